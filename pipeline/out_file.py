"""A file that a command is asked to write: found fit before the work that it is the result of. No torch."""

from __future__ import annotations

import os
from pathlib import Path

from storage.errors import UsageError

__all__ = ["out_file"]


def out_file(flag: str, path: str, example: str) -> Path:
    """Where a file is to be written.

    Args:
        flag: that named it.
        example: of a file's name, for the message.

    Raises:
        UsageError: a URL, a folder, below something that is no folder, or not to be written by this user.
    """
    if "://" in path:
        raise UsageError(f"{flag} {path}: a local file is wanted, not a URL")
    target = Path(path)
    if not target.name or target.is_dir():
        raise UsageError(f"{flag} {path}: this is a folder; name a file in it, for example {target / example}")
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UsageError(f"{flag} {path}: {above} is no folder")
    if not os.access(target if target.exists() else above, os.W_OK):
        raise UsageError(f"{flag} {path}: this user may not write {'it' if target.exists() else f'in {above}'}")
    return target
