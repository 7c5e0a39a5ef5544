"""The images that a cache was made of: their stored bytes by row, proven. No torch, no decoding."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np

from pipeline.samples import ImageSource, require_content
from storage.reader import EmbeddingReader
from storage.tables import SAMPLES, read_rows
from storage.transient import is_transient

__all__ = ["CachedImages"]


class CachedImages:
    """Stored bytes of images by row of the cache. Safe for several threads; pickles without the reader.

    Args:
        reader: of the cache.
        source: where the images are.
        rows: the only ones that will be asked for (others are a KeyError); left out, all of the cache, whose whole
            table of samples is then kept in memory.
    """

    def __init__(self, reader: EmbeddingReader, source: ImageSource, rows: Collection[int] | None = None) -> None:
        self._places: dict[int, int] | None = None
        if rows is None:
            samples = reader.samples
        else:
            wanted = sorted(set(rows))
            self._places = {row: place for place, row in enumerate(wanted)}
            samples = read_rows(reader.files, reader.manifest, SAMPLES, np.array(wanted, np.int64))
        self._ids, self._uris, self._digests = samples["sample_id"], samples["uri"], samples["content_sha256"]
        self._offsets, self._lengths = samples["offset"], samples["length"]
        self._source = source
        self._ahead: dict[int, Future[bytes]] = {}

    def _place(self, row: int) -> int:
        return row if self._places is None else self._places[row]

    def named(self, row: int) -> str:
        """The image as messages name it: row, sample_id and where it lies."""
        place = self._place(row)
        return f"row {row} ({self._ids[place].as_py()}): {self._source.resolve(self._uris[place].as_py())}"

    def named_within(self, row: int) -> str:
        """The same for who is elsewhere: row, sample_id and, if it is relative, the uri; no folder of this machine."""
        place = self._place(row)
        uri = self._uris[place].as_py()
        where = "" if "://" in uri or Path(uri).is_absolute() else f", {uri}"
        return f"row {row} ({self._ids[place].as_py()}{where})"

    def read(self, row: int) -> bytes:
        """The bytes that the teacher's image was decoded from.

        Raises:
            OSError: the image cannot be read where the source says; ConnectionError where another try may help.
            CacheMismatchError: it is there and is not the image that the teacher saw.
        """
        ahead = self._ahead.pop(row, None)
        return self._read(row) if ahead is None else ahead.result()

    @contextmanager
    def ahead(self, rows: Sequence[int]) -> Iterator[None]:
        """Within it :meth:`read` of these rows waits less: where each read is a request, many of them are under way.

        Their bytes are in memory until they are read. Of files on this machine nothing is read ahead.
        """
        with self._source.threads(self._uris[self._place(rows[0])].as_py()) if rows else nullcontext() as pool:
            if pool is not None:
                self._ahead.update((row, pool.submit(self._read, row)) for row in dict.fromkeys(rows))
            try:
                yield
            finally:
                for row in rows:
                    if (left := self._ahead.pop(row, None)) is not None:
                        left.cancel()

    def _read(self, row: int) -> bytes:
        named, at = self.named(row), self._place(row)
        try:
            data = self._source.read(self._uris[at].as_py(), self._offsets[at].as_py(), self._lengths[at].as_py())
        except OSError as error:
            # what another try can cure stays so
            kind = ConnectionError if is_transient(error) else OSError
            raise kind(
                f"{named} cannot be read: {error}. Were the images moved? Name their folder with --image-root."
            ) from error
        require_content(data, self._digests[at].as_py(), named)
        return data
