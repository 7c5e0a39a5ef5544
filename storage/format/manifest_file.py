"""Reading and writing of ``manifest.json`` and its backup, and the message about an unfinished cache.

The backup is written first, so that it is never older than the manifest. If one of the two is damaged, the other
describes the cache.
"""

from __future__ import annotations

from contextlib import suppress

from teacher_cache.storage.errors import CacheCorruptError, CacheIncompleteError, CacheNotFoundError, UsageError
from teacher_cache.storage.files.claim_records import working_processes
from teacher_cache.storage.files.location import is_several
from teacher_cache.storage.files.places import CACHE, misplaced, similar_names
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.format.commits import all_chunks, committed_chunks
from teacher_cache.storage.format.manifest import BACKUP_KEY, IMPORTED_ROWS, MANIFEST_KEY, CacheManifest


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


def no_cache(location: str) -> CacheNotFoundError | UsageError:
    """Return the error about a location without a cache."""
    if other := misplaced(location, CACHE):
        return CacheNotFoundError(other)
    if is_several(location):
        return UsageError(f"{location}: one cache is wanted here, not several. Name one of them")
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


def require_sealed(files: CacheFiles, manifest: CacheManifest) -> None:
    """Check that a cache is finished.

    Raises:
        CacheIncompleteError: chunks are missing. The message counts them, and names who works on the cache.
    """
    if not manifest.sealed:
        refs = all_chunks(manifest.layout)
        raise CacheIncompleteError(incomplete_message(files, manifest, len(committed_chunks(files, refs)), len(refs)))


def incomplete_message(files: CacheFiles, manifest: CacheManifest, done: int, total: int) -> str:
    """Return the message about an unfinished cache."""
    return f"{files.location}: {done} of {total} chunks are there. {finished_how(files, manifest)}."


def finished_how(files: CacheFiles, manifest: CacheManifest) -> str:
    """Return who finishes an unfinished cache: the processes that work on it, or a command."""
    names: tuple[str, ...] = ()
    with suppress(OSError):
        names = working_processes(files)
    if names:
        verb = "works" if len(names) == 1 else "work"
        return f"Now {', '.join(names)} {verb} on it: wait until it is finished"
    command = "import" if IMPORTED_ROWS in manifest.made_with else "precompute"
    return f"Run the same {command} command again to finish it"
