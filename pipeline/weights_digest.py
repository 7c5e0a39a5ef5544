"""One digest for the weights of a model, by which two of them are told apart. No model is built."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

__all__ = ["digest_tensors"]


def digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over name, dtype, shape and bytes of every parameter and persistent buffer, by name."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu().contiguous()
        total.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        total.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
