"""The root of a cache: reading, writing and restoring ``manifest.json``, of which a backup lies beside it.

The backup is written first and the manifest after it, so that of the two the manifest is never the newer one.
One damaged file then never costs the rest: the other says what it was.
"""

from __future__ import annotations

from teacher_cache.storage.errors import CacheCorruptError, CacheFormatError, CacheNotFoundError
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.format.manifest import BACKUP_KEY, MANIFEST_KEY, CacheManifest

__all__ = [
    "look_at_manifest",
    "opened_manifest",
    "planned_manifest",
    "read_backup",
    "read_manifest",
    "restore_manifest",
    "write_manifest",
]


def read_manifest(files: CacheFiles) -> CacheManifest:
    """The manifest of the cache at this location.

    Raises:
        CacheNotFoundError: there is none.
        CacheFormatError, CacheCorruptError: there is one that cannot be used.
    """
    try:
        data = files.read(MANIFEST_KEY)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheNotFoundError(
            f"{files.location}: no cache here ({MANIFEST_KEY} not found). Check the path, or start one with "
            "teacher-cache precompute --cache."
        ) from error
    return CacheManifest.from_bytes(data, files.location)


def read_backup(files: CacheFiles) -> CacheManifest | None:
    """The manifest's backup; None when there is none.

    Raises:
        CacheFormatError, CacheCorruptError: there is one that cannot be used.
    """
    try:
        data = files.read(BACKUP_KEY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return CacheManifest.from_bytes(data, files.location, BACKUP_KEY)


def planned_manifest(files: CacheFiles) -> CacheManifest:
    """As :func:`read_manifest`, for those who go on with a cache: a manifest that is missing comes from the backup.

    Whoever planned the cache may have been killed between the two.
    """
    try:
        return read_manifest(files)
    except CacheNotFoundError:
        restore_manifest(files)
        return read_manifest(files)


def look_at_manifest(files: CacheFiles) -> CacheManifest:
    """As :func:`planned_manifest`, for those who only look: of a missing manifest the backup is read, nothing written.

    Raises:
        CacheNotFoundError: neither is there.
        CacheFormatError, CacheCorruptError: what is there cannot be used.
    """
    try:
        return read_manifest(files)
    except CacheNotFoundError:
        backup = read_backup(files)
        if backup is None:
            raise
        return backup


def opened_manifest(files: CacheFiles) -> CacheManifest:
    """The manifest for a reader; its backup where the cache is just being planned, which writes the backup first.

    Raises:
        CacheNotFoundError, CacheFormatError: as :func:`read_manifest`.
        CacheCorruptError: as that; or the manifest of a finished cache is gone.
    """
    try:
        return read_manifest(files)
    except CacheNotFoundError:
        backup = read_backup(files)
        if backup is None:
            raise
    try:
        return read_manifest(files)  # it may have come since
    except CacheNotFoundError as error:
        if not backup.sealed:
            return backup
        raise CacheCorruptError(
            f"{files.location}: manifest.json is missing, {BACKUP_KEY} is there. Run teacher-cache repair CACHE to "
            "restore it, or the same precompute command again."
        ) from error


def write_manifest(files: CacheFiles, manifest: CacheManifest) -> None:
    """Replace backup and manifest, in this order; a kill in between leaves both readable."""
    data = manifest.to_bytes()
    files.write(BACKUP_KEY, data)
    files.write(MANIFEST_KEY, data)


def restore_manifest(files: CacheFiles) -> bool:
    """Bring manifest and backup to the same bytes when one of them is damaged or missing; whether anything changed.

    Raises:
        CacheNotFoundError: neither is there.
        CacheFormatError: the manifest is of another format; nothing is touched.
        CacheCorruptError: both are damaged.
    """
    try:
        manifest = read_manifest(files)
    except CacheFormatError:
        raise
    except (CacheNotFoundError, CacheCorruptError) as error:
        try:
            backup = read_backup(files)
        except (CacheCorruptError, CacheFormatError):
            backup = None
        if backup is None:
            raise error
        files.write(MANIFEST_KEY, backup.to_bytes())
        return True
    data = manifest.to_bytes()
    try:
        same = files.read(BACKUP_KEY) == data
    except FileNotFoundError:
        same = False
    if not same:
        files.write(BACKUP_KEY, data)
    return not same
