"""What a cache knows of its images and captions, by row, without its tables in memory. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.by_chunk import ByChunk
from storage.reader import EmbeddingReader
from storage.table_rows import TableRows
from storage.tables import CAPTIONS, SAMPLES
from storage.transient import read_error

__all__ = ["CachedSamples", "SampleRecord", "sample_records"]

_OPEN_FILES = 64  # of a million rows each

_Read = TypeVar("_Read")


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """One row of the samples table: what is needed to read an image, to prove it, and to name it."""

    row: int
    sample_id: str
    uri: str
    offset: int
    length: int
    content_sha256: str


def sample_records(samples: pa.Table) -> list[SampleRecord]:
    """Rows of the samples table as records, in their order."""
    columns = (samples[name].to_pylist() for name in SampleRecord.__dataclass_fields__)
    return [SampleRecord(*values) for values in zip(*columns, strict=True)]


class CachedSamples:
    """Samples and captions of the rows that a run uses, read from the tables by chunks.

    Rows are asked for in the order of an epoch, or ascending; what it holds is that of ``kept_chunks`` chunks of
    images and two groups of rows of either table. Behind a URL the tables' files are kept besides, as they are,
    compressed: up to 64 of either, of a million rows each. A thread of its own reads, so that who says :meth:`ahead`
    what is wanted does not wait. For one thread; a process that is forked cannot go on with it.

    Args:
        kept_chunks: of images, twice as many as one window of the shuffle has.
    """

    def __init__(self, reader: EmbeddingReader, kept_chunks: int) -> None:
        layout = reader.manifest.layout
        self._reader, self._size, self._images = reader, layout.image_chunk_rows, layout.image_rows
        self._samples, self._captions = (
            TableRows(reader.files, reader.manifest, name, _OPEN_FILES) for name in (SAMPLES, CAPTIONS)
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tables")
        self._records = ByChunk(self._size, kept_chunks, lambda chunk: self._thread.submit(self._samples_of, chunk))
        self._texts = ByChunk(self._size, kept_chunks, lambda chunk: self._thread.submit(self._captions_of, chunk))

    def ahead(self, rows: NDArray[np.int64], records: bool = True) -> None:
        """Begin to read what :meth:`texts`, and :meth:`records` if they are wanted, will be asked of these images."""
        self._texts.of(rows)
        if records:
            self._records.of(rows)

    def close(self) -> None:
        """Read nothing more; what was begun is waited for."""
        self._thread.shutdown(cancel_futures=True)

    def records(self, rows: NDArray[np.int64]) -> list[SampleRecord]:
        """Of some images, in their order.

        Raises:
            CacheCorruptError, CacheAccessError, CacheUnreachableError: the table is damaged or cannot be read.
        """
        found = np.empty(len(rows), object)
        for first, samples, here in self._records.of(rows):
            found[here] = sample_records(self._read(samples).take(pa.array(rows[here] - first)))
        return found.tolist()

    def texts(self, image_rows: NDArray[np.int64], caption_rows: NDArray[np.int64]) -> list[str]:
        """One caption of each of some images, in their order.

        Args:
            caption_rows: of the captions, each one of the image at the same place.

        Raises:
            As :meth:`records`.
        """
        found = np.empty(len(image_rows), object)
        for _, captions, here in self._texts.of(image_rows):
            first, texts = self._read(captions)
            found[here] = texts.take(pa.array(caption_rows[here] - first)).to_pylist()
        return found.tolist()

    def _read(self, coming: Future[_Read]) -> _Read:
        try:
            return coming.result()
        except BaseException:
            self._records.clear()  # so that it is tried again when it is asked for again
            self._texts.clear()
            raise

    def _rows(self, chunk: int) -> range:
        return range(chunk * self._size, min((chunk + 1) * self._size, self._images))

    def _samples_of(self, chunk: int) -> pa.Table:
        with self._named(SAMPLES):
            return _copied(self._samples.read(self._rows(chunk)).select(list(SampleRecord.__dataclass_fields__)))

    def _captions_of(self, chunk: int) -> tuple[int, pa.ChunkedArray]:
        rows = self._rows(chunk)
        first, stop = self._reader.caption_index.starts(np.array([rows.start, rows.stop])).tolist()
        with self._named(CAPTIONS):
            return first, _copied(self._captions.read(range(first, stop)).select(["text"]))["text"]

    @contextmanager
    def _named(self, table: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise read_error(f"{self._reader.location}/{table}", error) from error


def _copied(table: pa.Table) -> pa.Table:
    """The same rows in memory of their own: a slice would keep all that it was cut from."""
    return table.take(pa.array(np.arange(len(table)))).combine_chunks()
