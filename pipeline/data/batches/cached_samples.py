"""Images and captions of a cache by row, without its tables in memory. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.files.transient import read_error
from teacher_cache.storage.format.tables import CAPTIONS, SAMPLES
from teacher_cache.storage.read.chunk_cache import ByChunk
from teacher_cache.storage.read.reader import EmbeddingReader

# files of a million rows each; remote ones are in memory, compressed
_OPEN_FILES, _OPEN_FAR = 256, 64


class SampleRecord(NamedTuple):
    """Row of the samples table with the fields to read, check and name an image."""

    row: int
    sample_id: str
    uri: str
    offset: int
    length: int
    content_sha256: str


def sample_records(samples: pa.Table) -> list[SampleRecord]:
    """Return rows of the samples table as records, in order."""
    columns = (samples[name].to_pylist() for name in SampleRecord._fields)
    return [SampleRecord(*values) for values in zip(*columns, strict=True)]


class CachedSamples:
    """Samples and captions of a run's rows, read from the tables by chunks. For one thread at a time.

    Callers take the rows in the order of an epoch, or ascending. Memory holds ``kept_chunks`` chunks of images, and per
    table two row groups or one larger one (:class:`teacher_cache.storage.format.table_rows.TableRows`). It also holds
    up to 64 compressed remote files per table, of a million rows each. More files than that, or than 256 local ones,
    are opened and checked repeatedly.

    Args:
        kept_chunks: number of chunks of images, at least those of a shuffle window.
    """

    def __init__(self, reader: EmbeddingReader, kept_chunks: int) -> None:
        layout = reader.manifest.layout
        self._reader, self._size, self._images = reader, layout.image_chunk_rows, layout.image_rows
        most = _OPEN_FILES if isinstance(reader.chunks.files, LocalFiles) else _OPEN_FAR
        self._samples, self._captions = (reader.table(name, most) for name in (SAMPLES, CAPTIONS))
        self._records = ByChunk(self._size, kept_chunks, self._samples_of)
        self._texts = ByChunk(self._size, kept_chunks, self._captions_of)

    def records(self, rows: NDArray[np.int64]) -> list[SampleRecord]:
        """Return the records of images, in order.

        Raises:
            CacheCorruptError, CacheAccessError, CacheUnreachableError: the table is damaged or cannot be read.
        """
        return sample_records(_taken(rows, self._records.of(rows))) if len(rows) else []

    def texts(self, image_rows: NDArray[np.int64], caption_rows: NDArray[np.int64]) -> list[str]:
        """Return captions of images, image by image, in order.

        Args:
            caption_rows: (images, captions), one line per image.

        Raises:
            As :meth:`records`.
        """
        owners, rows = np.repeat(image_rows, caption_rows.shape[1]), caption_rows.ravel()
        parts = [(first, captions, places) for _, (first, captions), places in self._texts.of(owners)]
        return _taken(rows, parts)["text"].to_pylist() if parts else []

    def _rows(self, chunk: int) -> range:
        return range(chunk * self._size, min((chunk + 1) * self._size, self._images))

    def _samples_of(self, chunk: int) -> pa.Table:
        with self._named(SAMPLES):
            return _copied(self._samples.read(self._rows(chunk)).select(list(SampleRecord._fields)))

    def _captions_of(self, chunk: int) -> tuple[int, pa.Table]:
        rows = self._rows(chunk)
        first, stop = self._reader.caption_index.starts(np.array([rows.start, rows.stop])).tolist()
        with self._named(CAPTIONS):
            return first, _copied(self._captions.read(range(first, stop)).select(["text"]))

    @contextmanager
    def _named(self, table: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise read_error(f"{self._reader.location}/{table}", error) from error


def _taken(rows: NDArray[np.int64], parts: list[tuple[int, pa.Table, NDArray[np.intp]]]) -> pa.Table:
    """Return rows of a table in order, from parts: (first row, rows, positions in the result)."""
    places, before = np.empty(len(rows), np.int64), 0
    for first, part, positions in parts:
        places[positions] = rows[positions] - first + before
        before += len(part)
    return pa.concat_tables(part for _, part, _ in parts).take(pa.array(places))


def _copied(table: pa.Table) -> pa.Table:
    """Copy the rows: a slice would keep the whole table in memory."""
    return table.take(pa.array(np.arange(len(table)))).combine_chunks()
