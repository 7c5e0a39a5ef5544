"""The identity that a cache is expected to have, taken from another cache, a run, or what ``info --json`` printed."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from teacher_cache.storage.errors import CacheNotFoundError, UsageError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.identity import CacheIdentity
from teacher_cache.storage.format.manifest_file import read_manifest

__all__ = ["expected_identity"]

_FILES = ("run.json", "origin.json")


def expected_identity(place: str) -> CacheIdentity:
    """The identity that ``place`` stands for.

    Args:
        place: folder or URL of a cache; folder of a run or of a checkpoint; or a JSON file with an ``identity``, as
            ``teacher-cache info --json`` prints and as a cache's manifest is.

    Raises:
        UsageError: there is none of these.
        CacheError: there is a cache whose manifest cannot be used.
    """
    folder = Path(place)
    if folder.is_file():
        return _read(folder)
    for name in _FILES:
        if (folder / name).is_file():
            return _read(folder / name)
    try:
        return read_manifest(open_files(place)).identity
    except CacheNotFoundError as error:
        raise UsageError(
            f"{place}: no cache, no run and no JSON file with an identity (teacher-cache info CACHE --json prints one)"
        ) from error


def _read(path: Path) -> CacheIdentity:
    try:
        fields = json.loads(path.read_bytes())
        return CacheIdentity.model_validate(fields["identity"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError, ValidationError) as error:
        raise UsageError(f"{path}: no identity in it ({type(error).__name__}: {error})") from error
