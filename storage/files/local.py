"""A cache in a local folder: every object a file, put in place whole and synced."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from teacher_cache.storage.files.processes import ProcessName, this_process
from teacher_cache.storage.files.transient import read_error

__all__ = ["PARTIAL", "LocalFiles", "ObjectStat", "left_behind", "sync"]

PARTIAL = re.compile(r"^\.partial-(?P<process>.+-\d+-\d+)-[0-9a-f]{8}$")
"""Names of what is not finished; no location lists them."""

_GIVEN_UP_SECONDS = 24 * 3600.0
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class ObjectStat(NamedTuple):
    """What a location knows of an object without reading it."""

    nbytes: int
    modified: datetime | None
    """When it was last written, with its time zone; None where the store does not say."""


class LocalFiles:
    """A folder. Writes go to a temporary file beside the target, are synced and then renamed over it."""

    def __init__(self, location: str) -> None:
        self.location = location
        # of the folder at this moment: a process that changes it goes on with the same cache
        self._root = Path(location).absolute()

    def path(self, key: str) -> str:
        """Where the object lies."""
        return str(self._root / key)

    def read(self, key: str) -> bytes:
        """See :class:`teacher_cache.storage.files.protocol.CacheFiles`."""
        path = self._root / key
        try:
            return path.read_bytes()
        except OSError as error:
            if error.filename is None:  # a disk's EIO comes from the read, which knows no name
                error.filename = str(path)
            raise

    def read_buffer(self, key: str) -> bytes:
        """See :class:`teacher_cache.storage.files.protocol.CacheFiles`."""
        return self.read(key)

    def write(self, key: str, data: bytes) -> None:
        """See :class:`teacher_cache.storage.files.protocol.CacheFiles`. A kill leaves the old object or the new one,
        or a ``.partial-*``."""
        target = self._root / key
        with _partial_of(target, data) as partial:
            partial.replace(target)

    def create(self, key: str, data: bytes) -> bool:
        """See :class:`teacher_cache.storage.files.protocol.CacheFiles`. A kill leaves nothing, the whole object, or a
        ``.partial-*`` file.

        On a file system without hard links (FAT, some network mounts) the target is claimed with an empty file
        and then replaced: there, a kill between the two system calls leaves an empty object, which counts as there.
        """
        target = self._root / key
        if target.exists():  # spares the write; the race is decided by the link
            return False
        with _partial_of(target, data) as partial:
            return _link(partial, target)

    def exists(self, key: str) -> bool:
        """See :class:`teacher_cache.storage.files.protocol.CacheFiles`."""
        return (self._root / key).is_file()

    def folders(self, prefix: str = "") -> list[str]:
        """See :class:`teacher_cache.storage.files.protocol.CacheFiles`. A folder that may not be read counts as empty.

        Links to folders count as folders; what cannot be looked at (a link to itself) is left out.
        """
        try:
            with os.scandir(self._root / prefix) as entries:
                return sorted(entry.name for entry in entries if _is_folder(entry))
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return []

    def partials(self) -> list[str]:
        """See :class:`teacher_cache.storage.files.protocol.CacheFiles`."""
        found = []
        for folder, names in _walk(self._root):
            base = Path(folder).relative_to(self._root)
            found += [(base / name).as_posix() for name in names if PARTIAL.match(name)]
        return sorted(key for key in found if left_behind(key, self.stat))

    def list(self, prefix: str = "") -> list[str]:
        """See :class:`teacher_cache.storage.files.protocol.CacheFiles`."""
        found = []
        for folder, names in _walk(self._root / prefix):
            base = Path(folder).relative_to(self._root)
            found += [(base / name).as_posix() for name in names if not PARTIAL.match(name)]
        return sorted(found)

    def stat(self, key: str) -> ObjectStat:
        """See :class:`teacher_cache.storage.files.protocol.CacheFiles`."""
        found = (self._root / key).stat()
        return ObjectStat(found.st_size, datetime.fromtimestamp(found.st_mtime, UTC))

    def delete(self, key: str) -> None:
        """See :class:`teacher_cache.storage.files.protocol.CacheFiles`."""
        (self._root / key).unlink(missing_ok=True)

    def remove_partials(self) -> int:
        """See :class:`teacher_cache.storage.files.protocol.CacheFiles`."""
        found = self.partials()
        for key in found:
            self.delete(key)
        return len(found)


def _walk(top: Path) -> Iterator[tuple[str, list[str]]]:
    """Folders and the names of the files in each, links to folders followed, no folder twice; none where there is none.

    Raises:
        OSError, CacheAccessError: a folder cannot be listed, so that nobody knows what is in it.
    """

    def failed(error: OSError) -> None:
        if isinstance(error, PermissionError):
            raise read_error(str(top), error) from error
        if not isinstance(error, FileNotFoundError | NotADirectoryError):  # gone meanwhile, or never there
            raise error

    seen = set[tuple[int, int]]()
    for folder, folders, names in os.walk(top, onerror=failed, followlinks=True):
        try:
            found = Path(folder).stat()
        except FileNotFoundError:
            continue
        if (found.st_dev, found.st_ino) in seen:
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        yield folder, names


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


@contextlib.contextmanager
def _partial_of(target: Path, data: bytes) -> Iterator[Path]:
    """A synced file beside the target; afterwards it is gone and the folder is synced."""
    _make_folder(target.parent)
    partial = target.parent / f".partial-{this_process().tag}-{secrets.token_hex(4)}"
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield partial
    except OSError as error:
        error.filename = error.filename or str(target)  # a full disk does not say where
        raise
    finally:
        partial.unlink(missing_ok=True)
    # the new name itself must survive a power cut, or a commit could outlive the chunk it vouches for
    sync(target.parent)


def _make_folder(folder: Path) -> None:
    """The folder and those above it, each synced into its parent: an object is as durable as the way to it."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """A file or folder on disk, not only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(partial: Path, target: Path) -> bool:
    try:
        os.link(partial, target)
    except OSError as error:
        # NFS may repeat a link whose answer was lost and then report the first one as somebody else's
        if partial.stat().st_nlink == 2:
            return True
        if isinstance(error, FileExistsError):
            return False
        if error.errno not in _NO_LINKS:
            raise
        return _claim(partial, target)
    return True


def _claim(partial: Path, target: Path) -> bool:
    try:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    try:
        partial.replace(target)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return True


def left_behind(key: str, stat: Callable[[str], ObjectStat]) -> bool:
    """Whether an object is unfinished and its writer has ended; of another machine, or before a restart, by its age."""
    match = PARTIAL.match(key.rpartition("/")[2])
    if match is None:
        return False
    alive = ProcessName.of_tag(match["process"]).alive()
    if alive is not None:
        return not alive
    try:
        modified = stat(key).modified
    except FileNotFoundError:
        return False
    return modified is not None and (datetime.now(UTC) - modified).total_seconds() > _GIVEN_UP_SECONDS
