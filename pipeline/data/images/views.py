"""Views: the crops of an image that the teacher saw, drawn once, stored, and replayed for students.

View 0 is the model's own evaluation crop (:class:`teacher_cache.pipeline.data.images.model_input.ModelInput`). Later
views are random resized crops, possibly mirrored, in whole pixels of the source image. The drawn box is stored beside
the embedding (``image/view``) for students. It is drawn again only when a lost chunk is encoded again.

A draw depends only on the seed, the image's content and the number of the view: not on the order of rows, the number of
views or the process. So a cache with more views repeats the crops of one with fewer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from teacher_cache.pipeline.data.images.model_input import ModelInput
from teacher_cache.storage.format.identity import ViewsIdentity

if TYPE_CHECKING:
    from teacher_cache.pipeline.data.images.scaled_jpeg import ScaledJpeg

_TRIES = 10
_EXACT_BITS = 24  # boxes are stored as float32, which has 24 bits for whole numbers


@dataclass(frozen=True)
class Crop:
    """Region of a source image in whole pixels, possibly mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool

    def as_row(self) -> tuple[float, float, float, float, float]:
        """Return the crop in the form of ``image/view``: top, left, height, width, and 1.0 if mirrored."""
        return float(self.top), float(self.left), float(self.height), float(self.width), float(self.flip)

    @classmethod
    def from_row(cls, row: Sequence[float]) -> Crop:
        """Read the crop of a later view from ``image/view``.

        Raises:
            ValueError: not a box of whole pixels.
        """
        y, x, height, width, flip = (float(value) for value in row)
        whole = all(value.is_integer() for value in (y, x, height, width))
        if not whole or y < 0 or x < 0 or height < 1 or width < 1 or flip not in (0.0, 1.0):
            raise ValueError(f"stored crop {[float(value) for value in row]} is no box of whole pixels with a flip")
        return cls(int(y), int(x), int(height), int(width), bool(flip))

    def fits(self, width: int, height: int) -> bool:
        """Return whether the region lies within an image of this size."""
        return self.top + self.height <= height and self.left + self.width <= width


def draw_crop(policy: ViewsIdentity, content_sha256: str, view: int, width: int, height: int) -> Crop:
    """Draw the crop of one view of one image.

    The algorithm is torchvision's ``RandomResizedCrop.get_params`` (torchvision 0.29,
    ``torchvision/transforms/transforms.py``), which open_clip trains with. It tries ten times to find a box of random
    area and log-uniform width / height within the image, else takes the nearest central crop.

    Args:
        policy: policy of the cache; its ``count`` is ignored.
        content_sha256: digest of the image's bytes in the samples table.
        view: number of the view, from 1.
        width, height: size of the source image in pixels.

    Raises:
        ValueError: view 0, or a policy without random crops.
    """
    if view < 1 or policy.scale is None or policy.ratio is None or policy.flip is None or policy.seed is None:
        raise ValueError(f"view {view} is not drawn by policy {policy.policy}; view 0 is the evaluation crop")
    uniform = _uniforms(policy.seed, content_sha256, view)
    # drawn first, so that it does not depend on the number of tries
    flip = uniform() < policy.flip
    box = (_exact(value) for value in _box(uniform, policy.scale, policy.ratio, width, height))
    y, x, box_height, box_width = box
    return Crop(y, x, box_height, box_width, flip)


def crop_shown(image: Image.Image | ScaledJpeg, crop: Crop, model: ModelInput) -> NDArray[np.uint8]:
    """Crop, resize to the model's input, mirror and convert to RGB, in the order of open_clip's training transform.

    Normalised, the result is the model's input, for teacher and students.

    Args:
        image: decoded image in any mode. EXIF orientation is not applied.

    Returns:
        RGB uint8 (height, width, 3) of ``model.size``.

    Raises:
        ValueError: the crop is not within this image.
    """
    if not crop.fits(*image.size):
        width, height = image.size
        raise ValueError(f"stored crop {crop.as_row()} reaches beyond the {width} x {height} pixels there are")
    height, width = model.size
    # "random" means bicubic outside training, as in open_clip
    resample = Image.Resampling.BILINEAR if model.interpolation == "bilinear" else Image.Resampling.BICUBIC
    box = crop.left, crop.top, crop.left + crop.width, crop.top + crop.height
    if not isinstance(image, Image.Image):
        return image.cropped(box, (width, height), resample, crop.flip)
    # not resize(box=): at its edges the filter would see pixels beside the crop
    seen = image.crop(box).resize((width, height), resample)
    return np.array((ImageOps.mirror(seen) if crop.flip else seen).convert("RGB"))


def _box(
    uniform: Callable[[], float], scale: tuple[float, float], ratio: tuple[float, float], width: int, height: int
) -> tuple[int, int, int, int]:
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_TRIES):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform())
        aspect = math.exp(low + (high - low) * uniform())
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            y = int(uniform() * (height - box_height + 1))
            x = int(uniform() * (width - box_width + 1))
            return y, x, box_height, box_width
    box_width, box_height = width, height
    if width / height < ratio[0]:
        box_height = min(max(round(width / ratio[0]), 1), height)
    elif width / height > ratio[1]:
        box_width = min(max(round(height * ratio[1]), 1), width)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _uniforms(seed: int, content_sha256: str, view: int) -> Callable[[], float]:
    """Return a source of numbers in [0, 1), a counter-based generator for this view of this image.

    It uses raw Philox output, which numpy promises never to change, unlike its distributions.
    """
    key = hashlib.sha256(f"view {view} of {content_sha256} by seed {seed}".encode()).digest()[:16]
    raw = np.random.Philox(key=int.from_bytes(key, "little"))
    return lambda: (int(raw.random_raw()) >> 11) * 2.0**-53


def _exact(value: int) -> int:
    """Return the next lower number that float32 holds exactly: the same one, except in very long strips."""
    spare = max(value.bit_length() - _EXACT_BITS, 0)
    return value >> spare << spare
