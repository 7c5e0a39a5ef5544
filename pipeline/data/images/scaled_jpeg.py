"""Decoder ``jpeg-scaled``: decodes a JPEG at the scale that the model needs, then resizes with vector code.

A JPEG holds 8 x 8 blocks of frequencies. Decoding at 1/2, 1/4 or 1/8 uses only the low frequencies of each block: an
exact low-pass that saves most of the work (libjpeg's ``scale_denom``; other eighths are slower than full size). The
pixels are then resized as in Pillow: the same filter over the same region, by torch's kernel on uint8, which differs
from Pillow by one level here and there.

- The scale is the smallest that leaves ``MARGIN`` pixels of the region for each pixel of the model's input.
- Only the bytes decide: a colour JPEG, progressive or not, is decoded here. Pillow decodes grey, CMYK, several pictures
  in one file, every other format, and any JPEG that libjpeg warns about. So both decoders refuse the same images for
  the same reasons, by the rules of :mod:`teacher_cache.pipeline.data.images.decode`.
- Sizes, rounding and crops equal the other decoder's: they refer to the source image, whose size is in its header.

These pixels differ from Pillow's, so a cache's identity names the decoder. A change to this module that changes pixels
needs a new decoder name.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.transform import center_crop_or_pad
from PIL import Image
from torch import Tensor

from teacher_cache.pipeline.data.images.decode import decode_image
from teacher_cache.pipeline.data.images.model_input import ModelInput
from teacher_cache.storage.errors import MissingPackageError

MARGIN = 3.3  # below 3, a trained teacher's cosines change by more than 0.001
_EIGHTHS = (1, 2, 4, 8)
_RESIZE = {
    Image.Resampling.BICUBIC: torch.ops.aten._upsample_bicubic2d_aa,
    Image.Resampling.BILINEAR: torch.ops.aten._upsample_bilinear2d_aa,
}


class Box(NamedTuple):
    """Region in pixels, as in Pillow. Edges may be fractional."""

    left: float
    top: float
    right: float
    bottom: float


def require_simplejpeg() -> None:
    """Check that the package that decodes is installed.

    Raises:
        UsageError: it is not.
    """
    _decode_jpeg()


def _decode_jpeg() -> Any:
    try:
        from simplejpeg import decode_jpeg
    except ModuleNotFoundError as error:
        raise MissingPackageError("simplejpeg", "decoder 'jpeg-scaled'") from error
    return decode_jpeg


class ScaledJpeg:
    """Colour JPEG whose regions are decoded at the scale that they need. For one thread.

    Attributes:
        size: (width, height) of the source image in pixels.
    """

    def __init__(self, data: bytes, size: tuple[int, int]) -> None:
        self.size = size
        self._data = data
        self._decoded: dict[int, NDArray[np.uint8]] = {}

    def shown(self, model: ModelInput) -> NDArray[np.uint8]:
        """Return the evaluation crop of a model: RGB uint8 (height, width, 3) of its size."""
        model.require_resizable(*self.size)
        height, width = model.resized(*self.size)
        seen = self.resized((width, height), model.resampling())
        if (height, width) != model.size:
            fill = model.fill_color if model.resize_mode == "longest" else 0
            seen = center_crop_or_pad(seen, list(model.size), fill=fill)
        return rows_of_pixels(seen)

    def cropped(
        self, box: tuple[int, int, int, int], size: tuple[int, int], resample: Image.Resampling, mirror: bool
    ) -> NDArray[np.uint8]:
        """Return a region, mirrored or not, as RGB uint8 (height, width, 3). ``size`` is (width, height)."""
        planes = self.resized(size, resample, box)
        return rows_of_pixels(planes.flip(-1) if mirror else planes)

    def resized(
        self, size: tuple[int, int], resample: Image.Resampling, box: tuple[int, int, int, int] | None = None
    ) -> Tensor:
        """Crop to ``box`` and resize to (width, height) ``size``, as Pillow does.

        Args:
            resample: bicubic or bilinear, both antialiased.
            box: left, top, right, bottom in pixels of the source image. Default: the whole image.

        Returns:
            RGB uint8 (3, height, width).

        Raises:
            UndecodableImageError: the data is damaged, as
                :func:`teacher_cache.pipeline.data.images.decode.decode_image`.
            ValueError: the height or width is 0.
        """
        if min(size) < 1:
            raise ValueError("height and width must be > 0")  # Pillow's words: a cache keeps them
        region = Box(*(box or (0, 0, *self.size)))
        eighths = _eighths(region, size)
        try:
            pixels = self._at(eighths)
        except ValueError:  # damaged or odd: Pillow decides whether it is decodable
            image = decode_image(self._data)
            return _tensor((image.crop(box) if box else image).resize(size, resample))
        return _resized(pixels, Box(*(edge * eighths / 8 for edge in region)), size, resample)

    def _at(self, eighths: int) -> NDArray[np.uint8]:
        """Decode the whole image at ``eighths`` of its size, rounded up: (height, width, 3).

        Raises:
            ValueError: an error or a warning of libjpeg.
        """
        if eighths not in self._decoded:
            width, height = (-(-edge * eighths // 8) for edge in self.size)
            pixels = _decode_jpeg()(self._data, "RGB", min_height=height, min_width=width)
            if pixels.shape != (height, width, 3):
                raise ValueError(f"{pixels.shape} pixels decoded, {(height, width, 3)} wanted")
            self._decoded[eighths] = pixels
        return self._decoded[eighths]


def _eighths(region: Box, size: tuple[int, int]) -> int:
    """Return the least scale, in eighths, at which a region has ``MARGIN`` times ``size`` along both edges."""
    width, height = region.right - region.left, region.bottom - region.top
    for eighths in _EIGHTHS:
        if width * eighths >= 8 * MARGIN * size[0] and height * eighths >= 8 * MARGIN * size[1]:
            return eighths
    return _EIGHTHS[-1]


def _resized(pixels: NDArray[np.uint8], box: Box, size: tuple[int, int], resample: Image.Resampling) -> Tensor:
    left, top, right, bottom = (int(edge) for edge in (box.left, box.top, -(-box.right // 1), -(-box.bottom // 1)))
    part = np.ascontiguousarray(pixels[top:bottom, left:right])
    if (left, top) != (box.left, box.top):
        # torch's kernel cannot start between two pixels
        inner = (box.left - left, box.top - top, box.right - left, box.bottom - top)
        return _tensor(Image.fromarray(part).resize(size, resample, inner))
    width, height = size
    scales = height / (box.bottom - box.top), width / (box.right - box.left)
    # add the batch axis in numpy: with torch's, the tensor is not channels_last and gets copied
    whole = torch.from_numpy(part[None]).permute(0, 3, 1, 2)
    resized: Tensor = _RESIZE[resample](whole, [height, width], False, *scales)[0]
    return resized


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def rows_of_pixels(planes: Tensor) -> NDArray[np.uint8]:
    """Return RGB uint8 (3, height, width) as (height, width, 3), a view of the same bytes."""
    pixels: NDArray[np.uint8] = planes.permute(1, 2, 0).numpy()
    return pixels
