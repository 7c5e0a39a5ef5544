"""Writer of a cache: plan, chunks, claims and the seal."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teacher_cache.storage.write.claims import Claims as Claims
    from teacher_cache.storage.write.place import require_place as require_place
    from teacher_cache.storage.write.plan import plan_cache as plan_cache
    from teacher_cache.storage.write.writer import EmbeddingWriter as EmbeddingWriter

__all__ = [
    "Claims",
    "EmbeddingWriter",
    "plan_cache",
    "require_place",
]

_HOMES = {
    "Claims": "claims",
    "EmbeddingWriter": "writer",
    "plan_cache": "plan",
    "require_place": "place",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
