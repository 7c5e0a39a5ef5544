"""Encoding of captions at their own length, without the padding after the longest caption.

A caption has about 15 tokens, the tower is built for 77. CLIP reads the features at the end-of-text token, and in a
causal transformer later tokens do not reach earlier ones. So cutting the positions after the last end-of-text token
changes the result by float rounding only (tested).
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.func import functional_call

_STEP = 8  # few different lengths, so that kernels chosen or compiled by shape are reused
_GROUP = 64  # captions that fill a CPU's cores; smaller groups join the next longer ones

# what can_shorten has found: comparing the mask of a model on a GPU would wait for all its work
_SHORTENS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def can_shorten(model: nn.Module) -> bool:
    """Return whether this model's text features depend on nothing after the end-of-text token. Compared once."""
    if model not in _SHORTENS:
        _SHORTENS[model] = _is_causal(model)
    return _SHORTENS[model]


def _is_causal(model: nn.Module) -> bool:
    # only open_clip's own class: others pool another position, or are not causal
    if type(model) is not CLIP or model.text_pool_type != "argmax" or model.attn_mask is None:
        return False
    mask: Tensor = model.attn_mask  # type: ignore[assignment]
    return bool(torch.equal(mask, torch.full_like(mask, float("-inf")).triu(1)))


def shorten(tokens: Tensor) -> Tensor:
    """Cut (batch, context_length) token ids after the longest caption; only for models that ``can_shorten``."""
    # the end-of-text token has the highest id; padding follows it
    longest = int(tokens.argmax(dim=1).max()) + 1
    return tokens[:, : -(-longest // _STEP) * _STEP]


def encode_text(model: Any, tokens: Tensor) -> Tensor:
    """Return text features, not normalised, of (batch, length) int64 token ids at full or shortened length."""
    if tokens.shape[1] == model.context_length or not can_shorten(model):
        features: Tensor = model.encode_text(tokens)
        return features
    return encode_any_length(model, tokens)


def encode_by_length(model: Any, tokens: Tensor) -> Tensor:
    """Encode captions in groups of similar length, each group at its own length; for models that ``can_shorten``.

    Only on a CPU. A GPU takes all at once: several launches and a sync for the lengths cost more than padding.
    """
    if tokens.device.type != "cpu" or len(tokens) <= _GROUP:
        return encode_text(model, tokens)
    lengths, order = (tokens.argmax(dim=1) + 1).sort(stable=True)
    counts = (lengths + _STEP - 1).div(_STEP, rounding_mode="floor").bincount().tolist()
    features, start, stop = [], 0, 0
    for steps, count in enumerate(counts):
        stop += count
        if stop - start >= _GROUP or (count and stop == len(tokens)):
            features.append(encode_text(model, tokens[order[start:stop], : steps * _STEP]))
            start = stop
    return torch.cat(features)[order.argsort()]


def encode_any_length(model: Any, tokens: Tensor) -> Tensor:
    """Encode captions of any length by one path; for models that ``can_shorten``."""
    length = tokens.shape[1]
    shorter = {
        "model.positional_embedding": model.positional_embedding[:length],
        "model.attn_mask": model.attn_mask[:length, :length],
    }
    # neither is a tied weight; looking that up takes milliseconds per batch
    features: Tensor = functional_call(_EncodeText(model), shorter, (tokens,), tie_weights=False)
    return features


class _EncodeText(nn.Module):
    """Wrapper whose forward is ``encode_text``, for ``functional_call``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.model.encode_text(tokens)  # type: ignore[operator]
        return features
