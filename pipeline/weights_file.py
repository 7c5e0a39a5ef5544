"""Writing safetensors files as others are written: readable by whom the umask lets, errors that name the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["write_weights"]


def write_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write contiguous tensors as a safetensors file. Not atomic: ``path`` is in a folder in the making.

    Raises:
        OSError: it cannot be written, on a full disk for example.
    """
    path.touch()
    mode = path.stat().st_mode  # safetensors gives its file to the owner alone
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error
    path.chmod(mode)
