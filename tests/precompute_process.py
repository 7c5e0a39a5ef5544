"""``precompute`` in processes of its own, killed or stopped at a chosen event, or slowed down; started in milliseconds.

A fork server imports torch and the pipeline once and forks from there: each process is a real one, with a
real number to kill and nothing shared with the test but the files.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(
    [
        "tests.precompute_process",
        "teacher_cache.pipeline.precompute.run",
        "teacher_cache.pipeline.train.loop",
        "pandas",  # pyarrow imports it with its first table
        "zarr",
    ]
)


Event = tuple[str, str]
"""What happened, and to which object."""


class KillSwitch:
    """Call it with (kind, key) for each event; at event ``kill_at`` it sends its own process SIGKILL.

    At the first event of the kind of ``stop_at`` whose key begins with its key, it sends SIGSTOP.
    """

    def __init__(self, kill_at: int | None, stop_at: Event | None = None) -> None:
        self.events: list[Event] = []
        self._kill_at, self._stop_at = kill_at, stop_at
        self._lock = threading.Lock()

    def __call__(self, kind: str, key: str, ruin: Callable[[], None] | None = None) -> None:
        """Note an event.

        Args:
            ruin: called before the kill: what a kill in the middle of it leaves.
        """
        with self._lock:  # events come from several threads
            if len(self.events) == self._kill_at:
                if ruin is not None:
                    ruin()
                os.kill(os.getpid(), signal.SIGKILL)
            if self._stop_at is not None and kind == self._stop_at[0] and key.startswith(self._stop_at[1]):
                self._stop_at = None
                os.kill(os.getpid(), signal.SIGSTOP)
            self.events.append((kind, key))


def start(
    config: dict[str, Any],
    *,
    out: Path,
    kill_at: int | None = None,
    stop_at: Event | None = None,
    teacher_seconds: float = 0.0,
    environment: dict[str, str] | None = None,
    setup: Callable[[], None] | None = None,
) -> Any:
    """Begin ``precompute`` in another process.

    Args:
        config: of PrecomputeConfig.
        out: a file that gets {"result" or "error", "events", "hints"} as JSON when it ends by itself.
        kill_at: number of the event, from 0, at which it sends itself SIGKILL.
        stop_at: kind of the event, and begin of its key, at which it first sends itself SIGSTOP.
        teacher_seconds: added to each forward pass.
        setup: called first, in the new process.
    """
    moment = (kill_at, stop_at)
    process = FORK_SERVER.Process(target=_run, args=(config, out, moment, teacher_seconds, environment or {}, setup))
    process.start()
    return process


def finish(process: Any, out: Path, seconds: float = 120) -> dict[str, Any]:
    """Wait for the end of a process that is not to be killed; what it wrote to ``out``."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        pytest.fail(f"precompute did not end in {seconds} s")
    assert process.exitcode == 0, process.exitcode
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def _run(
    config: dict[str, Any],
    out: Path,
    moment: tuple[int | None, Event | None],
    teacher_seconds: float,
    environment: dict[str, str],
    setup: Callable[[], None] | None,
) -> None:
    os.environ.update(environment)
    if setup is not None:
        setup()
    happens, hints = KillSwitch(*moment), list[str]()
    watch(config["cache"], happens, teacher_seconds, passes_of(out))
    from teacher_cache.pipeline.precompute.run import precompute
    from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
    from teacher_cache.storage.observe.logs import hints_heard_by

    try:
        with hints_heard_by(hints.append):
            ended = {"result": precompute(PrecomputeConfig(**config)).model_dump(mode="json")}
    except BaseException as error:
        ended = {"error": f"{type(error).__name__}: {error}"}
    out.write_text(json.dumps({**ended, "events": happens.events, "hints": hints}))
    sys.stdout.flush()
    os._exit(0)  # no clean-up of what the fork server's process owns


def passes_of(out: Path) -> Path:
    """A file of one byte per forward pass that the process of this ``out`` has made, whatever became of it."""
    return out.with_suffix(".passes")


def watch(cache: str, happens: Callable[..., None], teacher_seconds: float, passes: Path) -> None:
    """Report the events of this process, slow its teacher down, and count its forward passes in a file."""
    from teacher_cache.pipeline.models.teacher import LiveTeacher
    from teacher_cache.pipeline.precompute import teacher_inputs
    from teacher_cache.storage.files.remote import RemoteFiles

    sync, decode, put, create = os.fsync, teacher_inputs.open_image, RemoteFiles.write, RemoteFiles.create
    root = Path(cache).resolve()

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        inside = path.is_relative_to(root)
        if inside and path.is_file():
            key = path.relative_to(root).parent.as_posix()
            # a kill within the write call leaves part of the bytes, one after it all of them, not yet synced
            happens("half", key, lambda: os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2))
            happens("written", key)
        sync(descriptor)
        if inside and path.is_dir():
            happens("renamed", path.relative_to(root).as_posix())

    def open_image(data: bytes, decoder: str) -> Any:
        happens("decode", "")
        return decode(data, decoder)

    def watched(tower: str, encode: Callable[..., Any]) -> Any:
        def call(self: LiveTeacher, batch: Any) -> Any:
            time.sleep(teacher_seconds)
            encoded = encode(self, batch)
            with passes.open("ab") as file:
                file.write(b".")
            happens("teacher", tower)
            return encoded

        return call

    def write(self: RemoteFiles, key: str, data: bytes) -> None:
        happens("before put", key)
        put(self, key, data)
        happens("after put", key)

    def create_object(self: RemoteFiles, key: str, data: bytes) -> bool:
        if key.startswith("claims/"):
            made = create(self, key, data)
            happens("after create", key)
            return made
        happens("before put", key)
        made = create(self, key, data)
        happens("after put", key)
        return made

    os.fsync, teacher_inputs.open_image = fsync, open_image
    LiveTeacher.encode_images = watched("image", LiveTeacher.encode_images)  # type: ignore[method-assign]
    LiveTeacher.encode_texts = watched("text", LiveTeacher.encode_texts)  # type: ignore[method-assign]
    RemoteFiles.write, RemoteFiles.create = write, create_object  # type: ignore[method-assign]
