"""Devices, and the settings of a model that depend on them."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from teacher_cache.storage.errors import UsageError

__all__ = ["device_uuid", "image_memory_format", "keep_depthwise_float32", "keep_freed_memory", "resolve_device"]

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def resolve_device(name: str) -> torch.device:
    """Return the device of this name; ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        UsageError: the device is unknown or not in this machine. There is no fallback.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r} is not known; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(f"device {name!r} asked for, but this machine has {count} CUDA devices; use --device cpu")
    elif device.type != "cpu":
        raise UsageError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    return device


def device_uuid(index: int) -> str | None:
    """Return the UUID of a CUDA device, as ``nvidia-smi -L`` shows it after ``GPU-``. None: torch knows none.

    Args:
        index: as torch counts, among the devices that it may see.
    """
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return None if uuid is None else str(uuid)


def image_memory_format(model: nn.Module) -> torch.memory_format:
    """Return channels last for a convolutional trunk, whose kernels are faster so on CPU and GPU; else no change.

    A transformer has one convolution, over patches, and gains nothing.

    Args:
        model: of open_clip; its image tower, ``model.visual``, is what counts.
    """
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.visual.modules())  # type: ignore[union-attr]
    return torch.channels_last if convolutions > 1 else torch.preserve_format


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU, let the C library keep what a model's layers free, instead of handing it back and taking it anew.

    There each layer allocates tens of megabytes. glibc maps such blocks from the kernel and unmaps them when
    freed, so that every forward pass faults in all of its memory again: half of the time of a convolutional
    teacher (benchmarks/cpu_teacher.md). One arena, since glibc trims the others whatever it is told.
    On another device, and elsewhere than on glibc, this does nothing.
    """
    if device.type != "cpu":
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  # musl and macOS have other meanings for these numbers, or none
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


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
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d) and _depthwise(module)]
    for convolution in convolutions:
        convolution.forward = _Float32(convolution.forward)  # type: ignore[assignment, method-assign]
    return len(convolutions)


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
