"""The arrays of a cache: names, stored types, shapes of chunks, bytes. No numpy: ``info`` starts without it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from storage.commits import ChunkRef, Tower
    from storage.manifest import Layout

__all__ = ["ARRAYS", "CRC_BYTES", "SCALE", "VIEW_FIELDS", "chunk_shape", "stored_arrays", "target_bytes"]

CRC_BYTES = 4
"""Of the checksum behind each chunk object."""

# tower -> array -> dtype, as encoders make them; shapes follow from the layout
ARRAYS: dict[Tower, dict[str, str]] = {
    "image": {"embedding": "<f2", "norm": "<f4", "view": "<f4"},
    "text": {"embedding": "<f2", "norm": "<f4"},
}
VIEW_FIELDS = ("top", "left", "height", "width", "flip")
SCALE = "scale"
"""The array that a cache of int8 embeddings has besides: what one step of each column is, chunk by chunk."""


def stored_arrays(layout: Layout, tower: Tower) -> dict[str, str]:
    """Name and dtype of each array on disk: those of :data:`ARRAYS`, or int8 embeddings with their scales."""
    if layout.embedding_dtype is None:
        return ARRAYS[tower]
    return {**ARRAYS[tower], "embedding": "|i1", SCALE: "<f4"}


def chunk_shape(layout: Layout, tower: Tower, name: str) -> tuple[int, ...]:
    """Rows and columns of one chunk as readers and writers see it: the axis of the one view left out."""
    if name == SCALE:
        return (1, layout.embed_dim)
    tail = {"embedding": (layout.embed_dim,), "norm": (), "view": (len(VIEW_FIELDS),)}[name]
    return (layout.chunk_rows(tower), *tail)


def target_bytes(layout: Layout, refs: Iterable[ChunkRef]) -> int:
    """Bytes of the objects of some chunks; the last one of a tower is padded, so that all are of one size."""
    counts = Counter(ref.tower for ref in refs)
    return sum(count * _chunk_bytes(layout, tower) for tower, count in counts.items())


def _chunk_bytes(layout: Layout, tower: Tower) -> int:
    return sum(
        math.prod(chunk_shape(layout, tower, name)) * int(dtype[2:]) + CRC_BYTES
        for name, dtype in stored_arrays(layout, tower).items()
    )
