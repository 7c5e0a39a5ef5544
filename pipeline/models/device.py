"""Devices, and model settings that depend on them."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from teacher_cache.pipeline.settings.names import no_such_device
from teacher_cache.storage.errors import UsageError

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
# torch refuses deterministic matrix products without it
_CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def resolve_device(name: str) -> torch.device:
    """Return the device of this name; ``auto`` is CUDA if available, else the CPU.

    Raises:
        UsageError: the device is unknown or missing. There is no fallback.
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
            raise no_such_device(name, count)
    elif device.type != "cpu":
        raise UsageError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    return device


def device_uuid(index: int) -> str | None:
    """Return the UUID of a CUDA device, as ``nvidia-smi -L`` shows it after ``GPU-``. None: torch knows none.

    Args:
        index: torch's index among its visible devices.
    """
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return None if uuid is None else str(uuid)


def multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for bfloat16: AVX512-BF16, AMX, or Arm's. True if torch cannot tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # since torch 2.11
    return capabilities is None or any(capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def for_copy(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on the CPU that a GPU copies without a wait: contiguous and pinned. On a CPU: unchanged."""
    return tensor.contiguous().pin_memory() if device.type == "cuda" else tensor


def mark(device: torch.device) -> torch.cuda.Event | None:
    """Record a point in a GPU's work, after everything queued so far. None: a CPU."""
    if device.type != "cuda":
        return None
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 on a GPU with all 24 bits within the block. TF32, cuDNN's default, keeps 11."""
    kernels: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [kernel.fp32_precision for kernel in kernels]
    try:
        for kernel in kernels:
            kernel.fp32_precision = "ieee"
        yield
    finally:
        for kernel, precision in zip(kernels, before, strict=True):
            kernel.fp32_precision = precision


@contextlib.contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Use only kernels that repeat their bits within the block. cuBLAS heeds it if it was not used before.

    Raises:
        RuntimeError: within the block, an operation has no such kernel; torch names it.
    """
    cudnn, workspace = torch.backends.cudnn, os.environ.get(_CUBLAS_WORKSPACE)
    before = torch.get_deterministic_debug_mode(), cudnn.deterministic, cudnn.benchmark
    os.environ.setdefault(_CUBLAS_WORKSPACE, ":4096:8")
    try:
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
        if workspace is None:
            os.environ.pop(_CUBLAS_WORKSPACE)


@contextlib.contextmanager
def memory_told(advice: str) -> Iterator[None]:
    """Raise a GPU's want of memory within the block as a UsageError with this advice.

    The batch is never made smaller instead: the bytes of a cache and the loss of a step depend on it.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError(f"the GPU has too little memory: {advice} ({str(error).partition('. ')[0]})") from error


def image_memory_format(model: nn.Module) -> torch.memory_format:
    """Return channels last for a convolutional image tower, which is faster on CPU and GPU; else no change.

    A transformer has a single convolution, over patches, and gains nothing.

    Args:
        model: open_clip model; ``model.visual`` is its image tower.
    """
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.visual.modules())  # type: ignore[union-attr]
    return torch.channels_last if convolutions > 1 else torch.preserve_format


def keep_freed_memory(device: torch.device) -> None:
    """Let glibc keep freed memory instead of returning it to the kernel, for models on a CPU.

    Each layer allocates tens of megabytes. By default glibc maps and unmaps such blocks, so that every forward pass
    faults in all of its memory again: half of the time of a convolutional teacher (benchmarks/cpu_teacher.md). One
    arena is set, since glibc always trims the others. Does nothing on another device or without glibc.
    """
    if device.type != "cpu":
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  # these numbers mean something else, or nothing, on musl and macOS
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def keep_depthwise_float32(model: nn.Module) -> int:
    """Run trainable depthwise convolutions in float32 under bf16 autocast on a CPU; their results are bf16 again.

    oneDNN's forward pass is a third faster in bf16, but it has no fast backward kernel for them: EfficientNet-Lite0's
    take nearly four times as long as in float32, and more than all else together (docs/design/004-training-loop.md).
    Layers without gradients stay in bf16. Outside autocast, and on other devices, nothing changes.

    Args:
        model: model on a CPU, after locking. Weights, names and classes of its modules stay unchanged.

    Returns:
        The number of changed convolutions.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d) and _depthwise(module)]
    for convolution in convolutions:
        convolution.forward = partial(_in_float32, convolution.forward)  # type: ignore[method-assign]
    return len(convolutions)


def _depthwise(convolution: nn.Conv2d) -> bool:
    return convolution.groups == convolution.in_channels > 1 and convolution.weight.requires_grad


def _in_float32(forward: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    if pixels.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return forward(pixels)
    with torch.autocast("cpu", enabled=False):
        result = forward(pixels.float())
    return result.to(torch.get_autocast_dtype("cpu"))
