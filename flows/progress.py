"""Progress of a stage as lines in the log of its task run."""

from __future__ import annotations

import time
from typing import Protocol

__all__ = ["LoggedProgress"]

_SECONDS_BETWEEN_LINES = 30.0


class _Logger(Protocol):
    def info(self, msg: str, /) -> None: ...


class LoggedProgress:
    """Call it with (stage, done, total) as often as you like; it writes a line every 30 seconds."""

    def __init__(self, logger: _Logger) -> None:
        self._logger = logger
        self._said = time.monotonic()

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Move a stage on.

        Args:
            note: written behind the numbers: a loss, a rate.
        """
        if time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self._logger.info(f"{stage}: {done:,} of {total:,} {note}".rstrip())
