"""Readers of a finished cache: rows by number, streams in a known order, the shuffle order, and resident rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_cache.lazy_names import lazy_names

if TYPE_CHECKING:
    from teacher_cache.storage.read.reader import EmbeddingReader as EmbeddingReader
    from teacher_cache.storage.read.resident import ResidentRows as ResidentRows
    from teacher_cache.storage.read.row_set import RowSet as RowSet
    from teacher_cache.storage.read.shuffle import batches as batches
    from teacher_cache.storage.read.shuffle import window_order as window_order

__all__ = ["EmbeddingReader", "ResidentRows", "RowSet", "batches", "window_order"]

_HOMES = {
    "EmbeddingReader": "reader",
    "ResidentRows": "resident",
    "RowSet": "row_set",
    "batches": "shuffle",
    "window_order": "shuffle",
}

__getattr__ = lazy_names(__name__, _HOMES)
