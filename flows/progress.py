"""Progress of a stage: lines in the log of its task run, and a progress artifact that moves with it."""

from __future__ import annotations

import time
from typing import Protocol, cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from pydantic import BaseModel, Field

__all__ = ["LoggedProgress", "Share", "start_progress"]

_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BETWEEN_MOVES = 2.0  # each is a request to the server, which every run shares
_SECONDS_AFTER_A_FAILURE = 60.0


class _Logger(Protocol):
    def info(self, msg: str, /) -> None: ...
    def warning(self, msg: str, /) -> None: ...


class Share(BaseModel, frozen=True):
    """What one stage moves of a progress artifact. Plain values, since task parameters are sent to the server."""

    artifact: UUID
    what: str = Field(description="Shown in front of the stage: the cache, or the run.")
    first: float = Field(0.0, description="Per cent when the stage begins.")
    last: float = Field(100.0, description="Per cent when it ends.")

    def move(self, done: int, total: int, note: str) -> None:
        """Say how far the stage is; a server that is away raises what Prefect's client raises."""
        percent = self.first + (self.last - self.first) * (done / total if total else 1.0)
        update_progress_artifact(self.artifact, progress=percent, description=f"`{self.what}`: {note}")

    def part(self, first: float, last: float) -> Share:
        """A stage within this one, between two shares of it from 0 to 1."""
        width = self.last - self.first
        return self.model_copy(update={"first": self.first + width * first, "last": self.first + width * last})


def start_progress(key: str, what: str) -> Share:
    """A new progress artifact, at 0 %, of the flow run that calls."""
    # a coroutine only where the caller is one
    artifact = cast(UUID, create_progress_artifact(0.0, key=f"{key}-progress", description=f"`{what}`"))
    return Share(artifact=artifact, what=what)


class LoggedProgress:
    """Call it with (stage, done, total) as often as you like.

    It writes a line every 30 seconds and moves the artifact every 2. An artifact that cannot be moved is no reason to
    end hours of work: the log says so, once, and it is tried again a minute later.

    Args:
        share: what to move; None for lines alone.
    """

    def __init__(self, logger: _Logger, share: Share | None = None) -> None:
        self._logger = logger
        self._share = share
        self._said = self._next_move = time.monotonic()
        self._failed = False

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Move a stage on.

        Args:
            note: written behind the numbers: a loss, a rate.
        """
        now = time.monotonic()
        text = f"{stage}: {done:,} of {total:,} {note}".rstrip()
        if now - self._said > _SECONDS_BETWEEN_LINES:
            self._said = now
            self._logger.info(text)
        if self._share is not None and now >= self._next_move:
            self._next_move = now + _SECONDS_BETWEEN_MOVES
            self._move(self._share, done, total, text)

    def end(self, note: str) -> None:
        """Move the artifact to where the stage ends."""
        if self._share is not None:
            self._move(self._share, 1, 1, note)

    def _move(self, share: Share, done: int, total: int, text: str) -> None:
        try:
            share.move(done, total, text)
        except Exception as error:
            self._next_move = time.monotonic() + _SECONDS_AFTER_A_FAILURE
            if not self._failed:
                self._logger.warning(f"the progress artifact cannot be moved: {type(error).__name__}: {error}")
            self._failed = True
