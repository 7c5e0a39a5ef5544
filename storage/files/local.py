"""A cache in a local folder: each object is a file, renamed into place once it is whole and synced."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from teacher_cache.storage.errors import name_file
from teacher_cache.storage.files.processes import this_process
from teacher_cache.storage.files.protocol import CacheFiles, ObjectStat
from teacher_cache.storage.files.transient import read_error

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class LocalFiles(CacheFiles):
    """Objects in a folder. A write goes to a temporary file beside the target, is synced, then renamed over it."""

    def __init__(self, location: str) -> None:
        self.location = location
        # absolute: a process that changes its folder keeps the same cache
        self._root = Path(location).absolute()
        self._durable = set[Path]()  # folders that are on the disk for sure: this process has synced them into theirs

    def path(self, key: str) -> str:
        """Return the path of the object's file."""
        return str(self._root / key)

    def read(self, key: str) -> bytes:
        """Return the object's bytes."""
        path = self._root / key
        try:
            return path.read_bytes()
        except OSError as error:
            name_file(error, path)
            raise

    def write(self, key: str, data: bytes) -> None:
        """Replace the object. A kill leaves the old object or the new one, and perhaps a ``.partial-*`` file."""
        target = self._root / key
        with self._partial_of(target, data) as partial:
            partial.replace(target)

    def create(self, key: str, data: bytes) -> bool:
        """Create the object if it does not exist. A kill leaves nothing, the whole object, or a ``.partial-*`` file.

        On a file system without hard links (FAT, some network mounts) the target is claimed with an empty file and
        then replaced: a kill between the two system calls leaves an empty object, which exists.
        """
        target = self._root / key
        if target.exists():  # saves the write; link() decides the race
            return False
        with self._partial_of(target, data) as partial:
            return _link(partial, target)

    def place(self, key: str, data: bytes) -> bytes | None:
        """Create the object unless it exists. An existing one is synced: its writer may not have come so far."""
        existing = super().place(key, data)
        if existing is not None:
            self.settle([key])
        return existing

    def settle(self, keys: Iterable[str]) -> None:
        """Sync the folders of existing objects."""
        for folder in {(self._root / key).parent for key in keys}:
            self._make_durable(folder)
            sync(folder)

    def exists(self, key: str) -> bool:
        """Return whether the object exists."""
        return (self._root / key).is_file()

    def folders(self, prefix: str = "") -> list[str]:
        """Return the names of the folders directly below ``prefix``, sorted. A folder without read permission is empty.

        Links to folders count as folders; a link to itself is skipped.
        """
        try:
            with os.scandir(self._root / prefix) as entries:
                return sorted(entry.name for entry in entries if _is_folder(entry))
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return []

    def all_keys(self, prefix: str = "") -> list[str]:
        """Return the keys of all files below ``prefix``, sorted."""
        keys: list[str] = []
        for folder, names in _walk(self._root / prefix):
            base = Path(folder).relative_to(self._root)
            keys += [(base / name).as_posix() for name in names]
        return sorted(keys)

    def stat(self, key: str) -> ObjectStat:
        """Return size and age of the object."""
        stat = (self._root / key).stat()
        return ObjectStat(stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC))

    def delete(self, key: str) -> None:
        """Remove the object if it exists."""
        (self._root / key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _partial_of(self, target: Path, data: bytes) -> Iterator[Path]:
        """Yield a synced file beside the target; remove it afterwards and sync the folder."""
        self._make_durable(target.parent)
        partial = target.parent / f".partial-{this_process().tag}-{secrets.token_hex(4)}"
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield partial
        except OSError as error:
            name_file(error, target)
            raise
        finally:
            partial.unlink(missing_ok=True)
        # the new name itself must survive a power cut, or a commit could outlive the chunk it vouches for
        sync(target.parent)

    def _make_durable(self, folder: Path) -> None:
        """Make a folder. An existing one is synced into its parent too: its maker may have been killed before that."""
        if folder in self._durable and folder.is_dir():
            return
        made = make_folder(folder)
        for path in (folder, *folder.parents):
            if path in self._durable or not path.is_relative_to(self._root):
                break
            if path not in made:
                with contextlib.suppress(PermissionError):  # the user's own folder, in one that may not be listed
                    sync(path.parent)
            self._durable.add(path)


def _walk(top: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder with the names of its files. Follows links to folders, and visits each folder once.

    Raises:
        OSError, CacheAccessError: a folder cannot be listed, so its contents are unknown.
    """

    def failed(error: OSError) -> None:
        if isinstance(error, PermissionError):
            raise read_error(str(top), error) from error
        if not isinstance(error, FileNotFoundError | NotADirectoryError):  # deleted meanwhile, or never existed
            raise error

    seen = set[tuple[int, int]]()
    for folder, folders, names in os.walk(top, onerror=failed, followlinks=True):
        try:
            stat = Path(folder).stat()
        except FileNotFoundError:
            continue
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        yield folder, names


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and its parents, each synced into its parent: an object is as durable as its path.

    Returns:
        The folders that were made.
    """
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync(path.parent)
    return missing


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(partial: Path, target: Path) -> bool:
    try:
        os.link(partial, target)
    except OSError as error:
        # NFS may retry a link whose reply was lost, and then report our own first link as an existing file
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


def unnamed_file(name: str) -> int:
    """Open a file without a path and return its descriptor: in memory if the system lets it.

    Args:
        name: what ``/proc`` shows.
    """
    with contextlib.suppress(AttributeError, OSError):  # another system, or a container that forbids it
        return os.memfd_create(name)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
