"""Opening a cache for reading: its manifest as it is, or as it was before views were added."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from teacher_cache.storage.errors import CacheIncompleteError, CacheMismatchError
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.files.transient import read_error
from teacher_cache.storage.format.arrays import zarr_metadata
from teacher_cache.storage.format.commits import all_chunks, committed_chunks
from teacher_cache.storage.format.manifest import MANIFEST_KEY, CacheManifest, StaticFile, incomplete_message
from teacher_cache.storage.format.manifest_file import opened_manifest

__all__ = ["manifests_before", "readable_manifest"]


def readable_manifest(files: CacheFiles, digest: str | None = None) -> CacheManifest:
    """The manifest of a cache of which at least the first generation can be read.

    Args:
        digest: of the manifest that is wanted, where views may have been added since.

    Raises:
        CacheNotFoundError, CacheFormatError, CacheCorruptError: see ``teacher_cache.storage.errors``.
        CacheIncompleteError: chunks of its first generation are missing; the message says how many.
        CacheMismatchError: the cache never had a manifest of this digest, or more than views has changed since.
    """
    try:
        manifest = opened_manifest(files)
    except OSError as error:
        raise read_error(f"{files.location}/{MANIFEST_KEY}", error) from error
    if not manifest.sealed_generations:
        refs = all_chunks(manifest.layout)
        done = len(committed_chunks(files, refs))
        raise CacheIncompleteError(incomplete_message(files.location, manifest, done, len(refs)))
    if digest is None or manifest.digest == digest:
        return manifest
    for earlier in manifests_before(manifest):
        if earlier.digest == digest:
            return earlier
    raise CacheMismatchError(
        f"{files.location}: its manifest is {manifest.digest[:12]}, {digest[:12]} was asked for, and more than views "
        "has changed in between."
    )


def manifests_before(manifest: CacheManifest) -> Iterator[CacheManifest]:
    """The manifests that a cache had before its views were added, the last one first.

    What is older than a repair that changed bytes is not among them: such a repair seals all generations anew.
    """
    while (views := manifest.generations[-1].views) is not None:
        if manifest.generations[-1].seal is not None:
            manifest = manifest.unsealed()
            yield manifest
        layout = manifest.layout.model_copy(update={"views": views[0]})
        metadata = {
            key: StaticFile(sha256=hashlib.sha256(data).hexdigest()) for key, data in zarr_metadata(layout).items()
        }
        manifest = manifest.before_views(views[0], metadata)
        yield manifest
