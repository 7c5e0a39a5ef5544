"""Bytes to pixels: decoding, model input, preprocessing, crops."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_cache.lazy_names import lazy_names

if TYPE_CHECKING:
    from teacher_cache.pipeline.data.images.decode import UndecodableImageError as UndecodableImageError
    from teacher_cache.pipeline.data.images.model_input import ModelInput as ModelInput
    from teacher_cache.pipeline.data.images.preprocess import Preprocess as Preprocess
    from teacher_cache.pipeline.data.images.scaled_jpeg import open_image as open_image
    from teacher_cache.pipeline.data.images.views import Crop as Crop
    from teacher_cache.pipeline.data.images.views import draw_crop as draw_crop
    from teacher_cache.pipeline.data.images.views import replay as replay

_HOMES = {
    "Crop": "views",
    "ModelInput": "model_input",
    "Preprocess": "preprocess",
    "UndecodableImageError": "decode",
    "draw_crop": "views",
    "open_image": "scaled_jpeg",
    "replay": "views",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605

__getattr__ = lazy_names(__name__, _HOMES)
