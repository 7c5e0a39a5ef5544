"""FLOPs against figures worked out by hand, and against those that open_clip publishes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from teacher_cache.pipeline.evaluate.cost.torch_models import count_flops
from tests.conftest import TINY_MODEL, make_model_folder


def transformer(tokens: int, width: int, layers: int) -> int:
    """2 x multiply-adds of pre-norm layers: 4 w^2 of projections and 8 w^2 of MLP a token, 2 products of attention."""
    linear = tokens * 12 * width**2
    attention = 2 * tokens**2 * width
    return 2 * layers * (linear + attention)


def test_linear_and_convolution_by_hand() -> None:
    linear = nn.Linear(6, 10)
    assert count_flops(lambda: linear(torch.zeros(4, 6))) == 2 * 4 * 6 * 10
    convolution = nn.Conv2d(3, 8, kernel_size=5, stride=2, padding=2)
    assert count_flops(lambda: convolution(torch.zeros(1, 3, 16, 16))) == 2 * 8 * 8 * 8 * (3 * 5 * 5)
    depthwise = nn.Conv2d(12, 12, kernel_size=3, padding=1, groups=12)
    assert count_flops(lambda: depthwise(torch.zeros(1, 12, 7, 7))) == 2 * 7 * 7 * 12 * 9


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_both_towers_of_a_tiny_clip_by_hand(tmp_path: Path, mode: Any) -> None:
    """Every multiply-add, attention's products with them, in whatever mode the caller is."""
    model = open_clip.create_model(f"local-dir:{make_model_folder(tmp_path / 'm')}").eval()
    vision, text = TINY_MODEL["vision_cfg"], TINY_MODEL["text_cfg"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    width = vision["width"]
    image = 2 * patches * width * 3 * vision["patch_size"] ** 2  # the convolution over patches
    image += transformer(patches + 1, width, vision["layers"])  # and the class token
    image += 2 * width * TINY_MODEL["embed_dim"]
    caption = transformer(text["context_length"], text["width"], text["layers"])
    caption += 2 * text["width"] * TINY_MODEL["embed_dim"]
    with mode():
        assert count_flops(lambda: model.encode_image(torch.zeros(1, 3, 32, 32))) == image
        tokens = torch.zeros(1, text["context_length"], dtype=torch.long)
        assert count_flops(lambda: model.encode_text(tokens)) == caption
        assert count_flops(lambda: model.encode_image(torch.zeros(5, 3, 32, 32))) == 5 * image


def test_the_fast_path_is_left_as_it_was() -> None:
    found = torch.backends.mha.get_fastpath_enabled()
    try:
        for enabled in (True, False):
            torch.backends.mha.set_fastpath_enabled(enabled)
            with pytest.raises(ZeroDivisionError):
                count_flops(lambda: 1 / 0)
            assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(found)


@pytest.mark.parametrize(
    ("name", "image", "text"),
    # docs/model_profile.csv of open_clip, by fvcore, in GFLOPs to two places
    [("ViT-B-32", 8.82, 5.96), ("ViT-S-32-alt", 2.29, 1.27)],
)
def test_published_figures(name: str, image: float, text: float) -> None:
    model = open_clip.create_model(name, require_pretrained=False, pretrained_image=False).eval()
    pixels, tokens = torch.zeros(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long)
    assert round(count_flops(lambda: model.encode_image(pixels)) / 1e9, 2) == image
    assert round(count_flops(lambda: model.encode_text(tokens)) / 1e9, 2) == text
