"""The manifest of a cache that is opened for reading."""

from __future__ import annotations

from teacher_cache.storage.errors import CacheIncompleteError, CacheMismatchError
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.files.transient import read_error
from teacher_cache.storage.format.commits import all_chunks, committed_chunks
from teacher_cache.storage.format.manifest import MANIFEST_KEY, CacheManifest, incomplete_message
from teacher_cache.storage.format.manifest_file import read_manifest

__all__ = ["readable_manifest"]


def readable_manifest(files: CacheFiles, digest: str | None = None) -> CacheManifest:
    """Return the manifest of a sealed cache.

    Args:
        digest: the digest that the manifest must have.

    Raises:
        CacheNotFoundError, CacheFormatError, CacheCorruptError: see ``teacher_cache.storage.errors``.
        CacheIncompleteError: the cache is not sealed. The message says how many chunks are committed.
        CacheMismatchError: the manifest has another digest.
    """
    try:
        manifest = read_manifest(files)
    except OSError as error:
        raise read_error(f"{files.location}/{MANIFEST_KEY}", error) from error
    if not manifest.sealed:
        refs = all_chunks(manifest.layout)
        done = len(committed_chunks(files, refs))
        raise CacheIncompleteError(incomplete_message(files.location, manifest, done, len(refs)))
    if digest is None or manifest.digest == digest:
        return manifest
    raise CacheMismatchError(
        f"{files.location}: its manifest is {manifest.digest[:12]}, {digest[:12]} was asked for. It was repaired with "
        "other bytes, or is another cache."
    )
