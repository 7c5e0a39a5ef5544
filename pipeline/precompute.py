"""Run the teacher once: plan the cache (``pipeline.plan``), encode what is pending chunk by chunk, seal it.

Decoding (threads), the teacher (this thread) and writing (one thread) overlap, across chunk borders too. What
a batch holds depends only on the chunk that it is of, never on what else is pending, so that an interrupted
and resumed run writes the very bytes of an unbroken one.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from pipeline.config import PrecomputeConfig
from pipeline.datasets.base import data_folder
from pipeline.device import keep_freed_memory
from pipeline.plan import Progress, plan_precompute
from pipeline.preprocess import UndecodableImageError, decode_image
from pipeline.samples import DatasetSpec, ImageSource, require_content
from pipeline.teacher import LiveTeacher, load_teacher
from storage.arrays import ARRAYS, array_dtype, chunk_shape
from storage.commits import ChunkRef, QuarantinedRow
from storage.inspect import describe_cache
from storage.journal import ChunkCost
from storage.manifest import CacheManifest
from storage.reader import EmbeddingReader
from storage.tables import CAPTIONS, PROBLEMS, SAMPLES, read_table
from storage.writer import EmbeddingWriter

__all__ = ["PrecomputeResult", "encode_chunks", "precompute", "summarize"]

_BATCHES_AHEAD = 4
_PROBLEMS_SHOWN = 50


class PrecomputeResult(BaseModel, frozen=True):
    """What a run of precompute did and what the cache holds now."""

    cache: str
    manifest_digest: str
    replaced_manifest_digest: str | None = Field(
        description="Of the sealed cache that was there, when damaged chunks came back with other bytes."
    )
    identity_digest: str
    teacher: str
    images: int = Field(description="Rows of the image tower, quarantined ones included.")
    captions: int
    splits: dict[str, int]
    chunks: int
    chunks_encoded: int = Field(description="By this run; the others were there.")
    quarantined: int = Field(description="Images with a row that could not be decoded; they have no embedding.")
    lost_images: int = Field(description="Images of the dataset that got no row.")
    problems: dict[str, int] = Field(description="Everything that was wrong, counted by kind.")
    problem_details: tuple[str, ...] = Field(description="The first 50, by name.")
    seconds: float
    images_per_second: float | None = Field(description="Of the teacher, over all chunks of the cache.")
    captions_per_second: float | None


def precompute(config: PrecomputeConfig, progress: Progress | None = None) -> PrecomputeResult:
    """Make the cache that ``config`` describes, or finish the one that is there.

    Safe to stop at any moment and to call again: only chunks without a sound commit are encoded.

    Args:
        progress: called with (stage, done, total): ``check files``, ``images`` and ``captions``.

    Raises:
        UsageError: dataset, teacher or device cannot be used; nothing is written then.
        CacheMismatchError: the path holds a cache of another teacher, dataset or preprocessing; or an image changed
            while the run worked.
        OSError: an image could not be read, or a chunk not written; what is committed stays.
        FloatingPointError: the teacher overflows in this precision.
    """
    started = time.perf_counter()
    DatasetSpec.parse(config.dataset)  # a typing error should not cost the loading of a teacher
    teacher = load_teacher(config.teacher, config.pretrained, config.device, config.precision)
    pending = plan_precompute(config, teacher, progress)
    encode_chunks(config, teacher, pending, progress)
    return summarize(config.cache, len(pending), time.perf_counter() - started)


def encode_chunks(
    config: PrecomputeConfig, teacher: LiveTeacher, refs: Sequence[ChunkRef], progress: Progress | None = None
) -> None:
    """Encode some chunks of a planned cache. When it returns, each of them is committed.

    An image that cannot be decoded quarantines its row and is named in the chunk's commit.
    """
    writer = EmbeddingWriter(config.cache)
    manifest = writer.manifest
    teacher.require(manifest.identity, config.cache)
    if teacher.device.type == "cpu":
        keep_freed_memory()
    threads = config.decode_threads or os.cpu_count() or 1
    done: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    for ref in refs:
        totals[ref.tower] += len(ref.rows(manifest.layout))
    jobs = _Jobs(teacher, manifest, writer, data_folder(DatasetSpec.parse(config.dataset).root))
    writing: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(threads) as decoders, ThreadPoolExecutor(1) as writers:
        try:
            for batch in _ahead(decoders, jobs.batches(refs)):
                chunk = batch.chunk
                chunk.start(batch.asked_at)
                waited = time.perf_counter()
                inputs = batch.inputs()
                began = time.perf_counter()
                chunk.run(teacher, batch, inputs)
                ended = time.perf_counter()
                chunk.decode_wait_seconds += began - waited
                chunk.teacher_seconds += ended - began
                done[chunk.ref.tower] += len(batch.rows)
                if batch.last:
                    # two chunks may wait for the disk before the teacher has to
                    while len(writing) >= 2:
                        writing.popleft().result()
                    writing.append(writers.submit(chunk.write, writer, teacher))
                if progress is not None:
                    stage = "images" if chunk.ref.tower == "image" else "captions"
                    progress(stage, done[chunk.ref.tower], totals[chunk.ref.tower])
            while writing:
                writing.popleft().result()
        except BaseException:
            # stop decoding ahead; whole chunks on their way to the disk are still written
            decoders.shutdown(wait=False, cancel_futures=True)
            raise


def summarize(cache: str, chunks_encoded: int, seconds: float) -> PrecomputeResult:
    """Seal a finished cache and say what is in it.

    Args:
        chunks_encoded, seconds: of the run that asks.

    Raises:
        CacheIncompleteError: chunks are missing.
    """
    writer = EmbeddingWriter(cache)
    before = writer.manifest
    manifest = writer.seal()
    problems: Counter[str] = Counter()
    details: list[str] = []
    for row in read_table(writer.files, manifest, PROBLEMS).to_pylist():
        problems[row["kind"]] += 1
        details.append(f"{row['kind']}: {row['where']}: {row['detail']}")
    quarantined = EmbeddingReader(cache).quarantined
    for item in quarantined:
        problems[item.reason] += 1
        details.append(f"{item.reason}: {item.sample_id}: {item.detail}")
    generation = manifest.generations[-1]
    info = describe_cache(cache)
    return PrecomputeResult(
        cache=cache,
        manifest_digest=manifest.digest,
        replaced_manifest_digest=before.digest if before.sealed and before.digest != manifest.digest else None,
        identity_digest=manifest.identity_digest,
        teacher=manifest.identity.teacher.name,
        images=manifest.layout.image_rows,
        captions=manifest.layout.text_rows,
        splits=manifest.identity.dataset.splits,
        chunks=manifest.layout.num_chunks,
        chunks_encoded=chunks_encoded,
        quarantined=len(quarantined),
        lost_images=generation.lost_images,
        problems=dict(sorted(problems.items())),
        problem_details=tuple(details[:_PROBLEMS_SHOWN]),
        seconds=seconds,
        images_per_second=info.images_per_second,
        captions_per_second=info.captions_per_second,
    )


@dataclass
class _Chunk:
    """One chunk while it is being encoded."""

    ref: ChunkRef
    rows: range
    arrays: dict[str, NDArray[Any]]
    quarantined: list[QuarantinedRow] = field(default_factory=list)
    started: float | None = None
    decode_wait_seconds: float = 0.0
    teacher_seconds: float = 0.0

    def start(self, at: float) -> None:
        if self.started is None:
            self.started = at

    def run(self, teacher: LiveTeacher, batch: _Batch, inputs: list[Any]) -> None:
        """Put the embeddings of one batch into their rows.

        Raises:
            FloatingPointError: the teacher gives nothing finite for a caption.
        """
        at = slice(batch.rows.start - self.rows.start, batch.rows.stop - self.rows.start)
        if self.ref.tower == "text":
            encoded = teacher.encode_texts(torch.stack(inputs))
            lost: list[tuple[str, str] | None] = [None] * len(inputs)
        else:
            blank = torch.zeros(3, *teacher.preprocess.size)
            # an undecodable image keeps its place, so that its neighbours' batch is the same with and without it
            pixels = [item.pixels if item.pixels is not None else blank for item in inputs]
            encoded = teacher.encode_images(torch.stack(pixels))
            self.arrays["view"][at] = np.array([item.crop for item in inputs], np.float32)
            lost = [item.lost for item in inputs]
        self.arrays["embedding"][at], self.arrays["norm"][at] = encoded.embedding, encoded.norm
        finite = np.isfinite(encoded.embedding).all(axis=1) & np.isfinite(encoded.norm)
        decoded = np.array([reason is None for reason in lost])
        if self.ref.tower == "text" and not finite.all():
            raise self._overflow(teacher, batch.rows[int(np.flatnonzero(~finite)[0])])
        for index in np.flatnonzero(~decoded | ~finite):
            reason, detail = lost[index] or ("not-finite", "the teacher's features are NaN, infinite or zero")
            row = batch.rows[int(index)]
            self.quarantined.append(
                QuarantinedRow(row=row, sample_id=inputs[index].sample_id, reason=reason, detail=detail)
            )
            for values in self.arrays.values():
                values[row - self.rows.start] = np.nan

    def _overflow(self, teacher: LiveTeacher, row: int) -> FloatingPointError:
        return FloatingPointError(
            f"{self.ref.tower} row {row}: the teacher's features are not finite in {teacher.precision}. "
            "Use --precision bf16 or fp32 and a new cache."
        )

    def write(self, writer: EmbeddingWriter, teacher: LiveTeacher) -> None:
        """Commit the chunk.

        Raises:
            FloatingPointError: most of its images came out as nothing finite: the arithmetic's fault, not theirs.
        """
        assert self.started is not None  # the batch that ended the chunk started it
        odd = [row.row for row in self.quarantined if row.reason == "not-finite"]
        if len(odd) > 1 and 2 * len(odd) > len(self.rows) - len(self.quarantined) + len(odd):
            raise self._overflow(teacher, odd[0])
        cost = ChunkCost(
            rows=len(self.rows),
            seconds=time.perf_counter() - self.started,
            decode_wait_seconds=self.decode_wait_seconds,
            teacher_seconds=self.teacher_seconds,
            device=str(teacher.device),
        )
        writer.write(self.ref, self.arrays, self.quarantined, cost)


@dataclass(frozen=True)
class _Decoded:
    pixels: torch.Tensor | None
    crop: tuple[float, ...]
    lost: tuple[str, str] | None = None  # reason and detail
    sample_id: str = ""


@dataclass
class _Batch:
    chunk: _Chunk
    rows: range
    last: bool
    prepare: Callable[[range], list[Callable[[], Any]]]
    futures: list[Future[Any]] = field(default_factory=list)
    asked_at: float = 0.0

    def submit(self, pool: ThreadPoolExecutor) -> None:
        self.asked_at = time.perf_counter()
        self.futures = [pool.submit(job) for job in self.prepare(self.rows)]

    def inputs(self) -> list[Any]:
        return [future.result() for future in self.futures]


class _Jobs:
    """Turns chunks into batches whose inputs can be prepared by any thread."""

    def __init__(self, teacher: LiveTeacher, manifest: CacheManifest, writer: EmbeddingWriter, image_root: str) -> None:
        self._tokenizer = teacher.tokenizer
        self._preprocess = teacher.preprocess
        self._transform = teacher.preprocess.transform()
        # where this run found the images: the folder may have moved since the cache was planned
        self._source = ImageSource(image_root)
        self._layout = manifest.layout
        self._samples = read_table(writer.files, manifest, SAMPLES)
        self._captions = read_table(writer.files, manifest, CAPTIONS)

    def batches(self, refs: Sequence[ChunkRef]) -> Iterator[_Batch]:
        batch_size = self._layout.batch_rows
        for ref in refs:
            rows = ref.rows(self._layout)
            arrays = {
                name: np.full(
                    (len(rows), *chunk_shape(self._layout, ref.tower, name)[1:]), np.nan, array_dtype(ref.tower, name)
                )
                for name in ARRAYS[ref.tower]
            }
            chunk = _Chunk(ref, rows, arrays)
            prepare = self._image_jobs if ref.tower == "image" else self._text_jobs
            for start in range(rows.start, rows.stop, batch_size):
                stop = min(start + batch_size, rows.stop)
                yield _Batch(chunk, range(start, stop), stop == rows.stop, prepare)

    def _image_jobs(self, rows: range) -> list[Callable[[], Any]]:
        part = self._samples.slice(rows.start, len(rows)).to_pylist()
        return [partial(self._decode, sample) for sample in part]

    def _decode(self, sample: dict[str, Any]) -> _Decoded:
        """Pixels and crop of one image, or why there are none.

        Raises:
            OSError: the bytes cannot be read just now; another try may, so the row is not given up.
            CacheMismatchError: they are not the bytes that the cache was planned with.
        """
        data = self._source.read(sample["uri"], sample["offset"], sample["length"])
        require_content(data, sample["content_sha256"], self._source.resolve(sample["uri"]))
        try:
            image = decode_image(data)
            crop = self._preprocess.evaluation_crop(*image.size)
            return _Decoded(self._transform(image), crop, sample_id=sample["sample_id"])
        except MemoryError:
            raise  # the machine's fault, not the image's
        except UndecodableImageError as error:
            lost = ("undecodable-image", str(error))
        except Exception as error:  # one pixel by 600, a mode that a resize does not know: nothing ends the run
            lost = ("untransformable-image", f"{type(error).__name__}: {error}")
        return _Decoded(None, (np.nan,) * 5, lost, sample["sample_id"])

    def _text_jobs(self, rows: range) -> list[Callable[[], Any]]:
        texts = self._captions["text"].slice(rows.start, len(rows)).to_pylist()
        return [partial(self._tokenize, text) for text in texts]

    def _tokenize(self, text: str) -> torch.Tensor:
        tokens: torch.Tensor = self._tokenizer([text])[0]
        return tokens


def _ahead(pool: ThreadPoolExecutor, batches: Iterator[_Batch]) -> Iterator[_Batch]:
    """The same batches, a few of them already being prepared."""
    waiting: deque[_Batch] = deque()
    for batch in batches:
        batch.submit(pool)
        waiting.append(batch)
        if len(waiting) > _BATCHES_AHEAD:
            yield waiting.popleft()
    yield from waiting
