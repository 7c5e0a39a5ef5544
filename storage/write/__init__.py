"""Writer of a cache: plan, chunks, claims and the seal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_cache.lazy_names import lazy_names

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

__getattr__ = lazy_names(__name__, _HOMES)
