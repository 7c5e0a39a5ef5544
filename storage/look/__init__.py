"""Looks into a finished or unfinished cache: info, list, statistics, rows by name, differences, export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_cache.lazy_names import lazy_names

if TYPE_CHECKING:
    from teacher_cache.storage.look.diff import diff_caches as diff_caches
    from teacher_cache.storage.look.export import export_rows as export_rows
    from teacher_cache.storage.look.info import describe_cache as describe_cache
    from teacher_cache.storage.look.listing import list_caches as list_caches
    from teacher_cache.storage.look.rows import find_neighbours as find_neighbours
    from teacher_cache.storage.look.rows import sample_images as sample_images
    from teacher_cache.storage.look.stats import cache_stats as cache_stats

_HOMES = {
    "cache_stats": "stats",
    "describe_cache": "info",
    "diff_caches": "diff",
    "export_rows": "export",
    "find_neighbours": "rows",
    "list_caches": "listing",
    "sample_images": "rows",
}

__all__ = [
    "cache_stats",
    "describe_cache",
    "diff_caches",
    "export_rows",
    "find_neighbours",
    "list_caches",
    "sample_images",
]

__getattr__ = lazy_names(__name__, _HOMES)
