"""Planning of a cache: identity, layout and tables before the first chunk, or the check of an existing cache."""

from __future__ import annotations

import hashlib
import time

import pyarrow as pa

from teacher_cache.storage.errors import CacheMismatchError
from teacher_cache.storage.files.location import in_parallel, open_files
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.format.arrays import zarr_metadata
from teacher_cache.storage.format.identity import CacheIdentity
from teacher_cache.storage.format.layout import Layout
from teacher_cache.storage.format.manifest import (
    BACKUP_KEY,
    MANIFEST_KEY,
    CacheManifest,
    Source,
    StaticFile,
)
from teacher_cache.storage.format.manifest_file import read_manifest, write_manifest
from teacher_cache.storage.format.tables import (
    CAPTIONS,
    PROBLEMS,
    SAMPLES,
    read_static,
    read_table,
    table_files,
)
from teacher_cache.storage.write.claims import PLAN, Claims
from teacher_cache.storage.write.place import require_place

__all__ = ["plan_cache", "require_same_plan"]

_PLAN_POLL_SECONDS = 0.2


def plan_cache(
    location: str,
    identity: CacheIdentity,
    layout: Layout,
    source: Source,
    tables: dict[str, pa.Table],
    made_with: dict[str, str],
) -> CacheManifest:
    """Start a cache, or continue an existing one with the same identity and layout.

    A second call with the same arguments changes nothing. An existing cache may have more views than ``identity``
    names. Several processes may call at once: one plans, the others wait for it and compare. A crash leaves a cache
    without manifest, which the next call plans again.

    Args:
        tables: samples, captions and problems (``teacher_cache.storage.format.tables``).
        made_with: versions of the libraries; only the first call stores them.

    Raises:
        CacheMismatchError: another cache exists here. The message names each field that differs.
    """
    files = open_files(location)
    files.remove_partials()
    with Claims(files) as claims:
        while not _is_planned(files):
            require_place(files)
            if not claims.take(PLAN):
                time.sleep(_PLAN_POLL_SECONDS)
            elif not _is_planned(files):  # the last holder of the claim may have planned it
                return _start(files, identity, layout, source, tables, made_with)
    return _take_up(files, identity, layout, tables)


def _is_planned(files: CacheFiles) -> bool:
    return files.exists(MANIFEST_KEY) or files.exists(BACKUP_KEY)


def _take_up(files: CacheFiles, identity: CacheIdentity, layout: Layout, tables: dict[str, pa.Table]) -> CacheManifest:
    """Check that the existing cache matches the arguments, and return its manifest."""
    manifest = read_manifest(files)
    require_same_plan(manifest, identity, layout, files.location)
    for key, recorded in manifest.files.items():
        read_static(files, key, recorded)
    places = ["uri", "offset", "length"]
    if not read_table(files, manifest, SAMPLES).select(places).equals(tables[SAMPLES].select(places)):
        raise CacheMismatchError(
            f"{files.location}: lists the same images at other places ({manifest.source.dataset}). Name the dataset "
            "in the same form; its folder may have moved."
        )
    if not files.exists(MANIFEST_KEY):  # its planner was killed between the backup and the manifest
        write_manifest(files, manifest)
    return manifest


def require_same_plan(manifest: CacheManifest, identity: CacheIdentity, layout: Layout, location: str) -> None:
    """Check that a cache is the one that ``identity`` and ``layout`` describe. It may have more views.

    Raises:
        CacheMismatchError: names each difference.
    """
    planned, views = manifest.layout, manifest.identity.views
    if views.holds(identity.views):
        identity = identity.model_copy(update={"views": views})
        layout = layout.model_copy(update={"views": planned.views})
    manifest.identity.require(identity, location)
    if planned != layout:
        raise CacheMismatchError(
            f"{location}: chunks of {planned.image_chunk_rows} images and {planned.text_chunk_rows} captions in "
            f"batches of {planned.batch_rows} in the cache, {layout.image_chunk_rows}, {layout.text_chunk_rows} and "
            f"{layout.batch_rows} asked for. Leave chunk rows and batch size out, or encode to a new path."
        )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _static_contents(layout: Layout, tables: dict[str, pa.Table]) -> dict[str, tuple[bytes, int | None]]:
    """Return bytes and rows (of parquet files) of each file of a planned cache, by key."""
    contents: dict[str, tuple[bytes, int | None]] = {key: (data, None) for key, data in zarr_metadata(layout).items()}
    for name in (SAMPLES, CAPTIONS, PROBLEMS):
        contents.update(table_files(name, tables[name]))
    return contents


def _start(
    files: CacheFiles,
    identity: CacheIdentity,
    layout: Layout,
    source: Source,
    tables: dict[str, pa.Table],
    made_with: dict[str, str],
) -> CacheManifest:
    contents = _static_contents(layout, tables)
    for _ in in_parallel(files, lambda key: files.write(key, contents[key][0]), list(contents)):
        pass
    static = {key: StaticFile(sha256=_sha256(data), rows=rows) for key, (data, rows) in contents.items()}
    problems = tables[PROBLEMS]
    counts = {item["values"]: item["counts"] for item in problems["kind"].value_counts().to_pylist()}
    manifest = CacheManifest(
        identity_digest=identity.digest,
        identity=identity,
        layout=layout,
        source=source,
        files=dict(sorted(static.items())),
        lost_images=sum(problems["lost_image"].to_pylist()),
        problems=dict(sorted(counts.items())),
        made_with=made_with,
    )
    # manifest last: once it exists, the tables and metadata that it names can be trusted
    write_manifest(files, manifest)
    return manifest
