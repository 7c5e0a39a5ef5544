"""Stored bytes of a cache's images, checked by digest. No torch, no decoding."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np

from teacher_cache.pipeline.data.batches.cached_samples import SampleRecord, sample_records
from teacher_cache.pipeline.data.datasets.samples import ImageSource, require_content
from teacher_cache.storage.files.transient import is_transient
from teacher_cache.storage.format.tables import SAMPLES
from teacher_cache.storage.read.reader import EmbeddingReader


class StoredImages:
    """Stored bytes of images by their records. Thread-safe; holds no table.

    Args:
        source: source of the image bytes.
    """

    def __init__(self, source: ImageSource) -> None:
        self._source = source
        self._ahead: dict[int, Future[bytes]] = {}

    def named(self, image: SampleRecord) -> str:
        """Return the image's name for messages: row, sample_id and location."""
        return f"row {image.row} ({image.sample_id}): {self._source.resolve(image.uri)}"

    def named_within(self, image: SampleRecord) -> str:
        """Return the image's name without folders of this machine: row, sample_id and the uri if relative."""
        where = "" if "://" in image.uri or Path(image.uri).is_absolute() else f", {image.uri}"
        return f"row {image.row} ({image.sample_id}{where})"

    def read(self, image: SampleRecord) -> bytes:
        """Return the bytes from which the teacher's image was decoded.

        Raises:
            OSError: the image cannot be read. ConnectionError: a retry may succeed.
            CacheMismatchError: the image has changed since the teacher saw it.
        """
        ahead = self._ahead.pop(image.row, None)
        return self._read(image) if ahead is None else ahead.result()

    @contextmanager
    def ahead(self, images: Sequence[SampleRecord]) -> Iterator[None]:
        """Prefetch remote images for :meth:`read` within the block. Local files are not prefetched.

        The bytes stay in memory until they are read.
        """
        with self._source.threads(images[0].uri) if images else nullcontext() as pool:
            if pool is not None:
                once = {image.row: image for image in images}
                self._ahead.update((row, pool.submit(self._read, image)) for row, image in once.items())
            try:
                yield
            finally:
                for image in images:
                    if (unread := self._ahead.pop(image.row, None)) is not None:
                        unread.cancel()

    def _read(self, image: SampleRecord) -> bytes:
        named = self.named(image)
        try:
            data = self._source.read(image.uri, image.offset, image.length)
        except OSError as error:
            # keep the error transient
            kind = ConnectionError if is_transient(error) else OSError
            gone = ""
            if isinstance(error, FileNotFoundError):
                gone = " Is this one gone? Put it back, or precompute the others into a new cache with --reuse."
            raise kind(
                f"{named} cannot be read: {error}.{gone} Were the images moved? Name their folder with --image-root."
            ) from error
        require_content(data, image.content_sha256, named)
        return data


class CachedImages:
    """:class:`StoredImages` of some rows of a cache, by row. Thread-safe; pickles without the reader.

    Args:
        reader: reader of the cache.
        source: source of the image bytes.
        rows: rows that can be read; others raise KeyError.
    """

    def __init__(self, reader: EmbeddingReader, source: ImageSource, rows: Collection[int]) -> None:
        ordered = sorted(set(rows))
        self._places = {row: place for place, row in enumerate(ordered)}
        self._samples = reader.table_rows(SAMPLES, np.array(ordered, np.int64))
        self._images = StoredImages(source)

    def _record(self, row: int) -> SampleRecord:
        return sample_records(self._samples.slice(self._places[row], 1))[0]

    def named(self, row: int) -> str:
        """See :meth:`StoredImages.named`."""
        return self._images.named(self._record(row))

    def named_within(self, row: int) -> str:
        """See :meth:`StoredImages.named_within`."""
        return self._images.named_within(self._record(row))

    def read(self, row: int) -> bytes:
        """See :meth:`StoredImages.read`."""
        return self._images.read(self._record(row))
