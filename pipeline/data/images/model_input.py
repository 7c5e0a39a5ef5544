"""Input of one model: size, crop and colours, and the evaluation transform in Pillow and numpy. No torch.

The transform makes the same Pillow calls and float32 arithmetic as open_clip's evaluation transform, and equals it bit
for bit. Teachers, students and deployed students use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from teacher_cache.pipeline.data.images.decode import MAX_PIXELS, ignore_pillows_warnings, size_in_words

if TYPE_CHECKING:
    from teacher_cache.pipeline.data.images.scaled_jpeg import ScaledJpeg

RESIZE_MODES = ("shortest", "longest", "squash")


@dataclass(frozen=True)
class ModelInput:
    """Evaluation transform of one model.

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
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Read an open_clip ``preprocess_cfg`` with an explicit size."""
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
        """Return the settings as open_clip's ``preprocess_cfg``."""
        return {
            "size": list(self.size),
            "mode": "RGB",
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "resize_mode": self.resize_mode,
            "fill_color": self.fill_color,
        }

    def picture(self, image: Image.Image) -> Image.Image:
        """Apply the transform without normalising: return an RGB image of ``size``.

        Args:
            image: image in any mode of :func:`teacher_cache.pipeline.data.images.decode.decode_image`.

        Raises:
            ValueError: too long a strip, by the rules of :mod:`teacher_cache.pipeline.data.images.decode`.
        """
        self.require_resizable(*image.size)
        ignore_pillows_warnings()
        height, width = self.resized(*image.size)
        resized = image.resize((width, height), self.resampling())
        if self.resize_mode == "squash":
            return resized.convert("RGB")
        return _centre_cropped(resized, self.size, self.fill_color if self.resize_mode == "longest" else 0).convert(
            "RGB"
        )

    def shown(self, image: Image.Image | ScaledJpeg) -> NDArray[np.uint8]:
        """Return :meth:`picture` as RGB uint8 (height, width, 3), for any decoder. Same errors."""
        return np.array(self.picture(image)) if isinstance(image, Image.Image) else image.shown(self)

    def pixels(self, image: Image.Image) -> NDArray[np.float32]:
        """Apply the whole transform: float32 (3, height, width), normalised by mean and std. Raises as above."""
        shown = np.asarray(self.picture(image)).transpose(2, 0, 1)
        # float32 throughout, in torchvision's order of operations, so that no bit differs
        scaled = np.ascontiguousarray(shown).astype(np.float32) / np.float32(255)
        mean, std = (np.asarray(values, np.float32).reshape(3, 1, 1) for values in (self.mean, self.std))
        normalised: NDArray[np.float32] = (scaled - mean) / std
        return normalised

    def resampling(self) -> Image.Resampling:
        """Return the filter of the resize."""
        # open_clip has two filters, and uses bicubic for the shortest-edge resize to a size that is not square
        keeps_ratio = self.resize_mode == "shortest" and self.size[0] != self.size[1]
        bilinear = self.interpolation == "bilinear" and not keeps_ratio
        return Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return (height, width) of a source image after the resize, before crop or padding."""
        wanted_height, wanted_width = self.size
        if self.resize_mode == "squash":
            return self.size
        if self.resize_mode == "shortest" and wanted_height == wanted_width:
            # as torchvision's Resize: the shorter edge exact, the longer one truncated
            return (
                wanted_height if height <= width else int(wanted_height * height / width),
                wanted_width if width <= height else int(wanted_width * width / height),
            )
        pick = max if self.resize_mode == "longest" else min
        ratio = pick(height / wanted_height, width / wanted_width)
        return round(height / ratio), round(width / ratio)

    def evaluation_crop(self, width: int, height: int) -> tuple[float, float, float, float, float]:
        """Return the region of a source image that the model sees: top, left, height, width in source pixels, flip 0.

        It rounds as open_clip: the image is resized to whole pixels, and the crop starts at a whole pixel of the
        resized image. With resize_mode ``longest`` the region extends beyond the image, where the model sees padding.
        """
        if self.resize_mode == "squash":
            return 0.0, 0.0, float(height), float(width), 0.0
        wanted_height, wanted_width = self.size
        resized_height, resized_width = self.resized(width, height)
        top = _centre(resized_height, wanted_height) * height / resized_height
        left = _centre(resized_width, wanted_width) * width / resized_width
        return top, left, wanted_height * height / resized_height, wanted_width * width / resized_width, 0.0

    def require_resizable(self, width: int, height: int) -> None:
        """Check that the resize of an image takes bounded memory.

        Raises:
            ValueError: it would not; the message has the sizes before and after.
        """
        resized_height, resized_width = self.resized(width, height)
        if resized_height * resized_width > MAX_PIXELS:
            before, after = size_in_words(width, height), size_in_words(resized_width, resized_height)
            raise ValueError(f"{before} would be resized to {after}, more than {MAX_PIXELS:,}")

    def require_evaluable(self, width: int, height: int) -> None:
        """Check that an image has an evaluation crop. Without one, its other views are not made either.

        Raises:
            ValueError: the resized image would be too large or empty.
        """
        resized_height, resized_width = self.resized(width, height)
        if not 0 < resized_height * resized_width <= MAX_PIXELS:
            before, after = size_in_words(width, height), size_in_words(resized_width, resized_height)
            raise ValueError(f"{before} would be resized to {after} for the evaluation crop")


def _centre_cropped(image: Image.Image, size: tuple[int, int], fill: int) -> Image.Image:
    """Return the centre crop of ``size`` (height, width), padded where the image is smaller, as open_clip does."""
    height, width = size
    if width > image.width or height > image.height:
        missing = max(width - image.width, 0), max(height - image.height, 0)
        border = missing[0] // 2, missing[1] // 2, (missing[0] + 1) // 2, (missing[1] + 1) // 2
        bands = len(image.getbands())
        palette = image.getpalette() if image.mode == "P" else None
        image = ImageOps.expand(image, border, (fill,) * bands if bands > 1 else fill)
        if palette is not None:
            image.putpalette(palette)  # expand may have added the border's colour
    y, x = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((x, y, x + width, y + height))


def _centre(have: int, want: int) -> int:
    """Return the start of a centred crop in resized pixels; negative where open_clip pads."""
    return round((have - want) / 2) if have >= want else -((want - have) // 2)
