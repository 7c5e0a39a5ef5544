"""Bytes to pixels: decoding, model input, preprocessing, crops."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value
