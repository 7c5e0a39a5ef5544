"""Interface of a store of objects by key, and limits of parallel requests to it."""

from __future__ import annotations

from typing import Protocol

from teacher_cache.storage.files.local import ObjectStat

__all__ = ["CHUNKS_AT_ONCE", "REQUESTS_AT_ONCE", "CacheFiles"]

CHUNKS_AT_ONCE = 8
"""Chunks that one process reads in parallel from an object store; each is in memory while it is proven."""

REQUESTS_AT_ONCE = 32
"""Parallel requests of one process to an object store; with more a store answers 503 SlowDown sooner."""


class CacheFiles(Protocol):
    """Objects by key (``/`` separated, relative). A reader sees an object whole or not at all.

    Any method may raise the errors of its location: OSError in a folder; for a URL CacheUnreachableError once all
    tries have failed, and CacheAccessError when the store refuses. Safe for several threads.
    """

    location: str

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

    def write(self, key: str, data: bytes) -> None:
        """Replace the object atomically and durably: after the return it survives a crash of the machine.

        After an error the object may be the old one or the new one, never a mixture.
        """

    def create(self, key: str, data: bytes) -> bool:
        """Create the object if it does not exist, atomically and durably. Exactly one of several writers wins.

        Include something unique (a random name) in the bytes: if the reply to a put is lost, a store without metadata
        recognises the caller's own object by its bytes.

        Returns:
            True if this call created the object; False if one existed, which is unchanged.

        Raises:
            UsageError: this kind of location has no exclusive creation.
        """

    def exists(self, key: str) -> bool:
        """Return whether the object exists."""

    def folders(self, prefix: str = "") -> list[str]:
        """Return the names of the folders directly below the folder ``prefix``, sorted."""

    def partials(self) -> list[str]:
        """Return the keys of unfinished objects of killed writers on this host; :meth:`list` omits them."""

    def list(self, prefix: str = "") -> list[str]:
        """Return the keys of all finished objects below the folder ``prefix``, sorted; empty when there is none."""

    def stat(self, key: str) -> ObjectStat:
        """Return size and age of the object.

        Raises:
            FileNotFoundError: the object does not exist.
        """

    def delete(self, key: str) -> None:
        """Remove the object. A missing object is no error."""

    def remove_partials(self) -> int:
        """Remove unfinished objects of killed writers on this host; return the number. Safe while others write."""
