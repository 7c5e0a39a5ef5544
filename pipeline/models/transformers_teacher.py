"""Teachers of the ``transformers`` library: CLIP, SigLIP and SigLIP 2 with their own image processors and tokenizers.

The library itself resizes, crops and normalises the image and tokenizes the caption: its pixels are not Pillow's. A
resized value is up to 2 of 255 levels away, and an odd margin is cropped a pixel further left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from teacher_cache.pipeline.data.images.decoders import PILLOW
from teacher_cache.pipeline.data.images.model_input import ModelInput
from teacher_cache.pipeline.data.images.preprocess import Preprocess
from teacher_cache.pipeline.data.images.scaled_jpeg import ScaledJpeg, rows_of_pixels
from teacher_cache.storage.errors import UsageError

_MODELS = {"clip": "CLIPModel", "siglip": "SiglipModel"}
_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as the processors' files have them
# of config.json, what says nothing about the model: paths, and who wrote the file
_NOT_THE_MODEL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_commit_hash"}


class TransformersTeacher(NamedTuple):
    """A model of transformers in the form of open_clip's, with what prepares its inputs.

    Attributes:
        architecture: its ``config.json``, without the fields that say nothing about the model.
    """

    model: nn.Module
    tokenizer: Any
    preprocess: Preprocess
    architecture: dict[str, Any]


def load_transformers(source: str, what: str) -> TransformersTeacher:
    """Load a model with its processor and tokenizer. No code of the model is run.

    Args:
        source: folder, or ORG/REPO of the hub.
        what: subject of the messages.

    Raises:
        UsageError: it is of another kind, asks for code of its own, or lacks weights; or its processor does what no
            student's preprocessing can do.
    """
    library = import_module("transformers")
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    config, _ = library.PreTrainedConfig.get_config_dict(source)
    kind = config.get("model_type")
    tokens = library.models.auto.tokenization_auto.get_tokenizer_config(source)
    images, _ = library.image_processing_utils.BaseImageProcessor.get_image_processor_dict(source)
    files = {"model": config, "tokenizer": tokens, "image processor": images}
    if coded := next((name for name, file in files.items() if "auto_map" in file), None):
        raise UsageError(
            f"{what}: its {coded} needs code of its own (auto_map), which is never run. Name another model"
        )
    if kind not in _MODELS:
        naflex = ", or a SigLIP 2 of one image size, whose type is siglip" if kind == "siglip2" else ""
        raise UsageError(f"{what}: its model_type {kind!r} is none of {', '.join(_MODELS)}. Name one{naflex}")
    inner, loaded = getattr(library, _MODELS[kind]).from_pretrained(
        source, dtype=torch.float32, output_loading_info=True
    )
    missing = sorted({*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])})
    if missing:
        raise UsageError(
            f"{what}: its file lacks weights of {len(missing)} tensors, {missing[0]} the first; they would be random. "
            "Save the whole model by save_pretrained"
        )
    processor = library.AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    tokenizer = library.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    length = int(inner.config.text_config.max_position_embeddings)
    architecture = {name: value for name, value in config.items() if name not in _NOT_THE_MODEL}
    return TransformersTeacher(
        _Model(inner, length), _Tokenizer(tokenizer, length), _preprocess(processor, what), architecture
    )


class _Model(nn.Module):
    """A CLIP or SigLIP model of transformers with open_clip's methods."""

    def __init__(self, inner: Any, context_length: int) -> None:
        super().__init__()
        self.inner = inner
        self.context_length = context_length

    @property
    def visual(self) -> nn.Module:
        tower: nn.Module = self.inner.vision_model
        return tower

    @property
    def logit_scale(self) -> Tensor:
        scale: Tensor = self.inner.logit_scale
        return scale

    @property
    def logit_bias(self) -> Tensor | None:
        return getattr(self.inner, "logit_bias", None)

    def encode_image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.inner.get_image_features(pixel_values=pixels).pooler_output
        return features

    def encode_text(self, tokens: Tensor) -> Tensor:
        # no attention mask: CLIP's towers are causal, and SigLIP's learned with the padding in sight
        features: Tensor = self.inner.get_text_features(input_ids=tokens).pooler_output
        return features


class _Tokenizer:
    """A tokenizer of transformers, padded to the model's context length and cut to it. Thread-safe."""

    def __init__(self, inner: Any, context_length: int) -> None:
        self.name = type(inner).__name__
        self.context_length = context_length
        self._inner, self._lock = inner, Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Tokenizer, (self._inner, self.context_length)  # without the lock

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Return int64 (texts, context_length)."""
        if not texts:
            return np.zeros((0, self.context_length), np.int64)
        with self._lock:
            encoded = self._inner(
                list(texts),
                padding="max_length",
                truncation=True,
                max_length=self.context_length,
                return_attention_mask=False,
            )
        return np.asarray(encoded["input_ids"], np.int64)


@dataclass(frozen=True)
class _Processed(Preprocess):
    """Preprocessing by an image processor of transformers.

    Its settings describe the region and colours for students. View 0 is resized and cropped by the processor, and every
    view is normalised by it. The crops of other views are resized by Pillow, as for every teacher.
    """

    processor: Any = None

    def without_torch(self) -> ModelInput:
        return self  # the processor needs torch

    def shown(self, image: Image.Image | ScaledJpeg) -> NDArray[np.uint8]:
        if isinstance(image, ScaledJpeg):
            return super().shown(image)
        self.require_resizable(*image.size)
        planes: Tensor = self.processor.preprocess(
            image, do_rescale=False, do_normalize=False, do_convert_rgb=True, return_tensors="pt"
        )["pixel_values"][0]
        return np.ascontiguousarray(rows_of_pixels(planes))

    def normalized(self, shown: Image.Image | NDArray[np.uint8]) -> Tensor:
        return self.normalized_batch(torch.from_numpy(np.array(shown))[None])[0]

    def normalized_batch(self, shown: Tensor) -> Tensor:
        planes: Tensor = self.processor.rescale_and_normalize(
            shown.permute(0, 3, 1, 2).contiguous(), True, self.processor.rescale_factor, True, self.mean, self.std
        )
        return planes

    def evaluation_crop(self, width: int, height: int) -> tuple[float, float, float, float, float]:
        top, left, crop_height, crop_width, flip = super().evaluation_crop(width, height)
        if self.resize_mode == "shortest" and self.decoder == PILLOW:
            resized_height, resized_width = self.resized(width, height)
            top = (resized_height - self.size[0]) // 2 * height / resized_height
            left = (resized_width - self.size[1]) // 2 * width / resized_width
        return top, left, crop_height, crop_width, flip


def _preprocess(processor: Any, what: str) -> Preprocess:
    size: dict[str, int] = dict(processor.size)
    crop: dict[str, int] = dict(processor.crop_size or {}) if processor.do_center_crop else {}
    height, width = (crop.get(edge, size.get(edge, 0)) for edge in ("height", "width"))
    if "shortest_edge" in size:
        mode, fits = "shortest", size["shortest_edge"] == height == width
    else:
        mode, fits = "squash", size == {"height": height, "width": width}
    interpolation = _FILTERS.get(int(processor.resample))
    whole = processor.do_resize and processor.do_rescale and processor.do_normalize
    if not (fits and whole and interpolation and hasattr(processor, "rescale_and_normalize")):
        raise UsageError(
            f"{what}: its image processor {type(processor).__name__} (size {size}, crop {crop or 'none'}, resample "
            f"{processor.resample}) has no counterpart that a student could inherit. Wanted: a resize to the size of "
            "the crop, or to height and width, by bilinear or bicubic, rescaled and normalised"
        )
    mean, std = (tuple(float(value) for value in values) for values in (processor.image_mean, processor.image_std))
    return _Processed((height, width), mean, std, interpolation, mode, 0, processor=processor)
