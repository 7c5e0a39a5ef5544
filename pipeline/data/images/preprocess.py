"""Preprocessing of images as tensors, with a probe that identifies it.

Decoders are in :mod:`teacher_cache.pipeline.data.images.decoders`; the evaluation transform itself, which needs no
torch, in :mod:`teacher_cache.pipeline.data.images.model_input`.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import functional as transforms

from teacher_cache.pipeline.data.images.decoders import PILLOW, require_decoder
from teacher_cache.pipeline.data.images.model_input import ModelInput

if TYPE_CHECKING:
    from teacher_cache.pipeline.data.images.scaled_jpeg import ScaledJpeg
    from teacher_cache.storage.format.identity import PreprocessIdentity


@dataclass(frozen=True)
class Preprocess(ModelInput):
    """Evaluation transform of one model for all decoders. A probe identifies it in a cache.

    Attributes:
        decoder: image decoder, for :func:`teacher_cache.pipeline.data.images.decoders.open_image`.
    """

    decoder: str = PILLOW

    @classmethod
    def of_model(cls, model: torch.nn.Module) -> Preprocess:
        """Return the preprocessing that open_clip attached to the model."""
        config: dict[str, Any] = model.visual.preprocess_cfg  # type: ignore[assignment,union-attr]
        return cls.from_config(config)

    def decoded_by(self, decoder: str | None) -> Preprocess:
        """Return the same preprocessing with the decoder of a cache.

        Args:
            decoder: name in :class:`teacher_cache.storage.format.identity.PreprocessIdentity`. None: Pillow.

        Raises:
            UsageError: it is unknown, or needs a package that is not installed.
        """
        require_decoder(decoder or PILLOW)
        return replace(self, decoder=decoder or PILLOW)

    def without_torch(self) -> ModelInput:
        """Return the part that makes pixels, for processes that import no torch."""
        return ModelInput(**{field.name: getattr(self, field.name) for field in fields(ModelInput)})

    def transform(self, image: Image.Image | ScaledJpeg) -> torch.Tensor:
        """Apply open_clip's evaluation transform: float32 (3, height, width), :meth:`shown` and normalised.

        Raises:
            ValueError: too long a strip, by the rules of :mod:`teacher_cache.pipeline.data.images.decode`.
        """
        return self.normalized(self.shown(image))

    def normalized(self, shown: Image.Image | NDArray[np.uint8]) -> torch.Tensor:
        """Normalise pixels, of the evaluation crop or any other region: the second part of :meth:`transform`.

        Args:
            shown: RGB of ``size``. An array is uint8 (height, width, 3), writable.

        Returns:
            float32 (3, height, width).
        """
        scaled = transforms.to_tensor(shown)
        pixels: torch.Tensor = transforms.normalize(scaled, list(self.mean), list(self.std), inplace=True)
        return pixels

    def normalized_batch(self, shown: torch.Tensor) -> torch.Tensor:
        """Return :meth:`normalized` of a batch, computed on its device. On a CPU the results are bit-identical.

        Args:
            shown: uint8 (batch, height, width, 3), RGB of ``size``.

        Returns:
            float32 (batch, 3, height, width).
        """
        mean, std, levels = (_on_device(values, shown.device) for values in (self.mean, self.std, (255.0,)))
        # transpose before the cast: bytes are a quarter of the floats
        return shown.permute(0, 3, 1, 2).contiguous().float().div_(levels).sub_(mean).div_(std)

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
            antialias=True,  # Pillow's resize, which open_clip uses, always low-passes
            probe=self._probe(),
            decoder=None if self.decoder == PILLOW else self.decoder,
        )

    def _probe(self) -> str:
        """Return a 12 x 12 grid of pixels of two transformed probe images, one byte per channel, base64.

        The images are noise, one shrunk and one enlarged. Another filter, crop or scale changes most pixels by far more
        than one level, the tolerance between correct implementations of one filter.
        """
        pixels = []
        for height, width in (
            (2 * self.size[0] + 61, 3 * self.size[1] + 17),
            (self.size[0] - 3, self.size[1] // 2 + 5),
        ):
            y, x, channel = np.mgrid[0:height, 0:width, 0:3].astype(np.uint32)
            noise = (x * 2654435761 + y * 2246822519 + channel * 3266489917) >> np.uint32(7)
            image = Image.fromarray(((noise * np.uint32(668265263)) >> np.uint32(24)).astype(np.uint8))
            seen = self.transform(image).numpy() * np.reshape(self.std, (3, 1, 1)) + np.reshape(self.mean, (3, 1, 1))
            rows, columns = (np.linspace(0, length - 1, 12).round().astype(int) for length in self.size)
            pixels.append(np.clip(seen[:, rows][:, :, columns] * 255, 0, 255).round().astype(np.uint8))
        return base64.b64encode(np.stack(pixels).tobytes()).decode()


@lru_cache(maxsize=64)
def _on_device(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return values by channel as float32 (channels, 1, 1) on a device. Copied once: each copy waits for a GPU's work.

    Tensors, not Python numbers: CUDA multiplies by the reciprocal of a number.
    """
    return torch.tensor(values, dtype=torch.float32, device=device).reshape(-1, 1, 1)


def handed_on(teacher: PreprocessIdentity) -> dict[str, Any]:
    """Return the preprocessing that a student inherits, as open_clip's ``preprocess_cfg``.

    It excludes the size, which is the student's own, and the decoder, which each cache determines.
    """
    return teacher.model_dump(exclude={"probe", "image_size", "antialias", "decoder"})
