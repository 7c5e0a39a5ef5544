"""Create a cache: identity, layout and tables, before the first chunk; or take up one that was begun."""

from __future__ import annotations

import hashlib
import time

import pyarrow as pa

from teacher_cache.storage.errors import CacheCorruptError, CacheMismatchError
from teacher_cache.storage.files.location import in_parallel, open_files
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.format.arrays import (
    zarr_metadata,
)
from teacher_cache.storage.format.identity import CacheIdentity, ViewsIdentity
from teacher_cache.storage.format.layout import Layout
from teacher_cache.storage.format.manifest import (
    BACKUP_KEY,
    MANIFEST_KEY,
    CacheManifest,
    Generation,
    Source,
    StaticFile,
)
from teacher_cache.storage.format.manifest_file import planned_manifest, write_manifest
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
from teacher_cache.storage.write.writer import _PLAN_POLL_SECONDS

__all__ = ["plan_cache", "require_asked"]


def plan_cache(
    location: str,
    identity: CacheIdentity,
    layout: Layout,
    source: Source,
    tables: dict[str, pa.Table],
    made_with: dict[str, str],
) -> CacheManifest:
    """Start a cache, or take up the one that is there if it is the same; with more views wanted, add them to its plan.

    A second call with the same arguments changes nothing, and a cache that has more views is taken as it is. Several
    processes may call at once: one plans, the others wait for it and compare. A crash leaves a cache without manifest,
    which the next call writes anew; or one whose manifest has the new views and whose Zarr metadata has not, which the
    next call writes again.

    Args:
        tables: samples, captions and problems (``teacher_cache.storage.format.tables``).
        made_with: versions of the libraries, kept from the first call.

    Raises:
        CacheMismatchError: another cache is there; the message names each field that differs.
    """
    files = open_files(location)
    files.remove_partials()
    with Claims(files) as claims:
        while True:
            if files.exists(MANIFEST_KEY) or files.exists(BACKUP_KEY):
                manifest = _take_up(files, identity, layout, tables)
                if manifest.identity.views.holds(identity.views):
                    return manifest
            else:
                require_place(files)
            if claims.take(PLAN):
                break
            time.sleep(_PLAN_POLL_SECONDS)
        if files.exists(MANIFEST_KEY):  # of the one that has just given the claim back, or to be given more views
            manifest = _take_up(files, identity, layout, tables)
            if manifest.identity.views.holds(identity.views):
                return manifest
            return _add_views(files, manifest, identity.views, made_with)
        return _start(files, identity, layout, source, tables, made_with)


def _take_up(files: CacheFiles, identity: CacheIdentity, layout: Layout, tables: dict[str, pa.Table]) -> CacheManifest:
    """The manifest that is there, if it is of the very cache that is asked for, apart from the number of views."""
    manifest = planned_manifest(files)
    require_asked(manifest, identity, layout, files.location)
    if manifest.adds_views:
        _write_metadata(files, manifest)
    for key, wanted in manifest.files.items():
        read_static(files, key, wanted)
    places = ["uri", "offset", "length"]
    if not read_table(files, manifest, SAMPLES).select(places).equals(tables[SAMPLES].select(places)):
        raise CacheMismatchError(
            f"{files.location}: lists the same images at other places ({manifest.source.dataset}). Name the dataset "
            "in the same form; its folder may have moved."
        )
    return manifest


def require_asked(manifest: CacheManifest, identity: CacheIdentity, layout: Layout, where: str) -> None:
    """Refuse a cache that is another one than is asked for, apart from the number of views.

    Raises:
        CacheMismatchError: names what differs.
    """
    have, views = manifest.layout, manifest.identity.views
    if views.holds(identity.views) or views.count == 1:
        # the one view there is has no settings that new ones could differ from
        identity = identity.model_copy(update={"views": views})
    else:
        identity = identity.model_copy(update={"views": identity.views.model_copy(update={"count": views.count})})
    layout = layout.model_copy(update={"views": have.views})
    manifest.identity.require(identity, where)
    if have != layout:
        raise CacheMismatchError(
            f"{where}: chunks of {have.image_chunk_rows} images and {have.text_chunk_rows} captions in "
            f"batches of {have.batch_rows} in the cache, {layout.image_chunk_rows}, {layout.text_chunk_rows} and "
            f"{layout.batch_rows} asked for. Leave chunk rows and batch size out, or encode to a new path."
        )


def _add_views(
    files: CacheFiles, manifest: CacheManifest, views: ViewsIdentity, made_with: dict[str, str]
) -> CacheManifest:
    """Plan more views of a cache; what is there is not touched, but for the shapes in Zarr's metadata."""
    grown = manifest.layout.model_copy(update={"views": views.count})
    before, after = zarr_metadata(manifest.layout), zarr_metadata(grown)
    changed = {key: StaticFile(sha256=_sha256(data)) for key, data in after.items() if data != before[key]}
    planned = manifest.with_views(views, changed, made_with)
    # manifest first: from then on it says what the metadata has to be, and any precompute can write that
    write_manifest(files, planned)
    _write_metadata(files, planned)
    return planned


def _write_metadata(files: CacheFiles, manifest: CacheManifest) -> None:
    """Zarr's metadata where it is not that of the layout: of before views were planned. Only with the planned bytes."""
    for key, data in zarr_metadata(manifest.layout).items():
        if manifest.files[key].sha256 == _sha256(data):
            try:
                read_static(files, key, manifest.files[key])
            except CacheCorruptError:
                files.write(key, data)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _static_contents(layout: Layout, tables: dict[str, pa.Table]) -> dict[str, tuple[bytes, int | None]]:
    """Bytes, and rows of a parquet file, of every file that is written when a cache is planned, by key."""
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
    generation = Generation(
        number=0,
        image_rows=(0, layout.image_rows),
        text_rows=(0, layout.text_rows),
        lost_images=sum(problems["lost_image"].to_pylist()),
        problems=dict(sorted(counts.items())),
    )
    manifest = CacheManifest(
        identity_digest=identity.digest,
        identity=identity,
        layout=layout,
        source=source,
        files=dict(sorted(static.items())),
        generations=(generation,),
        made_with=made_with,
    )
    # manifest last: whoever finds it may trust the tables and the metadata that it names
    write_manifest(files, manifest)
    return manifest
