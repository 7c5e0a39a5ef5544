"""Stored bytes of a cache's images, proven. No torch, no decoding."""

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

__all__ = ["CachedImages", "StoredImages"]


class StoredImages:
    """Stored bytes of images by their records. Safe for several threads; holds no table.

    Args:
        source: where the images are.
    """

    def __init__(self, source: ImageSource) -> None:
        self._source = source
        self._ahead: dict[int, Future[bytes]] = {}

    def named(self, image: SampleRecord) -> str:
        """Return the image's name for messages: row, sample_id and where it lies."""
        return f"row {image.row} ({image.sample_id}): {self._source.resolve(image.uri)}"

    def named_within(self, image: SampleRecord) -> str:
        """Return its name without folders of this machine: row, sample_id and, if it is relative, the uri."""
        where = "" if "://" in image.uri or Path(image.uri).is_absolute() else f", {image.uri}"
        return f"row {image.row} ({image.sample_id}{where})"

    def read(self, image: SampleRecord) -> bytes:
        """Return the bytes that the teacher's image was decoded from.

        Raises:
            OSError: the image cannot be read where the source says; ConnectionError where another try may help.
            CacheMismatchError: it is there and is not the image that the teacher saw.
        """
        ahead = self._ahead.pop(image.row, None)
        return self._read(image) if ahead is None else ahead.result()

    @contextmanager
    def ahead(self, images: Sequence[SampleRecord]) -> Iterator[None]:
        """Prefetch images for :meth:`read` within the block, where each read is a request.

        Their bytes are in memory until they are read. Files on this machine are not prefetched.
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
            # what another try can cure stays so
            kind = ConnectionError if is_transient(error) else OSError
            raise kind(
                f"{named} cannot be read: {error}. Were the images moved? Name their folder with --image-root."
            ) from error
        require_content(data, image.content_sha256, named)
        return data


class CachedImages:
    """:class:`StoredImages` of some rows of a cache, by row. Safe for several threads; pickles without the reader.

    Args:
        reader: of the cache.
        source: where the images are.
        rows: those that can be read; others raise KeyError.
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
