"""Whole-object reads and atomic whole-object writes below one cache location.

Everything in a cache is a small file or a chunk that is written once, whole. Two implementations with the
same promises: a local folder, and any fsspec URL whose puts are atomic (``s3://``, ``gs://``, ``memory://``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import fsspec

from storage.errors import UsageError

__all__ = ["CacheFiles", "LocalFiles", "RemoteFiles", "open_files"]

_PARTIAL = re.compile(r"^\.partial-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}$")
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class CacheFiles(Protocol):
    """Objects by key (``/`` separated, relative). A reader sees an object whole or not at all."""

    location: str

    def read(self, key: str) -> bytes:
        """The object's bytes.

        Raises:
            FileNotFoundError: there is no such object.
        """

    def write(self, key: str, data: bytes) -> None:
        """Replace the object atomically and durably: after a return it survives a crash of the machine."""

    def create(self, key: str, data: bytes) -> bool:
        """Write the object only if there is none, atomically and durably; of all that race, exactly one wins.

        Returns:
            True if this call made the object, False if another one was there; that one is left as it is.
        """

    def exists(self, key: str) -> bool:
        """Whether the object is there, whole."""

    def list(self, prefix: str = "") -> list[str]:
        """Keys of all finished objects below the folder ``prefix``, sorted; empty when there is none."""

    def delete(self, key: str) -> None:
        """Remove the object; removing what is not there is not an error."""

    def remove_partials(self) -> int:
        """Remove what writers that died on this host left unfinished; returns how many. Safe beside live writers."""


class LocalFiles:
    """A folder. Writes go to a temporary file beside the target, are synced and then renamed over it."""

    def __init__(self, location: str) -> None:
        self.location = location
        self._root = Path(location)

    def read(self, key: str) -> bytes:
        """See :class:`CacheFiles`."""
        return (self._root / key).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        """See :class:`CacheFiles`. A kill leaves the old object, the new one, or a ``.partial-*`` file beside it."""
        target = self._root / key
        with _partial_of(target, data) as partial:
            partial.replace(target)

    def create(self, key: str, data: bytes) -> bool:
        """See :class:`CacheFiles`. A kill leaves nothing, the whole object, or a ``.partial-*`` file.

        On a file system without hard links (FAT, some network mounts) the target is claimed with an empty file
        and then replaced: there, a kill between the two system calls leaves an empty object, which counts as there.
        """
        target = self._root / key
        if target.exists():  # spares the write; the race is decided by the link
            return False
        with _partial_of(target, data) as partial:
            return _link(partial, target)

    def exists(self, key: str) -> bool:
        """See :class:`CacheFiles`."""
        return (self._root / key).is_file()

    def list(self, prefix: str = "") -> list[str]:
        """See :class:`CacheFiles`."""
        found = []
        for folder, _, names in os.walk(self._root / prefix):
            base = Path(folder).relative_to(self._root)
            found += [(base / name).as_posix() for name in names if not _PARTIAL.match(name)]
        return sorted(found)

    def delete(self, key: str) -> None:
        """See :class:`CacheFiles`."""
        (self._root / key).unlink(missing_ok=True)

    def remove_partials(self) -> int:
        """See :class:`CacheFiles`."""
        removed = 0
        for folder, _, names in os.walk(self._root):
            for name in names:
                match = _PARTIAL.match(name)
                if match and match["host"] == socket.gethostname() and not _alive(int(match["pid"])):
                    (Path(folder) / name).unlink(missing_ok=True)
                    removed += 1
        return removed


class RemoteFiles:
    """An fsspec URL. One put per write: object stores show an object only when its put has ended."""

    def __init__(self, location: str) -> None:
        self.location = location
        self._fs, self._root = fsspec.core.url_to_fs(location)

    def _path(self, key: str) -> str:
        return f"{self._root.rstrip('/')}/{key}" if key else self._root

    def read(self, key: str) -> bytes:
        """See :class:`CacheFiles`."""
        data: bytes = self._fs.cat_file(self._path(key))
        return data

    def write(self, key: str, data: bytes) -> None:
        """See :class:`CacheFiles`."""
        self._fs.pipe_file(self._path(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """See :class:`CacheFiles`. The server decides: a put with ``If-None-Match: *``."""
        try:
            self._fs.pipe_file(self._path(key), data, mode="create")
        except FileExistsError:
            return False
        return True

    def exists(self, key: str) -> bool:
        """See :class:`CacheFiles`."""
        return bool(self._fs.isfile(self._path(key)))

    def list(self, prefix: str = "") -> list[str]:
        """See :class:`CacheFiles`."""
        try:
            paths = self._fs.find(self._path(prefix), refresh=True)
        except FileNotFoundError:
            return []
        cut = len(self._fs._strip_protocol(self._root).rstrip("/")) + 1
        return sorted(path[cut:] for path in paths)

    def delete(self, key: str) -> None:
        """See :class:`CacheFiles`."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(key))

    def remove_partials(self) -> int:
        """Nothing to do: an unfinished put leaves no object."""
        return 0


def open_files(location: str | os.PathLike[str]) -> CacheFiles:
    """The files of a cache at a local path or a URL; nothing is created before the first write."""
    text = os.fspath(location)
    if "://" not in text:
        return LocalFiles(text)
    if text.startswith("file://"):
        return LocalFiles(text.removeprefix("file://"))
    try:
        return RemoteFiles(text)
    except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is not installed
        raise UsageError(f"{text}: {error}") from error


@contextlib.contextmanager
def _partial_of(target: Path, data: bytes) -> Iterator[Path]:
    """A synced file beside the target; afterwards it is gone and the folder is synced."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".partial-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield partial
    finally:
        partial.unlink(missing_ok=True)
    # the new name itself must survive a power cut, or a commit could outlive the chunk it vouches for
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
