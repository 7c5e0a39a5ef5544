"""Interface of a store of objects by key, and limits of parallel requests to it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import NamedTuple

from teacher_cache.storage.files.processes import ProcessName

CHUNKS_AT_ONCE = 8
"""Chunks that one process reads in parallel from an object store; each is in memory while it is proven."""

REQUESTS_AT_ONCE = 32
"""Parallel requests of one process to an object store; with more a store answers 503 SlowDown sooner."""


PARTIAL = re.compile(r"^\.partial-(?P<process>.+-\d+-\d+)-[0-9a-f]{8}$")
"""Name of an unfinished object; no location lists it."""

_GIVEN_UP_SECONDS = 24 * 3600.0


class ObjectStat(NamedTuple):
    """Size and age of an object, known without reading it."""

    nbytes: int
    modified: datetime | None
    """Time of the last write, with its time zone; None if the store does not report it."""


class CacheFiles(ABC):
    """Objects by key (``/`` separated, relative). A reader sees an object whole or not at all.

    Any method may raise the errors of its location: OSError in a folder; for a URL CacheUnreachableError once all
    tries have failed, and CacheAccessError when the store refuses. Safe for several threads.
    """

    location: str

    @abstractmethod
    def read(self, key: str) -> bytes:
        """Return the object's bytes.

        Raises:
            FileNotFoundError: the object does not exist.
        """

    def read_buffer(self, key: str) -> bytes | memoryview:
        """Return the object's bytes, without a copy where an object store received them.

        Raises:
            FileNotFoundError: the object does not exist.
        """
        return self.read(key)

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Replace the object atomically and durably: after the return it survives a crash of the machine.

        After an error the object may be the old one or the new one, never a mixture.
        """

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Create the object if it does not exist, atomically and durably. Exactly one of several writers wins.

        Include something unique (a random name) in the bytes: if the reply to a put is lost, a store without metadata
        recognises the caller's own object by its bytes.

        Returns:
            True if this call created the object; False if one existed, which is unchanged.

        Raises:
            UsageError: this kind of location has no exclusive creation.
        """

    def place(self, key: str, data: bytes) -> bytes | None:
        """Create the object unless it exists. Return the bytes of the existing one, or None.

        An empty object is replaced: on a file system without hard links, a kill within :meth:`create` leaves one.

        Raises:
            UsageError: this kind of location has no exclusive creation.
        """
        existing = None if self.create(key, data) else self.read(key)
        if existing == b"":
            self.write(key, data)
        return existing or None

    def settle(self, keys: Iterable[str]) -> None:  # noqa: B027 - in an object store nothing is left to do
        """Make existing objects durable: the process that created them may have been stopped just before that."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Return whether the object exists."""

    @abstractmethod
    def folders(self, prefix: str = "") -> list[str]:
        """Return the names of the folders directly below the folder ``prefix``, sorted."""

    @abstractmethod
    def all_keys(self, prefix: str = "") -> list[str]:
        """Return the keys of all objects below the folder ``prefix``, unfinished ones too, sorted."""

    def partials(self) -> list[str]:
        """Return the keys of unfinished objects of ended writers, sorted; :meth:`list` omits them.

        Writers on another machine, or before a restart, are judged by the object's age.
        """
        return [key for key in self.all_keys() if self._is_left_behind(key)]

    def remove_partials(self) -> int:
        """Remove the objects of :meth:`partials`; return their number. Safe while others write."""
        partials = self.partials()
        for key in partials:
            self.delete(key)
        return len(partials)

    def list(self, prefix: str = "") -> list[str]:
        """Return the keys of all finished objects below the folder ``prefix``, sorted; empty when there is none."""
        return [key for key in self.all_keys(prefix) if not PARTIAL.match(key.rpartition("/")[2])]

    @abstractmethod
    def stat(self, key: str) -> ObjectStat:
        """Return size and age of the object.

        Raises:
            FileNotFoundError: the object does not exist.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object. A missing object is no error."""

    def is_old(self, key: str) -> bool:
        """Return whether the object was last written a day ago or earlier. False if it is missing."""
        try:
            modified = self.stat(key).modified
        except FileNotFoundError:
            return False
        return modified is not None and (datetime.now(UTC) - modified).total_seconds() > _GIVEN_UP_SECONDS

    def _is_left_behind(self, key: str) -> bool:
        match = PARTIAL.match(key.rpartition("/")[2])
        if match is None:
            return False
        alive = ProcessName.of_tag(match["process"]).alive()
        return self.is_old(key) if alive is None else not alive
