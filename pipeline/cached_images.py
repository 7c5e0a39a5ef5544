"""The images that a cache was made of: their stored bytes by row, proven. No torch, no decoding."""

from __future__ import annotations

from pipeline.samples import ImageSource, require_content
from storage.reader import EmbeddingReader
from storage.transient import is_transient

__all__ = ["CachedImages"]


class CachedImages:
    """Stored bytes of images by row of the cache. Safe for several threads; pickles without the reader."""

    def __init__(self, reader: EmbeddingReader, source: ImageSource) -> None:
        samples = reader.samples
        self._ids, self._uris, self._digests = samples["sample_id"], samples["uri"], samples["content_sha256"]
        self._offsets, self._lengths = samples["offset"], samples["length"]
        self._source = source

    def named(self, row: int) -> str:
        """The image as messages name it: row, sample_id and where it lies."""
        return f"row {row} ({self._ids[row].as_py()}): {self._source.resolve(self._uris[row].as_py())}"

    def read(self, row: int) -> bytes:
        """The bytes that the teacher's image was decoded from.

        Raises:
            OSError: the image cannot be read where the source says; ConnectionError where another try may help.
            CacheMismatchError: it is there and is not the image that the teacher saw.
        """
        named = self.named(row)
        try:
            data = self._source.read(self._uris[row].as_py(), self._offsets[row].as_py(), self._lengths[row].as_py())
        except OSError as error:
            # what another try can cure stays so
            kind = ConnectionError if is_transient(error) else OSError
            raise kind(
                f"{named} cannot be read: {error}. Were the images moved? Name their folder with --image-root."
            ) from error
        require_content(data, self._digests[row].as_py(), named)
        return data
