"""Forecast of a precompute: counts and bytes from the dataset's lists, hours from one timed batch of each tower.

The break-even follows from the teacher's own time: distilling without a cache runs the teacher on every image and one
caption of it in every epoch.

Rows of an earlier cache are not estimated from a sample: every file is read for its digest, as in precompute.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from teacher_cache.pipeline.data.cores import decode_threads
from teacher_cache.pipeline.data.datasets.files import data_folder
from teacher_cache.pipeline.data.datasets.records import Sample, SampleSet
from teacher_cache.pipeline.data.datasets.samples import ImageSource, digest_threads, list_samples, why_none
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec, check_dataset
from teacher_cache.pipeline.data.images.decoders import open_image
from teacher_cache.pipeline.models.teacher import Encoded, LiveTeacher, load_teacher
from teacher_cache.pipeline.precompute.plan import (
    PlannedDataset,
    PlanSettings,
    Progress,
    copied_rows,
    dataset_identity,
    dataset_tables,
    origin_of_reused,
    read_dataset,
    require_one_origin,
    require_same_dataset,
    reuse_line,
    rows_by_tower,
)
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.commits import COMMITS, ChunkRef, all_chunks, target_bytes
from teacher_cache.storage.format.layout import Layout, Tower
from teacher_cache.storage.format.tables import CAPTIONS, PROBLEMS, SAMPLES, read_table, table_files
from teacher_cache.storage.observe.safe_text import printable
from teacher_cache.storage.write.plan import require_same_plan

_PROBE_BATCHES = 8  # read to estimate the bytes of tables; one of them is timed, one warms up


class ProbeRate(BaseModel, frozen=True):
    """Measured seconds of one tower."""

    rows: int = Field(description="Number of rows in the timed batch.")
    seconds_per_row: float = Field(
        description="Wall-clock seconds of a row: reading, decoding and the teacher, overlapped if it is on a GPU."
    )
    teacher_seconds_per_row: float = Field(description="Seconds of a row in the forward pass alone.")


class Forecast(BaseModel, frozen=True):
    """Result of ``teacher-cache precompute --dry-run``."""

    cache: str
    dataset: str
    teacher: str
    device: str
    precision: str
    images: int = Field(description="Images listed by the dataset; unreadable ones will get no row.")
    captions: int
    views: int
    chunks: int
    image_chunk_rows: int
    text_chunk_rows: int
    target_bytes: int = Field(description="Bytes of the embeddings, before compression.")
    compress: bool = Field(False, description="True if they will be compressed.")
    table_bytes: int = Field(description="Estimated bytes of samples and captions.")
    there_bytes: int = Field(0, description="Bytes of embeddings and tables that the cache already has.")
    free_bytes: int | None = Field(description="Free bytes on the disk of the cache; None for a URL.")
    committed_rows: int = Field(description="Image views and captions that the cache already has.")
    reuse: str | None = Field(None, description="Finished cache whose rows are copied.")
    reuse_line: str | None = Field(
        None, description="Sentence on the rows that are copied from it and those that are encoded."
    )
    rows_reused: dict[Tower, int] = Field(
        description="Copied rows by tower: image views, and captions. The time for copying is not included."
    )
    rows_to_encode: dict[Tower, int] = Field(description="Rows that the teacher must encode, by tower.")
    probe_images: int
    probe_captions: int
    probe_lost: int = Field(description="Images of the probe that could not be read.")
    image: ProbeRate
    text: ProbeRate
    check_seconds: float = Field(
        description="Seconds to read every file once for its digest, before the teacher; 0 if that was done."
    )
    encode_seconds: float = Field(description="Seconds to encode the remaining rows, by one process.")
    online_epoch_seconds: float = Field(
        description="Seconds of the teacher per epoch of training without a cache: every image, and one caption of "
        "each image with captions."
    )
    epochs_to_pay: int | None = Field(
        description="Number of epochs, over all students, from which the cache is cheaper."
    )

    @property
    def needed_bytes(self) -> int:
        """Number of bytes still to write."""
        return max(self.target_bytes + self.table_bytes - self.there_bytes, 0)

    @property
    def fits(self) -> bool:
        """True if there is room for them, or the free space is unknown."""
        return self.free_bytes is None or self.needed_bytes <= self.free_bytes


def forecast(config: PrecomputeConfig, probe: int | None = None, progress: Progress | None = None) -> Forecast:
    """Time a few batches and forecast ``precompute`` with the same settings. Writes nothing.

    Args:
        probe: number of images to read. Default: eight batches. One batch of images and one of captions is timed.
        progress: called with (stage, done, total).

    Raises:
        UsageError: dataset, teacher, device or views cannot be used, or no image of the probe can be read.
        CacheMismatchError: precompute would refuse the existing or the reused cache, for its teacher or dataset.
        CacheError: the reused cache cannot be read, or is not finished.
    """
    settings = PlanSettings.of(config)
    spec = check_dataset(config.dataset)
    listed = list_samples(spec)
    if not listed.samples:
        raise UsageError(f"{spec}: {why_none(listed.problems)}")
    teacher = load_teacher(config.teacher, config.pretrained, config.device, config.precision, config.decoder)
    origin = origin_of_reused(settings, teacher)
    began = time.perf_counter()
    if config.reuse is None:
        planned, check = _planned_unread(settings, spec, listed, teacher), None
    else:
        planned = read_dataset(settings, teacher, progress)
        check = time.perf_counter() - began
    listed = planned.dataset
    require_same_dataset(planned)
    layout, committed = _layout(planned, teacher.device.type)
    pending = sorted(set(all_chunks(layout)) - set(committed))
    if settings.have is not None:
        require_one_origin(config, origin, settings.have, pending)
    copied, waiting = copied_rows(planned, layout, pending), rows_by_tower(layout, pending)
    to_encode: dict[Tower, int] = {tower: waiting[tower] - copied[tower] for tower in waiting}

    read = _read_probe(spec, listed, probe or _PROBE_BATCHES * layout.batch_rows, progress)
    image, text = _time_towers(config, teacher, read, listed, layout)
    tables = _table_bytes(read, layout)
    if check is None:
        check = 0.0 if settings.goes_on else read.seconds_per_image * len(listed.samples)
    encode = to_encode["image"] * image.seconds_per_row + to_encode["text"] * text.seconds_per_row
    captioned = sum(1 for sample in listed.samples if sample.captions)
    online = len(listed.samples) * image.teacher_seconds_per_row + captioned * text.teacher_seconds_per_row
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
        compress=config.compress,
        table_bytes=tables,
        # a manifest is written after its tables
        there_bytes=target_bytes(layout, committed) + (tables if settings.have is not None else 0),
        free_bytes=_free_bytes(config.cache),
        committed_rows=sum(rows_by_tower(layout, committed).values()),
        reuse=config.reuse,
        reuse_line=None if config.reuse is None else reuse_line(settings, copied, waiting),
        rows_reused=copied,
        rows_to_encode=to_encode,
        probe_images=len(read.part.samples),
        probe_captions=text.rows,
        probe_lost=read.lost,
        image=image,
        text=text,
        check_seconds=check,
        encode_seconds=encode,
        online_epoch_seconds=online,
        epochs_to_pay=epochs_to_pay(check + encode, online),
    )


def epochs_to_pay(cache_seconds: float, online_epoch_seconds: float) -> int | None:
    """Return the number of epochs from which the cache is cheaper than the teacher. None: the teacher's time is 0."""
    return math.floor(cache_seconds / online_epoch_seconds) + 1 if online_epoch_seconds > 0 else None


def _planned_unread(
    settings: PlanSettings, spec: DatasetSpec, listed: SampleSet, teacher: LiveTeacher
) -> PlannedDataset:
    """Plan a dataset without reading its images: digests come from the existing cache, or are empty.

    Images that were lost when the cache was made are left out.
    """
    samples, known = listed.samples, dict[str, str]()
    if settings.have is not None:
        files, have = open_files(settings.config.cache), settings.have
        rows = read_table(files, have, SAMPLES, ["sample_id", "content_sha256"]).to_pydict()
        known = dict(zip(rows["sample_id"], rows["content_sha256"], strict=True))
        problems = read_table(files, have, PROBLEMS).to_pylist()
        lost = {problem["where"] for problem in problems if problem["lost_image"]}
        samples = [sample for sample in samples if sample.sample_id in known or printable(sample.sample_id) not in lost]
    readable = replace(listed, samples=samples)
    tables = dataset_tables(readable, [known.get(sample.sample_id, "") for sample in samples])
    return PlannedDataset(settings, spec, readable, tables, settings.identity(teacher, dataset_identity(spec, tables)))


def _layout(planned: PlannedDataset, device: str) -> tuple[Layout, list[ChunkRef]]:
    """Return the layout of the cache, and its committed chunks.

    Raises:
        CacheMismatchError: precompute would refuse the existing cache.
    """
    identity, settings = planned.identity, planned.settings
    layout = settings.layout(identity, device, planned.dataset.whole)
    have, cache = settings.have, settings.config.cache
    if have is None:
        return layout, []
    require_same_plan(have, identity, layout, cache)
    names = set(open_files(cache).list(COMMITS))
    return have.layout, [ref for ref in all_chunks(have.layout) if ref.commit_key in names]


@dataclass(frozen=True)
class _Probe:
    """Sample of readable images of the dataset, with their digests.

    Attributes:
        lost: number of images that cannot be read.
    """

    source: ImageSource
    part: SampleSet
    digests: list[str]
    lost: int
    seconds_per_image: float


def _read_probe(spec: DatasetSpec, listed: SampleSet, count: int, progress: Progress | None) -> _Probe:
    source = ImageSource(data_folder(spec.root))
    drawn = np.random.default_rng(0).choice(len(listed.samples), min(count, len(listed.samples)), replace=False)
    samples = [listed.samples[number] for number in np.sort(drawn)]

    def digest(sample: Sample) -> str | OSError:
        try:
            return hashlib.sha256(source.read(sample.uri, sample.offset, sample.length)).hexdigest()
        except OSError as error:
            return error

    began = time.perf_counter()
    with ThreadPoolExecutor(digest_threads(source, samples)) as pool:
        results = list(zip(samples, pool.map(digest, samples), strict=True))
    seconds = (time.perf_counter() - began) / len(samples)
    readable = [(sample, result) for sample, result in results if isinstance(result, str)]
    if progress is not None:
        progress("probe: read", len(readable), len(samples))
    if not readable:
        sample, why = results[0]
        raise UsageError(
            f"{spec}: not one of the {len(samples)} images of the probe can be read, the first: {sample.uri}: {why}"
        )
    part = SampleSet(spec.kind, source.root, samples=[sample for sample, _ in readable])
    return _Probe(source, part, [result for _, result in readable], len(samples) - len(readable), seconds)


def _table_bytes(probe: _Probe, layout: Layout) -> int:
    """Estimate the bytes of all tables from the probe."""
    tables = dataset_tables(probe.part, probe.digests)
    sizes = {name: sum(len(data) for data, _ in table_files(name, table).values()) for name, table in tables.items()}
    per_caption: float = sizes.pop(CAPTIONS) / max(tables[CAPTIONS].num_rows, 1)
    per_image: float = sum(sizes.values()) / len(probe.digests)
    return round(per_image * layout.image_rows + per_caption * layout.text_rows)


def _time_towers(
    config: PrecomputeConfig, teacher: LiveTeacher, probe: _Probe, listed: SampleSet, layout: Layout
) -> tuple[ProbeRate, ProbeRate]:
    """Time one batch of images and one of captions, after a warm-up batch."""
    samples = probe.part.samples[: layout.batch_rows]
    shown = teacher.preprocess.shown

    def decode(sample: Sample) -> NDArray[np.uint8] | None:
        try:
            return shown(open_image(probe.source.read(sample.uri, sample.offset, sample.length), config.decoder))
        except Exception:  # precompute reports such images
            return None

    def prepare() -> torch.Tensor:
        pixels = [image for image in pool.map(decode, samples) if image is not None]
        return torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0)

    own = (sample.captions[0] for sample in probe.part.samples if sample.captions)
    # in a labelled dataset one image has all captions
    every = chain.from_iterable(sample.captions for sample in listed.samples)
    texts = list(islice(own, layout.batch_rows)) or list(islice(every, layout.batch_rows))
    threads = max(config.decode_threads or decode_threads(), probe.source.fetches(samples[0].uri))
    with ThreadPoolExecutor(threads) as pool:
        image = _time(teacher, prepare, teacher.encode_shown, layout.views)
    text = _time(teacher, lambda: teacher.tokenizer(texts) if texts else torch.empty(0), teacher.encode_texts, 1)
    return image, text


def _time(teacher: LiveTeacher, prepare: Callable[[], Any], encode: Callable[[Any], Encoded], views: int) -> ProbeRate:
    """Time one batch: its preparation, shared by the views, and its forward pass."""
    began = time.perf_counter()
    batch = prepare()
    prepared = (time.perf_counter() - began) / views
    if not len(batch):
        return ProbeRate(rows=0, seconds_per_row=0.0, teacher_seconds_per_row=0.0)
    encode(batch).embedding  # noqa: B018 - waits for the device
    began = time.perf_counter()
    encode(batch).embedding  # noqa: B018
    encoded = time.perf_counter() - began
    # on a CPU decoding and teacher share the cores, so the times add up
    seconds = prepared + encoded if teacher.device.type == "cpu" else max(prepared, encoded)
    return ProbeRate(
        rows=len(batch), seconds_per_row=seconds / len(batch), teacher_seconds_per_row=encoded / len(batch)
    )


def _free_bytes(cache: str) -> int | None:
    if "://" in cache:
        return None
    folder = Path(cache).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
