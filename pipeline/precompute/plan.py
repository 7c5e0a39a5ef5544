"""Planning of a cache: read the dataset, check the teacher, write manifest and tables, list the pending chunks."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from teacher_cache.pipeline.data.datasets.records import SampleSet, WholeList
from teacher_cache.pipeline.data.datasets.samples import Place, load_samples
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec
from teacher_cache.pipeline.models.teacher import LiveTeacher
from teacher_cache.pipeline.precompute.lost_samples import hint_at_gaps, require_few_problems
from teacher_cache.pipeline.precompute.reuse import cached_rows, count_known, dataset_changes, require_reusable
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.errors import CacheMismatchError, CacheNotFoundError, UsageError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.format.identity import CacheIdentity, DatasetIdentity, TargetsIdentity, ViewsIdentity
from teacher_cache.storage.format.layout import Layout, Tower, planned_layout
from teacher_cache.storage.format.manifest import IMPORTED, CacheManifest, Source
from teacher_cache.storage.format.manifest_file import read_manifest
from teacher_cache.storage.format.tables import (
    CAPTIONS,
    KIND,
    PROBLEMS,
    SAMPLES,
    SCHEMAS,
    captions_sha256,
    chunk_rows_sha256,
    read_table,
    samples_sha256,
)
from teacher_cache.storage.observe.logs import command_line, event, logger, say
from teacher_cache.storage.observe.quantities import counted
from teacher_cache.storage.read.several.parts import named_manifest
from teacher_cache.storage.write.plan import plan_cache
from teacher_cache.storage.write.writer import EmbeddingWriter

Progress = Callable[[str, int, int], None]
ReadDataset = tuple[SampleSet, list[str]]
"""Samples and digests, as :func:`teacher_cache.pipeline.data.datasets.samples.load_samples` returns them."""

_LOG = logger("precompute")

CROP_SETTINGS = {"crop_scale": "scale", "crop_ratio": "ratio", "crop_flip": "flip", "view_seed": "seed"}
"""Settings of precompute, and their names in the identity (``ViewsIdentity``)."""
# milder than ImageNet's 0.08: a caption describes the whole picture, and open_clip crops by 0.9 and more
_CROPS: dict[str, Any] = {"scale": (0.3, 1.0), "ratio": (3 / 4, 4 / 3), "flip": 0.5, "seed": 0}
_CHUNK_ROWS = 4096  # 4 MiB at 512 float16: larger chunks read no faster


@dataclass(frozen=True)
class PlanSettings:
    """Settings of a run, completed from the existing cache and from the reused one. Reads each manifest once.

    Attributes:
        have: manifest of the existing cache.
        reused: manifest of the cache that rows are copied from.
    """

    config: PrecomputeConfig
    have: CacheManifest | None
    reused: CacheManifest | None

    @classmethod
    def of(cls, config: PrecomputeConfig) -> PlanSettings:
        """Read the manifests.

        Raises:
            UsageError: crop settings without random crops.
            CacheMismatchError: the cache has fewer views, and views cannot be added.
            CacheError: the reused cache cannot be read.
        """
        reused = None if config.reuse is None else named_manifest(config.reuse)
        settings = cls(config, existing_manifest(config.cache), reused)
        _ = settings.views
        return settings

    @property
    def targets(self) -> TargetsIdentity:
        """Storage type of the embeddings: from ``config``, else the existing cache, else float16."""
        if self.config.dtype is not None:
            return TargetsIdentity(dtype=self.config.dtype)
        return TargetsIdentity() if self.have is None else self.have.identity.targets

    @property
    def goes_on(self) -> bool:
        """True for an unfinished cache, whose remaining images are compared with their digests when they are encoded.

        A sealed cache encodes nothing, and imported rows are not decoded: there only digests show a changed image.
        """
        return self.have is not None and not self.have.sealed and not self.have.imported_sha256

    @property
    def views(self) -> ViewsIdentity:
        """Number and crops of the views: from ``config``, else the existing cache, else the reused one."""
        config, drawn_as = self.config, self.have or self.reused
        if self.have is not None:
            _require_views(config, self.have)
        settings = {name: getattr(config, setting) for setting, name in CROP_SETTINGS.items()}
        count = config.views or (1 if self.have is None else self.have.identity.views.count)
        if count == 1:
            if any(value is not None for value in settings.values()):
                raise UsageError(
                    "crop_scale, crop_ratio, crop_flip and view_seed are of random crops, and there are none in 1 "
                    "view: ask for --views 2 or more, or leave them out"
                )
            return ViewsIdentity(policy="evaluation")
        recorded = {} if drawn_as is None else drawn_as.identity.views.fields()
        drawn = {name: recorded.get(name, _CROPS[name]) if value is None else value for name, value in settings.items()}
        return ViewsIdentity(policy="random-resized-crop", count=count, **drawn)

    def identity(self, teacher: LiveTeacher, dataset: DatasetIdentity) -> CacheIdentity:
        """Return the identity of the cache of a dataset."""
        return CacheIdentity(
            teacher=teacher.identity(),
            preprocess=teacher.preprocess.identity(),
            tokenizer=teacher.tokenizer_identity(),
            views=self.views,
            targets=self.targets,
            dataset=dataset,
        )

    def layout(self, identity: CacheIdentity, device: str, whole: WholeList | None = None) -> Layout:
        """Return the layout: chunks and batches from ``config``, else the existing cache, else by default.

        Args:
            device: type of the device that will encode, as torch names it.
            whole: list of the dataset that this is a part of: all its parts have chunks of one size.

        Raises:
            UsageError: a cache cannot have so many rows or chunks, or rows so wide.
        """
        config, rows = self.config, identity.dataset
        images, captions = whole[:2] if whole else (rows.images, rows.captions)
        fresh = planned_layout(
            config.cache,
            embed_dim=identity.teacher.embed_dim,
            views=identity.views.count,
            image_rows=rows.images,
            text_rows=rows.captions,
            image_chunk_rows=config.chunk_rows or default_chunk_rows(images),
            text_chunk_rows=config.chunk_rows or default_chunk_rows(captions),
            batch_rows=config.batch_size or default_batch_rows(device),
            text_order="characters",
            embedding_dtype=self.targets.layout_dtype,
            compressor="blosc" if config.compress else None,
        )
        if self.have is None:
            return fresh
        configured: dict[str, int | None] = {"batch_rows": config.batch_size}
        configured |= dict.fromkeys(("image_chunk_rows", "text_chunk_rows"), config.chunk_rows)
        defaults = {name: getattr(self.have.layout, name) for name, value in configured.items() if value is None}
        return fresh.model_copy(update={**defaults, "text_order": self.have.layout.text_order})


@dataclass(frozen=True)
class PlannedDataset:
    """Dataset whose files are digested, now or by its cache's planner, with the tables and identity of its cache."""

    settings: PlanSettings
    spec: DatasetSpec
    dataset: SampleSet
    tables: dict[str, pa.Table]
    identity: CacheIdentity


def existing_manifest(cache: str) -> CacheManifest | None:
    """Return the manifest of a cache, or None if there is none."""
    try:
        return read_manifest(open_files(cache))
    except CacheNotFoundError:
        return None


def plan_precompute(
    config: PrecomputeConfig,
    teacher: LiveTeacher,
    progress: Progress | None = None,
    encode_on: str | None = None,
    read: ReadDataset | None = None,
) -> list[ChunkRef]:
    """Write the cache's manifest and tables, or check them against the existing cache.

    An existing cache may have more views than ``config`` names.

    Args:
        encode_on: type of the device that will encode, as torch names it. Default: the teacher's.
        read: the dataset's files as read just now. Default: they are read here.

    Returns:
        The pending chunks.

    Raises:
        UsageError: crop settings without random crops.
        CacheMismatchError: the existing cache has another identity, fewer views or other crops; or an import began
            it, and the teacher would encode the missing rows to other bytes.
    """
    settings = PlanSettings.of(config)
    origin = origin_of_reused(settings, teacher)
    planned = read_dataset(settings, teacher, progress, read)
    for problem in planned.dataset.problems:
        event(_LOG, logging.WARNING, "problem in the dataset", **asdict(problem))
    made_with = teacher.library_versions() | origin
    manifest, pending = plan_dataset(planned, encode_on or teacher.device.type, made_with)
    require_one_origin(config, origin, manifest, pending)
    if config.reuse is not None and pending:
        copied = copied_rows(planned, manifest.layout, pending)
        say(reuse_line(settings, copied, rows_by_tower(manifest.layout, pending)))
    return pending


def origin_of_reused(settings: PlanSettings, teacher: LiveTeacher) -> dict[str, str]:
    """Return the origin of imported rows to record, if the reused cache has any. Reads no rows.

    Raises:
        CacheMismatchError: the cache to fill is an unfinished import, which only the import can finish.
        NotReusableError: the reused cache has another teacher, preprocessing, tokenizer or dtype.
    """
    config, have = settings.config, settings.reused
    if settings.have is not None and not settings.have.sealed:
        _refuse_imported(config.cache, settings.have)
    if config.reuse is None or have is None:
        return {}
    # dataset and views are compared row by row, once the files are read
    require_reusable(have, config.reuse, settings.identity(teacher, have.identity.dataset))
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


def _refuse_imported(cache: str, manifest: CacheManifest) -> None:
    if manifest.imported_sha256:
        state = "are damaged" if manifest.sealed else "are not all there yet"
        raise CacheMismatchError(
            f"{cache}: its rows were imported ({manifest.made_with.get(IMPORTED)}) and {state}. Run the same "
            "teacher-cache import command again; or encode to a new path."
        )


def read_dataset(
    settings: PlanSettings, teacher: LiveTeacher, progress: Progress | None = None, read: ReadDataset | None = None
) -> PlannedDataset:
    """Read and digest a dataset's files, and return the tables and identity of its cache. Writes nothing.

    With ``read``, no file is read. Nor are images that an unfinished cache lists at the same place: each is compared
    with its digest when it is encoded.

    Raises:
        UsageError: as ``teacher_cache.pipeline.data.datasets.samples.load_samples``.
        CacheError: more images cannot be used than the settings allow.
    """

    def checked(done: int, total: int) -> None:
        if progress is not None:
            progress("check files", done, total)

    spec = DatasetSpec.parse(settings.config.dataset)
    dataset, digests = read or load_samples(spec, checked, _known_digests(settings))
    if settings.have is None:
        require_few_problems(settings.config, spec, dataset)
        hint_at_gaps(spec, dataset)
    tables = dataset_tables(dataset, digests)
    return PlannedDataset(settings, spec, dataset, tables, settings.identity(teacher, dataset_identity(spec, tables)))


def _known_digests(settings: PlanSettings) -> dict[Place, str]:
    """Return the recorded sha256 of the images that need not be read."""
    have = settings.have
    if have is None or not settings.goes_on:
        return {}
    columns = ("sample_id", "uri", "offset", "length", "content_sha256")
    table = read_table(open_files(settings.config.cache), have, SAMPLES, columns)
    *places, digests = (table[name].to_pylist() for name in columns)
    return dict(zip(zip(*places, strict=True), digests, strict=True))


def plan_dataset(
    planned: PlannedDataset, device: str, made_with: dict[str, str]
) -> tuple[CacheManifest, list[ChunkRef]]:
    """Write manifest and tables, or check the existing ones; return the manifest and the pending chunks.

    Args:
        device: type of the device that will encode, as torch names it.
        made_with: versions of the libraries, for a new manifest.

    Raises:
        CacheMismatchError: as :func:`plan_precompute`.
    """
    identity, settings, whole = planned.identity, planned.settings, planned.dataset.whole
    cache, source = settings.config.cache, Source(dataset=str(planned.spec), image_root=planned.dataset.root)

    def plan(layout: Layout) -> CacheManifest:
        return plan_cache(cache, identity, layout, source, planned.tables, made_with)

    require_same_dataset(planned)
    layout = settings.layout(identity, device, whole)
    try:
        manifest = plan(layout)
    except CacheMismatchError:
        now = replace(settings, have=existing_manifest(cache)).layout(identity, device, whole)
        if now == layout:
            raise
        manifest = plan(now)  # another process planned it first, with its own device's defaults
    pending = EmbeddingWriter(cache, manifest).pending()
    for tower, num_rows in rows_by_tower(manifest.layout, pending).items():
        event(_LOG, logging.DEBUG, "rows planned", tower=tower, num_rows=num_rows)
    return manifest, pending


def copied_rows(planned: PlannedDataset, layout: Layout, pending: Sequence[ChunkRef]) -> dict[Tower, int]:
    """Count the rows of pending chunks that are copied from the reused cache, by tower.

    Raises:
        CacheError: as ``teacher_cache.pipeline.precompute.reuse.CachedRows``.
    """
    settings, tables = planned.settings, planned.tables
    if settings.config.reuse is None:
        return {"image": 0, "text": 0}
    identity, have = planned.identity, settings.have
    if have is not None and have.layout.views > identity.views.count:  # its further views stay
        identity = identity.model_copy(update={"views": have.identity.views})
    towers: dict[Tower, str] = {"image": SAMPLES, "text": CAPTIONS}
    known = cached_rows(
        settings.config.reuse,
        identity,
        lambda table, name: tables[table][name],
        lambda tower, rows: chunk_rows_sha256(tables[towers[tower]].slice(rows.start, len(rows)), tower),
    )
    return count_known(known, layout, pending)


def reuse_line(settings: PlanSettings, copied: dict[Tower, int], pending: dict[Tower, int]) -> str:
    """Return how many of the pending rows are copied, and how many encoded, in a sentence."""
    assert settings.reused is not None
    copied_views, views = settings.reused.layout.views, settings.views.count
    encoded: dict[Tower, int] = {tower: pending[tower] - copied[tower] for tower in pending}
    nouns = ("image" if views == 1 else "view", "caption")
    rows = (f"{counted(of['image'], nouns[0])} and {counted(of['text'], nouns[1])}" for of in (copied, encoded))
    advice = (
        f". It has {copied_views} views, this cache gets {views}: --views {copied_views} copies all"
        if copied_views > views
        else ""
    )
    return f"from {settings.config.reuse}: {' copied, '.join(rows)} to encode{advice}"


def require_same_dataset(planned: PlannedDataset) -> None:
    """Check that an existing cache has the rows of the dataset, if its teacher is the one asked for.

    Raises:
        CacheMismatchError: it has other rows. The message counts them, and has the command that makes a cache of the
            dataset.
    """
    settings, have = planned.settings, planned.settings.have
    if have is None:
        return
    config, wanted = settings.config, planned.identity.model_copy(update={"views": have.identity.views})
    differences = have.identity.differences(wanted)
    if not differences or any(not difference.field.startswith("dataset.") for difference in differences):
        return  # plan_cache names each other difference
    rows, recorded = planned.identity.dataset, have.identity.dataset
    changes = dataset_changes(open_files(config.cache), have, planned.tables)
    removed = set(changes.removed)
    lost = [problem for problem in planned.dataset.problems if problem.where in removed]
    if 2 * changes.kept < recorded.images and not lost:
        raise CacheMismatchError(
            f"{config.cache}: is of {counted(recorded.images, 'image')} of {have.source.dataset}, asked for "
            f"{'is' if rows.images == 1 else 'are'} {rows.images:,} of {planned.spec}. Choose another --cache, or name "
            "the dataset of this one."
        )
    way_out = "It is not finished: restore the dataset and run the command again, or choose another --cache."
    if have.sealed:
        job = "To add them" if changes.only_added else "To make a cache of the dataset as it is, which copies its rows"
        way_out = f"{job}: {_reuse_command(config, have, config.views or have.identity.views.count)}"
    raise CacheMismatchError(
        f"{config.cache}: the dataset lists {counted(rows.images, 'image')}, this cache holds {recorded.images:,}: "
        f"{changes.described(rows.captions - recorded.captions)}{_named_otherwise(have, planned)}."
        + "".join(f" {problem}." for problem in lost[:1])
        + f" {way_out}"
    )


def _named_otherwise(have: CacheManifest, planned: PlannedDataset) -> str:
    """Return both names of a dataset if its settings differ: they may be why."""
    old, new = have.source.dataset, str(planned.spec)
    return f" (the cache is of {old}, asked for is {new})" if old.partition("?")[2] != new.partition("?")[2] else ""


def rows_by_tower(layout: Layout, refs: Iterable[ChunkRef]) -> dict[Tower, int]:
    """Count the rows of some chunks by tower. Each view of an image counts as a row."""
    rows: dict[Tower, int] = {"image": 0, "text": 0}
    for ref in refs:
        rows[ref.tower] += len(ref.rows(layout))
    return rows


def dataset_tables(dataset: SampleSet, digests: list[str]) -> dict[str, pa.Table]:
    """Return a cache's tables of samples, captions and problems. The same dataset gives the same tables."""
    samples = dataset.samples
    counts = [len(sample.captions) for sample in samples]
    texts = [caption for sample in samples for caption in sample.captions]
    kinds = [kind for sample in samples for kind in sample.kinds]
    captions = {"row": np.arange(len(texts)), "image_row": np.repeat(np.arange(len(samples)), counts), "text": texts}
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
        CAPTIONS: pa.table(captions | ({KIND: kinds} if kinds else {})),
        PROBLEMS: pa.table(
            {name: [getattr(problem, name) for problem in dataset.problems] for name in SCHEMAS[PROBLEMS].names},
            schema=SCHEMAS[PROBLEMS],
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
        caption_kinds=dict(Counter(captions[KIND].to_pylist())) if KIND in captions.column_names else None,
    )


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
        way_out = (
            "Make a new cache that copies its rows; the teacher then encodes the other views alone: "
            f"{_reuse_command(config, manifest, config.views)}"
        )
    raise CacheMismatchError(
        f"{config.cache}: views.count: {count} in the cache, {config.views} asked for, and a cache never changes. "
        f"{way_out}"
    )


def _reuse_command(config: PrecomputeConfig, manifest: CacheManifest, views: int) -> str:
    """Return the command that makes a new cache with the rows of ``config.cache``."""
    identity = manifest.identity
    values: dict[str, Any] = {
        "dataset": config.dataset,
        "teacher": config.teacher,
        "pretrained": config.pretrained,
        "precision": identity.teacher.precision if identity.teacher.precision != "fp32" else None,
        "decoder": identity.preprocess.decoder,
        "dtype": identity.targets.layout_dtype,
        "views": views if views > 1 else None,
        "reuse": config.cache,
        "cache": "NEW",
    }
    return command_line("precompute", *(["--compress"] if config.compress else []), **values)


def default_chunk_rows(rows: int) -> int:
    """Return 4,096, or fewer for a small dataset: about 16 chunks, so that a stopped run loses little."""
    size = _CHUNK_ROWS
    while size > 64 and rows < 16 * size:
        size //= 2
    return size


def default_batch_rows(device: str) -> int:
    """Return the rows per forward pass on a type of device, as torch names it."""
    # on a CPU the activations of 16 images fit its caches; more images only cost memory
    return 16 if device == "cpu" else 1024
