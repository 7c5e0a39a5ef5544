"""The decoder ``jpeg-scaled``: JPEG decoded at the scale that the model's input needs, then resized by vector code.

A JPEG holds 8 x 8 blocks of frequencies. Decoded at 1/2, 1/4 or 1/8, only the low ones of each block are turned into
pixels, which is an exact low-pass and saves most of the work (libjpeg's ``scale_denom``; other eighths are possible and
slower than none). What is decoded is then resized as Pillow resizes: the same filter over the same region, by torch's
kernel on uint8, which differs from Pillow by one level here and there.

- The scale is the smallest that leaves ``MARGIN`` pixels of the region for each pixel of the model's input.
- An image goes this way by its bytes alone: a JPEG in colour, progressive or not. Grey, CMYK, several pictures in one
  file, and every other format are Pillow's, and so is a JPEG of which libjpeg says that something in it is wrong. So
  the same images are undecodable, for the same reasons, and :mod:`teacher_cache.pipeline.data.images.decode`'s rules
  hold for all.
- Sizes, rounding and crops are those of the other decoder: they are of the source image, whose size is in its header.

These pixels are not Pillow's, so that a cache says in its identity that it is of them. Whoever changes what this module
makes of an image has to give that another name.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from teacher_cache.pipeline.data.images.decode import decode_image, identified_image, load_image
from teacher_cache.storage.errors import UsageError

__all__ = ["DECODERS", "JPEG_SCALED", "MARGIN", "PILLOW", "ScaledJpeg", "open_image", "require_decoder"]

PILLOW, JPEG_SCALED = "pillow", "jpeg-scaled"
DECODERS = (PILLOW, JPEG_SCALED)
MARGIN = 3.3  # below 3, a trained teacher moves by more than 0.001 of cosine
_EIGHTHS = (1, 2, 4, 8)
_RESIZE = {
    Image.Resampling.BICUBIC: torch.ops.aten._upsample_bicubic2d_aa,
    Image.Resampling.BILINEAR: torch.ops.aten._upsample_bilinear2d_aa,
}


class Box(NamedTuple):
    """A region in pixels, as Pillow has it; edges need not be whole."""

    left: float
    top: float
    right: float
    bottom: float


def require_decoder(name: str) -> None:
    """Refuse a decoder that cannot be used here.

    Raises:
        UsageError: it is not known, or needs a package that is not installed.
    """
    if name not in DECODERS:
        raise UsageError(f"decoder {name!r} is not known; there are {', '.join(DECODERS)}")
    if name == JPEG_SCALED:
        _decode_jpeg()


def _decode_jpeg() -> Any:
    try:
        from simplejpeg import decode_jpeg
    except ModuleNotFoundError as error:
        raise UsageError(
            f"decoder {JPEG_SCALED!r} needs simplejpeg, which is not installed: pip install 'teacher-cache[fastjpeg]'"
        ) from error
    return decode_jpeg


def open_image(data: bytes, decoder: str = PILLOW) -> Image.Image | ScaledJpeg:
    """Open the image in these bytes: decoded by Pillow, or a JPEG that is decoded when it is resized.

    Raises:
        UndecodableImageError: :mod:`teacher_cache.pipeline.data.images.decode` says why; a JPEG's, if its data is
        damaged, comes with its pixels.
        UsageError: as :func:`require_decoder`.
    """
    if decoder == PILLOW:
        return decode_image(data)
    require_decoder(decoder)
    image = identified_image(data)
    if image.format == "JPEG" and image.mode == "RGB":
        return ScaledJpeg(data, image.size)
    return load_image(image)


class ScaledJpeg:
    """JPEG in colour whose regions are each decoded at the scale that they need. For one thread.

    Attributes:
        size: (width, height) in pixels, of the source image.
    """

    def __init__(self, data: bytes, size: tuple[int, int]) -> None:
        self.size = size
        self._data = data
        self._decoded: dict[int, NDArray[np.uint8]] = {}

    def resized(
        self, size: tuple[int, int], resample: Image.Resampling, box: tuple[int, int, int, int] | None = None
    ) -> Tensor:
        """Crop to ``box`` and resize to (width, height) ``size``, as Pillow does.

        Args:
            resample: bicubic or bilinear, both antialiased.
            box: left, top, right, bottom in pixels of the source image; all of it if left out.

        Returns:
            RGB uint8 (3, height, width).

        Raises:
            UndecodableImageError: the data is damaged, as
            :func:`teacher_cache.pipeline.data.images.decode.decode_image`.
            ValueError: a size of nothing.
        """
        if min(size) < 1:
            raise ValueError("height and width must be > 0")  # Pillow's words: a cache keeps them
        region = Box(*(box or (0, 0, *self.size)))
        eighths = _eighths(region, size)
        try:
            pixels = self._at(eighths)
        except ValueError:  # something is wrong with it, or odd: Pillow decides whether that is too much
            image = decode_image(self._data)
            return _tensor((image.crop(box) if box else image).resize(size, resample))
        return _resized(pixels, Box(*(edge * eighths / 8 for edge in region)), size, resample)

    def _at(self, eighths: int) -> NDArray[np.uint8]:
        """Decode all of the image at a number of eighths of its size, rounded up: (height, width, 3).

        Raises:
            ValueError: libjpeg is not content with the data, if only by a warning.
        """
        if eighths not in self._decoded:
            width, height = (-(-edge * eighths // 8) for edge in self.size)
            pixels = _decode_jpeg()(self._data, "RGB", min_height=height, min_width=width)
            if pixels.shape != (height, width, 3):
                raise ValueError(f"{pixels.shape} pixels decoded, {(height, width, 3)} wanted")
            self._decoded[eighths] = pixels
        return self._decoded[eighths]


def _eighths(region: Box, size: tuple[int, int]) -> int:
    """Return the scale, in eighths, at which a region has ``MARGIN`` times the pixels of ``size`` along both edges."""
    width, height = region.right - region.left, region.bottom - region.top
    for eighths in _EIGHTHS:
        if width * eighths >= 8 * MARGIN * size[0] and height * eighths >= 8 * MARGIN * size[1]:
            return eighths
    return _EIGHTHS[-1]


def _resized(pixels: NDArray[np.uint8], box: Box, size: tuple[int, int], resample: Image.Resampling) -> Tensor:
    left, top, right, bottom = (int(edge) for edge in (box.left, box.top, -(-box.right // 1), -(-box.bottom // 1)))
    part = np.ascontiguousarray(pixels[top:bottom, left:right])
    if (left, top) != (box.left, box.top):
        # torch's kernel takes a scale, and no start between two pixels
        inner = (box.left - left, box.top - top, box.right - left, box.bottom - top)
        return _tensor(Image.fromarray(part).resize(size, resample, inner))
    width, height = size
    scales = height / (box.bottom - box.top), width / (box.right - box.left)
    # the axis of the batch in numpy: one added by torch would not count as channels_last, and be copied first
    whole = torch.from_numpy(part[None]).permute(0, 3, 1, 2)
    resized: Tensor = _RESIZE[resample](whole, [height, width], False, *scales)[0]
    return resized


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
