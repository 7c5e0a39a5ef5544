"""Captions encoded at their own length give what the padded ones give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from teacher_cache.pipeline.models.text_length import can_shorten, encode_by_length, encode_text, shorten
from tests.conftest import TINY_MODEL, make_model_folder

TEXTS = ["a dog", "two brown dogs run over the wet grass", "", "word " * 40]


def build(path: Path, **text_cfg: Any) -> Any:
    folder = make_model_folder(path, text_cfg={**TINY_MODEL["text_cfg"], "context_length": 32, **text_cfg})
    return open_clip.create_model(f"local-dir:{folder}").double()


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1], TEXTS[:3], TEXTS[2:3]])
def test_features_and_gradients_equal_those_of_padded_captions(tmp_path: Path, texts: list[str]) -> None:
    """In float64, where rounding cannot hide a real difference."""
    model = build(tmp_path / "m")
    assert can_shorten(model)
    tokens = open_clip.tokenize(texts, context_length=32)
    short = shorten(tokens)
    assert short.shape[1] == (32 if len(texts) == 4 else 16 if len(texts) == 3 else 8)
    gradients = []
    for features in (model.encode_text(tokens), encode_text(model, short)):
        model.zero_grad()
        features.square().sum().backward()
        gradients.append((features.detach(), model.positional_embedding.grad.clone()))
    for padded, own in zip(*gradients, strict=True):
        torch.testing.assert_close(own, padded, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("captions", [1, 64, 127, 128, 200, 1000])
def test_captions_by_length_have_the_features_and_gradients_of_all_together(tmp_path: Path, captions: int) -> None:
    model = build(tmp_path / "m")
    # most of them short, as captions are
    words = [1 + number * 7 % 9 if number % 10 else 30 for number in range(captions)]
    tokens = open_clip.tokenize([f"{number % 50} " + "dog " * count for number, count in enumerate(words)], 32)
    positions: list[int] = []
    model.transformer.register_forward_pre_hook(lambda _, inputs: positions.append(inputs[0].shape[:2].numel()))
    found = []
    for encode in (encode_text, encode_by_length):
        model.zero_grad()
        features = encode(model, tokens)
        (features * torch.linspace(-1, 1, captions, dtype=torch.float64)[:, None]).sum().backward()
        found.append((features.detach(), model.positional_embedding.grad.clone()))
    for whole, grouped in zip(*found, strict=True):
        torch.testing.assert_close(grouped, whole, rtol=1e-9, atol=1e-11)
    whole, *groups = positions
    assert whole == 32 * captions
    assert sum(groups) <= (0.6 if captions > 64 else 1) * whole
    # of one padded length each, so at most four, and only the longest may be few
    assert len(groups) <= 4
    assert min([*groups[:-1], 64 * 8]) >= 64 * 8


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = build(tmp_path / "m")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    encode_text(model, shorten(open_clip.tokenize(["a dog"], context_length=32)))
    assert model.positional_embedding.shape[0] == 32
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("text_cfg", [{"no_causal_mask": True}, {"pool_type": "last"}])
def test_models_that_look_behind_the_end_are_not_shortened(tmp_path: Path, text_cfg: dict[str, Any]) -> None:
    assert not can_shorten(build(tmp_path / "m", **text_cfg))


def test_custom_text_towers_are_not_shortened(tmp_path: Path) -> None:
    assert not can_shorten(open_clip.create_model(f"local-dir:{make_model_folder(tmp_path / 'm', custom_text=True)}"))
