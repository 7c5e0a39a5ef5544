"""Spans: neighbouring chunks that one task run encodes."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from pydantic import BaseModel

from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.format.layout import Tower

__all__ = ["MOST_SPANS", "Span", "default_chunks_per_span"]

MOST_SPANS = 16  # a graph that a person can read; each task run costs the server a dozen calls


class Span(BaseModel, frozen=True):
    """Chunks of one tower and view, by number. Plain values, since task parameters are sent to the server."""

    tower: Tower
    view: int
    chunks: tuple[int, ...]

    @classmethod
    def of(cls, refs: Sequence[ChunkRef]) -> Span:
        """Return the span of chunks of one tower and view."""
        return cls(tower=refs[0].tower, view=refs[0].view, chunks=tuple(ref.chunk for ref in refs))

    @property
    def name(self) -> str:
        """``image-v0-000000-000003`` or ``text-000000-000003``: first and last chunk."""
        middle = f"v{self.view}-" if self.tower == "image" else ""
        return f"{self.tower}-{middle}{self.chunks[0]:06d}-{self.chunks[-1]:06d}"

    def refs(self) -> list[ChunkRef]:
        """Return the chunks as the cache names them."""
        return [ChunkRef(self.tower, self.view, chunk) for chunk in self.chunks]


def default_chunks_per_span(pending: Sequence[ChunkRef]) -> int:
    """Return the smallest span size that gives at most 16 spans, each within one tower and view."""
    groups: dict[tuple[Tower, int], int] = {}
    for ref in pending:
        groups[ref.tower, ref.view] = groups.get((ref.tower, ref.view), 0) + 1
    size = max(1, ceil(len(pending) / MOST_SPANS))
    while sum(ceil(count / size) for count in groups.values()) > max(MOST_SPANS, len(groups)):
        size += 1
    return size
