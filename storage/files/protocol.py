"""What a place for bytes by key can do, and how many reads it is asked for at once."""

from __future__ import annotations

from typing import Protocol

from teacher_cache.storage.files.local import ObjectStat

__all__ = ["CHUNKS_AT_ONCE", "REQUESTS_AT_ONCE", "CacheFiles"]

CHUNKS_AT_ONCE = 8


REQUESTS_AT_ONCE = 32


class CacheFiles(Protocol):
    """Objects by key (``/`` separated, relative). A reader sees an object whole or not at all.

    Any method may raise what the location raises: OSError in a folder; for a URL CacheUnreachableError once all
    tries have failed, and CacheAccessError when the store refuses. Safe for several threads, and after a fork.
    """

    location: str

    def read(self, key: str) -> bytes:
        """The object's bytes.

        Raises:
            FileNotFoundError: there is no such object.
        """

    def read_buffer(self, key: str) -> bytes | memoryview:
        """Return the object's bytes; those of an object store without another copy.

        Raises:
            FileNotFoundError: there is no such object.
        """

    def write(self, key: str, data: bytes) -> None:
        """Replace the object atomically and durably: after a return it survives a crash of the machine.

        After an error the object may be the old one or the new one, never a mixture.
        """

    def create(self, key: str, data: bytes) -> bool:
        """Write the object only if there is none, atomically and durably; of all that race, exactly one wins.

        Put something of your own into the bytes (a random name): outside of folders and S3 it is by its bytes that
        an object is recognised as the caller's own when the answer to its put was lost.

        Returns:
            True if this call made the object, False if another one was there; that one is left as it is.

        Raises:
            UsageError: this kind of location cannot promise it.
        """

    def exists(self, key: str) -> bool:
        """Whether the object is there, whole."""

    def folders(self, prefix: str = "") -> list[str]:
        """Names of the folders directly below the folder ``prefix``, sorted; what lies in them is not listed."""

    def partials(self) -> list[str]:
        """Keys of what writers that died on this host left unfinished; no listing shows them."""

    def list(self, prefix: str = "") -> list[str]:
        """Keys of all finished objects below the folder ``prefix``, sorted; empty when there is none."""

    def stat(self, key: str) -> ObjectStat:
        """Size and age of the object.

        Raises:
            FileNotFoundError: there is no such object.
        """

    def delete(self, key: str) -> None:
        """Remove the object; removing what is not there is not an error."""

    def remove_partials(self) -> int:
        """Remove what writers that died on this host left unfinished; returns how many. Safe beside live writers."""
