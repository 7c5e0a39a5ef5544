"""Spans: neighbouring chunks that one task run encodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import ceil

from pydantic import BaseModel

from teacher_cache.storage.format.commits import ChunkRef, stretches_of
from teacher_cache.storage.format.layout import Tower

__all__ = ["MOST_SPANS", "Span", "default_chunks_per_span"]

MOST_SPANS = 16  # a graph that a person can read; each task run costs the server a dozen calls


class Span(BaseModel, frozen=True):
    """Chunks of one tower, by view and number. Plain values, since task parameters are sent to the server."""

    tower: Tower
    chunks: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, refs: Sequence[ChunkRef]) -> Span:
        """Return the span of chunks of one tower."""
        return cls(tower=refs[0].tower, chunks=tuple((ref.view, ref.chunk) for ref in refs))

    @property
    def name(self) -> str:
        """Name by first and last chunk, without views: ``image-000000-000003`` or ``text-000000-000003``."""
        return f"{self.tower}-{self.chunks[0][1]:06d}-{self.chunks[-1][1]:06d}"

    def refs(self) -> list[ChunkRef]:
        """Return the chunks as the cache knows them."""
        return [ChunkRef(self.tower, view, chunk) for view, chunk in self.chunks]


def default_chunks_per_span(pending: Sequence[ChunkRef]) -> int:
    """Return the smallest number of chunks per span that gives at most 16 spans.

    A span has chunks of one tower, with all views of an image.
    """
    stretches = stretches_of(pending)
    by_tower = Counter(stretch[0].tower for stretch in stretches)
    views = max(map(len, stretches), default=1)
    size = max(1, ceil(len(pending) / MOST_SPANS))
    while sum(ceil(count / max(1, size // views)) for count in by_tower.values()) > MOST_SPANS:
        size += 1
    return size
