"""Image bytes to model input, as open_clip does it for evaluation, with the crop it took and a probe of it.

Raises nothing of its own on odd images: what Pillow cannot decode becomes an ``UndecodableImageError``.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

if TYPE_CHECKING:
    from storage.manifest import PreprocessIdentity

__all__ = ["Preprocess", "UndecodableImageError"]


class UndecodableImageError(Exception):
    """These bytes are not an image that Pillow can decode whole."""


@dataclass(frozen=True)
class Preprocess:
    """The evaluation transform of one model.

    Attributes:
        size: (height, width) of the model's input.
        resize_mode: shortest (then centre crop), longest (then pad) or squash, as in open_clip.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    @classmethod
    def of_model(cls, model: torch.nn.Module) -> Preprocess:
        """The one that open_clip attached to a model when it built it."""
        config: dict[str, Any] = model.visual.preprocess_cfg  # type: ignore[assignment,union-attr]
        return cls.from_config(config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Preprocess:
        """From an open_clip ``preprocess_cfg`` with an explicit size."""
        size = config["size"]
        height, width = (size, size) if isinstance(size, int) else size
        return cls(
            (int(height), int(width)),
            tuple(float(value) for value in config["mean"]),
            tuple(float(value) for value in config["std"]),
            config["interpolation"],
            config["resize_mode"],
            int(config["fill_color"]),
        )

    def to_config(self) -> dict[str, Any]:
        """As open_clip's ``preprocess_cfg``."""
        return {
            "size": list(self.size),
            "mode": "RGB",
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "resize_mode": self.resize_mode,
            "fill_color": self.fill_color,
        }

    def transform(self) -> Any:
        """open_clip's own transform, a PIL image to a float32 tensor (3, height, width)."""
        config = PreprocessCfg(**{**self.to_config(), "size": self.size})
        return image_transform_v2(config, is_train=False)

    def evaluation_crop(self, width: int, height: int) -> tuple[float, float, float, float, float]:
        """The region of a source image that the model sees: top, left, height, width in source pixels, flip 0.

        Follows open_clip's transform to its rounding: the image is resized to whole pixels, and the crop starts
        at a whole pixel of the resized image. With resize_mode ``longest`` the region reaches beyond the image,
        where the model sees padding.
        """
        wanted_height, wanted_width = self.size
        if self.resize_mode == "squash":
            return 0.0, 0.0, float(height), float(width), 0.0
        if self.resize_mode == "shortest" and wanted_height == wanted_width:
            # torchvision's Resize to one number: the shorter edge exact, the longer one cut to a whole number
            resized_height = wanted_height if height <= width else int(wanted_height * height / width)
            resized_width = wanted_width if width <= height else int(wanted_width * width / height)
        else:
            pick = max if self.resize_mode == "longest" else min
            ratio = pick(height / wanted_height, width / wanted_width)
            resized_height, resized_width = round(height / ratio), round(width / ratio)
        top = _centre(resized_height, wanted_height) * height / resized_height
        left = _centre(resized_width, wanted_width) * width / resized_width
        return top, left, wanted_height * height / resized_height, wanted_width * width / resized_width, 0.0

    def identity(self) -> PreprocessIdentity:
        """What a cache records of it."""
        from storage.manifest import PreprocessIdentity

        return PreprocessIdentity(
            image_size=self.size,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            resize_mode=self.resize_mode,
            fill_color=self.fill_color,
            antialias=True,  # open_clip's transform works on PIL images, whose resize always low-passes
            probe=self._probe(),
        )

    def _probe(self) -> str:
        """Means of an 8 x 8 grid of blocks of two probe images after the transform, one byte each, base64.

        The images hold edges and fine texture, so that another interpolation, crop or antialiasing shows.
        """
        transform = self.transform()
        grids = []
        for height, width in ((301, 407), (150, 97)):
            y, x = np.mgrid[0:height, 0:width].astype(np.float64)
            rings = 127.5 + 127.5 * np.sin((x**2 + 2 * y**2) / 900)
            checks = 255.0 * (((x // 3) + (y // 5)) % 2)
            ramp = 255 * x / width
            image = Image.fromarray(np.stack([rings, checks, ramp], axis=-1).round().astype(np.uint8))
            pixels = transform(image).numpy() * np.reshape(self.std, (3, 1, 1)) + np.reshape(self.mean, (3, 1, 1))
            rows = np.array_split(pixels, 8, axis=1)
            blocks = [[block.mean(axis=(1, 2)) for block in np.array_split(row, 8, axis=2)] for row in rows]
            grids.append(np.clip(np.array(blocks) * 255, 0, 255).round().astype(np.uint8))
        return base64.b64encode(np.stack(grids).tobytes()).decode()


def _centre(have: int, want: int) -> int:
    """Where a centred crop starts, in resized pixels; negative where open_clip pads."""
    return round((have - want) / 2) if have >= want else -((want - have) // 2)


def decode_image(data: bytes) -> Image.Image:
    """The image in these bytes, all its pixels decoded.

    Raises:
        UndecodableImageError: Pillow cannot decode it (truncated, not an image, a decompression bomb, ...).
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    # Pillow's plugins raise OSError, ValueError, SyntaxError, struct.error and more on bytes they did not expect
    except Exception as error:
        raise UndecodableImageError(f"{type(error).__name__}: {error}") from error
    return image
