"""Pairs that another trainer reads: pixels of the crop that the teacher saw, and rows of a cache by content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.pipeline.data.images.decode import UndecodableImageError
from teacher_cache.pipeline.data.images.decoders import open_image
from teacher_cache.pipeline.data.images.preprocess import Preprocess
from teacher_cache.pipeline.data.images.views import crop_shown, draw_crop
from teacher_cache.storage.errors import CacheMismatchError, UsageError
from teacher_cache.storage.format.identity import CacheIdentity
from teacher_cache.storage.read.reader import EmbeddingReader


class ShownPair(NamedTuple):
    """A pair as a worker makes it, or a batch of pairs: then each field is stacked, or a list of texts.

    Attributes:
        pixels: float32 (3, height, width), normalised.
        tokens: int64 (context_length,).
        image_sha256: digest of the image's bytes, in hex.
        caption: its text.
        view: number of the view that the pixels show.
        box: float32 (5,), the crop as in ``image/view``; zeros for view 0.
        name: file or key of the pair, for messages.
        problem: why there are no pixels. Empty: none.
    """

    pixels: Tensor
    tokens: Tensor
    image_sha256: Any
    caption: Any
    view: Any
    box: Any
    name: Any
    problem: Any


class ShowPair:
    """Function from image bytes and a caption to a :class:`ShownPair`. Pickles without the cache.

    With several views, one is drawn by torch's generator for each pair. Its crop is drawn as it was for the teacher,
    from the image's content.

    Args:
        identity: identity of the cache.
        preprocess: the student's preprocessing.
        tokenizer: the student's tokenizer: texts to int64 (texts, context_length).
        views: number of the cache's views to use, from the first.
    """

    def __init__(
        self, identity: CacheIdentity, preprocess: Preprocess, tokenizer: Callable[[list[str]], Tensor], views: int
    ) -> None:
        self._policy, self._views, self._tokenizer = identity.views, views, tokenizer
        self._preprocess = preprocess.decoded_by(identity.preprocess.decoder)

    def __call__(self, read: Callable[[], bytes], caption: str, name: str) -> ShownPair:
        """Return the pair. A file that cannot be read or decoded is its ``problem``; pixels are zeros then."""
        view, box, digest, problem = 0, np.zeros(5, np.float32), "", ""
        shown = np.zeros((*self._preprocess.size, 3), np.uint8)
        try:
            data = read()
            digest = hashlib.sha256(data).hexdigest()
            view = int(torch.randint(self._views, ())) if self._views > 1 else 0
            shown, box = self._shown(data, digest, view)
        except (OSError, UndecodableImageError, ArithmeticError, ValueError, RuntimeError) as error:
            problem = f"{name}: {error}"
        tokens = self._tokenizer([caption])[0]
        pixels = self._preprocess.normalized(shown)
        return ShownPair(pixels, tokens, digest, caption, view, box, name, problem)

    def _shown(self, data: bytes, digest: str, view: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        image = open_image(data, self._preprocess.decoder)
        if view == 0:
            return self._preprocess.shown(image), np.zeros(5, np.float32)
        crop = draw_crop(self._policy, digest, view, *image.size)
        return crop_shown(image, crop, self._preprocess), np.array(crop.as_row(), np.float32)


def rows_of(reader: EmbeddingReader, pairs: ShownPair) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the image rows and the caption rows of a batch, (batch,) int64 each, by content.

    Raises:
        OSError: a file could not be read or decoded.
        CacheMismatchError: a pair is not in the cache, or its image has no embedding. The message names the first.
    """
    if problem := next(filter(None, pairs.problem), None):
        raise OSError(problem)
    try:
        images, captions = reader.lookup(pairs.image_sha256, pairs.caption)
    except UsageError:
        for name, sha256, caption in zip(pairs.name, pairs.image_sha256, pairs.caption, strict=True):
            try:
                reader.lookup([sha256], [caption])
            except UsageError as error:
                raise CacheMismatchError(f"{name}: {error}") from error
        raise
    assert images is not None  # both were asked for
    assert captions is not None
    lost = np.isin(images, [row.row for row in reader.quarantined])
    if lost.any():
        name, row = pairs.name[int(np.argmax(lost))], images[np.argmax(lost)]
        raise CacheMismatchError(f"{name}: row {row} of {reader.location} has no embedding; leave the image out")
    return images, captions
