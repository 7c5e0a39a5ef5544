"""Pixels and token ids of training pairs and evaluation crops, made by the decode service. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from teacher_cache.pipeline.data.batches.decoded_images import DecodedImages
from teacher_cache.pipeline.data.images.ready_pixels import PixelFiles
from teacher_cache.pipeline.data.service.slots import Slot, Slots


class Key(NamedTuple):
    """Item of a batch, looked up in the cache's tables.

    Attributes:
        image, region: arguments of the images' ``write``.
        texts: captions of the image. None: an evaluation crop without captions.
    """

    image: Any
    region: Any
    texts: list[str] | None


class Item(NamedTuple):
    """Key, and where its pixels and tokens go: byte offsets in a slot."""

    key: Key
    slot: Slot
    pixels: int
    tokens: int


class BatchForm(NamedTuple):
    """Arrays of a batch in a slot: tokens first, since they must be aligned.

    Attributes:
        size: height and width of the images.
        captions: number of captions of each image.
        length: number of tokens of a caption.
    """

    rows: int
    size: tuple[int, int]
    captions: int
    length: int

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Bytes of an image's pixels, and of its captions' tokens."""
        return 3 * self.size[0] * self.size[1], 8 * self.captions * self.length

    @property
    def nbytes(self) -> int:
        """Bytes of the batch."""
        return self.rows * sum(self.row_bytes)

    def items(self, keys: Sequence[Key], slot: Slot) -> list[Item]:
        """Return the keys with their places."""
        pixels, tokens = self.row_bytes
        first = self.rows * tokens
        return [Item(key, slot, first + at * pixels, at * tokens) for at, key in enumerate(keys)]

    def pixels(self, slots: Slots, slot: Slot, rows: int) -> NDArray[np.uint8]:
        """Return the first images of a slot, uint8 (rows, height, width, 3)."""
        return slots.array(slot, (rows, *self.size, 3), offset=self.rows * self.row_bytes[1])

    def tokens(self, slots: Slots, slot: Slot, rows: int) -> NDArray[np.int64]:
        """Return the tokens of the first images of a slot, int64 (rows, captions, length)."""
        return slots.array(slot, (rows, self.captions, self.length), np.int64)


class StudentInputs:
    """Pixels and tokens of a run, as a service's ``Prepare``. It holds no table and no reader.

    Args:
        learned: images of training pairs.
        evaluated: images of evaluation crops.
        tokenizer: texts to int64 (texts, length).
        length: number of tokens of a caption.
    """

    def __init__(
        self,
        learned: DecodedImages | PixelFiles,
        evaluated: DecodedImages | None,
        tokenizer: Callable[[list[str]], Any],
        length: int,
    ) -> None:
        self._learned: Any = learned
        self._evaluated: Any = evaluated
        self._tokenizer, self._length = tokenizer, length
        decoded = [images for images in (learned, evaluated) if isinstance(images, DecodedImages)]
        slow = next((images.modules for images in decoded if images.modules), ())
        self.modules: tuple[str, ...] = (*slow, type(tokenizer).__module__)

    def named(self, item: Item) -> str:
        """Return an item's name for a message."""
        return str(self._images(item).named(item.key.image))

    def __call__(self, items: Sequence[Item], slots: Slots) -> list[None]:
        """Write each item's pixels and tokens to its places.

        Raises:
            OSError, CacheError: an item cannot be made.
        """
        with self._images(items[0]).ahead([item.key.image for item in items]):
            for item in items:
                self._write(item, slots)
        return [None] * len(items)

    def _images(self, item: Item) -> Any:
        return self._evaluated if item.key.texts is None else self._learned

    def _write(self, item: Item, slots: Slots) -> None:
        images = self._images(item)
        images.write(item.key.image, item.key.region, slots.array(item.slot, (*images.size, 3), offset=item.pixels))
        if item.key.texts:
            shape = len(item.key.texts), self._length
            slots.array(item.slot, shape, np.int64, item.tokens)[:] = self._tokenizer(item.key.texts)
