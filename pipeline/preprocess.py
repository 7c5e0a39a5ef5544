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
        """A 12 x 12 grid of pixels of two probe images after the transform, one byte a channel, base64.

        The images are noise, one shrunk and one enlarged, so that any other filter, crop or scale shows in most of
        the pixels by far more than the one level that two correct implementations of the same filter may differ.
        """
        transform = self.transform()
        pixels = []
        for height, width in (
            (2 * self.size[0] + 61, 3 * self.size[1] + 17),
            (self.size[0] - 3, self.size[1] // 2 + 5),
        ):
            y, x, channel = np.mgrid[0:height, 0:width, 0:3].astype(np.uint32)
            noise = (x * 2654435761 + y * 2246822519 + channel * 3266489917) >> np.uint32(7)
            image = Image.fromarray(((noise * np.uint32(668265263)) >> np.uint32(24)).astype(np.uint8))
            seen = transform(image).numpy() * np.reshape(self.std, (3, 1, 1)) + np.reshape(self.mean, (3, 1, 1))
            rows, columns = (np.linspace(0, length - 1, 12).round().astype(int) for length in self.size)
            pixels.append(np.clip(seen[:, rows][:, :, columns] * 255, 0, 255).round().astype(np.uint8))
        return base64.b64encode(np.stack(pixels).tobytes()).decode()


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
    except MemoryError:
        raise  # the machine's fault, not the image's
    # Pillow's plugins raise OSError, ValueError, SyntaxError, struct.error and more on bytes they did not expect
    except Exception as error:
        raise UndecodableImageError(f"{type(error).__name__}: {error}") from error
    return image
