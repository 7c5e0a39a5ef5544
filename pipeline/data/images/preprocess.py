"""Images to model input, by open_clip's own evaluation transform, with a probe of it.

Decoding is in :mod:`teacher_cache.pipeline.data.images.decode`, and the faster one in
:mod:`teacher_cache.pipeline.data.images.scaled_jpeg`; geometry, and the same transform without torch, in
:mod:`teacher_cache.pipeline.data.images.model_input`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, center_crop_or_pad, image_transform_v2
from PIL import Image
from torchvision.transforms import Compose, Normalize, ToTensor
from torchvision.transforms import functional as transforms

from teacher_cache.pipeline.data.images.decode import ignore_pillows_warnings
from teacher_cache.pipeline.data.images.model_input import ModelInput
from teacher_cache.pipeline.data.images.scaled_jpeg import PILLOW, ScaledJpeg, require_decoder

if TYPE_CHECKING:
    from teacher_cache.storage.format.identity import PreprocessIdentity

__all__ = ["Preprocess", "handed_on", "rows_of_pixels"]


@dataclass(frozen=True)
class Preprocess(ModelInput):
    """The evaluation transform of one model, by open_clip itself; a probe of it identifies it in a cache.

    Attributes:
        decoder: of the images, for :func:`teacher_cache.pipeline.data.images.scaled_jpeg.open_image`.
    """

    decoder: str = PILLOW

    @classmethod
    def of_model(cls, model: torch.nn.Module) -> Preprocess:
        """Take the preprocessing that open_clip attached to a model when it built it."""
        config: dict[str, Any] = model.visual.preprocess_cfg  # type: ignore[assignment,union-attr]
        return cls.from_config(config)

    def decoded_by(self, decoder: str | None) -> Preprocess:
        """Return the same preprocessing with the decoder of a cache.

        Args:
            decoder: as :class:`teacher_cache.storage.format.identity.PreprocessIdentity` has it: None is Pillow.

        Raises:
            UsageError: it is not known, or needs a package that is not installed.
        """
        require_decoder(decoder or PILLOW)
        return replace(self, decoder=decoder or PILLOW)

    def transform(self) -> Callable[[Image.Image | ScaledJpeg], torch.Tensor]:
        """open_clip's own transform, an image to a float32 tensor (3, height, width): ``shown``, then normalised.

        It raises a ValueError for an image that is too long a strip; see
        :mod:`teacher_cache.pipeline.data.images.decode`'s rules.
        """
        return _Transform(self._of_open_clip(), self)

    def shown(self) -> Callable[[Image.Image | ScaledJpeg], NDArray[np.uint8]]:
        """Return the part of :meth:`transform` that moves pixels: RGB uint8 (height, width, 3). Raises as that does."""
        return _Shown(Compose(_without_normalising(self._of_open_clip())), self)

    def scaled(self, image: ScaledJpeg) -> torch.Tensor:
        """Return :meth:`shown` of a JPEG that is decoded as it is resized: RGB uint8 (3, height, width)."""
        self.require_resizable(*image.size)
        height, width = self.resized(*image.size)
        seen = image.resized((width, height), self._resampling())
        if (height, width) != self.size:
            fill = self.fill_color if self.resize_mode == "longest" else 0
            seen = center_crop_or_pad(seen, list(self.size), fill=fill)
        return seen

    def normalized(self, shown: Image.Image | NDArray[np.uint8]) -> torch.Tensor:
        """Apply the rest of :meth:`transform`, to the evaluation crop or any other region.

        Args:
            shown: RGB of ``size``; as an array uint8 (height, width, 3), writable.

        Returns:
            float32 (3, height, width).
        """
        scaled = transforms.to_tensor(shown)
        pixels: torch.Tensor = transforms.normalize(scaled, list(self.mean), list(self.std), inplace=True)
        return pixels

    def normalized_batch(self, shown: torch.Tensor) -> torch.Tensor:
        """:meth:`normalized` of a batch, on the device that it lies on; on a CPU to the last bit.

        Args:
            shown: uint8 (batch, height, width, 3), RGB of ``size``.

        Returns:
            float32 (batch, 3, height, width).
        """
        # tensors of the device, not numbers: CUDA would multiply by the reciprocal of a number
        mean, std, levels = (
            torch.tensor(values, dtype=torch.float32, device=shown.device).reshape(-1, 1, 1)
            for values in (self.mean, self.std, (255.0,))
        )
        # moved while it is bytes, a quarter of the floats
        return shown.permute(0, 3, 1, 2).contiguous().float().div_(levels).sub_(mean).div_(std)

    def _of_open_clip(self) -> Compose:
        config = PreprocessCfg(**{**self.to_config(), "size": self.size})
        return image_transform_v2(config, is_train=False)

    def identity(self) -> PreprocessIdentity:
        """Return what a cache records of the preprocessing."""
        from teacher_cache.storage.format.identity import PreprocessIdentity

        return PreprocessIdentity(
            image_size=self.size,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            resize_mode=self.resize_mode,
            fill_color=self.fill_color,
            antialias=True,  # open_clip's transform works on PIL images, whose resize always low-passes
            probe=self._probe(),
            decoder=None if self.decoder == PILLOW else self.decoder,
        )

    def _probe(self) -> str:
        """Return a 12 x 12 grid of pixels of two probe images after the transform, one byte a channel, base64.

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
    """Return what a student takes over of its teacher's preprocessing, as open_clip's ``preprocess_cfg``.

    All but the size, which is the student's own, and the decoder, which is that of the images of each cache.
    """
    return teacher.model_dump(exclude={"probe", "image_size", "antialias", "decoder"})


@dataclass(frozen=True)
class _Shown:
    """Transform to pixels, for images that can be resized in bounded memory; a class, so that workers can get it."""

    apply: Any
    preprocess: Preprocess

    def __call__(self, image: Image.Image | ScaledJpeg) -> NDArray[np.uint8]:
        if isinstance(image, ScaledJpeg):
            return rows_of_pixels(self.preprocess.scaled(image))
        self.preprocess.require_resizable(*image.size)
        ignore_pillows_warnings()
        return np.array(self.apply(image))


class _Transform:
    """open_clip's transform in its two parts."""

    def __init__(self, whole: Compose, preprocess: Preprocess) -> None:
        self._whole, self._preprocess, self._shown = whole, preprocess, preprocess.shown()

    def __repr__(self) -> str:
        return repr(self._whole)

    def __call__(self, image: Image.Image | ScaledJpeg) -> torch.Tensor:
        return self._preprocess.normalized(self._shown(image))


def rows_of_pixels(planes: torch.Tensor) -> NDArray[np.uint8]:
    """RGB uint8 (3, height, width) as (height, width, 3): a view of the same bytes."""
    pixels: NDArray[np.uint8] = planes.permute(1, 2, 0).numpy()
    return pixels


def _without_normalising(whole: Compose) -> list[Any]:
    steps: list[Any] = whole.transforms
    assert [isinstance(step, (ToTensor, Normalize)) for step in steps[-3:]] == [False, True, True], whole
    return steps[:-2]
