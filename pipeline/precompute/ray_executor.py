"""Encode on a Ray cluster: an actor per GPU, or per CPU where there is none, each with its teacher. Imports ray.

The driver hands out spans of chunks (``teacher_cache.pipeline.precompute.handout``) as actors become free, and moves
no rows: actors read the dataset and write the cache themselves, so both have to be reachable from every node, as has
the teacher. Nodes that join get actors, also where Ray's autoscaler adds them for ``workers`` that have no place yet;
the chunks of an actor or node that is lost go to others. Should the driver be lost, its actors end with it and the
next run goes on.

Nodes need this package in the driver's version. Credentials are the nodes' own, by the standard chain: a role, files,
or the environment that ``ray start`` was given. None are sent: all users of a cluster see a job's environment.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.pipeline.precompute.encode_worker import EncodeWorker, Outcome
from teacher_cache.pipeline.precompute.handout import Handout
from teacher_cache.pipeline.precompute.plan import Progress, plan_precompute
from teacher_cache.pipeline.precompute.row_tally import RowTally
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.write.writer import EmbeddingWriter

__all__ = ["RayExecutor"]

_WAIT_SECONDS = 1.0
_LOOK_SECONDS = 5.0  # how often the cluster is asked for room: nodes join and leave
_PATIENCE_SECONDS = 600.0  # without any actor alive: an autoscaler may need minutes for a machine with a GPU
_STARTS_LOST = 3  # in a row, with no actor alive


@dataclass(frozen=True)
class _Slot:
    """What Ray sets aside for one actor."""

    cpus: int
    gpus: int

    @classmethod
    def of(cls, config: PrecomputeConfig, nodes: list[dict[str, float]]) -> _Slot:
        """A GPU and its share of the node's cores, or ``decode_threads`` cores, one if that is left out.

        Raises:
            UsageError: a numbered device: Ray chooses which one.
        """
        with_gpu = [node for node in nodes if node.get("GPU", 0) >= 1]
        if config.device == "cpu" or (config.device == "auto" and not with_gpu):
            return cls(config.decode_threads or 1, 0)
        if config.device not in ("auto", "cuda"):
            raise UsageError(f"device {config.device!r}: Ray chooses the GPU of each worker; use auto, cuda or cpu")
        share = min((int(node.get("CPU", 0) // node["GPU"]) for node in with_gpu), default=1)
        return cls(config.decode_threads or max(1, share), 1)

    def room(self, node: dict[str, float]) -> int:
        """How many fit on a node that has nothing else to do."""
        places = int(node.get("CPU", 0) // self.cpus)
        return min(places, int(node.get("GPU", 0) // self.gpus)) if self.gpus else places

    def __str__(self) -> str:
        return f"{self.gpus} GPU and {self.cpus} CPU"


@dataclass
class _Member:
    actor: Any
    node: str | None = None
    span: Sequence[ChunkRef] = ()


class RayExecutor:
    """See :class:`teacher_cache.pipeline.precompute.executors.Executor`.

    Args:
        address: of the cluster, ``ray://HOST:PORT``; None for the one that RAY_ADDRESS names or this machine is part
            of, or else one of this machine alone, for the time of the run.
        workers: most actors at a time; they are asked for even while there is no room. As many as there is room for if
            None.
        worker: the class of the actors.
    """

    def __init__(
        self, address: str | None = None, workers: int | None = None, worker: type[EncodeWorker] = EncodeWorker
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
        here = threading.current_thread() is threading.main_thread()
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            # the actors' output stays in Ray's logs: stdout is for results
            ray.init(address=self._address, log_to_driver=False, logging_level=logging.WARNING, include_dashboard=False)
        except (OSError, RuntimeError, ValueError) as error:
            where = f"at {self._address}" if self._address else "by RAY_ADDRESS or on this machine"
            raise UsageError(
                f"no Ray cluster {where} ({error}). Start one with ray start --head, or use --executor local"
            ) from error
        finally:
            if here:
                signal.signal(signal.SIGTERM, on_sigterm)  # ray.init puts its own in place
        self._connected = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connected:
            self._connected = False
            ray.shutdown()

    def plan(self, config: PrecomputeConfig, progress: Progress | None = None) -> list[ChunkRef]:
        """See :class:`teacher_cache.pipeline.precompute.executors.Executor`. Planned by this process, which needs no
        GPU."""
        device = "cuda" if self._slot(config).gpus else "cpu"
        teacher = load_teacher(config.teacher, config.pretrained, "cpu", config.precision, config.decoder)
        return plan_precompute(config, teacher, progress, encode_on=device)

    def encode(self, config: PrecomputeConfig, refs: Sequence[ChunkRef], progress: Progress | None = None) -> int:
        """See :class:`teacher_cache.pipeline.precompute.executors.Executor`. Chunks that a lost actor had committed
        count as its own.

        Raises:
            ChildProcessError: a chunk ended three actors one after another, actors are lost before they can begin, or
                none was given a place for ten minutes.
            Exception: of an actor, when it would come again, or has come three times.
        """
        slot = self._slot(config)
        given = config.model_copy(
            update={"device": "cuda" if slot.gpus else "cpu", "decode_threads": config.decode_threads or slot.cpus}
        )
        writer = EmbeddingWriter(config.cache)
        tally = RowTally(writer.manifest.layout, refs, progress)
        handout = Handout(refs)
        encoded = 0
        crew = _Crew(self._worker, slot, given, self._workers)
        with tally, contextlib.ExitStack() as leaving:
            leaving.callback(crew.dismiss)
            while handout.left:
                crew.grow(handout.waiting)
                for member, outcome in crew.finished():
                    span, member.span = member.span, ()
                    if isinstance(outcome, Outcome):
                        encoded += outcome.encoded
                        if outcome.error is None:
                            handout.done(span)
                            tally.add(span)
                        elif outcome.transient:
                            handout.give_back(span, outcome.error)
                        else:
                            raise outcome.error
                    elif span:
                        there = [ref for ref in span if writer.is_sound(ref)]
                        encoded += len(there)
                        tally.add(there)
                        handout.done(there)
                        handout.give_back([ref for ref in span if ref not in there], outcome)
                for member in crew.idle():
                    crew.give(member, handout.take(crew.size))
        return encoded

    def _slot(self, config: PrecomputeConfig) -> _Slot:
        return _Slot.of(config, list(_nodes().values()))


class _Crew:
    """The actors of one run."""

    def __init__(self, worker: type[EncodeWorker], slot: _Slot, config: PrecomputeConfig, workers: int | None) -> None:
        class OnRay(worker):  # type: ignore[valid-type,misc]
            def begin(self, config: PrecomputeConfig, folder: str) -> tuple[str, Outcome]:
                return ray.get_runtime_context().get_node_id(), self.start(config, folder)

        options = {"num_cpus": slot.cpus, "num_gpus": slot.gpus, "max_restarts": 0, "max_task_retries": 0}
        # not restarted by Ray: an actor that a chunk ended would get the same chunk and end again
        self._actor = ray.remote(OnRay).options(**options, scheduling_strategy="SPREAD")
        self._slot, self._config, self._workers = slot, config, workers
        self._busy: dict[Any, _Member] = {}
        self._idle: list[_Member] = []
        self._wanted = 0
        self._looked = -float("inf")
        self._alive_at = time.monotonic()
        self._starts_lost = 0

    @property
    def size(self) -> int:
        """Actors that have begun."""
        return len(self._idle) + sum(member.node is not None for member in self._busy.values())

    def grow(self, chunks: int) -> None:
        """Ask for actors, as many as there may be and as there are chunks waiting for one.

        Raises:
            ChildProcessError: none has been alive for long, and none has a place.
        """
        now = time.monotonic()
        if now - self._looked > _LOOK_SECONDS:
            self._looked = now
            room = sum(self._slot.room(node) for node in _nodes().values())
            self._wanted = self._workers or room
        starting = len(self._busy) + len(self._idle) - self.size
        for _ in range(min(self._wanted - self.size, chunks) - starting):
            member = _Member(self._actor.remote())
            self._busy[member.actor.begin.remote(self._config, str(Path.cwd()))] = member
        if self.size:
            self._alive_at = now
        elif now - self._alive_at > _PATIENCE_SECONDS:
            have = list(_nodes().values())
            gpus, cpus = (sum(node.get(name, 0) for node in have) for name in ("GPU", "CPU"))
            raise ChildProcessError(
                f"no worker was given a place on the Ray cluster for {_PATIENCE_SECONDS:g} s: {self._slot} are wanted "
                f"on one node, {len(have)} nodes have {gpus:g} GPU and {cpus:g} CPU in all. Add nodes, or free "
                "some, and run the same command again"
            )

    def finished(self) -> Iterator[tuple[_Member, Outcome | ChildProcessError | None]]:
        """Actors whose call has ended, with its outcome. Of one that was lost, why; None if its node was lost with it.

        Raises:
            Exception: what kept one after another from beginning.
        """
        if not self._busy:
            time.sleep(_WAIT_SECONDS)
            return
        ready, _ = ray.wait(list(self._busy), num_returns=1, timeout=_WAIT_SECONDS)
        if ready:  # and all others that are: with a thousand actors one at a time would be slow
            ready, _ = ray.wait(list(self._busy), num_returns=len(self._busy), timeout=0)
        for call in ready:
            member = self._busy.pop(call)
            try:
                came = ray.get(call)
            except RayTaskError:
                raise  # not of the work: that comes back as an Outcome
            except RayError as error:
                yield member, self._lost(member, error)
                continue
            if isinstance(came, Outcome):
                outcome = came
            else:
                node, outcome = came
                if outcome.error is not None and outcome.transient:
                    self._give_up(member, outcome.error)
                    continue
                member.node = node
                self._starts_lost = 0
            self._idle.append(member)
            yield member, outcome

    def idle(self) -> list[_Member]:
        """Actors that have nothing to do."""
        return list(self._idle)

    def give(self, member: _Member, span: Sequence[ChunkRef]) -> None:
        """Let an actor encode these."""
        if span:
            self._idle.remove(member)
            member.span = span
            self._busy[member.actor.encode.remote(list(span))] = member

    def dismiss(self) -> None:
        """End all of them."""
        for member in [*self._busy.values(), *self._idle]:
            ray.kill(member.actor)

    def _lost(self, member: _Member, error: RayError) -> ChildProcessError | None:
        why = ChildProcessError(f"the last one on Ray node {member.node}: {_first_line(error)}")
        if member.node is None:
            self._give_up(member, why)
            return None
        ray.kill(member.actor)  # where it only cannot be reached, it would go on beside the one that takes its place
        self._looked = -float("inf")
        gone = member.node not in _nodes() or (isinstance(error, RayActorError) and error.preempted)
        return None if gone else why

    def _give_up(self, member: _Member, why: Exception) -> None:
        """Of an actor that could not begin.

        Raises:
            Exception: ``why``, when this came several times in a row and no other actor works.
        """
        ray.kill(member.actor)
        self._starts_lost += 1
        if self._starts_lost >= _STARTS_LOST and not self.size:
            raise why


def _nodes() -> dict[str, dict[str, float]]:
    """What each node that is alive has, by its id."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}


def _first_line(error: RayError) -> str:
    """The line of Ray's message that says what happened; the first one and the ids say little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(("The actor is dead because", "Worker exit"))]
    return (said or lines or [type(error).__name__])[0][:300]
