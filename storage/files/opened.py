"""Objects of a store as open files, for libraries that read through fsspec: tables and tars."""

from __future__ import annotations

import io
from typing import Any

from obstore.fsspec import FsspecStore

from teacher_cache.storage.files.remote import RemoteFiles
from teacher_cache.storage.files.stores import open_store

_REQUEST_BYTES = 4 << 20  # at 0.1 s a request, 40 MB/s


class _Object(io.RawIOBase):
    """Object of a store as a file. Each read is one request."""

    def __init__(self, bucket: str, key: str) -> None:
        self._files, self._key, self._at = RemoteFiles(bucket), key, 0
        self._size = self._files.stat(key).nbytes

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position; no request."""
        self._at = max((0, self._at, self._size)[whence] + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read as many bytes as the buffer holds, or fewer at the end."""
        length = min(len(buffer), self._size - self._at)
        data = self._files.read_range(self._key, self._at, length) if length > 0 else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _StoreFiles(FsspecStore):
    """Files for fsspec, from the stores that caches use."""

    def _construct_store(self, bucket: str) -> Any:
        return open_store(f"{self.protocol}://{bucket}")

    def _open(self, path: str, mode: str = "rb", *arguments: Any, **settings: Any) -> Any:
        bucket, key = self._split_path(path)
        if mode != "rb":
            return super()._open(path, mode, *arguments, **settings)
        # obstore's own file forgets what it has read at each seek
        return io.BufferedReader(_Object(f"{self.protocol}://{bucket}", key), _REQUEST_BYTES)


class S3Files(_StoreFiles):
    """``s3://`` for fsspec."""

    protocol = "s3"


class GoogleFiles(_StoreFiles):
    """``gs://`` for fsspec."""

    protocol = "gs"


class AzureFiles(_StoreFiles):
    """``az://`` for fsspec."""

    protocol = "az"
