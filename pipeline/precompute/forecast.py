"""What a precompute will take, before it is run: rows and bytes from the dataset's lists, hours from a short probe.

The probe is ``precompute`` itself, on a few images in a temporary folder, so that reading, decoding, the teacher and
writing overlap as they will. When the cache pays for itself follows from the teacher's own time in it: distilling
without a cache runs the teacher on each image and one caption of it in every epoch.

Which rows an earlier cache has is not guessed from a sample: every file is read for its digest, as precompute will.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
from pydantic import BaseModel, Field

from teacher_cache.pipeline.data.datasets.records import Sample, SampleSet, data_folder
from teacher_cache.pipeline.data.datasets.samples import DatasetSpec, ImageSource, digest_threads, list_samples
from teacher_cache.pipeline.models.teacher import LiveTeacher, load_teacher
from teacher_cache.pipeline.precompute.encode import encode_chunks
from teacher_cache.pipeline.precompute.plan import (
    PlannedDataset,
    Progress,
    asked_layout,
    asked_targets,
    asked_views,
    dataset_identity,
    dataset_tables,
    library_versions,
    new_layout,
    origin_of_reused,
    read_dataset,
    refuse_to_mix,
    require_one_origin,
)
from teacher_cache.pipeline.precompute.reuse import CachedChunks, CachedRows, cached_rows, count_known
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.errors import CacheNotFoundError, UsageError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.commits import COMMITS, ChunkRef, all_chunks, target_bytes
from teacher_cache.storage.format.identity import CacheIdentity, ViewsIdentity
from teacher_cache.storage.format.journal import read_note
from teacher_cache.storage.format.layout import Layout, Tower
from teacher_cache.storage.format.manifest import CacheManifest, Source
from teacher_cache.storage.format.manifest_file import read_manifest
from teacher_cache.storage.format.tables import CAPTIONS, SAMPLES, chunk_rows_sha256, table_files
from teacher_cache.storage.write.plan import plan_cache, require_same_plan
from teacher_cache.storage.write.writer import EmbeddingWriter

__all__ = ["Forecast", "ProbeRate", "epochs_to_pay", "forecast"]

_PROBE_BATCHES = 4  # per chunk of the probe; of its two chunks the first warms up


class ProbeRate(BaseModel, frozen=True):
    """Of one tower, measured."""

    rows: int = Field(description="That were timed.")
    seconds_per_row: float = Field(description="Wall clock: reading, decoding, teacher and writing, as they overlap.")
    teacher_seconds_per_row: float = Field(description="In the forward pass alone.")


class Forecast(BaseModel, frozen=True):
    """The answer of ``teacher-cache precompute --dry-run``."""

    cache: str
    dataset: str
    teacher: str
    device: str
    precision: str
    images: int = Field(description="Listed by the dataset; those that cannot be read will get no row.")
    captions: int
    views: int
    chunks: int
    image_chunk_rows: int
    text_chunk_rows: int
    target_bytes: int = Field(description="Of the embeddings.")
    table_bytes: int = Field(description="Of samples and captions, about.")
    there_bytes: int = Field(0, description="Of both, that a cache there has already.")
    free_bytes: int | None = Field(description="Where the cache will lie, if that is a local folder.")
    committed_rows: int = Field(description="Image views and captions that a cache there has already.")
    reuse: str | None = Field(None, description="Finished cache that rows are copied from.")
    rows_reused: dict[Tower, int] = Field(
        description="Copied from it, by tower: image views, and captions. The time that takes is not counted."
    )
    rows_to_encode: dict[Tower, int] = Field(description="That the teacher has to encode, by tower.")
    probe_images: int
    probe_captions: int
    probe_lost: int = Field(description="Images of the probe that could not be read.")
    image: ProbeRate
    text: ProbeRate
    check_seconds: float = Field(description="Reading every file once for its digest, before the teacher begins.")
    encode_seconds: float = Field(description="Of what is left to encode, by one process.")
    online_epoch_seconds: float = Field(
        description="What the teacher would take in each epoch of training without a cache: each image, one caption."
    )
    epochs_to_pay: int | None = Field(
        description="Student epochs, over all students, from which on the cache is cheaper."
    )

    @property
    def needed_bytes(self) -> int:
        """What is still to be written."""
        return max(self.target_bytes + self.table_bytes - self.there_bytes, 0)

    @property
    def fits(self) -> bool:
        """Whether there is room for it; True where that is not known."""
        return self.free_bytes is None or self.needed_bytes <= self.free_bytes


def forecast(config: PrecomputeConfig, probe: int | None = None, progress: Progress | None = None) -> Forecast:
    """Measure a little and say what ``precompute`` with the same settings will take. Writes nothing that stays.

    Args:
        probe: images to encode, and as many captions; by default eight batches.
        progress: called with (stage, done, total).

    Raises:
        UsageError: dataset, teacher, device or views cannot be used, or not one image of the probe can be read.
        CacheMismatchError: a cache of another teacher or dataset is there, or named to copy rows from, which
            precompute would refuse.
        CacheError: a cache to copy rows from cannot be read, or is not finished.
    """
    refuse_to_mix(config.cache)
    views = asked_views(config)
    spec = DatasetSpec.parse(config.dataset)
    listed, planned = list_samples(spec), None
    if not listed.samples:
        raise UsageError(f"{spec}: lists no image. Check the path, and the kind before it")
    teacher = load_teacher(config.teacher, config.pretrained, config.device, config.precision, config.decoder)
    origin = origin_of_reused(config, teacher)
    began = time.perf_counter()
    if config.reuse is not None:
        planned = read_dataset(config, teacher, progress)
        listed = planned.dataset
    check_all = time.perf_counter() - began
    there = _there(config, teacher, spec, listed, planned)
    known = _known(config, planned, None if there is None else there[0])
    embed_dim, rows = teacher.identity().embed_dim, (len(listed.samples), listed.num_captions)
    layout = new_layout(config, teacher.device.type, embed_dim, views.count, *rows)
    committed: list[ChunkRef] = []
    if there is not None:
        manifest, committed = there
        layout = manifest.layout
    pending = sorted(set(all_chunks(layout)) - set(committed))
    if there is not None:
        require_one_origin(config, origin, there[0], pending)
    wanted = probe or 2 * _PROBE_BATCHES * layout.batch_rows
    drawn = np.random.default_rng(0).choice(len(listed.samples), min(wanted, len(listed.samples)), replace=False)
    source = ImageSource(data_folder(spec.root))
    began = time.perf_counter()
    samples, digests, lost = _read(source, [listed.samples[number] for number in np.sort(drawn)])
    check = (time.perf_counter() - began) / len(drawn)
    if progress is not None:
        progress("probe: read", len(samples), len(drawn))
    if not samples:
        raise UsageError(f"{spec}: not one of the {len(drawn)} images of the probe can be read, the first: {lost}")
    part = SampleSet(spec.kind, source.root, samples=samples)
    image, text, per_image, per_caption = _probe(config, teacher, spec, part, listed, digests, layout, progress)

    tables = round(per_image * layout.image_rows + per_caption * layout.text_rows)
    done: dict[Tower, int] = {"image": 0, "text": 0}
    for ref in committed:
        done[ref.tower] += len(ref.rows(layout))
    copied: dict[Tower, int] = {"image": 0, "text": 0} if known is None else count_known(known, layout, pending)
    left: dict[Tower, int] = {
        "image": layout.image_rows * layout.views - done["image"] - copied["image"],
        "text": layout.text_rows - done["text"] - copied["text"],
    }
    encode = left["image"] * image.seconds_per_row + left["text"] * text.seconds_per_row
    check = check_all if planned else check * len(listed.samples)
    online = len(listed.samples) * (image.teacher_seconds_per_row + text.teacher_seconds_per_row)
    return Forecast(
        cache=config.cache,
        dataset=str(spec),
        teacher=" ".join(filter(None, (teacher.name, teacher.pretrained))),
        device=str(teacher.device),
        precision=teacher.precision,
        images=layout.image_rows,
        captions=layout.text_rows,
        views=layout.views,
        chunks=layout.num_chunks,
        image_chunk_rows=layout.image_chunk_rows,
        text_chunk_rows=layout.text_chunk_rows,
        target_bytes=target_bytes(layout, all_chunks(layout)),
        table_bytes=tables,
        # a manifest is written after its tables
        there_bytes=target_bytes(layout, committed) + (tables if there is not None else 0),
        free_bytes=_free_bytes(config.cache),
        committed_rows=sum(done.values()),
        reuse=config.reuse,
        rows_reused=copied,
        rows_to_encode=left,
        probe_images=len(samples),
        probe_captions=text.rows,
        probe_lost=len(drawn) - len(samples),
        image=image,
        text=text,
        check_seconds=check,
        encode_seconds=encode,
        online_epoch_seconds=online,
        epochs_to_pay=epochs_to_pay(check + encode, online),
    )


def epochs_to_pay(cache_seconds: float, online_epoch_seconds: float) -> int | None:
    """The first number of epochs whose teacher would take longer than the cache; None without a teacher's time."""
    return math.floor(cache_seconds / online_epoch_seconds) + 1 if online_epoch_seconds > 0 else None


def _read(source: ImageSource, samples: Sequence[Sample]) -> tuple[list[Sample], list[str], str]:
    """Those that can be read, with their digests; and why the first of the others cannot."""

    def digest(sample: Sample) -> str | OSError:
        try:
            return hashlib.sha256(source.read(sample.uri, sample.offset, sample.length)).hexdigest()
        except OSError as error:
            return error

    with ThreadPoolExecutor(digest_threads(source, samples)) as pool:
        found = list(pool.map(digest, samples))
    pairs = [(sample, each) for sample, each in zip(samples, found, strict=True) if isinstance(each, str)]
    lost = next(
        (f"{sample.uri}: {each}" for sample, each in zip(samples, found, strict=True) if not isinstance(each, str)), ""
    )
    return [sample for sample, _ in pairs], [each for _, each in pairs], lost


def _probe(
    config: PrecomputeConfig,
    teacher: LiveTeacher,
    spec: DatasetSpec,
    part: SampleSet,
    listed: SampleSet,
    digests: list[str],
    like: Layout,
    progress: Progress | None,
) -> tuple[ProbeRate, ProbeRate, float, float]:
    """Rates of images and captions, and bytes of tables per image and per caption: precompute on some images."""
    images = len(part.samples)
    # as many captions as images: those of a few say as much
    texts = [sample.captions[0] for sample in part.samples if sample.captions]
    if len(texts) < images:  # of labelled images one has all captions
        texts = list(islice(chain.from_iterable(sample.captions for sample in listed.samples), images))
    captions = len(texts)
    spread = [replace(sample, captions=tuple(texts[at::images])) for at, sample in enumerate(part.samples)]
    few = replace(part, samples=spread)
    tables = dataset_tables(few, digests)
    # all captions of an image, which are more alike than those of several, where there are more of them
    whole = dataset_tables(part, digests) if part.num_captions > captions else tables
    sizes = {name: sum(len(data) for data, _ in table_files(name, table).values()) for name, table in whole.items()}
    per_caption = sizes.pop(CAPTIONS) / max(whole[CAPTIONS].num_rows, 1)
    targets = asked_targets(config)
    identity = CacheIdentity(
        teacher=teacher.identity(),
        preprocess=teacher.preprocess.identity(),
        tokenizer=teacher.tokenizer_identity(),
        views=ViewsIdentity(policy="evaluation"),
        targets=targets,
        dataset=dataset_identity(spec, tables),
    )
    with tempfile.TemporaryDirectory(prefix="teacher-cache-probe-") as folder:
        chunks = {"image_chunk_rows": -(-images // 2), "text_chunk_rows": max(-(-captions // 2), 1)}
        layout = like.model_copy(update={"views": 1, "image_rows": images, "text_rows": captions, **chunks})
        cache = str(Path(folder) / "probe.cache")
        source = Source(dataset=str(spec), image_root=part.root)
        plan_cache(cache, identity, layout, source, tables, library_versions())
        mine = config.model_copy(update={"cache": cache, "reuse": None})  # the teacher is what is timed
        rates = {tower: _rate(mine, teacher, tower, progress) for tower in ("image", "text")}
    return rates["image"], rates["text"], sum(sizes.values()) / images, per_caption


def _rate(config: PrecomputeConfig, teacher: LiveTeacher, tower: Tower, progress: Progress | None) -> ProbeRate:
    writer = EmbeddingWriter(config.cache)
    refs = [ref for ref in writer.pending() if ref.tower == tower]
    if not refs:
        return ProbeRate(rows=0, seconds_per_row=0.0, teacher_seconds_per_row=0.0)
    if len(refs) > 1:
        encode_chunks(config, teacher, refs[:1])  # the first pass allocates and chooses kernels
    timed = refs[-1]
    encode_chunks(config, teacher, [timed])
    rows = len(timed.rows(writer.manifest.layout))
    # by its note, from the first image asked for to the commit: opening a cache is paid once, not for each chunk
    cost = read_note(writer.files, timed.name)
    if progress is not None:
        progress(f"probe: {tower}s", rows, rows)
    return ProbeRate(
        rows=rows,
        seconds_per_row=cost.seconds / rows,
        teacher_seconds_per_row=cost.teacher_seconds / rows,
    )


def _known(
    config: PrecomputeConfig, planned: PlannedDataset | None, there: CacheManifest | None
) -> CachedRows | CachedChunks | None:
    """What can be copied from the cache that is named, if one is.

    Raises:
        CacheError: as ``teacher_cache.pipeline.precompute.reuse.CachedRows``.
    """
    if config.reuse is None or planned is None:
        return None
    identity = planned.identity
    if there is not None and there.layout.views > identity.views.count:  # it is taken as it is
        identity = identity.model_copy(update={"views": there.identity.views})
    tables = planned.tables
    towers: dict[Tower, str] = {"image": SAMPLES, "text": CAPTIONS}
    return cached_rows(
        config.reuse,
        identity,
        lambda table, name: tables[table][name],
        lambda tower, rows: chunk_rows_sha256(tables[towers[tower]].slice(rows.start, len(rows)), tower),
    )


def _there(
    config: PrecomputeConfig,
    teacher: LiveTeacher,
    spec: DatasetSpec,
    listed: SampleSet,
    planned: PlannedDataset | None,
) -> tuple[CacheManifest, list[ChunkRef]] | None:
    """The cache that is there, if there is one, and its committed chunks.

    Raises:
        CacheMismatchError: it is of another teacher, dtype, crops, chunks or batches; of other captions or splits, or
            of more rows than the dataset lists. Fewer may be all that could be read.
    """
    cache = config.cache
    files = open_files(cache)
    try:
        manifest = read_manifest(files)
    except CacheNotFoundError:
        return None
    teacher.require(manifest.identity, cache)
    have = manifest.identity.dataset
    if planned is not None:
        asked = planned.identity.dataset
    elif have.images == len(listed.samples):
        # all but the images' digests, for which every file would be read
        asked = dataset_identity(spec, dataset_tables(listed, [""] * have.images))
        asked = asked.model_copy(update={"samples_sha256": have.samples_sha256})
    else:
        most = {"images": min(have.images, len(listed.samples)), "captions": min(have.captions, listed.num_captions)}
        asked = have.model_copy(update=most)
    wanted = {"dataset": asked, "targets": asked_targets(config), "views": asked_views(config)}
    identity = manifest.identity.model_copy(update=wanted)
    require_same_plan(manifest, identity, asked_layout(config, identity, teacher.device.type), cache)
    names = set(files.list(COMMITS))
    return manifest, [ref for ref in all_chunks(manifest.layout) if ref.commit_key in names]


def _free_bytes(cache: str) -> int | None:
    if "://" in cache:
        return None
    folder = Path(cache).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
