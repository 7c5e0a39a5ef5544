"""The format of a cache: identity, manifest, arrays, commits, tables, journal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_cache.lazy_names import lazy_names

if TYPE_CHECKING:
    from teacher_cache.storage.format.commit_records import CommitRecords as CommitRecords
    from teacher_cache.storage.format.commits import ChunkCommit as ChunkCommit
    from teacher_cache.storage.format.commits import ChunkRef as ChunkRef
    from teacher_cache.storage.format.identity import CacheIdentity as CacheIdentity
    from teacher_cache.storage.format.layout import Layout as Layout
    from teacher_cache.storage.format.manifest import CacheManifest as CacheManifest
    from teacher_cache.storage.format.manifest_file import read_manifest as read_manifest
    from teacher_cache.storage.format.table_rows import TableRows as TableRows
    from teacher_cache.storage.format.tables import read_table as read_table

__all__ = [
    "CacheIdentity",
    "CacheManifest",
    "ChunkCommit",
    "ChunkRef",
    "CommitRecords",
    "Layout",
    "TableRows",
    "read_manifest",
    "read_table",
]

_HOMES = {
    "CacheIdentity": "identity",
    "CacheManifest": "manifest",
    "ChunkCommit": "commits",
    "ChunkRef": "commits",
    "CommitRecords": "commit_records",
    "Layout": "layout",
    "TableRows": "table_rows",
    "read_manifest": "manifest_file",
    "read_table": "tables",
}

__getattr__ = lazy_names(__name__, _HOMES)
