"""Reading and writing of ``manifest.json`` and its backup.

The backup is written first, so that it is never older than the manifest. If one of the two is damaged, the other
describes the cache.
"""

from __future__ import annotations

from teacher_cache.storage.errors import CacheCorruptError, CacheNotFoundError
from teacher_cache.storage.files.places import CACHE, misplaced, similar_names
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.format.manifest import BACKUP_KEY, MANIFEST_KEY, CacheManifest


def read_manifest(files: CacheFiles) -> CacheManifest:
    """Return the manifest of the cache at this location. Read it once in a run and hand it on.

    If a process was killed while it planned the cache, only the backup exists, and is returned.

    Raises:
        CacheNotFoundError: there is no cache.
        CacheFormatError: this version does not read its format.
        CacheCorruptError: the manifest is damaged, or missing from a sealed cache.
    """
    try:
        return _read(files, MANIFEST_KEY)
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = error
    try:
        backup = _read(files, BACKUP_KEY)
    except (FileNotFoundError, NotADirectoryError):
        raise no_cache(files.location) from missing
    try:
        return _read(files, MANIFEST_KEY)  # another process may have written it since
    except FileNotFoundError as error:
        if backup.sealed:
            raise CacheCorruptError(
                f"{files.location}: {MANIFEST_KEY} is missing, {BACKUP_KEY} is there. Run teacher-cache repair CACHE "
                "to restore it."
            ) from error
        return backup


def no_cache(location: str) -> CacheNotFoundError:
    """Return the error about a location without a cache."""
    if other := misplaced(location, CACHE):
        return CacheNotFoundError(other)
    return CacheNotFoundError(
        f"{location}: no cache here ({MANIFEST_KEY} not found).{similar_names(location, CACHE)} Check the path, or "
        "start one with teacher-cache precompute --cache."
    )


def write_manifest(files: CacheFiles, manifest: CacheManifest) -> None:
    """Replace the backup, then the manifest. If the process is killed in between, both can be read."""
    data = manifest.to_bytes()
    files.write(BACKUP_KEY, data)
    files.write(MANIFEST_KEY, data)


def _read(files: CacheFiles, key: str) -> CacheManifest:
    return CacheManifest.from_bytes(files.read(key), files.location, key)
