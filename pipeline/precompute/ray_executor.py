"""Encoding on a Ray cluster: an actor per GPU, or per CPU without GPUs, each with its own teacher. Imports ray.

Actors are processes that share a cache by claims, like several ``precompute`` started by hand. The driver starts and
replaces them but moves no rows: actors read the dataset and write the cache themselves. So every node must reach the
dataset, the cache and the teacher. Nodes that join later get actors too, for example from Ray's autoscaler. Other
actors take over the chunks of a lost actor or node. If the driver is lost, its actors end too, and the next run
continues.

Every node needs the driver's version of this package and its own credentials, from the standard chain: a role, files,
or the environment of ``ray start``. The driver sends none: all users of a cluster can see a job's environment.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError

from teacher_cache.pipeline.data.cores import processes_of
from teacher_cache.pipeline.data.service.worker import portable
from teacher_cache.pipeline.models.teacher import LiveTeacher, load_teacher
from teacher_cache.pipeline.precompute.encode import RowTally, encode_claimed
from teacher_cache.pipeline.precompute.plan import Progress, ReadDataset, plan_precompute
from teacher_cache.pipeline.precompute.reuse import known_rows
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.processes import ProcessName, this_process
from teacher_cache.storage.files.transient import is_transient
from teacher_cache.storage.format.commits import ChunkRef, stretches_of
from teacher_cache.storage.observe.telemetry import METRICS_HOST, METRICS_PORT, observed
from teacher_cache.storage.write.claims import claimed_by
from teacher_cache.storage.write.writer import EmbeddingWriter

_WAIT_SECONDS = 1.0
_LOOK_SECONDS = 5.0  # between polls of the cluster for room and of the cache for commits
_PATIENCE_SECONDS = 600.0  # without a live actor: an autoscaler may need minutes for a GPU machine
_STARTS_LOST = 3  # consecutive failed starts without a live actor
_TRIES = 3  # actors that a chunk may kill; transient errors of an actor without a commit between them
_NO_METRICS: Mapping[str, str] = {}
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Outcome:
    """Result of a call to an actor. Errors are values: nothing is raised across processes.

    Attributes:
        encoded: chunks that this actor encoded.
        error: error that stopped it, or None.
        transient: whether a retry, here or elsewhere, may succeed.
    """

    encoded: frozenset[ChunkRef] = frozenset()
    error: Exception | None = None
    transient: bool = False


class EncodeActor:
    """Actor with one teacher on one device. For one call at a time."""

    def start(
        self, config: PrecomputeConfig, folder: str, number: int = 0, metrics: Mapping[str, str] = _NO_METRICS
    ) -> Outcome:
        """Load the teacher, open the planned cache and check that they match.

        Args:
            folder: working directory of the driver. Relative paths start there, on machines that have it.
            number: number of the actor in its run. It is added to the port of metrics.
            metrics: the driver's environment variables of metrics.
        """
        self._number = number
        os.environ.update(metrics)

        def begin() -> set[ChunkRef]:
            with contextlib.suppress(OSError):
                os.chdir(folder)
            self._config = config
            self._teacher: LiveTeacher = load_teacher(
                config.teacher, config.pretrained, config.device, config.precision, config.decoder
            )
            self._writer = EmbeddingWriter(config.cache)
            self._teacher.require(self._writer.manifest.identity, config.cache)
            self._known = known_rows(config.reuse, self._writer)
            return set()

        return _outcome(begin)

    def encode(self, refs: Sequence[ChunkRef]) -> Outcome:
        """Encode these chunks together with the other actors. If it returns no error, every chunk is committed."""

        def work() -> set[ChunkRef]:
            with observed(self._number, cache=self._config.cache):
                return encode_claimed(self._config, self._teacher, refs, None, self._known, self._writer)

        return _outcome(work)


def _outcome(call: Callable[[], set[ChunkRef]]) -> Outcome:
    try:
        return Outcome(frozenset(call()))
    except torch.AcceleratorError:
        # nothing can be done on that GPU in this process; a lost actor's chunks go to others
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    except Exception as error:
        return Outcome(error=portable(error, f"(a worker on {socket.gethostname()})"), transient=is_transient(error))


@dataclass(frozen=True)
class _Slot:
    """Resources that Ray reserves for one actor."""

    cpus: int
    gpus: int

    @classmethod
    def of(cls, config: PrecomputeConfig, nodes: list[dict[str, float]]) -> _Slot:
        """Return a GPU and its share of the node's cores, or without GPUs ``decode_threads`` cores (default: one).

        Raises:
            UsageError: a numbered device, since Ray chooses the device.
        """
        with_gpu = [node for node in nodes if node.get("GPU", 0) >= 1]
        if config.device == "cpu" or (config.device == "auto" and not with_gpu):
            return cls(config.decode_threads or 1, 0)
        if config.device not in ("auto", "cuda"):
            raise UsageError(f"device {config.device!r}: Ray chooses the GPU of each worker; use auto, cuda or cpu")
        share = min((int(node.get("CPU", 0) // node["GPU"]) for node in with_gpu), default=1)
        return cls(config.decode_threads or max(1, share), 1)

    def room(self, node: dict[str, float]) -> int:
        """Return the number of actors that fit on an idle node."""
        places = int(node.get("CPU", 0) // self.cpus)
        return min(places, int(node.get("GPU", 0) // self.gpus)) if self.gpus else places

    def __str__(self) -> str:
        return f"{self.gpus} GPU and {self.cpus} CPU"


@dataclass
class _Member:
    """Actor, with its node and process once it has begun."""

    actor: Any
    refs: list[ChunkRef]
    node: str | None = None
    process: ProcessName | None = None
    errors: int = 0
    left_at_error: int = 0


@dataclass(frozen=True)
class _Lost:
    """Loss of an actor that was encoding.

    Attributes:
        why: None if its node was lost too, which does not implicate its chunks.
    """

    process: ProcessName
    why: ChildProcessError | None


class RayExecutor:
    """See :class:`teacher_cache.pipeline.precompute.executors.Executor`.

    Args:
        address: address of the cluster, ``ray://HOST:PORT``. Default: the cluster of RAY_ADDRESS or of this machine,
            else a temporary one on this machine.
        workers: maximum number of actors, requested even without room for them. Default: as many as there is room for.
        worker: class of the actors.
    """

    def __init__(
        self, address: str | None = None, workers: int | None = None, worker: type[EncodeActor] = EncodeActor
    ) -> None:
        self._address, self._workers, self._worker = address, workers, worker
        self._connected = False

    def __enter__(self) -> Self:
        """Connect, unless this process is connected already.

        Raises:
            UsageError: no cluster answers at the address.
        """
        if ray.is_initialized():
            return self
        in_main_thread = threading.current_thread() is threading.main_thread()
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            # actors' output goes to Ray's logs: stdout is for results
            ray.init(address=self._address, log_to_driver=False, logging_level=logging.WARNING, include_dashboard=False)
        except Exception as error:  # a node that does not start in time raises a plain Exception
            where = f"at {self._address}" if self._address else "by RAY_ADDRESS or on this machine"
            reason = str(error).partition("\n")[0]
            raise UsageError(
                f"no Ray cluster {where} ({reason}). Start one with ray start --head, or use --executor local"
            ) from error
        finally:
            if in_main_thread:
                signal.signal(signal.SIGTERM, on_sigterm)  # ray.init installs its own handler
        self._connected = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connected:
            self._connected = False
            ray.shutdown()

    def plan(
        self, config: PrecomputeConfig, progress: Progress | None = None, read: ReadDataset | None = None
    ) -> list[ChunkRef]:
        """Plan the cache in this process, which needs no GPU."""
        device = "cuda" if self._slot(config).gpus else "cpu"
        teacher = load_teacher(config.teacher, config.pretrained, "cpu", config.precision, config.decoder)
        return plan_precompute(config, teacher, progress, device, read)

    def encode(self, config: PrecomputeConfig, refs: Sequence[ChunkRef], progress: Progress | None = None) -> int:
        """Encode chunks of a planned cache with actors. Chunks that a lost actor committed are counted too.

        Raises:
            ChildProcessError: a chunk killed three actors in a row, actors are lost before they begin, or none found
                room for ten minutes.
            Exception: an actor's error that a retry cannot cure, or that came three times.
        """
        slot = self._slot(config)
        device = "cuda" if slot.gpus else "cpu"
        processes = config.decode_processes
        if processes is None:  # an actor sees one GPU, and cannot tell how many share its node's cores
            processes = processes_of(slot.cpus) if slot.gpus else 0
        decoding = {"decode_threads": config.decode_threads or slot.cpus, "decode_processes": processes}
        per_actor = config.model_copy(update={"device": device, **decoding})
        chunks = _Chunks(config.cache, refs, progress)
        crew = _Crew(self._worker, slot, per_actor, self._workers, refs)
        with chunks.tally, contextlib.ExitStack() as leaving:
            leaving.callback(crew.dismiss)
            while not chunks.all_done or crew.encoding:
                if not chunks.all_done:
                    crew.grow(chunks.stretches_left)
                for member, result in crew.results():
                    if isinstance(result, _Lost):
                        chunks.lose(result)
                    elif chunks.take(member, result):
                        crew.encode(member)
                chunks.look()
            return chunks.encoded

    def _slot(self, config: PrecomputeConfig) -> _Slot:
        return _Slot.of(config, list(_nodes().values()))


class _Chunks:
    """Chunks of one run, seen by the driver: which are committed, and which killed an actor."""

    def __init__(self, cache: str, refs: Sequence[ChunkRef], progress: Progress | None) -> None:
        self._writer = EmbeddingWriter(cache)
        self._refs = refs
        self.tally = RowTally(self._writer.manifest.layout, refs, progress)
        self.all_done = not refs
        self._left = set(refs)
        self._damaged = self._writer.committed(refs)  # these have records already, which do not mean done
        self._reported: set[ChunkRef] = set()
        self._all_reported = True
        self._deaths: Counter[ChunkRef] = Counter()
        self._looked = time.monotonic()

    @property
    def stretches_left(self) -> int:
        """Number of stretches without a commit, each one claim."""
        return len(stretches_of(self._left))

    @property
    def encoded(self) -> int:
        """Number of chunks that the actors encoded, including unreported ones of lost actors."""
        return len(self._reported if self._all_reported else self._refs)

    def take(self, member: _Member, outcome: Outcome) -> bool:
        """Count an actor's chunks, and return whether it should retry.

        Raises:
            Exception: the actor's error, if a retry cannot cure it or it came three times without a commit.
        """
        self._reported |= outcome.encoded
        if outcome.error is None:
            self.all_done = True
            self._count(self._left)
            return False
        if len(self._left) < member.left_at_error:
            member.errors = 0
        member.errors, member.left_at_error = member.errors + 1, len(self._left)
        if not outcome.transient or member.errors >= _TRIES:
            raise outcome.error
        self._all_reported = False
        return not self.all_done

    def lose(self, lost: _Lost) -> None:
        """Count the loss of an actor against the chunks that it had claimed and not committed.

        Raises:
            ChildProcessError: one of them has killed three actors.
        """
        self._all_reported = False
        if lost.why is None:
            return
        uncommitted = [ref for ref in self._refs if ref in self._left]
        done = self._writer.committed(uncommitted) - self._damaged
        claimed = claimed_by(self._writer.files, lost.process, [ref for ref in uncommitted if ref not in done])
        self._deaths.update(claimed)
        for ref in claimed:
            if self._deaths[ref] >= _TRIES:
                raise ChildProcessError(
                    f"chunk {ref.name} ended {_TRIES} workers one after another, so it is not tried again; {lost.why}"
                ) from lost.why

    def look(self) -> None:
        """Count the chunks committed since the last poll. Polls only every few seconds."""
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            began = time.monotonic()
            self._count(self._writer.committed(list(self._left)) - self._damaged)
            # poll a large cache less often
            self._looked = time.monotonic() + 20 * (time.monotonic() - began)

    def _count(self, refs: set[ChunkRef]) -> None:
        self.tally.add(sorted(refs))
        self._left = self._left - refs


class _Crew:
    """Actors of one run."""

    def __init__(
        self,
        worker: type[EncodeActor],
        slot: _Slot,
        config: PrecomputeConfig,
        workers: int | None,
        refs: Sequence[ChunkRef],
    ) -> None:
        class OnRay(worker):  # type: ignore[valid-type,misc]
            def begin(self, *args: Any) -> tuple[str, ProcessName, Outcome]:
                return ray.get_runtime_context().get_node_id(), this_process(), self.start(*args)

        options = {"num_cpus": slot.cpus, "num_gpus": slot.gpus, "max_restarts": 0, "max_task_retries": 0}
        # Ray must not restart actors: the driver counts their deaths
        self._actor = ray.remote(OnRay).options(**options, scheduling_strategy="SPREAD")
        self._slot, self._config, self._workers, self._refs = slot, config, workers, list(refs)
        self._busy: dict[Any, _Member] = {}
        self._started = 0
        self._wanted = 0
        self._looked = -float("inf")
        self._alive_at = time.monotonic()
        self._starts_lost = 0

    @property
    def encoding(self) -> int:
        """Number of actors that have begun."""
        return sum(member.node is not None for member in self._busy.values())

    def grow(self, stretches: int) -> None:
        """Start actors up to the maximum, but at most one per remaining stretch of rows.

        Raises:
            ChildProcessError: no actor has been alive for long, and none finds room.
        """
        now = time.monotonic()
        if now - self._looked > _LOOK_SECONDS:
            self._looked = now
            room = sum(self._slot.room(node) for node in _nodes().values())
            self._wanted = self._workers or room
        for _ in range(min(self._wanted, stretches) - len(self._busy)):
            self._start()
        if self.encoding:
            self._alive_at = now
        elif now - self._alive_at > _PATIENCE_SECONDS:
            nodes = list(_nodes().values())
            gpus, cpus = (sum(node.get(name, 0) for node in nodes) for name in ("GPU", "CPU"))
            raise ChildProcessError(
                f"no worker was given a place on the Ray cluster for {_PATIENCE_SECONDS:g} s: {self._slot} are needed "
                f"on one node, {len(nodes)} nodes have {gpus:g} GPU and {cpus:g} CPU in all. Add nodes, or free "
                "some, and run the same command again"
            )

    def _start(self) -> None:
        # actors start at different chunks, so that they meet claimed ones only towards the end
        first = int(len(self._refs) * (self._started * _GOLDEN % 1))
        self._started += 1
        member = _Member(self._actor.remote(), self._refs[first:] + self._refs[:first])
        metrics = {name: os.environ[name] for name in (METRICS_PORT, METRICS_HOST) if name in os.environ}
        self._busy[member.actor.begin.remote(self._config, str(Path.cwd()), self._started, metrics)] = member

    def encode(self, member: _Member) -> None:
        """Let an actor encode the pending chunks."""
        self._busy[member.actor.encode.remote(member.refs)] = member

    def results(self) -> Iterator[tuple[_Member, Outcome | _Lost]]:
        """Wait at most a second, and yield the actors that ended, each with its outcome or loss.

        Raises:
            Exception: the error that kept several actors in a row from beginning.
        """
        if not self._busy:
            time.sleep(_WAIT_SECONDS)
            return
        ready, _ = ray.wait(list(self._busy), num_returns=1, timeout=_WAIT_SECONDS)
        if ready:  # take all that are ready: with a thousand actors one at a time would be slow
            ready, _ = ray.wait(list(self._busy), num_returns=len(self._busy), timeout=0)
        for call in ready:
            member = self._busy.pop(call)
            try:
                result = ray.get(call)
            except RayTaskError:
                raise  # not an error of encoding: those are Outcomes
            except RayError as error:
                if lost := self._lost(member, error):
                    yield member, lost
                continue
            if isinstance(result, Outcome):
                yield member, result
            else:
                self._begun(member, *result)

    def _begun(self, member: _Member, node: str, process: ProcessName, outcome: Outcome) -> None:
        if outcome.error is not None:
            if not outcome.transient:
                raise outcome.error
            self._give_up(member, outcome.error)
            return
        member.node, member.process = node, process
        self._starts_lost = 0
        self.encode(member)

    def dismiss(self) -> None:
        """End all actors."""
        for member in self._busy.values():
            ray.kill(member.actor)

    def _lost(self, member: _Member, error: RayError) -> _Lost | None:
        why = ChildProcessError(f"the last one on Ray node {member.node}: {_first_line(error)}")
        if member.process is None:
            self._give_up(member, why)
            return None
        ray.kill(member.actor)  # it may only be unreachable, and would run beside its replacement
        self._looked = -float("inf")
        node_lost = member.node not in _nodes() or (isinstance(error, RayActorError) and error.preempted)
        return _Lost(member.process, None if node_lost else why)

    def _give_up(self, member: _Member, why: Exception) -> None:
        """End an actor that could not begin.

        Raises:
            Exception: ``why``, if several starts failed in a row and no other actor works.
        """
        ray.kill(member.actor)
        self._starts_lost += 1
        if self._starts_lost >= _STARTS_LOST and not self.encoding:
            raise why


def _nodes() -> dict[str, dict[str, float]]:
    """Return the resources of each node that is alive, by its id."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}


def _first_line(error: RayError) -> str:
    """Return the line of Ray's message that names the cause, seldom the first one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if line.startswith(("The actor is dead because", "Worker exit"))]
    return (causes or lines or [type(error).__name__])[0][:300]
