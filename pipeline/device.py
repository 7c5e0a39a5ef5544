"""Which device a stage runs on: the one asked for, or an error."""

from __future__ import annotations

import torch

from storage.errors import UsageError

__all__ = ["resolve_device"]


def resolve_device(name: str) -> torch.device:
    """The device of this name; ``auto`` is CUDA where there is one, else the CPU.

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
