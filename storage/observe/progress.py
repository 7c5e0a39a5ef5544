"""Progress on stderr while a command works: bars on a terminal, else a line every ten seconds."""

from __future__ import annotations

import logging
import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.theme import Theme

from teacher_cache.storage.observe.logs import event, json_logs, logger

_LOG = logger("progress")

_SECONDS_BETWEEN_LINES = 10.0
_WIDE = 100  # columns
# rich's own bar is light on dark: what is left of it would look done on a light terminal
_THEME = Theme({"bar.back": "dim", "progress.elapsed": "none", "progress.remaining": "none"})


class StageProgress:
    """One bar per stage, or events if logs are JSON.

    Use it as a context manager; call it with (stage, done, total) as often as needed.
    """

    def __init__(self) -> None:
        console = Console(stderr=True, theme=_THEME)
        self._progress = Progress(
            *_columns(console.width),
            console=console,
            disable=json_logs() or not console.is_terminal,
        )
        self._lines = json_logs() or not console.is_terminal
        self._tasks: dict[str, TaskID] = {}
        self._begun: dict[str, tuple[float, int]] = {}
        self._printed_at: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int, note: str = "", eta_seconds: float | None = None) -> None:
        """Update a stage.

        Args:
            note: text behind the bar: a loss, a rate.
            eta_seconds: time until the stage is done, from a caller that knows; a bar on a terminal estimates its own.
        """
        if stage not in self._tasks:
            # rows done before this process began say nothing about its speed
            self._tasks[stage] = self._progress.add_task(stage, total=total, completed=max(done - 1, 0), note=note)
            self._printed_at[stage] = time.monotonic()
            self._begun[stage] = time.monotonic(), done
        self._progress.update(self._tasks[stage], completed=done, total=total, note=note)
        if self._lines and (done >= total or time.monotonic() - self._printed_at[stage] > _SECONDS_BETWEEN_LINES):
            self._printed_at[stage] = time.monotonic()
            if json_logs():
                event(_LOG, logging.INFO, stage, done=done, total=total, note=note, eta_seconds=eta_seconds)
                return
            seconds = self._estimated(stage, done, total) if eta_seconds is None else eta_seconds
            eta = "" if seconds is None else f"eta {_clock(seconds)}"
            known = "  ".join(filter(None, (f"{stage}: {done} of {total}", note, eta)))
            print(known, file=sys.stderr, flush=True)  # noqa: T201

    def _estimated(self, stage: str, done: int, total: int) -> float | None:
        """Return the seconds until a stage is done, at its speed so far. None: it is done, or has just begun."""
        began, first = self._begun[stage]
        return (time.monotonic() - began) * (total - done) / (done - first) if total > done > first else None


def _columns(width: int) -> list[ProgressColumn]:
    """Return what a terminal of this width shows of each stage: the count and the time left in any case."""
    columns: list[tuple[int, ProgressColumn]] = [
        (0, TextColumn("{task.description}")),
        (60, BarColumn(bar_width=40 if width >= _WIDE else 10)),
        (0, MofNCompleteColumn()),
        (_WIDE, TimeElapsedColumn()),
        (0, TimeRemainingColumn()),
        (80, TextColumn("{task.fields[note]}")),
    ]
    return [column for least, column in columns if width >= least]


def _clock(seconds: float) -> str:
    """Return seconds as the bar shows them: 0:01:30."""
    return str(timedelta(seconds=round(seconds)))
