"""How many rows of a run are done, for whoever watches it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from teacher_cache.pipeline.precompute.plan import Progress
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.format.layout import Layout
from teacher_cache.storage.observe.telemetry import telemetry

__all__ = ["RowTally"]


class RowTally:
    """Rows done, by this process and by others, out of those of some chunks; hands them to a progress.

    As a context manager it takes back what it told the telemetry when an error ends the block, since who tries again
    counts all of them again.
    """

    def __init__(self, layout: Layout, refs: Iterable[ChunkRef], progress: Progress | None) -> None:
        self._layout = layout
        self._progress = progress
        self._done: Counter[str] = Counter()
        self._total: Counter[str] = Counter()
        for ref in refs:
            self._total[ref.tower] += len(ref.rows(layout))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tower, rows in self._done.items() if error is not None else ():
            telemetry().done(tower, -rows)

    def add_rows(self, ref: ChunkRef, rows: int) -> None:
        """Count rows of a chunk."""
        self._done[ref.tower] += rows
        telemetry().done(ref.tower, rows)
        if self._progress is not None:
            stage = "images" if ref.tower == "image" else "captions"
            self._progress(stage, self._done[ref.tower], self._total[ref.tower])

    def add(self, refs: Iterable[ChunkRef]) -> None:
        """Count all rows of chunks."""
        for ref in refs:
            self.add_rows(ref, len(ref.rows(self._layout)))
