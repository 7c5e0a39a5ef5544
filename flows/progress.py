"""Progress of a stage: lines in the log of its task run, and a progress artifact that moves with it.

The work never waits for the server: Prefect's client waits minutes for a server that accepts requests but does not
answer. A thread sends the moves, and only the newest one.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, cast
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from pydantic import BaseModel, Field

from teacher_cache.flows.markdown import code
from teacher_cache.flows.parameters import in_parameters
from teacher_cache.storage.observe.logs import hints_heard_by

_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BETWEEN_MOVES = 2.0  # each is a request to the server, which all runs share
_SECONDS_AFTER_A_FAILURE, _MOST_SECONDS_AFTER = 60.0, 960.0  # doubled with each failure in a row
_SECONDS_FOR_THE_LAST = 5.0


class _Logger(Protocol):
    def info(self, msg: str, /) -> None: ...
    def warning(self, msg: str, /) -> None: ...


class Share(BaseModel, frozen=True):
    """The part of a progress artifact that one stage moves. Plain values: task parameters are sent to the server."""

    artifact: UUID
    what: str = Field(description="Cache or run, shown before the stage.")
    first: float = Field(0.0, description="Percent at which the stage begins.")
    last: float = Field(100.0, description="Percent at which the stage ends.")

    def move(self, done: float, total: float, note: str) -> None:
        """Move the artifact. If the server does not answer, the error of Prefect's client comes after minutes."""
        percent = self.first + (self.last - self.first) * (done / total if total else 1.0)
        _update(self.artifact, percent, f"`{self.what}`: {note}")

    def fail(self, error: Exception) -> None:
        """Show an error beside the artifact, which stays where it is. See :meth:`move` for the server."""
        _update(self.artifact, None, f"`{self.what}`: failed, {type(error).__name__}: {error}")

    def part(self, first: float, last: float) -> Share:
        """Return the share of a stage within this one, between two fractions of it."""
        width = self.last - self.first
        return self.model_copy(update={"first": self.first + width * first, "last": self.first + width * last})


@contextlib.contextmanager
def progress_artifact(key: str, what: str) -> Iterator[Share]:
    """Create a progress artifact of the calling flow run, at 0 %. It shows the error that ends the block, if any."""
    # the call returns a coroutine only to an async caller
    artifact = cast(UUID, create_progress_artifact(0.0, key=f"{key}-progress", description=code(what)))
    share = Share(artifact=artifact, what=what)
    try:
        yield share
    except Exception as error:
        in_parameters(key, error)
        LoggedProgress(get_run_logger(), share).fail(error)
        raise


@contextlib.contextmanager
def hints_logged() -> Iterator[list[str]]:
    """Yield a list that gets each hint of the block once. The run logs it as a warning."""
    hints: list[str] = []

    def log(line: str) -> None:
        if line not in hints:
            hints.append(line)
            get_run_logger().warning(line)

    with hints_heard_by(log):
        yield hints


def _update(artifact: UUID, percent: float | None, description: str) -> None:
    update = ArtifactUpdate(description=description)
    if percent is not None:
        update.data = percent
    # settings, even empty, give a new client: the shared one belongs to the engine's thread and closes with the run
    with get_client(httpx_settings={}, sync_client=True) as client:
        client.update_artifact(artifact, update)


@dataclass(frozen=True)
class _Move:
    send: Callable[[], None]
    failed: Callable[[Exception], None]
    last: bool  # of its stage: sent even after a failure, since no newer one follows


class _Mover:
    """Sender of the newest move of each artifact, one at a time, in a thread that lives while moves wait.

    One per process, so that a late move of one stage cannot overtake the first of the next.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[UUID, _Move] = {}
        self._thread: threading.Thread | None = None
        self._failures = 0
        self.rests_until = float("-inf")

    def put(self, artifact: UUID, move: _Move) -> None:
        """Queue a move; it replaces a waiting one of the same artifact. Returns at once."""
        with self._changed:
            self._waiting[artifact] = move
            if self._thread is None:
                # a daemon: a process that is done does not wait for a server
                self._thread = threading.Thread(target=self._send, name="progress-artifact", daemon=True)
                self._thread.start()

    def settled(self, seconds: float) -> bool:
        """Wait until all moves are sent or failed. Return False after ``seconds``."""
        with self._changed:
            return self._changed.wait_for(lambda: self._thread is None, seconds)

    def _send(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._thread = None
                    self._changed.notify_all()
                    return
                move = self._waiting.pop(next(iter(self._waiting)))
            try:
                move.send()
            except Exception as error:
                self._rest()
                move.failed(error)
            else:
                self._failures, self.rests_until = 0, float("-inf")

    def _rest(self) -> None:
        seconds = min(_SECONDS_AFTER_A_FAILURE * 2**self._failures, _MOST_SECONDS_AFTER)
        with self._changed:
            self._failures += 1
            self.rests_until = time.monotonic() + seconds
            self._waiting = {artifact: move for artifact, move in self._waiting.items() if move.last}


_mover = _Mover()


class LoggedProgress:
    """Progress callback of a stage: (stage, done, total). It never waits for the server.

    It writes a line every 30 seconds and moves the artifact every 2. If a move fails, the log says so once, and the
    next try comes after one minute, two minutes and so on.

    Args:
        share: share of the artifact to move; None for lines only.
        sizes: sizes of stages by name, if the share is of several.
    """

    def __init__(self, logger: _Logger, share: Share | None = None, sizes: Mapping[str, float] | None = None) -> None:
        self._logger = logger
        self._share = share
        self._sizes = sizes
        self._done: dict[str, float] = {}
        self._last_line = self._next_move = time.monotonic()
        self._failed = False

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Report the progress of a stage.

        Args:
            note: text after the numbers, for example a loss.
        """
        now = time.monotonic()
        self._done[stage] = done / total if total else 1.0
        text = f"{stage}: {done:,} of {total:,} {note}".rstrip()
        if now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._logger.info(text)
        if self._share is not None and now >= max(self._next_move, _mover.rests_until):
            self._next_move = now + _SECONDS_BETWEEN_MOVES
            share = self._share
            sizes = self._sizes or {stage: 1.0}
            moved = sum(size * self._done.get(name, 0.0) for name, size in sizes.items())
            self._put(share, lambda: share.move(moved, sum(sizes.values()), text))

    def end(self, note: str) -> None:
        """Move the artifact to the end of the stage. Waits a few seconds at most."""
        if share := self._share:
            self._last(share, lambda: share.move(1, 1, note))

    def fail(self, error: Exception) -> None:
        """Show the error that ends the stage beside the artifact. Waits a few seconds at most."""
        if share := self._share:
            self._last(share, lambda: share.fail(error))

    def _last(self, share: Share, send: Callable[[], None]) -> None:
        self._put(share, send, last=True)
        if not _mover.settled(_SECONDS_FOR_THE_LAST):
            self._cannot("the server does not answer")

    def _put(self, share: Share, send: Callable[[], None], last: bool = False) -> None:
        # Prefect's events name the run of the context
        context = contextvars.copy_context()
        _mover.put(
            share.artifact,
            _Move(
                send=lambda: context.run(send),
                failed=lambda error: self._cannot(f"{type(error).__name__}: {error}"),
                last=last,
            ),
        )

    def _cannot(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            self._logger.warning(f"the progress artifact cannot be moved: {why}")
