"""Comparison of two pictures by their pixels: the same one, also recompressed, resized, cropped a little or mirrored.

Both are made grey and square. One is laid over the other at several sizes and places, as it is and mirrored, and the
best correlation of the pixels counts: the structure term of SSIM (Wang et al., Image quality assessment, 2004) over the
whole overlap, ``(cov(a, b) + C) / (std(a) std(b) + C)``. C keeps the noise of plain areas from deciding. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image

from teacher_cache.pipeline.data.images.decode import decode_image, what_pillow_raises

LEAST_LIKENESS = 0.9
"""Likeness from which two pictures are the same one (benchmarks/twins.md has the distributions)."""

_SIDE = 64  # pixels
_ROUGH_SIDE, _ROUGH_LIKENESS = 32, 0.8  # pairs below are not compared at the full size, which takes six times as long
_SCALES = (1.0, 0.975, 0.95, 0.925, 0.9)  # of the side: how much of one picture the other shows
_C = (0.03 * 255) ** 2 / 2

_Floats = NDArray[np.float32]


class Likeness(NamedTuple):
    """Likeness of two pictures, at most 1, and whether one is the mirror image of the other."""

    value: float
    mirrored: bool


class Picture:
    """A picture to compare with others.

    Args:
        data: stored bytes of the image.

    Raises:
        UndecodableImageError: as ``teacher_cache.pipeline.data.images.decode.decode_image``.
    """

    def __init__(self, data: bytes) -> None:
        image = decode_image(data, shrink_to=2 * _SIDE)
        with what_pillow_raises():
            grey = image.convert("L")
            self._grey = grey.resize((2 * _SIDE, 2 * _SIDE), Image.Resampling.BOX)

    @cached_property
    def rough(self) -> list[_Floats]:
        """The picture at the scales of the rough comparison, each (side, side)."""
        return self._scaled(_ROUGH_SIDE)

    @cached_property
    def full(self) -> list[_Floats]:
        """The picture at the scales of the full comparison, each (side, side)."""
        return self._scaled(_SIDE)

    def _scaled(self, side: int) -> list[_Floats]:
        sides = [round(scale * side) for scale in _SCALES]
        return [np.asarray(self._grey.resize((n, n), Image.Resampling.BICUBIC), np.float32) for n in sides]

    def likeness(self, other: Picture) -> Likeness:
        """Return how alike two pictures are."""
        rough = max(_likenesses(self.rough, other.rough))
        return rough if rough.value < _ROUGH_LIKENESS else max(_likenesses(self.full, other.full))


def _likenesses(a: list[_Floats], b: list[_Floats]) -> Iterator[Likeness]:
    for mirrored in (False, True):
        turned = [picture[:, ::-1] for picture in b] if mirrored else b
        yield Likeness(max(_best(a[0], turned), _best(turned[0], a[1:])), mirrored)


def _best(whole: _Floats, parts: list[_Floats]) -> float:
    """Return the greatest likeness of a picture's windows with smaller pictures of their size."""
    best = -1.0
    for part in parts:
        windows = sliding_window_view(whole, part.shape).reshape(-1, part.size)
        windows = windows - windows.mean(axis=1, keepdims=True)
        centred = part.reshape(-1) - part.mean()
        spread = np.sqrt(np.einsum("nd,nd->n", windows, windows) * (centred @ centred))
        best = max(best, float(((windows @ centred + _C * part.size) / (spread + _C * part.size)).max()))
    return best
