"""A disk that loses power: what a program does to a folder is recorded, and every folder it may leave is made.

POSIX promises little: bytes of a file are on the disk once the file is synced, a name in a folder once the folder is.
Between two syncs any of the changes may be on the disk and any may not, in whatever order they were made. Only a
rename is one change, on every journaling file system. A file that was not synced may hold its bytes, half of them,
zeros, or what it held at its last sync.

The real folder is looked at before and after each call that changes names, and before each sync. So what libraries
below Python write is seen too. No sync reaches the real disk: that makes the recording fast.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Names = dict[str, int | None]
"""Inode by name; None: the name is gone."""
Entry = tuple[str, int, Any]
Left = dict[str, bytes | None]
"""What a power loss leaves: bytes by path; None is a folder."""

_NAMING = ("link", "rename", "replace", "unlink", "remove", "mkdir", "rmdir")
_ALL_OF = 6  # so many changes that are not synced are lost in every combination; of more, some combinations


class Killed(BaseException):
    """The program was killed: no call that changes names works any more."""


class Disk:
    """Recorder of one folder: a context manager, once for each Disk.

    Args:
        kill_at: number of the change of names, from 0, before which the program is killed. ``revive`` ends that.
    """

    def __init__(self, root: Path, kill_at: int | None = None) -> None:
        self.root, self.changes = root, 0
        self._kill_at = kill_at
        self._log: list[Entry] = []
        self._folders: dict[int, Names] = {}
        self._files: dict[int, bytes] = {}
        self._looks: dict[int, tuple[int, int]] = {}  # length and time of each file's last write, when it was read
        self._held: list[int] = []  # open inodes get no second life
        self._lock = threading.RLock()
        self._patch = pytest.MonkeyPatch()
        self._top = self._inode(str(root))
        self._look()
        # what was there before is on the disk
        self._log += [("sync", inode, "") for inode in (*self._folders, *self._files)]

    def __enter__(self) -> Disk:
        for name in _NAMING:
            call = functools.partial(self._named, name in ("rename", "replace"), getattr(os, name))
            self._patch.setattr(os, name, call)
        self._patch.setattr(os, "fsync", self._synced)
        return self

    def __exit__(self, *_: Any) -> None:
        self._patch.undo()
        with self._lock:
            self._look()
        for descriptor in self._held:
            os.close(descriptor)

    def revive(self) -> None:
        """Let another process go on after a kill. What the killed one did not sync may still be lost."""
        self._kill_at = None

    def promise(self, what: Any) -> None:
        """Note that the program was told that something is safe."""
        with self._lock:
            self._look()
            self._log.append(("promise", 0, what))

    def _named(self, whole: bool, call: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        with self._lock:
            if self._kill_at is not None and self.changes >= self._kill_at:
                raise Killed
            self._look()
            done = call(*arguments, **more)
            self.changes += 1
            self._look(whole)
            return done

    def _synced(self, descriptor: int) -> None:
        with self._lock:
            if self._kill_at is not None and self.changes >= self._kill_at:
                raise Killed
            self._look()
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            self._log.append(("sync", os.fstat(descriptor).st_ino, path.name if path != self.root else "."))

    def _look(self, whole: bool = False) -> None:
        """Log what has changed in the folder since the last look.

        Args:
            whole: the names in a folder have changed by a rename, which is one change.
        """
        folders, files = dict[int, Names](), dict[int, bytes]()
        self._list(str(self.root), self._top, folders, files)
        for inode, data in files.items():
            if self._files.get(inode) != data:
                self._log.append(("data", inode, data))
        for inode, names in folders.items():
            before = self._folders.get(inode, {})
            changes: Names = {name: None for name in before if name not in names}
            changes |= {name: at for name, at in names.items() if before.get(name) != at}
            parts = [changes] if whole else [{name: at} for name, at in changes.items()]
            self._log += [("names", inode, part) for part in parts if part]
        self._folders |= folders  # a folder that is gone may be back in a crash
        self._files |= files

    def _list(self, path: str, inode: int, folders: dict[int, Names], files: dict[int, bytes]) -> None:
        names = folders[inode] = {}
        for name in sorted(os.listdir(path)):  # noqa: PTH208
            inner = f"{path}/{name}"
            try:
                found = os.lstat(inner)
                names[name] = self._inode(inner)
                if stat.S_ISDIR(found.st_mode):
                    self._list(inner, found.st_ino, folders, files)
                else:
                    files[found.st_ino] = self._bytes(inner, found)
            except FileNotFoundError:  # another thread has removed it
                names.pop(name, None)

    def _bytes(self, path: str, found: os.stat_result) -> bytes:
        look = (found.st_size, found.st_mtime_ns)
        # of two writes within a tick of the clock the second changes no time
        if self._looks.get(found.st_ino) == look and time.time_ns() - found.st_mtime_ns > 50_000_000:
            return self._files[found.st_ino]
        self._looks[found.st_ino] = look
        return Path(path).read_bytes()

    def _inode(self, path: str) -> int:
        inode = os.lstat(path).st_ino
        if inode not in self._folders and inode not in self._files:
            self._held.append(os.open(path, os.O_PATH | os.O_NOFOLLOW))
        return inode

    def losses(
        self, seed: int = 0, some: int = 12, deaf: Callable[[str], bool] = lambda name: False
    ) -> Iterator[tuple[list[Any], Left]]:
        """Yield all that was promised before a power loss, and what the loss may leave, for every moment.

        A moment before a sync stands for those before it: whatever may be lost then, may be lost at it.

        Args:
            some: combinations tried where there are too many, beside all, none, and each change alone.
            deaf: whether the syncs of a folder or file of this name are not heard, as if its writer left them out. The
                root's name is ".".
        """
        rng, seen = random.Random(seed), set[Any]()
        state = _State()
        promised: list[Any] = []
        for kind, inode, value in (*self._log, ("sync", 0, "")):
            if kind == "sync" and deaf(value):
                continue
            if kind in ("sync", "promise"):
                promised += [value] * (kind == "promise")
                for left in state.crashes(self._top, rng, some):
                    key = (len(promised), frozenset(left.items()))
                    if key not in seen:
                        seen.add(key)
                        yield list(promised), left
            state.take(kind, inode, value)


class _State:
    """What is on the disk for sure, and what is on its way there."""

    def __init__(self) -> None:
        self._names: dict[int, Names] = {}
        self._data: dict[int, bytes] = {}
        self._new_names: list[tuple[int, Names]] = []
        self._new_data: dict[int, bytes] = {}

    def take(self, kind: str, inode: int, value: Any) -> None:
        if kind == "names":
            self._new_names.append((inode, value))
        elif kind == "data":
            self._new_data[inode] = value
        elif kind == "sync":
            if inode in self._new_data:
                self._data[inode] = self._new_data.pop(inode)
            for at, names in self._new_names:
                if at == inode:
                    self._names.setdefault(at, {}).update(names)
            self._new_names = [(at, names) for at, names in self._new_names if at != inode]

    def crashes(self, top: int, rng: random.Random, some: int) -> Iterator[Left]:
        """Yield what a crash now may leave."""
        changes: list[tuple[str, int, Any]] = [("names", at, names) for at, names in self._new_names]
        changes += [("data", inode, data) for inode, data in self._new_data.items()]
        for kept in _choices(len(changes), rng, some):
            names = {inode: dict(held) for inode, held in self._names.items()}
            data = dict(self._data)
            for (kind, inode, value), how in zip(changes, kept, strict=True):
                if kind == "names" and how:
                    names.setdefault(inode, {}).update(value)
                elif kind == "data":
                    data[inode] = _torn(data.get(inode, b""), value, how)
            left: Left = {}
            _tree(top, "", names, data, left)
            yield left


def _choices(number: int, rng: random.Random, some: int) -> Iterator[tuple[int, ...]]:
    """Yield for each change whether it is kept (1), lost (0), or for bytes torn in some way (2, 3)."""
    if number <= _ALL_OF:
        yield from itertools.product((0, 1), repeat=number)
    else:
        yield from ((0,) * number, (1,) * number)
        for one in range(number):
            yield tuple(int(other == one) for other in range(number))
            yield tuple(int(other != one) for other in range(number))
    for _ in range(some if number else 0):
        yield tuple(rng.choice((0, 1, 1, 2, 3)) for _ in range(number))


@functools.cache  # the same object each time, whose hash is known
def _torn(before: bytes, after: bytes, how: int) -> bytes:
    return (before, after, after[: len(after) // 2], bytes(len(after)))[how]


def _tree(inode: int, path: str, names: dict[int, Names], data: dict[int, bytes], left: Left) -> None:
    for name, at in sorted(names.get(inode, {}).items()):
        if at is not None:
            key = f"{path}{name}"
            left[key] = data.get(at)
            if at not in data:
                _tree(at, f"{key}/", names, data, left)


def laid(left: Left, folder: Path) -> Path:
    """Make a folder that holds what was left."""
    folder.mkdir()
    for key, data in left.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(data)
    return folder
