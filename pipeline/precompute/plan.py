"""Planning of a cache: read the dataset, check the teacher, write manifest and tables, list the pending chunks."""

from __future__ import annotations

import logging
import platform
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import __version__ as pillow_version

from teacher_cache.pipeline.data.datasets.samples import DatasetSpec, SampleSet, load_samples
from teacher_cache.pipeline.data.images.scaled_jpeg import JPEG_SCALED, PILLOW
from teacher_cache.pipeline.models.teacher import LiveTeacher
from teacher_cache.pipeline.precompute.reuse import require_reusable
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.errors import CacheMismatchError, CacheNotFoundError, UsageError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.commits import ChunkRef, stretches_of
from teacher_cache.storage.format.identity import CacheIdentity, DatasetIdentity, TargetsIdentity, ViewsIdentity
from teacher_cache.storage.format.layout import Layout
from teacher_cache.storage.format.manifest import IMPORTED, CacheManifest, Source
from teacher_cache.storage.format.manifest_file import read_manifest
from teacher_cache.storage.format.tables import CAPTIONS, PROBLEMS, SAMPLES, captions_sha256, samples_sha256
from teacher_cache.storage.observe.logs import event, logger
from teacher_cache.storage.write.plan import plan_cache
from teacher_cache.storage.write.writer import EmbeddingWriter

__all__ = [
    "CROP_SETTINGS",
    "PlannedDataset",
    "Progress",
    "asked_layout",
    "asked_targets",
    "asked_views",
    "chunk_spans",
    "dataset_identity",
    "dataset_tables",
    "default_batch_rows",
    "default_chunk_rows",
    "library_versions",
    "new_layout",
    "origin_of_reused",
    "plan_dataset",
    "plan_precompute",
    "read_dataset",
    "refuse_to_mix",
    "require_one_origin",
]

Progress = Callable[[str, int, int], None]

_LOG = logger("precompute")

CROP_SETTINGS = {"crop_scale": "scale", "crop_ratio": "ratio", "crop_flip": "flip", "view_seed": "seed"}
"""Settings of precompute, and their names in the identity (``ViewsIdentity``)."""
# milder than ImageNet's 0.08: a caption describes the whole picture, and open_clip crops by 0.9 and more
_CROPS: dict[str, Any] = {"scale": (0.3, 1.0), "ratio": (3 / 4, 4 / 3), "flip": 0.5, "seed": 0}
_CHUNK_ROWS = 4096  # 4 MiB at 512 float16: larger chunks read no faster


@dataclass(frozen=True)
class PlannedDataset:
    """Dataset whose files are read and digested, with the tables and identity of its cache."""

    spec: DatasetSpec
    dataset: SampleSet
    tables: dict[str, pa.Table]
    identity: CacheIdentity


def plan_precompute(
    config: PrecomputeConfig, teacher: LiveTeacher, progress: Progress | None = None, encode_on: str | None = None
) -> list[ChunkRef]:
    """Write the cache's manifest and tables, or check them against the existing cache.

    An existing cache may have more views than ``config`` names.

    Args:
        encode_on: type of the device that will encode, as torch names it. Default: the teacher's.

    Returns:
        The pending chunks.

    Raises:
        UsageError: crop settings without random crops.
        CacheMismatchError: the existing cache has another identity, fewer views or other crops; or an import began
            it, and the teacher would encode the missing rows to other bytes.
    """
    refuse_to_mix(config.cache)
    origin = origin_of_reused(config, teacher)
    planned = read_dataset(config, teacher, progress)
    _tell_problems(planned.dataset)
    made_with = library_versions(teacher.preprocess.decoder) | origin
    writer = _planned(config, encode_on or teacher.device.type, planned, made_with)
    pending = _pending(writer)
    require_one_origin(config, origin, writer.manifest, pending)
    return pending


def _tell_problems(dataset: SampleSet) -> None:
    for problem in dataset.problems:
        event(_LOG, logging.WARNING, "problem in the dataset", **asdict(problem))


def origin_of_reused(config: PrecomputeConfig, teacher: LiveTeacher) -> dict[str, str]:
    """Return the origin of imported rows to record, if the reused cache has any. Reads manifests only.

    Raises:
        NotReusableError: the reused cache has another teacher, preprocessing, tokenizer or dtype.
        CacheError: its manifest cannot be read.
    """
    if config.reuse is None:
        return {}
    have = read_manifest(open_files(config.reuse))
    # dataset and views are compared row by row, once the files are read
    compared = {
        "teacher": teacher.identity(),
        "preprocess": teacher.preprocess.identity(),
        "tokenizer": teacher.tokenizer_identity(),
        "targets": asked_targets(config),
    }
    require_reusable(have, config.reuse, have.identity.model_copy(update=compared))
    imported = have.made_with.get(IMPORTED)
    if not imported:
        return {}
    by_way_of = "; copied from cache"
    return {IMPORTED: imported if by_way_of in imported else f"{imported}{by_way_of} {have.digest[:12]}"}


def require_one_origin(
    config: PrecomputeConfig, origin: dict[str, str], manifest: CacheManifest, pending: Sequence[ChunkRef]
) -> None:
    """Check that a cache will not mix imported and encoded rows. Reads and writes nothing.

    Args:
        origin: result of :func:`origin_of_reused`.
        manifest: manifest of the cache to fill.
        pending: its pending chunks.

    Raises:
        CacheMismatchError: imported rows would be copied into a cache that was begun without them, or only the import
            has the missing rows.
    """
    if origin and pending and IMPORTED not in manifest.made_with:
        raise CacheMismatchError(
            f"{config.cache}: was begun without the rows of {config.reuse}, of which some were imported, and would not "
            "say so. Leave --reuse out, or encode to a new path."
        )
    if any(ref.view == 0 for ref in pending):
        _refuse_imported(config.cache, manifest)


def refuse_to_mix(cache: str) -> None:
    """Check that the cache is not an unfinished import, which only the import can finish.

    Raises:
        CacheMismatchError: the remedy is in the message.
    """
    try:
        manifest = read_manifest(open_files(cache))
    except CacheNotFoundError:
        return
    if not manifest.sealed:
        _refuse_imported(cache, manifest)


def _refuse_imported(cache: str, manifest: CacheManifest) -> None:
    if manifest.imported_sha256:
        state = "are damaged" if manifest.sealed else "are not all there yet"
        raise CacheMismatchError(
            f"{cache}: its rows were imported ({manifest.made_with.get(IMPORTED)}) and {state}. Run the same "
            "teacher-cache import command again; or encode to a new path."
        )


def read_dataset(config: PrecomputeConfig, teacher: LiveTeacher, progress: Progress | None = None) -> PlannedDataset:
    """Read and digest a dataset's files, and return the tables and identity of its cache. Writes nothing.

    Raises:
        UsageError: crop settings without random crops; or as
            ``teacher_cache.pipeline.data.datasets.samples.load_samples``.
    """
    views = asked_views(config)

    def count(done: int, total: int) -> None:
        if progress is not None:
            progress("check files", done, total)

    spec = DatasetSpec.parse(config.dataset)
    dataset, digests = load_samples(spec, count)
    tables = dataset_tables(dataset, digests)
    identity = CacheIdentity(
        teacher=teacher.identity(),
        preprocess=teacher.preprocess.identity(),
        tokenizer=teacher.tokenizer_identity(),
        views=views,
        targets=asked_targets(config),
        dataset=dataset_identity(spec, tables),
    )
    return PlannedDataset(spec, dataset, tables, identity)


def plan_dataset(
    config: PrecomputeConfig, device: str, planned: PlannedDataset, made_with: dict[str, str]
) -> list[ChunkRef]:
    """Plan as :func:`plan_precompute` does, for a dataset that is already read.

    Args:
        device: type of the device that will encode, as torch names it.
        made_with: versions of the libraries, for a new manifest.
    """
    return _pending(_planned(config, device, planned, made_with))


def _planned(
    config: PrecomputeConfig, device: str, planned: PlannedDataset, made_with: dict[str, str]
) -> EmbeddingWriter:
    """Write manifest and tables, or check the existing ones; return a writer of the cache."""
    identity, source = planned.identity, Source(dataset=str(planned.spec), image_root=planned.dataset.root)

    def plan(layout: Layout) -> CacheManifest:
        return plan_cache(config.cache, identity, layout, source, planned.tables, made_with)

    layout = asked_layout(config, identity, device)
    try:
        try:
            manifest = plan(layout)
        except CacheMismatchError:
            now = asked_layout(config, identity, device)
            if now == layout:
                raise
            manifest = plan(now)  # another process planned it first, with its own device's defaults
    except CacheMismatchError as error:
        lost = [problem for problem in planned.dataset.problems if problem.lost_image]
        if not lost:
            raise
        # the most frequent reason: a share that is not mounted, or a server that is down
        raise CacheMismatchError(
            f"{error} {len(lost)} images of the dataset have no row now, the first: {lost[0].where}: {lost[0].detail}."
        ) from error
    return EmbeddingWriter(config.cache, manifest)


def _pending(writer: EmbeddingWriter) -> list[ChunkRef]:
    """Report the rows to telemetry and return the pending chunks."""
    pending = writer.pending()
    rows = Counter({"image": 0, "text": 0})
    for ref in pending:
        rows[ref.tower] += len(ref.rows(writer.manifest.layout))
    for tower, count in rows.items():
        event(_LOG, logging.DEBUG, "rows planned", tower=tower, num_rows=count)
    return pending


def chunk_spans(pending: Sequence[ChunkRef], chunks_per_span: int) -> list[list[ChunkRef]]:
    """Cut pending chunks into spans for separate tasks, each within one tower.

    All views of the same images stay in one span, so that an image is read once.
    """
    spans: list[list[ChunkRef]] = []
    for stretch in stretches_of(pending):
        if spans and len(spans[-1]) + len(stretch) <= chunks_per_span and spans[-1][0].tower == stretch[0].tower:
            spans[-1].extend(stretch)
        else:
            spans.append(stretch)
    return spans


def dataset_tables(dataset: SampleSet, digests: list[str]) -> dict[str, pa.Table]:
    """Return a cache's tables of samples, captions and problems. The same dataset gives the same tables."""
    samples = dataset.samples
    counts = [len(sample.captions) for sample in samples]
    texts = [caption for sample in samples for caption in sample.captions]
    return {
        SAMPLES: pa.table(
            {
                "row": np.arange(len(samples)),
                "sample_id": [sample.sample_id for sample in samples],
                "uri": [sample.uri for sample in samples],
                "offset": [sample.offset for sample in samples],
                "length": [sample.length for sample in samples],
                "content_sha256": digests,
                "split": [sample.split for sample in samples],
            }
        ),
        CAPTIONS: pa.table(
            {"row": np.arange(len(texts)), "image_row": np.repeat(np.arange(len(samples)), counts), "text": texts}
        ),
        PROBLEMS: pa.table(
            {
                "kind": pa.array([problem.kind for problem in dataset.problems], pa.string()),
                "where": pa.array([problem.where for problem in dataset.problems], pa.string()),
                "detail": pa.array([problem.detail for problem in dataset.problems], pa.string()),
                "lost_image": pa.array([problem.lost_image for problem in dataset.problems], pa.bool_()),
            }
        ),
    }


def dataset_identity(spec: DatasetSpec, tables: dict[str, pa.Table]) -> DatasetIdentity:
    """Return the dataset part of a cache's identity."""
    samples, captions = tables[SAMPLES], tables[CAPTIONS]
    return DatasetIdentity(
        kind=spec.kind,
        images=samples.num_rows,
        captions=captions.num_rows,
        splits=dict(Counter(samples["split"].to_pylist())),
        samples_sha256=samples_sha256(samples),
        captions_sha256=captions_sha256(captions),
    )


def asked_targets(config: PrecomputeConfig) -> TargetsIdentity:
    """Return the storage type of the embeddings: from ``config``, else the existing cache, else float16."""
    if config.dtype is not None:
        return TargetsIdentity(dtype=config.dtype)
    try:
        return read_manifest(open_files(config.cache)).identity.targets
    except CacheNotFoundError:
        return TargetsIdentity()


def asked_views(config: PrecomputeConfig) -> ViewsIdentity:
    """Return number and settings of the views: from ``config``, else the existing cache, else the reused one.

    Raises:
        UsageError: crop settings without random crops.
        CacheMismatchError: the cache has fewer views, and views cannot be added.
    """
    have, drawn_as = ViewsIdentity(policy="evaluation"), None
    try:
        manifest = read_manifest(open_files(config.cache))
        have = drawn_as = manifest.identity.views
        _require_views(config, manifest)
    except CacheNotFoundError:
        if config.reuse is not None:
            drawn_as = read_manifest(open_files(config.reuse)).identity.views
    count = config.views or have.count
    settings = {name: getattr(config, setting) for setting, name in CROP_SETTINGS.items()}
    if count == 1:
        if any(value is not None for value in settings.values()):
            raise UsageError(
                "crop_scale, crop_ratio, crop_flip and view_seed are of random crops, and there are none in 1 view: "
                "ask for --views 2 or more, or leave them out"
            )
        return ViewsIdentity(policy="evaluation")
    recorded = {} if drawn_as is None else drawn_as.fields()
    drawn = {name: recorded.get(name, _CROPS[name]) if value is None else value for name, value in settings.items()}
    return ViewsIdentity(policy="random-resized-crop", count=count, **drawn)


def _require_views(config: PrecomputeConfig, manifest: CacheManifest) -> None:
    """Check that a cache has the views that ``config`` names.

    Raises:
        CacheMismatchError: it has fewer. The message contains the command that makes a cache with all of them.
    """
    count = manifest.identity.views.count
    if config.views is None or config.views <= count:
        return
    way_out = "Leave --views out to finish it, or encode to a new path."
    if manifest.sealed:
        identity = manifest.identity
        values: dict[str, Any] = {
            "dataset": config.dataset,
            "teacher": config.teacher,
            "pretrained": config.pretrained,
            "precision": identity.teacher.precision,
            "decoder": identity.preprocess.decoder,
            "dtype": identity.targets.dtype,
            "views": config.views,
            "reuse": config.cache,
            "cache": "NEW",
        }
        flags = shlex.join(word for name, value in values.items() if value for word in (f"--{name}", str(value)))
        way_out = (
            "Make a new cache that copies its rows; the teacher then encodes the other views alone: teacher-cache "
            f"precompute {flags}"
        )
    raise CacheMismatchError(
        f"{config.cache}: views.count: {count} in the cache, {config.views} asked for, and a cache never changes. "
        f"{way_out}"
    )


def asked_layout(config: PrecomputeConfig, identity: CacheIdentity, device: str) -> Layout:
    """Return the layout: chunks and batches from ``config``, else from the existing cache, else by default."""
    rows = identity.dataset
    fresh = new_layout(config, device, identity.teacher.embed_dim, identity.views.count, rows.images, rows.captions)
    try:
        have = read_manifest(open_files(config.cache)).layout
    except CacheNotFoundError:
        return fresh
    configured = {
        "image_chunk_rows": config.chunk_rows,
        "text_chunk_rows": config.chunk_rows,
        "batch_rows": config.batch_size,
    }
    defaults = {name: getattr(have, name) for name, value in configured.items() if value is None}
    return fresh.model_copy(update={**defaults, "text_order": have.text_order})


def new_layout(
    config: PrecomputeConfig, device: str, embed_dim: int, views: int, image_rows: int, text_rows: int
) -> Layout:
    """Return the layout of a new cache: chunks and batches from ``config``, else by rows and type of device."""
    return Layout(
        embed_dim=embed_dim,
        views=views,
        image_rows=image_rows,
        text_rows=text_rows,
        image_chunk_rows=config.chunk_rows or default_chunk_rows(image_rows),
        text_chunk_rows=config.chunk_rows or default_chunk_rows(text_rows),
        batch_rows=config.batch_size or default_batch_rows(device),
        text_order="characters",
        embedding_dtype=asked_targets(config).layout_dtype,
    )


def default_chunk_rows(rows: int) -> int:
    """Return 4,096, or fewer for a small dataset: about 16 chunks, so that a stopped run loses little."""
    size = _CHUNK_ROWS
    while size > 64 and rows < 16 * size:
        size //= 2
    return size


def default_batch_rows(device: str) -> int:
    """Return the rows per forward pass on a type of device, as torch names it."""
    # on a CPU the activations of 16 images fit its caches; more images only cost memory
    return 16 if device == "cpu" else 256


def library_versions(decoder: str = PILLOW) -> dict[str, str]:
    """Return the versions of the libraries that affect pixels and rows, for a manifest.

    Args:
        decoder: decoder of the images.
    """
    names: tuple[str, ...] = ("torch", "torchvision", "open_clip_torch", "numpy", "pyarrow", "zarr", "teacher-cache")
    if decoder == JPEG_SCALED:
        names = (*names, "simplejpeg")
    return {"python": platform.python_version(), "pillow": pillow_version, **{name: version(name) for name in names}}
