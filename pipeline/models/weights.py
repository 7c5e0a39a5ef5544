"""Weights files, and the digest of weights. No model is built."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 over name, dtype, shape and bytes of every parameter and persistent buffer, by name."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu().contiguous()
        total.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        total.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def write_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write contiguous tensors as a safetensors file. Not atomic: ``path`` is in an unfinished folder.

    Raises:
        OSError: the file cannot be written, for example on a full disk.
    """
    path.touch()
    mode = path.stat().st_mode  # safetensors creates files for the owner only
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error
    path.chmod(mode)
