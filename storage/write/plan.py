"""Planning of a cache: identity, layout and tables before the first chunk, or the check of an existing cache."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pyarrow as pa

from teacher_cache.storage.errors import CacheMismatchError, UsageError
from teacher_cache.storage.files.claim_records import CLAIMS
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.files.location import in_parallel, open_files
from teacher_cache.storage.files.new_files import require_writable
from teacher_cache.storage.files.protocol import PARTIAL, CacheFiles
from teacher_cache.storage.format.arrays import zarr_metadata
from teacher_cache.storage.format.commits import COMMITS
from teacher_cache.storage.format.identity import CacheIdentity
from teacher_cache.storage.format.journal import JOURNAL
from teacher_cache.storage.format.layout import Layout
from teacher_cache.storage.format.manifest import BACKUP_KEY, MANIFEST_KEY, CacheManifest, Source, StaticFile
from teacher_cache.storage.format.manifest_file import read_manifest
from teacher_cache.storage.format.tables import CAPTIONS, PROBLEMS, SAMPLES, read_static, read_table, table_files
from teacher_cache.storage.write.claims import PLAN, Claims

_PLAN_POLL_SECONDS = 0.2
_OWN = {MANIFEST_KEY, BACKUP_KEY, SAMPLES, CAPTIONS, PROBLEMS, "targets.zarr", COMMITS, JOURNAL, CLAIMS}
_NAMED = 3


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
    without manifest, which the next call plans again. Every file is created, and none replaced: a process that was
    paused here changes nothing of a cache that another one has planned.

    Args:
        tables: samples, captions and problems (``teacher_cache.storage.format.tables``).
        made_with: versions of the libraries; only the first call stores them.

    Raises:
        CacheMismatchError: another cache exists here; the message names each field that differs. Or another plan was
            interrupted here.
    """
    files = open_files(location)
    files.remove_partials()
    with Claims(files) as claims:
        while not _is_planned(files):
            require_place(files)
            if not claims.take(PLAN):
                time.sleep(_PLAN_POLL_SECONDS)
            elif not _is_planned(files):  # the last holder of the claim may have planned it
                manifest = _start(files, identity, layout, source, tables, made_with)
                if manifest is not None:
                    return manifest
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
            f"{files.location}: has the same images under other paths within the dataset ({manifest.source.dataset}). "
            "Name the dataset in the form that the cache was planned with; only its folder may differ."
        )
    if not files.exists(MANIFEST_KEY):  # its planner was killed between the backup and the manifest
        files.place(MANIFEST_KEY, manifest.to_bytes())
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
    if planned.compressor != layout.compressor:
        has, wants, same = ("", "not ", "true") if planned.compressor else ("not ", "", "false")
        raise CacheMismatchError(
            f"{location}: chunks are {has}compressed in the cache, {wants}compressed asked for. Set compress to "
            f"{same}; or make a new cache at another path, which can reuse the rows of this one once it is finished."
        )
    if planned != layout:
        raise CacheMismatchError(
            f"{location}: chunks of {planned.image_chunk_rows} images and {planned.text_chunk_rows} captions in "
            f"batches of {planned.batch_rows} in the cache, {layout.image_chunk_rows}, {layout.text_chunk_rows} and "
            f"{layout.batch_rows} asked for. Leave chunk rows and batch size out, or encode to a new path."
        )


def _start(
    files: CacheFiles,
    identity: CacheIdentity,
    layout: Layout,
    source: Source,
    tables: dict[str, pa.Table],
    made_with: dict[str, str],
) -> CacheManifest | None:
    """Write tables, metadata and manifest. Return None if another process has planned the cache meanwhile.

    Raises:
        CacheMismatchError: an interrupted plan has left another file.
    """
    contents: dict[str, tuple[bytes, int | None]] = {key: (data, None) for key, data in zarr_metadata(layout).items()}
    for name in (SAMPLES, CAPTIONS, PROBLEMS):
        contents.update(table_files(name, tables[name]))
    present = in_parallel(files, lambda key: files.place(key, contents[key][0]), list(contents))
    others = [key for key, earlier in zip(contents, present, strict=True) if earlier not in (None, contents[key][0])]
    if others and _is_planned(files):
        return None
    if others:
        raise CacheMismatchError(
            f"{files.location}: {others[0]} of an interrupted run has other content than this run's (another dataset, "
            "teacher, setting or library version). Nothing is encoded here yet. If no other process plans this cache "
            "now, delete it and run the same command again; or encode to a new path."
        )
    static = {
        key: StaticFile(sha256=hashlib.sha256(data).hexdigest(), rows=rows) for key, (data, rows) in contents.items()
    }
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
    if files.place(BACKUP_KEY, manifest.to_bytes()) is not None:
        return None
    files.place(MANIFEST_KEY, manifest.to_bytes())
    return manifest


def require_place(files: CacheFiles) -> None:
    """Check that a cache can be created here: the folder is empty or already holds this cache, and is writable.

    Other files in it (photographs, other caches) would count as unknown files of the cache. In an object store, only
    the names of folders are checked.

    Raises:
        UsageError: the folder holds other files; the message names some.
        CacheAccessError: this user may not write in the folder.
    """
    if _is_planned(files):
        return
    if isinstance(files, LocalFiles):
        folder = Path(files.path(""))
        names = _names(folder)
        require_writable(folder)
    else:
        names = files.folders()
    others = sorted(name for name in names if name not in _OWN and not PARTIAL.match(name))
    if others:
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        raise UsageError(
            f"{files.location}: contains {', '.join(others[:_NAMED])}{more}, but a cache needs a folder of its own. "
            f"Choose a new one, for example {files.location.rstrip('/')}/NAME.cache"
        )


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        raise UsageError(f"{folder}: is a file, but a cache is a folder. Choose another path") from error
