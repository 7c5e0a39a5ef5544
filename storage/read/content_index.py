"""Rows by content: the sha256 of an image's stored bytes, the text of a caption, or both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.format.tables import CAPTIONS, SAMPLES

_KEY_BYTES = 16


class ContentRows(NamedTuple):
    """Rows that :meth:`teacher_cache.storage.read.reader.EmbeddingReader.lookup` returns, in the order asked for.

    Attributes:
        image_rows: (n,) int64; None if only captions were given.
        caption_rows: (n,) int64; None if only images were given.
    """

    image_rows: NDArray[np.int64] | None
    caption_rows: NDArray[np.int64] | None


class ContentIndex:
    """Rows of one cache by content. Each kind of question takes 24 bytes per row in memory, from its first use on.

    Args:
        column: Yields a column of a table in parts, as ``EmbeddingReader.column`` does.
        location: The cache, for messages.
    """

    def __init__(self, column: Callable[[str, str], Iterator[pa.ChunkedArray]], location: str) -> None:
        self._column, self._location = column, location

    def rows(self, image_sha256: Sequence[str] | None, caption: Sequence[str] | None) -> ContentRows:
        """See :meth:`teacher_cache.storage.read.reader.EmbeddingReader.lookup`."""
        texts = [text.strip() for text in caption or ()]
        if image_sha256 is None:
            if caption is None:
                raise ValueError("lookup takes image_sha256, caption or both; neither was given")
            return ContentRows(None, self._found(self._captions, texts, (f"no caption is {text!r}" for text in texts)))
        images = [sha256.lower() for sha256 in image_sha256]
        if caption is not None and len(texts) != len(images):
            raise ValueError(
                f"{len(images)} image_sha256 and {len(texts)} captions: lookup takes one caption per image"
            )
        missing = (f"no image's stored bytes have the sha256 {sha256!r}" for sha256 in images)
        image_rows = self._found(self._images, images, missing)
        if caption is None:
            return ContentRows(image_rows, None)
        pairs = [_pair(*both) for both in zip(image_rows.tolist(), texts, strict=True)]
        missing = (f"the image {sha256!r} has no caption {text!r}" for sha256, text in zip(images, texts, strict=True))
        caption_rows = self._found(self._pairs, pairs, missing)
        return ContentRows(self._owners[caption_rows], caption_rows)

    def images_held(self, image_sha256: Sequence[str]) -> NDArray[np.int64]:
        """Return the first row of each image by the sha256 of its stored bytes, (n,); -1 for none."""
        return self._images.rows(image_sha256)

    def captions_held(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Return the first row of each caption by its text alone, (n,); -1 for none."""
        return self._captions.rows([text.strip() for text in texts])

    def _found(self, keys: _Keys, contents: Sequence[str], missing: Iterable[str]) -> NDArray[np.int64]:
        """Return the row of each content; an error has the entry of ``missing`` of the first one without a row."""
        rows = keys.rows(contents)
        lost = np.flatnonzero(rows < 0)
        if len(lost):
            name = next(name for number, name in enumerate(missing) if number == lost[0])
            others = f" ({len(lost) - 1:,} more are missing)" if len(lost) > 1 else ""
            raise UsageError(
                f"{self._location}: {name}{others}. Name the cache of this dataset, or leave it out; teacher-cache "
                "look CACHE shows what the cache holds"
            )
        return rows

    def _values(self, table: str, name: str) -> Iterator[str]:
        return chain.from_iterable(part.to_pylist() for part in self._column(table, name))

    @cached_property
    def _images(self) -> _Keys:
        return _Keys(self._values(SAMPLES, "content_sha256"))

    @cached_property
    def _captions(self) -> _Keys:
        return _Keys(text.strip() for text in self._values(CAPTIONS, "text"))

    @cached_property
    def _owners(self) -> NDArray[np.int64]:
        parts = (part.to_numpy() for part in self._column(CAPTIONS, "image_row"))
        return np.concatenate([np.empty(0, np.int64), *parts])

    @cached_property
    def _pairs(self) -> _Keys:
        # an image may be in several rows, each with captions of its own: all count as those of the first
        owners = self._images.firsts()[self._owners]
        texts = self._values(CAPTIONS, "text")
        return _Keys(_pair(int(owner), text.strip()) for owner, text in zip(owners, texts, strict=True))


class _Keys:
    """Rows by a digest of their content: that of equal contents is the first one."""

    def __init__(self, contents: Iterable[str]) -> None:
        keys = content_digests(contents)
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def rows(self, contents: Sequence[str]) -> NDArray[np.int64]:
        """Return the row of each content, -1 for none."""
        digests = content_digests(contents)
        at = np.searchsorted(self._keys, digests)
        rows = np.full(len(digests), -1, np.int64)
        held = np.flatnonzero(at < len(self._keys))
        held = held[self._keys[at[held]] == digests[held]]
        rows[held] = self._order[at[held]]
        return rows

    def firsts(self) -> NDArray[np.int64]:
        """Return, for each row, the first row with the same content."""
        firsts = np.empty(len(self._keys), np.int64)
        firsts[self._order] = self._order[np.searchsorted(self._keys, self._keys)]
        return firsts


def _pair(image_row: int, text: str) -> str:
    return f"{image_row} {text}"


def content_digests(contents: Iterable[str]) -> NDArray[np.bytes_]:
    """Return one key of 16 bytes for each content, (contents,) S16."""
    encoded = (content.encode("utf-8", "surrogatepass") for content in contents)
    # not by join, which would hold each as an object of its own: 154 bytes a row, not 24
    digests = (hashlib.blake2b(content, digest_size=_KEY_BYTES).digest() for content in encoded)
    return np.fromiter(digests, f"S{_KEY_BYTES}")
