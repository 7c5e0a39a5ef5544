"""Readers of a finished cache: rows by number, streams in a known order, the shuffle order, and resident rows."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teacher_cache.storage.read.reader import EmbeddingReader as EmbeddingReader
    from teacher_cache.storage.read.resident import ResidentRows as ResidentRows
    from teacher_cache.storage.read.row_set import RowSet as RowSet
    from teacher_cache.storage.read.shuffle import batches as batches
    from teacher_cache.storage.read.shuffle import window_order as window_order

__all__ = ["EmbeddingReader", "ResidentRows", "RowSet", "batches", "window_order"]

_HOMES = {"EmbeddingReader": "reader", "ResidentRows": "resident", "RowSet": "row_set"}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'shuffle')}"), name)
