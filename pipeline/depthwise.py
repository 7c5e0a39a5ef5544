"""Depthwise convolutions of a student that trains in bf16 on a CPU, in float32: there they are faster."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["keep_depthwise_float32"]


def keep_depthwise_float32(model: nn.Module) -> int:
    """Let depthwise convolutions that learn leave bf16 autocast on a CPU: arguments to float32, the result to bf16.

    Forward, oneDNN is a third faster in bf16. Backward it has no fast kernel for them: those of EfficientNet-Lite0 take
    nearly four times as long as in float32, and more than all else together (docs/design/004-training-loop.md). Layers
    that need no gradient stay in bf16. Outside autocast, and on other devices, nothing changes.

    Args:
        model: on a CPU, its layers locked that are to be. Weights, names and classes of its modules stay.

    Returns:
        How many convolutions do so from now on.
    """
    found = [module for module in model.modules() if isinstance(module, nn.Conv2d) and _depthwise(module)]
    for convolution in found:
        convolution.forward = _Float32(convolution.forward)  # type: ignore[assignment, method-assign]
    return len(found)


def _depthwise(convolution: nn.Conv2d) -> bool:
    return convolution.groups == convolution.in_channels > 1 and convolution.weight.requires_grad


class _Float32:
    def __init__(self, forward: Any) -> None:
        self._forward = forward

    def __call__(self, pixels: Tensor) -> Tensor:
        if pixels.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            result: Tensor = self._forward(pixels)
            return result
        with torch.autocast("cpu", enabled=False):
            result = self._forward(pixels.float())
        return result.to(torch.get_autocast_dtype("cpu"))
