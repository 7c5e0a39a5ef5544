"""Creation of ready pixels: each image of a split is decoded once, and the student's input is stored."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import __version__, features
from pydantic import BaseModel

from teacher_cache.pipeline.data.batches.cached_samples import CachedSamples, SampleRecord
from teacher_cache.pipeline.data.batches.pairs import stored_crops, views_used
from teacher_cache.pipeline.data.batches.student_images import StudentImages
from teacher_cache.pipeline.data.cores import decode_threads
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images.preprocess import Preprocess, handed_on
from teacher_cache.pipeline.data.images.ready_pixels import (
    RECORD,
    ROWS_KEY,
    PixelsCommit,
    PixelsRecord,
    chunk_key,
    commit_key,
    local_pixels,
    pixels_shown,
    read_commit,
    read_record,
    rows_bytes,
)
from teacher_cache.pipeline.data.images.views import Crop
from teacher_cache.pipeline.evaluate.twins.exclude import exclude_listed
from teacher_cache.pipeline.models.student import build_student, student_config
from teacher_cache.pipeline.settings.base import learned_split
from teacher_cache.pipeline.settings.train import PixelsConfig
from teacher_cache.storage.errors import CacheCorruptError, CacheMismatchError, CacheNotFoundError, UsageError
from teacher_cache.storage.files.checksum import crc32c
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.files.location import absolute_location, begun_ahead
from teacher_cache.storage.observe.quantities import byte_size, counted
from teacher_cache.storage.read.reader import EmbeddingReader

_CHUNK_ROWS = 64


class PixelsResult(BaseModel, frozen=True):
    """Result of making pixels: totals of the folder, and the chunks that this call made."""

    out: str
    images: int
    views: int
    size: tuple[int, int]
    nbytes: int
    chunks: int
    chunks_made: int


@dataclass(frozen=True)
class PixelsPlan:
    """Plan of the pixels to make, before any image is decoded.

    Attributes:
        rows: rows of the cache, ascending, int64.
        todo: (chunk, its unfinished views), in the order of work.
        free_bytes: free space of the folder's disk.
    """

    out: str
    record: PixelsRecord
    reader: EmbeddingReader
    source: ImageSource
    preprocess: Preprocess
    rows: NDArray[np.int64]
    todo: tuple[tuple[int, tuple[int, ...]], ...]
    threads: int
    free_bytes: int

    @property
    def nbytes(self) -> int:
        """Size of all pixels in bytes, including the padding of each view's last chunk."""
        return self.record.views * self.record.chunks * self.record.chunk_bytes

    @property
    def chunks_to_make(self) -> int:
        """Number of chunks to make; a chunk has one view."""
        return sum(len(views) for _, views in self.todo)

    @property
    def bytes_to_write(self) -> int:
        """Bytes that this call adds."""
        return self.chunks_to_make * self.record.chunk_bytes

    def __str__(self) -> str:
        record = self.record
        height, width = record.size
        return (
            f"{self.out}: {counted(record.images, 'image')} x {counted(record.views, 'view')} x {height} x {width} x 3 "
            f"bytes = {byte_size(self.nbytes)} in {counted(record.views * record.chunks, 'chunk')}; "
            f"{self.chunks_to_make:,} of them to make, {byte_size(self.bytes_to_write)}; {byte_size(self.free_bytes)} "
            "are free"
        )


def plan_pixels(config: PixelsConfig) -> PixelsPlan:
    """Plan pixels from cache, student and folder. Nothing is written.

    Raises:
        UsageError: a setting or the list of ``exclude`` cannot be used, or the disk is too full.
        CacheMismatchError: the list is of other images, or the folder holds other pixels; the message names each field
            with both values.
        CacheError: the cache or the folder's record cannot be used.
    """
    files, out = local_pixels(config.out), Path(config.out).resolve()
    reader = EmbeddingReader(config.cache)
    split = learned_split(config, reader.identity.dataset.splits)
    learned = reader.row_set(split)
    if config.exclude:
        exclude_listed(config.exclude, reader, split, learned)
    rows = learned.numbers()
    if not len(rows):
        raise UsageError(f"{config.cache}: no image of split {split!r} has an embedding")
    manifest = reader.manifest
    views = views_used(reader, config.views)
    student = build_student(
        student_config(config.student), handed_on(manifest.identity.preprocess), manifest.layout.embed_dim
    )
    decoded_by = manifest.identity.preprocess.decoder
    preprocess = student.preprocess_to_learn(config.train_image_size).decoded_by(decoded_by)
    record = PixelsRecord(
        cache=absolute_location(config.cache),
        split=split,
        images=len(rows),
        views=views,
        chunk_rows=_CHUNK_ROWS,
        rows_sha256=hashlib.sha256(rows_bytes(rows)).hexdigest(),
        decoder=_versions(decoded_by),
        **pixels_shown(reader, rows, views, preprocess),
    )
    try:
        record = _continued(record, read_record(files), config.out)
    except CacheNotFoundError:
        # unfinished files of a killed call are not listed
        if out.is_file() or files.list():
            raise UsageError(f"{config.out}: is there and holds no ready pixels. Name a new folder by --out.") from None
    todo = tuple(
        (chunk, missing)
        for chunk in range(record.chunks)
        if (missing := tuple(view for view in range(record.views) if not _finished(files, record, view, chunk)))
    )
    plan = PixelsPlan(
        config.out,
        record,
        reader,
        ImageSource(config.image_root or manifest.source.image_root),
        preprocess,
        rows,
        todo,
        config.threads or decode_threads(),
        shutil.disk_usage(next(folder for folder in (out, *out.parents) if folder.is_dir())).free,
    )
    if plan.bytes_to_write > plan.free_bytes:
        raise UsageError(f"{plan}. Free some, choose a larger disk by --out, or take fewer --views.")
    return plan


def make_pixels(plan: PixelsPlan, progress: Callable[[str, int, int], None] | None = None) -> PixelsResult:
    """Make the missing chunks of a plan.

    Each chunk is written, then committed: a kill loses the chunks in flight, which the next call makes again. An image
    is decoded once for all its missing views. Memory: two chunks of all missing views.

    Args:
        progress: called with ("pixels", done chunks, all chunks).

    Raises:
        OSError: an image cannot be read or decoded, or the disk is full; finished chunks stay.
        CacheMismatchError: an image has changed since the cache was made.
    """
    files, record = local_pixels(plan.out), plan.record
    files.remove_partials()
    _begin(files, record, plan.rows)
    total = record.views * record.chunks
    done = total - plan.chunks_to_make
    images = StudentImages(plan.reader, plan.source, plan.preprocess)
    with ThreadPoolExecutor(plan.threads) as decoders:
        try:
            for chunk, views, seen in _decoded_ahead(plan, images, decoders):
                parts = [future.result() for future in seen]
                for index, view in enumerate(views):
                    data = b"".join(part[index] for part in parts)
                    commit = PixelsCommit(
                        view=view,
                        chunk=chunk,
                        made_of=record.made_of(view),
                        crc32c=tuple(crc32c(part[index]) for part in parts),
                    )
                    files.write(chunk_key(view, chunk), data + bytes(record.chunk_bytes - len(data)))
                    # last: a commit proves that its chunk is complete
                    files.write(commit_key(view, chunk), commit.to_bytes())
                    done += 1
                    if progress is not None:
                        progress("pixels", done, total)
        except BaseException:
            decoders.shutdown(wait=False, cancel_futures=True)
            raise
    return PixelsResult(
        out=plan.out,
        images=record.images,
        views=record.views,
        size=record.size,
        nbytes=plan.nbytes,
        chunks=total,
        chunks_made=plan.chunks_to_make,
    )


def _versions(decoder: str | None) -> str:
    pillow = f"Pillow {__version__}, libjpeg {features.version('jpg')}"
    if decoder is None:
        return pillow
    return f"simplejpeg {version('simplejpeg')}, torch {version('torch')}, {pillow}"


_Work = tuple[int, tuple[int, ...], list[Future[list[bytes]]]]


def _decoded_ahead(plan: PixelsPlan, images: StudentImages, decoders: ThreadPoolExecutor) -> Iterator[_Work]:
    """Yield the pixels of each chunk to make, while the next chunk is decoded."""
    samples = CachedSamples(plan.reader, kept_chunks=1)

    def decode(work: tuple[int, tuple[int, ...]]) -> _Work:
        chunk, views = work
        rows = plan.rows[chunk * plan.record.chunk_rows : (chunk + 1) * plan.record.chunk_rows]
        crops = [stored_crops(plan.reader, rows, np.full(len(rows), view)) for view in views]
        jobs = zip(samples.records(rows), zip(*crops, strict=True), strict=True)
        return chunk, views, [decoders.submit(_pixels, images, image, regions) for image, regions in jobs]

    return begun_ahead(decode, plan.todo, ahead=1)


def _pixels(images: StudentImages, image: SampleRecord, crops: tuple[Crop | None, ...]) -> list[bytes]:
    return [shown.tobytes() for shown in images.each_shown(image, crops)]


def _begin(files: LocalFiles, record: PixelsRecord, rows: NDArray[np.int64]) -> None:
    """Write the record, then the row numbers and Zarr metadata, where they are missing or differ."""
    metadata = _zarr_metadata(record)
    for key, data in {RECORD: record.to_bytes(), ROWS_KEY: rows_bytes(rows), **metadata}.items():
        try:
            same = files.read(key) == data
        except FileNotFoundError:
            same = False
        if not same:
            files.write(key, data)


def _zarr_metadata(record: PixelsRecord) -> dict[str, bytes]:
    """Return the ``zarr.json`` files, by key in the folder, as zarr-python writes them."""
    import zarr
    from zarr.codecs import BytesCodec
    from zarr.storage import MemoryStore

    written: dict[str, Any] = {}
    root = zarr.create_group(MemoryStore(written), zarr_format=3)
    shape = (record.images, record.views, *record.size, 3)
    arrays: dict[str, dict[str, Any]] = {
        "pixels": {
            "shape": shape,
            "chunks": (record.chunk_rows, 1, *shape[2:]),
            "dtype": "uint8",
            "serializer": BytesCodec(endian=None),
            "dimension_names": ("image", "view", "height", "width", "channel"),
        },
        "row": {
            "shape": (record.images,),
            "chunks": (record.images,),
            "dtype": "int64",
            "serializer": BytesCodec(endian="little"),
            "dimension_names": ("image",),
        },
    }
    for name, settings in arrays.items():
        # uncompressed: an image is one read at an offset
        root.create_array(name, fill_value=0, compressors=None, **settings)
    return {f"pixels.zarr/{key}": buffer.to_bytes() for key, buffer in sorted(written.items())}


def _continued(new: PixelsRecord, old: PixelsRecord, out: str) -> PixelsRecord:
    """Return the record with more views."""
    settings = new.model_dump(exclude={"cache", "views"})
    differ = old.differences({**settings, "crops_sha256": new.crops_sha256[: old.views - 1]})
    if differ:
        raise CacheMismatchError(
            f"{out}: holds other pixels: {'; '.join(differ)}. Choose another --out, or delete the folder."
        )
    return new if new.views > old.views else old


def _finished(files: LocalFiles, record: PixelsRecord, view: int, chunk: int) -> bool:
    """Return whether a chunk is committed and its file has the right size. Reading checks the bytes."""
    try:
        path = Path(files.location) / chunk_key(view, chunk)
        whole = path.stat().st_size == record.chunk_bytes
        return whole and read_commit(files, record, view, chunk) is not None
    except (FileNotFoundError, CacheCorruptError):
        return False
