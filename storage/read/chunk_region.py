"""Chunks in one contiguous range of addresses, so that one call gathers rows of many chunks.

On Linux the chunk files of a local cache are memory-mapped into it: no byte is copied, and all processes of a machine
share the page cache. On other systems, or if the chunk size is not a multiple of a page, chunks are copied into it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

# from Linux's <sys/mman.h>; Python's mmap lacks them
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MADV_POPULATE_READ = 22
_PROT_NONE = 0


class ChunkRegion:
    """Addresses of chunks of equal size; only chunks in use take memory. Threads may fill different chunks.

    Args:
        chunks: Number of chunks.
        shape: Shape of one chunk, rows first.
        dtype: Dtype of the values.

    Attributes:
        rows: All rows, (chunks x chunk_rows, ...). Reading a chunk that was not mapped or filled may end the process.
        chunk_bytes: Bytes of one chunk.
        maps_files: Whether :meth:`map` can be used.
    """

    def __init__(self, chunks: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.chunk_bytes = int(np.prod(shape)) * dtype.itemsize
        self._region, self.maps_files = _reserve(chunks * self.chunk_bytes, self.chunk_bytes)
        self._bytes = np.frombuffer(self._region, np.uint8)
        self._shape, self._dtype = shape, dtype
        used = self._bytes[: chunks * self.chunk_bytes]
        self.rows: NDArray[Any] = used.view(dtype).reshape(chunks * shape[0], *shape[1:])

    def chunk(self, number: int) -> NDArray[Any]:
        """Return the rows of one chunk."""
        return self.rows[number * self._shape[0] : (number + 1) * self._shape[0]]

    def map(self, number: int, path: str, nbytes: int) -> bytes:
        """Memory-map a file's chunk to its place, unproven, and return the bytes that follow it in the file.

        If the file is replaced later, as our writers do, the old file stays mapped. If it is truncated in place,
        reading the lost part ends the process (SIGBUS).

        Args:
            number: The chunk.
            path: The file.
            nbytes: Size of the file.

        Raises:
            OSError: The file cannot be opened, read or mapped, or has another size.
        """
        start = number * self.chunk_bytes
        descriptor = os.open(path, os.O_RDONLY)
        try:
            # one byte more than expected, to notice a longer file
            behind = os.pread(descriptor, nbytes - self.chunk_bytes + 1, self.chunk_bytes)
            if len(behind) != nbytes - self.chunk_bytes:
                raise OSError(f"{path}: not {nbytes} bytes")
            self._replace(start, mmap.PROT_READ, mmap.MAP_SHARED, descriptor)
            with contextlib.suppress(_Unsupported):
                # read now: a disk error raises here, but would end the process while rows are gathered
                self._populate(start)
            return behind
        finally:
            os.close(descriptor)

    def will_need(self, number: int) -> bool:
        """Prefetch a mapped chunk if the system has evicted its pages. Does not wait.

        Returns:
            True if they were evicted. Always False for files that this user may not write.
        """
        assert _libc is not None  # it maps files
        start = number * self.chunk_bytes
        pages = np.empty(-(-self.chunk_bytes // mmap.PAGESIZE), np.uint8)
        where = self._bytes.ctypes.data + start
        if _libc.mincore(where, self.chunk_bytes, pages.ctypes.data) == 0 and pages.min() & 1:
            return False
        self._region.madvise(mmap.MADV_WILLNEED, start, self.chunk_bytes)
        return True

    def can_be_read(self, number: int) -> bool:
        """Read all pages of a mapped chunk; return False if that fails. Kernels before 5.14 return True."""
        try:
            with contextlib.suppress(_Unsupported):
                self._populate(number * self.chunk_bytes)
        except OSError:
            return False
        return True

    def fill(self, number: int, values: NDArray[Any], again: bool = False) -> None:
        """Copy a chunk to its place.

        Args:
            number: The place.
            values: The chunk.
            again: Reuse the memory of a place that was filled before and not released.
        """
        start = number * self.chunk_bytes
        if self.maps_files and not again:
            self._replace(start, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        source = np.ascontiguousarray(values, self._dtype)
        if source.shape != self._shape:
            raise ValueError(f"chunk is {source.shape}, its place {self._shape}")
        ctypes.memmove(self._bytes.ctypes.data + start, source.ctypes.data, self.chunk_bytes)

    def release(self, number: int) -> None:
        """Release the memory of a chunk, in a region that maps files."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._replace(number * self.chunk_bytes, _PROT_NONE, flags, -1)

    def _populate(self, start: int) -> None:
        assert _libc is not None  # it maps files
        # not mmap.madvise, which holds the GIL until the disk has answered
        if _libc.madvise(self._bytes.ctypes.data + start, self.chunk_bytes, _MADV_POPULATE_READ) != 0:
            number = ctypes.get_errno()
            if number == errno.EINVAL:  # before Linux 5.14
                raise _Unsupported
            raise OSError(number, os.strerror(number))

    def _replace(self, start: int, protection: int, flags: int, descriptor: int) -> None:
        assert _libc is not None  # it maps files
        where = self._bytes.ctypes.data + start
        if _libc.mmap(where, self.chunk_bytes, protection, flags | _MAP_FIXED, descriptor, 0) != where:
            number = ctypes.get_errno()
            message = os.strerror(number)
            if number == errno.ENOMEM:
                message += ": too many files are mapped. Take a smaller window, or raise the system's vm.max_map_count"
            raise OSError(number, message)


class _Unsupported(Exception):
    """Error of a kernel that cannot read pages ahead (before Linux 5.14)."""


def _reserve(nbytes: int, chunk_bytes: int) -> tuple[mmap.mmap, bool]:
    """Reserve addresses, and return them with whether files can be mapped there."""
    nbytes = max(nbytes, 1)
    if sys.platform != "linux":
        return mmap.mmap(-1, nbytes), False
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    if chunk_bytes % mmap.PAGESIZE:
        return mmap.mmap(-1, nbytes, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE), False
    return mmap.mmap(-1, nbytes, flags=flags, prot=_PROT_NONE), True


_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
if _libc is not None:
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    _libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    _libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
