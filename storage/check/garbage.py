"""Garbage of a cache: half-written files, claims of ended processes, and files that are no part of a cache.

A chunk is never garbage: a sealed cache needs all of them, and uncommitted ones belong to a running ``precompute``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from teacher_cache.storage.files.claim_records import CLAIMS
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.format.commits import all_chunks
from teacher_cache.storage.format.journal import note_key
from teacher_cache.storage.format.manifest import BACKUP_KEY, MANIFEST_KEY, CacheManifest
from teacher_cache.storage.format.manifest_file import read_manifest
from teacher_cache.storage.write.claims import left_claims


class Garbage(BaseModel, frozen=True):
    """An object that nothing needs."""

    key: str
    kind: Literal["partial", "claim", "unknown-file"] = Field(
        description="Reason: an interrupted write, a claim of an ended process, or a file that is no part of a cache."
    )
    nbytes: int


class GarbageReport(BaseModel, frozen=True):
    """Result of ``teacher-cache repair --leftovers``."""

    location: str
    deleted: bool = Field(description="True if the objects were deleted.")
    found: tuple[Garbage, ...]
    nbytes: int
    left: int = Field(0, description="Number of unknown files that were not deleted.")


def collect_garbage(location: str, delete: bool = False, unknown: bool = False) -> GarbageReport:
    """Find garbage, and delete it on request. Safe while other processes read and write the cache.

    Files of a cache are never deleted: ``repair`` mends damaged ones. Caches inside this folder, and folders behind
    links, are skipped.

    Args:
        delete: delete half-written files and claims of ended processes.
        unknown: with ``delete``, also delete files that are no part of a cache.

    Raises:
        CacheNotFoundError: there is no cache, so every file would be unknown.
        CacheCorruptError, CacheFormatError: the manifest cannot be used, so what belongs to the cache is unknown.
    """
    files = open_files(location)
    keys = files.list()
    garbage = [Garbage(key=key, kind="partial", nbytes=_size(files, key)) for key in files.partials()]
    garbage += [Garbage(key=key, kind="claim", nbytes=_size(files, key)) for key in left_claims(files)]
    known = known_keys(read_manifest(files))
    within = tuple(
        key.removesuffix(MANIFEST_KEY) for key in keys if key.endswith(f"/{MANIFEST_KEY}") and key not in known
    )
    garbage += [
        Garbage(key=key, kind="unknown-file", nbytes=_size(files, key))
        for key in keys
        if key not in known and not key.startswith((f"{CLAIMS}/", *within))
    ]
    garbage = [item for item in garbage if not _behind_link(files, item.key)]
    not_deleted = 0
    if delete:
        deleted = [item for item in garbage if unknown or item.kind != "unknown-file"]
        not_deleted, garbage = len(garbage) - len(deleted), deleted
        for item in deleted:
            files.delete(item.key)
    nbytes = sum(item.nbytes for item in garbage)
    return GarbageReport(location=location, deleted=delete, found=tuple(garbage), nbytes=nbytes, left=not_deleted)


def known_keys(manifest: CacheManifest) -> set[str]:
    """Return every key that the cache may have, whether its object exists or not. Claims are left out."""
    known = {MANIFEST_KEY, BACKUP_KEY, *manifest.files}
    for ref in all_chunks(manifest.layout):
        known.update((ref.commit_key, note_key(ref.name), *ref.object_keys(manifest.layout).values()))
    return known


def _behind_link(files: CacheFiles, key: str) -> bool:
    """Return whether a link leads to the folder of an object."""
    if not isinstance(files, LocalFiles):
        return False
    root, folder = Path(files.path("")).resolve(), Path(files.path(key)).parent
    return folder.resolve() != root / Path(key).parent


def _size(files: CacheFiles, key: str) -> int:
    try:
        return files.stat(key).nbytes
    except FileNotFoundError:
        return 0  # its owner has just removed it
