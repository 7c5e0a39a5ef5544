"""The check of a location before a cache is started in it."""

from __future__ import annotations

import os
from pathlib import Path

from teacher_cache.storage.errors import CacheAccessError, UsageError
from teacher_cache.storage.files.local import PARTIAL, LocalFiles
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.format.commits import COMMITS
from teacher_cache.storage.format.journal import JOURNAL
from teacher_cache.storage.format.manifest import BACKUP_KEY, MANIFEST_KEY
from teacher_cache.storage.format.tables import CAPTIONS, PROBLEMS, SAMPLES
from teacher_cache.storage.write.claims import CLAIMS

__all__ = ["require_place"]

_OWN = {MANIFEST_KEY, BACKUP_KEY, SAMPLES, CAPTIONS, PROBLEMS, "targets.zarr", COMMITS, JOURNAL, CLAIMS}
_NAMED = 3


def require_place(files: CacheFiles) -> None:
    """Check that a cache can be created here: the folder is empty or already holds this cache, and is writable.

    Other files in it (photographs, other caches) would count as unknown files of the cache. In an object store, only
    the names of folders are checked.

    Raises:
        UsageError: the folder holds other files; the message names some.
        CacheAccessError: this user may not write in the folder.
    """
    if files.exists(MANIFEST_KEY) or files.exists(BACKUP_KEY):
        return
    if isinstance(files, LocalFiles):
        folder = Path(files.path(""))
        names = _names(folder)
        _require_writable(folder)
    else:
        names = files.folders()
    others = sorted(name for name in names if name not in _OWN and not PARTIAL.match(name))
    if others:
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        raise UsageError(
            f"{files.location}: holds {', '.join(others[:_NAMED])}{more}, and a cache has a folder of its own. Name "
            f"one that is not there yet, for example {files.location.rstrip('/')}/NAME.cache"
        )


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        raise UsageError(f"{folder}: is a file, and a cache is a folder. Name another one") from error


def _require_writable(folder: Path) -> None:
    nearest = folder
    while not nearest.exists():
        nearest = nearest.parent
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise CacheAccessError(f"{folder}: this user may not write in {nearest}. Let this user, or name another place.")
