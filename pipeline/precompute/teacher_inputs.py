"""Pixels and token ids for the teacher, made by the decode service, in this process or a worker. No torch.

An image is read and decoded once, whatever the number of its views.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from teacher_cache.pipeline.data.datasets.samples import ImageSource, require_content
from teacher_cache.pipeline.data.images.decode import UndecodableImageError, decoded_size
from teacher_cache.pipeline.data.images.decoders import modules_of, open_image
from teacher_cache.pipeline.data.images.model_input import ModelInput
from teacher_cache.pipeline.data.images.views import crop_shown, draw_crop
from teacher_cache.pipeline.data.service.slots import Slot, Slots
from teacher_cache.storage.format.identity import ViewsIdentity

_NO_CROP = (np.nan,) * 5


class Place(NamedTuple):
    """Place of one view of an image: a row of a slot. Without a slot only its crop is needed."""

    view: int
    slot: Slot | None
    at: int


class ImageItem(NamedTuple):
    """Image of a ticket.

    Attributes:
        sample: its row of the samples table.
        content: its bytes, requested already. Default: they are read when it is decoded.
    """

    sample: dict[str, Any]
    places: tuple[Place, ...]
    content: Future[bytes] | None = None


class TextItem(NamedTuple):
    """Caption of a ticket: its text, and its row of a slot."""

    text: str
    slot: Slot
    at: int


class Prepared(NamedTuple):
    """One view of an image, ready for the teacher.

    Attributes:
        crop: crop in the form of ``image/view``.
        lost: reason and detail of a view that cannot be encoded.
    """

    crop: tuple[float, ...]
    lost: tuple[str, str] | None = None


class Made(NamedTuple):
    """Result of an item: its views by number (none for a caption), and the seconds that it took."""

    views: dict[int, Prepared]
    seconds: float


class TeacherInputs:
    """Pixels and tokens of one teacher, as a service's ``Prepare``. Thread-safe; pickles without its threads.

    Args:
        seen: the teacher's preprocessing.
        decoder: name of the image decoder.
        policy: what draws the crops of later views.
        tokenizer: texts to int64 (texts, context_length).
        fetches: number of requests for remote images in flight per process.
    """

    def __init__(
        self,
        seen: ModelInput,
        decoder: str,
        policy: ViewsIdentity,
        source: ImageSource,
        tokenizer: Callable[[list[str]], Any],
        context_length: int,
        fetches: int,
    ) -> None:
        self._seen, self._decoder, self._policy, self._source = seen, decoder, policy, source
        self._tokenizer, self._context_length, self._fetches = tokenizer, context_length, fetches
        self.modules: tuple[str, ...] = (*modules_of(decoder), type(seen).__module__, type(tokenizer).__module__)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of a slot: of an image, or of a caption's tokens if they need more."""
        return max(3 * self._seen.size[0] * self._seen.size[1], 8 * self._context_length)

    def shown(self, slots: Slots, slot: Slot, rows: int) -> NDArray[np.uint8]:
        """Return the first images of a slot: uint8 (rows, height, width, 3)."""
        return slots.array(slot, (rows, *self._seen.size, 3))

    def tokens(self, slots: Slots, slot: Slot, rows: int) -> NDArray[np.int64]:
        """Return the first captions of a slot: int64 (rows, context_length)."""
        return slots.array(slot, (rows, self._context_length), np.int64)

    def named(self, item: Any) -> str:
        """Return an item's name for a message."""
        if isinstance(item, TextItem):
            return f"caption {item.text[:80]!r}"
        return f"{item.sample['sample_id']}: {self._source.resolve(item.sample['uri'])}"

    def request(self, item: ImageItem) -> ImageItem:
        """Request a remote image's bytes ahead. A local one is read when it is decoded."""
        if item.content is not None or not self._source.fetches(item.sample["uri"]):
            return item
        return item._replace(content=self._fetchers.submit(self._fetch, item.sample))

    def close(self) -> None:
        """Cancel the requests that were made ahead."""
        if (fetchers := self.__dict__.pop("_fetchers", None)) is not None:
            fetchers.shutdown(wait=False, cancel_futures=True)

    def __call__(self, items: Sequence[Any], slots: Slots) -> list[Made]:
        """Make each item's pixels or tokens.

        Raises:
            OSError: the bytes cannot be read now. A retry may succeed, so the row is not quarantined.
            CacheMismatchError: the image changed since the cache was planned.
        """
        if isinstance(items[0], TextItem):
            return self._tokenized(items, slots)
        return [self._image(item, slots) for item in [self.request(item) for item in items]]

    def _tokenized(self, items: Sequence[TextItem], slots: Slots) -> list[Made]:
        began = time.perf_counter()
        tokens = np.asarray(self._tokenizer([item.text for item in items]))
        for item, row in zip(items, tokens, strict=True):
            self.tokens(slots, item.slot, item.at + 1)[item.at] = row
        # one job: its seconds are not divided among the captions
        return [Made({}, time.perf_counter() - began)] + [Made({}, 0.0)] * (len(items) - 1)

    def _image(self, item: ImageItem, slots: Slots) -> Made:
        """Decode an image once and write each view to its place; a lost view stays black."""
        began = time.perf_counter()
        data = item.content.result() if item.content else self._fetch(item.sample)
        rows = {
            place.view: None if place.slot is None else self.shown(slots, place.slot, place.at + 1)[place.at]
            for place in item.places
        }
        try:
            if all(row is None for row in rows.values()):
                size, image = decoded_size(data), None
            else:
                image = open_image(data, self._decoder)
                size = image.size
        except Exception as error:
            _raise_if_memory(error)
            views = {view: _lost(row, error) for view, row in rows.items()}
        else:
            views = {view: self._view(item.sample, view, image, size, row) for view, row in rows.items()}
        return Made(views, time.perf_counter() - began)

    def _view(
        self, sample: dict[str, Any], view: int, image: Any, size: tuple[int, int], row: NDArray[np.uint8] | None
    ) -> Prepared:
        try:
            if view > 0 or row is None:
                self._seen.require_evaluable(*size)
            if view == 0:
                box = self._seen.evaluation_crop(*size)
                if row is not None:
                    row[:] = self._seen.shown(image)
            else:
                crop = draw_crop(self._policy, sample["content_sha256"], view, *size)
                box = crop.as_row()
                if row is not None:
                    row[:] = crop_shown(image, crop, self._seen)
        except Exception as error:  # an odd image, such as 1 x 600 pixels, must not end the run
            _raise_if_memory(error)
            return _lost(row, error)
        return Prepared(box)

    def _fetch(self, sample: dict[str, Any]) -> bytes:
        data = self._source.read(sample["uri"], sample["offset"], sample["length"])
        require_content(data, sample["content_sha256"], self._source.resolve(sample["uri"]))
        return data

    @cached_property
    def _fetchers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._fetches, thread_name_prefix="images")

    def __reduce__(self) -> tuple[Any, ...]:
        parts = self._seen, self._decoder, self._policy, self._source, self._tokenizer, self._context_length
        return partial(TeacherInputs, fetches=self._fetches), parts


def _lost(row: NDArray[np.uint8] | None, error: Exception) -> Prepared:
    # a black image keeps the place, so the batch is the same for its neighbours
    if row is not None:
        row[:] = 0
    if isinstance(error, UndecodableImageError):
        return Prepared(_NO_CROP, ("undecodable-image", str(error)))
    return Prepared(_NO_CROP, ("untransformable-image", f"{type(error).__name__}: {error}"))


def _raise_if_memory(error: Exception) -> None:
    """Raise an error for want of memory again: the machine's fault, not the image's. torch's is a RuntimeError."""
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        raise error
