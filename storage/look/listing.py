"""List of the caches below a path or URL: contents, progress and size, from manifests and file names alone."""

from __future__ import annotations

import json
import os
from collections import deque
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, Field

from teacher_cache.storage.errors import CacheCorruptError, CacheError, CacheFormatError
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.format.commits import COMMITS, all_chunks, target_bytes
from teacher_cache.storage.format.manifest import MANIFEST_KEY, CacheManifest


class ListedCache(BaseModel, frozen=True):
    """One line of ``teacher-cache info`` of a folder; unknown fields of a damaged cache are None."""

    location: str
    teacher: str | None = None
    dataset: str | None = None
    images: int | None = None
    captions: int | None = None
    views: int | None = None
    sealed: bool | None = None
    chunks: int | None = None
    chunks_committed: int | None = Field(None, description="Committed chunks; all for a sealed cache, unchecked.")
    committed_bytes: int | None = Field(None, description="Bytes of the chunk objects that are committed.")
    modified: datetime | None = Field(None, description="Time at which the manifest was planned, or sealed.")
    problem: str | None = Field(None, description="Reason why the manifest cannot be used.")


class CacheListing(BaseModel, frozen=True):
    """Result of ``teacher-cache info`` of a folder."""

    location: str
    caches: tuple[ListedCache, ...]
    folders: int = Field(description="Number of folders searched, without the caches.")
    not_entered: int = Field(description="Number of folders beyond the depth, which may hold more caches.")


def list_caches(location: str, depth: int = 4) -> CacheListing:
    """Find the caches at and below a location. No embedding is read.

    A folder with our ``manifest.json`` is a cache, and is not searched further. Reads one manifest per cache and, if
    the cache is unfinished, the names of its commits. A folder behind several links is searched once. A folder without
    read permission counts as empty.

    Args:
        depth: levels of folders below the location to search.

    Raises:
        CacheUnreachableError, CacheAccessError: the store does not answer, or refuses.
    """
    files = open_files(location)
    caches: list[ListedCache] = []
    queue: deque[tuple[str, int]] = deque([("", 0)])
    seen: set[str] = set()
    entered = beyond = 0
    while queue:
        folder, level = queue.popleft()
        if isinstance(files, LocalFiles):
            real = os.path.realpath(Path(files.location, folder))
            if real in seen:
                continue
            seen.add(real)
        cache = _cache_at(files, folder)
        if cache is not None:
            caches.append(cache)
            continue
        if level > depth:
            beyond += 1
            continue
        entered += 1
        queue += [(f"{folder}/{name}" if folder else name, level + 1) for name in files.folders(folder)]
    return CacheListing(
        location=location,
        caches=tuple(sorted(caches, key=lambda cache: cache.location)),
        folders=entered,
        not_entered=beyond,
    )


def _cache_at(files: CacheFiles, folder: str) -> ListedCache | None:
    key = f"{folder}/{MANIFEST_KEY}" if folder else MANIFEST_KEY
    where = os.path.join(files.location, folder) if folder else files.location  # noqa: PTH118  # a URL too
    try:
        data = files.read(key)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if isinstance(error, CacheError):
            raise
        if folder and isinstance(error, PermissionError) and not _may_enter(files, key):
            return None
        return ListedCache(location=where, problem=f"{key}: cannot be read: {error.strerror or error}")
    if _of_another_tool(data):
        return None
    try:
        manifest = CacheManifest.from_bytes(data, where)
    except (CacheCorruptError, CacheFormatError) as error:
        return ListedCache(location=where, problem=str(error))
    layout = manifest.layout
    refs = all_chunks(layout)
    committed = set(refs)
    if not manifest.sealed:
        keys = files.list(f"{folder}/{COMMITS}" if folder else COMMITS)
        committed_keys = {key.removeprefix(f"{folder}/") for key in keys}
        committed = {ref for ref in refs if ref.commit_key in committed_keys}
    return ListedCache(
        location=where,
        teacher=" ".join(filter(None, (manifest.identity.teacher.name, manifest.identity.teacher.pretrained))),
        dataset=manifest.source.dataset,
        images=layout.image_rows,
        captions=layout.text_rows,
        views=layout.views,
        sealed=manifest.sealed,
        chunks=len(refs),
        chunks_committed=len(committed),
        committed_bytes=manifest.stored_bytes or target_bytes(layout, committed),
        modified=files.stat(key).modified,
    )


def _may_enter(files: CacheFiles, key: str) -> bool:
    """Return whether the folder of an unreadable file may be entered."""
    try:
        files.stat(key)
    except OSError:
        return False
    return True


def _of_another_tool(data: bytes) -> bool:
    """Return whether this is JSON of another tool: many have a manifest.json."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return False  # perhaps ours, damaged
    return not isinstance(fields, dict) or fields.get("format") != "teacher-cache"
