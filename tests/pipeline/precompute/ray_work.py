"""Runs of precompute on a small Ray cluster of several nodes, all on this machine; a program of its own.

Ray starts threads and servers and warns as it likes, so it stays out of the tests' process: :func:`run` starts this
module's ``main`` and reads what it found. Actors count their forward passes and commits in files of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from teacher_cache.pipeline.models.teacher import LiveTeacher
from teacher_cache.pipeline.precompute.executors import Executor
from teacher_cache.pipeline.precompute.run import precompute, seal_and_summarize
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import cache_digest
from tests.object_store import ObjectStore
from tests.pipeline.precompute.conftest import make_config

REPOSITORY = Path(__file__).parents[3]
IMAGES, BATCH, CHUNK = 48, 2, 4
CHUNKS = IMAGES // CHUNK * 3  # two captions an image
PASSES = CHUNKS * CHUNK // BATCH
IN_FLIGHT = 3  # chunks of a worker that is killed: one with the teacher, two that are written or wait for it
POISON = "image/v0/000005"
_STORE_BYTES = 80_000_000
_SECONDS = 240  # a bound for a machine under load, not an expectation


def watched_actor(deadly: str = "") -> Any:
    """A class of actors that are slow and write down what they do: a line per forward pass and one per commit.

    Args:
        deadly: chunk of which an actor dies before it is written.
    """
    from teacher_cache.pipeline.precompute.ray_executor import EncodeActor, Outcome

    class WatchedActor(EncodeActor):
        def start(self, *args: Any) -> Outcome:
            outcome = super().start(*args)
            if outcome.error is None:
                watch(self._teacher, self._writer, deadly)
            return outcome

    return WatchedActor


def watch(teacher: LiveTeacher, writer: EmbeddingWriter, deadly: str) -> None:
    """Have a teacher wait and a writer die, and both write down what they do."""
    log = log_folder() / str(os.getpid())
    images, texts, write = teacher.encode_images, teacher.encode_texts, writer.write

    def noted(line: str) -> None:
        with log.open("a") as file:
            file.write(line + "\n")

    def watched(encode: Callable[..., Any]) -> Callable[..., Any]:
        def call(batch: Any) -> Any:
            time.sleep(0.05)
            if hold().exists():
                noted("held")
            until(lambda: not hold().exists())
            encoded = encode(batch)
            noted("pass")
            return encoded

        return call

    def watched_write(ref: ChunkRef, *others: Any) -> Any:
        if ref.name == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        made = write(ref, *others)
        noted(ref.name)
        return made

    log.touch()
    teacher.encode_images, teacher.encode_texts = watched(images), watched(texts)  # type: ignore[method-assign]
    writer.write = watched_write  # type: ignore[method-assign]


def log_folder() -> Path:
    """Where the actors of the present run write; named in a file, since actors keep the environment of their node."""
    return Path(Path(os.environ["RAY_WORK_LOG"]).read_text())


def hold() -> Path:
    """While this file is there, nobody's forward pass goes on."""
    return log_folder().with_suffix(".hold")


def logged() -> dict[int, list[str]]:
    """Lines by process."""
    return {int(path.name): path.read_text().splitlines() for path in log_folder().iterdir()}


def commits() -> list[str]:
    return [line for lines in logged().values() for line in lines if line not in ("pass", "held")]


def until(true: Callable[[], Any]) -> None:
    stop = time.monotonic() + _SECONDS
    while not true():
        assert time.monotonic() < stop, "it never came to that"
        time.sleep(0.01)


def config_of(spec: dict[str, Any], location: str, **settings: Any) -> PrecomputeConfig:
    small = {"batch_size": BATCH, "chunk_rows": CHUNK, "decode_threads": 1}
    return make_config(spec["photos"], spec["teacher"], location, **small, **settings)


def local(spec: dict[str, Any]) -> dict[str, Any]:
    """A run by this process alone; first, before anything imports ray."""
    location = f"{spec['folder']}/local"
    precompute(config_of(spec, location))
    return {"ray": "ray" in sys.modules, "digest": cache_digest(location)}


class Runs:
    """The runs, each on the cluster as the one before left it."""

    def __init__(self, spec: dict[str, Any], cluster: Any) -> None:
        self.spec, self.cluster = spec, cluster
        self.nodes = [self.add_node(), self.add_node()]

    def add_node(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=_STORE_BYTES)

    def config(self, location: str, **settings: Any) -> PrecomputeConfig:
        return config_of(self.spec, location, **settings)

    def plain(self) -> dict[str, Any]:
        """As the command does it, in a folder."""
        location = f"{self.spec['folder']}/plain"
        seen: list[tuple[str, int, int]] = []
        config = self.config(location, executor="ray", workers=1)
        before = signal.getsignal(signal.SIGTERM)
        result = precompute(config, lambda *stage: seen.append(stage))
        return {
            "encoded": result.chunks_encoded,
            "digest": cache_digest(location),
            "images": [done for stage, done, _ in seen if stage == "images"],
            "handler_kept": signal.getsignal(signal.SIGTERM) is before,
        }

    def killed(self) -> dict[str, Any]:
        """One of two actors is killed in the middle."""

        def kill() -> dict[str, Any]:
            until(lambda: len(commits()) >= CHUNKS // 4 and len(logged()) == 2)
            victim = max(logged(), key=lambda pid: len(logged()[pid]))
            os.kill(victim, signal.SIGKILL)
            return {"victim": victim}

        return self.watched("killed", watched_actor(), kill)

    def node_lost(self) -> dict[str, Any]:
        """One of two nodes is lost in the middle; another one joins a little later."""

        def lose() -> dict[str, Any]:
            until(lambda: len(commits()) >= CHUNKS // 4 and len(logged()) == 2)
            before = set(logged())
            hold().touch()  # or the other worker would have done all before the new node is up
            self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)
            self.nodes.append(self.add_node())
            # it has claimed something, so it will do something, however quick the other one is
            until(lambda: any("held" in lines for pid, lines in logged().items() if pid not in before))
            hold().unlink()
            return {"before": sorted(before)}

        return self.watched("node-lost", watched_actor(), lose)

    def poisoned(self) -> dict[str, Any]:
        """A chunk that ends every actor."""
        return self.watched("poisoned", watched_actor(POISON), dict, workers=1)

    def refused(self) -> dict[str, Any]:
        """An error that would come again, at the actors alone: a photograph that changed after planning."""

        def change() -> None:
            photo = Path(self.spec["photos"]) / "images" / "0007.jpg"
            photo.write_bytes(photo.read_bytes() + b"\0")

        return self.watched("refused", watched_actor(), dict, planned=change, workers=1)

    def watched(
        self,
        name: str,
        worker: Any,
        meanwhile: Callable[[], dict[str, Any]],
        planned: Callable[[], None] = lambda: None,
        workers: int | None = None,
    ) -> dict[str, Any]:
        """A run in the object store while something else happens; what either came to."""
        from teacher_cache.pipeline.precompute.ray_executor import RayExecutor

        log = Path(self.spec["folder"]) / f"{name}-{time.monotonic_ns()}"
        log.mkdir()
        Path(os.environ["RAY_WORK_LOG"]).write_text(str(log))
        config = self.config(f"{self.spec['root']}/{name}")
        found: dict[str, Any] = {}
        executor: Executor = RayExecutor(workers=workers, worker=worker)
        begun = threading.Event()

        def run() -> dict[str, Any]:
            with executor:
                pending = executor.plan(config)
                planned()
                begun.set()
                encoded = executor.encode(config, pending)
            return {"encoded": encoded, "chunks": seal_and_summarize(config.cache, encoded, 0.0).chunks}

        # as a task of Prefect's in a thread; Ray adds nodes in the main one only
        running = threading.Thread(target=lambda: found.update(_caught(run)))
        running.start()
        assert begun.wait(_SECONDS), found
        found.update(_caught(meanwhile))
        running.join()
        lines = logged()
        found["passes"] = sum(line == "pass" for each in lines.values() for line in each)
        found["commits"] = {
            str(pid): [line for line in each if line not in ("pass", "held")] for pid, each in lines.items()
        }
        return found


def _caught(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return call()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Do the runs that the JSON on stdin names; what each found goes to stdout."""
    out, sys.stdout = sys.stdout, sys.stderr
    spec = json.load(sys.stdin)
    found: dict[str, Any] = {"local": local(spec)}
    from ray._private import services
    from ray.cluster_utils import Cluster

    services.get_node = _patient(services.get_node)
    head = {"num_cpus": 0, "object_store_memory": _STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        runs = Runs(spec, cluster)
        for name in spec["runs"]:
            began = time.monotonic()
            found[name] = _caught(getattr(runs, name))
            sys.stderr.write(f"{name}: {time.monotonic() - began:.1f} s\n")
    finally:
        cluster.shutdown()
    out.write(json.dumps(found))
    out.flush()


def _patient(get_node: Callable[..., Any]) -> Callable[..., Any]:
    """Return a look for a node that waits: Ray itself gives a node that starts 30 seconds, whatever the load."""

    def call(*arguments: Any) -> Any:
        stop = time.monotonic() + _SECONDS
        while True:
            try:
                return get_node(*arguments)
            except RuntimeError:
                if time.monotonic() > stop:
                    raise
                time.sleep(0.5)

    return call


@contextlib.contextmanager
def _short_folder() -> Iterator[str]:
    # Ray's sockets lie in it, and the name of a socket has no more than 107 characters
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield folder


def run(photos: Path, teacher: Path, folder: Path, store: ObjectStore, runs: Sequence[str]) -> dict[str, Any]:
    """Do these runs in a process of its own; what each found, by name."""
    folder.mkdir()
    spec = {
        "photos": str(photos),
        "teacher": str(teacher),
        "folder": str(folder),
        "root": store.location("ray"),
        "runs": list(runs),
    }
    with _short_folder() as temporary:
        environment = {
            **os.environ,
            **store.environment,
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",  # as Ray's actors with one core: another number sums in another order
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": temporary,
            "RAY_WORK_LOG": str(folder / "log"),
        }
        ended = subprocess.run(
            [sys.executable, "-c", "from tests.pipeline.precompute.ray_work import main; main()"],
            input=json.dumps(spec),
            env=environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=4 * _SECONDS,
        )
    assert ended.returncode == 0, ended.stderr[-4000:]
    found: dict[str, Any] = json.loads(ended.stdout)
    found["stderr"] = ended.stderr
    return found
