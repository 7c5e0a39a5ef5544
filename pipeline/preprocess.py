"""Image bytes to model input, as open_clip does it for evaluation, with the crop it took and a probe of it.

What becomes of odd images, for the teacher and for students alike:

- Only formats of ``FORMATS`` are looked at. Pillow knows forty more, and one of them starts Ghostscript.
- The teacher sees the pixels that open_clip would show it: the first frame of an animation; CMYK and YCCK by Pillow's
  plain conversion; hidden colours of transparent pixels, alpha left out; palettes and 1-bit images resized to the
  nearest pixel; EXIF's orientation, colour profiles and text left alone; JPEG data that libjpeg can mend, mended.
- 16 bits of grey are the one thing done otherwise: open_clip clips them, which makes nearly every such image white.
  Here their upper 8 bits are taken, as Pillow does for 16 bits of colour.
- 32-bit whole numbers and floats have no white that everybody agrees on: undecodable.
- Truncated (if only by a JPEG's end mark), damaged (a wrong checksum too), empty, and not an image: undecodable.
- More than ``MAX_PIXELS``, by the header, before any is decoded: undecodable. One image takes at most 4 bytes a pixel
  and once more while it is converted, for each thread that decodes.
- A strip so long that the resize alone would make more than ``MAX_PIXELS``: untransformable.

Pillow's warnings (large images, odd palettes, broken EXIF) say nothing that is not in these rules, and are ignored.
Nothing of Pillow's own is raised: what it cannot decode becomes an ``UndecodableImageError``.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, UnidentifiedImageError
from torchvision.transforms import Compose, Normalize, ToTensor
from torchvision.transforms import functional as transforms

from pipeline.datasets.base import printable

if TYPE_CHECKING:
    from storage.identity import PreprocessIdentity

__all__ = ["FORMATS", "MAX_PIXELS", "Preprocess", "UndecodableImageError", "decode_image", "handed_on"]

MAX_PIXELS = 178_956_970  # where Pillow itself, too, takes an image for a decompression bomb
Image.init()  # all plugins; a name that none of them has would be a KeyError in Image.open
FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF") if name in Image.OPEN)
_PILLOW = re.compile(r"PIL\.")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # another one in each run, and commits hold these texts


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

    def transform(self) -> Callable[[Image.Image], torch.Tensor]:
        """open_clip's own transform, a PIL image to a float32 tensor (3, height, width): ``shown``, then normalised.

        It raises a ValueError for an image that is too long a strip; see the module's rules.
        """
        return _Transform(self._of_open_clip(), self)

    def shown(self) -> Callable[[Image.Image], Image.Image]:
        """The part of :meth:`transform` that moves pixels: to an RGB image of ``size``. It raises as that does."""
        return _Shown(Compose(_without_normalising(self._of_open_clip())), self)

    def normalized(self, shown: Image.Image | NDArray[np.uint8]) -> torch.Tensor:
        """The rest of :meth:`transform`, for the evaluation crop and any other region alike.

        Args:
            shown: RGB of ``size``; as an array uint8 (height, width, 3).

        Returns:
            float32 (3, height, width).
        """
        pixels: torch.Tensor = transforms.normalize(transforms.to_tensor(shown), list(self.mean), list(self.std))
        return pixels

    def _of_open_clip(self) -> Compose:
        config = PreprocessCfg(**{**self.to_config(), "size": self.size})
        return image_transform_v2(config, is_train=False)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) in pixels to which a source image is resized, before the crop or the padding."""
        wanted_height, wanted_width = self.size
        if self.resize_mode == "squash":
            return self.size
        if self.resize_mode == "shortest" and wanted_height == wanted_width:
            # torchvision's Resize to one number: the shorter edge exact, the longer one cut to a whole number
            return (
                wanted_height if height <= width else int(wanted_height * height / width),
                wanted_width if width <= height else int(wanted_width * width / height),
            )
        pick = max if self.resize_mode == "longest" else min
        ratio = pick(height / wanted_height, width / wanted_width)
        return round(height / ratio), round(width / ratio)

    def evaluation_crop(self, width: int, height: int) -> tuple[float, float, float, float, float]:
        """The region of a source image that the model sees: top, left, height, width in source pixels, flip 0.

        Follows open_clip's transform to its rounding: the image is resized to whole pixels, and the crop starts
        at a whole pixel of the resized image. With resize_mode ``longest`` the region reaches beyond the image,
        where the model sees padding.
        """
        if self.resize_mode == "squash":
            return 0.0, 0.0, float(height), float(width), 0.0
        wanted_height, wanted_width = self.size
        resized_height, resized_width = self.resized(width, height)
        top = _centre(resized_height, wanted_height) * height / resized_height
        left = _centre(resized_width, wanted_width) * width / resized_width
        return top, left, wanted_height * height / resized_height, wanted_width * width / resized_width, 0.0

    def require_evaluable(self, width: int, height: int) -> None:
        """Refuse an image whose evaluation crop cannot be made, so that its other views are not made either.

        Raises:
            ValueError: resized for that crop, it would be too large or nothing at all.
        """
        resized_height, resized_width = self.resized(width, height)
        if not 0 < resized_height * resized_width <= MAX_PIXELS:
            raise ValueError(
                f"{_size(width, height)} would be resized to {_size(resized_width, resized_height)} for the "
                "evaluation crop"
            )

    def identity(self) -> PreprocessIdentity:
        """What a cache records of it."""
        from storage.identity import PreprocessIdentity

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


def handed_on(teacher: PreprocessIdentity) -> dict[str, Any]:
    """What a student takes over of its teacher's preprocessing, as open_clip's ``preprocess_cfg``: all but the size."""
    return teacher.model_dump(exclude={"probe", "image_size", "antialias"})


def _centre(have: int, want: int) -> int:
    """Where a centred crop starts, in resized pixels; negative where open_clip pads."""
    return round((have - want) / 2) if have >= want else -((want - have) // 2)


@dataclass(frozen=True)
class _Shown:
    """What a model sees, for images that can be resized in bounded memory; a class, so that workers can get it."""

    apply: Any
    preprocess: Preprocess

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.preprocess.resized(*image.size)
        if height * width > MAX_PIXELS:
            raise ValueError(
                f"{_size(*image.size)} would be resized to {_size(width, height)}, more than {MAX_PIXELS:,}"
            )
        _ignore_pillows_warnings()
        shown: Image.Image = self.apply(image)
        return shown


class _Transform:
    """open_clip's transform in its two parts."""

    def __init__(self, whole: Compose, preprocess: Preprocess) -> None:
        self._whole, self._preprocess, self._shown = whole, preprocess, preprocess.shown()

    def __repr__(self) -> str:
        return repr(self._whole)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self._preprocess.normalized(self._shown(image))


def _without_normalising(whole: Compose) -> list[Any]:
    steps: list[Any] = whole.transforms
    assert [isinstance(step, (ToTensor, Normalize)) for step in steps[-3:]] == [False, True, True], whole
    return steps[:-2]


def _size(width: int, height: int) -> str:
    return f"{width:,} x {height:,} pixels"


def decode_image(data: bytes) -> Image.Image:
    """The image in these bytes, all its pixels decoded, in a mode that open_clip's transform takes.

    Raises:
        UndecodableImageError: the module's rules say why.
    """
    _ignore_pillows_warnings()
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise Image.DecompressionBombError
        if width * height == 0:
            raise UndecodableImageError(f"{_size(width, height)}: nothing to see")
        image.load()
        return _eight_bits(image)
    except (MemoryError, UndecodableImageError):
        raise  # no memory: the machine's fault, not the image's
    except UnidentifiedImageError:
        raise UndecodableImageError(
            f"not an image, damaged at its start, or none of {', '.join(FORMATS)}; {len(data):,} bytes"
        ) from None
    except Image.DecompressionBombError as error:
        # Pillow's own check comes first where its limit is the lower one, and its text has size and limit too
        found = str(error) or f"{_size(width, height)}, the most is {MAX_PIXELS:,}"
        raise UndecodableImageError(found) from error
    # Pillow's plugins raise OSError, ValueError, SyntaxError, struct.error and more on bytes they did not expect
    except Exception as error:
        raise UndecodableImageError(printable(_ADDRESS.sub("", f"{type(error).__name__}: {error}"))) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image itself, or the upper half of its 16 bits.

    Raises:
        UndecodableImageError: it has 32 bits a pixel of grey.
    """
    # Pillow reads 16-bit PGM as mode I, scaled to 0 ... 65535
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit whole numbers" if image.mode == "I" else "32-bit floats"
        raise UndecodableImageError(f"{kind}, whose white nobody knows; write it with 8 or 16 bits")
    return image


def _ignore_pillows_warnings() -> None:
    # Each time, since a filter that is put before it, or taken away, would make an error or a line on the terminal
    # of a warning. warnings.catch_warnings would do the same for one thread, and images are decoded by many.
    first = warnings.filters[0] if warnings.filters else ("", None, Warning, None, 0)
    if first[0] != "ignore" or first[3] != _PILLOW:
        warnings.filterwarnings("ignore", module=_PILLOW.pattern)
