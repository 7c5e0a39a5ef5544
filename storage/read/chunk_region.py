"""Chunks side by side in one stretch of addresses, so that rows of many chunks are gathered by one call.

On Linux the chunk files of a local cache are mapped there: no byte is copied, and all processes of a machine share one
copy, the system's. Elsewhere, and where the size of a chunk is not a multiple of a page, chunks are copied there.
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

__all__ = ["ChunkRegion"]

# of Linux, in <sys/mman.h>; Python's mmap does not have them
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MADV_POPULATE_READ = 22
_PROT_NONE = 0


class ChunkRegion:
    """Room for ``chunks`` chunks of equal size, of which those in use take memory. Threads may fill it, each its own.

    Attributes:
        rows: all of it, (chunks x chunk_rows, ...): read only what was mapped or filled; the rest may end the process.
        maps_files: whether :meth:`map` can be used.
    """

    def __init__(self, chunks: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Reserve the addresses.

        Args:
            shape: of one chunk, rows first.
        """
        self.chunk_bytes = int(np.prod(shape)) * dtype.itemsize
        self._region, self.maps_files = _reserve(chunks * self.chunk_bytes, self.chunk_bytes)
        self._bytes = np.frombuffer(self._region, np.uint8)
        self._shape, self._dtype = shape, dtype
        used = self._bytes[: chunks * self.chunk_bytes]
        self.rows: NDArray[Any] = used.view(dtype).reshape(chunks * shape[0], *shape[1:])

    def chunk(self, number: int) -> NDArray[Any]:
        """The rows of one chunk."""
        return self.rows[number * self._shape[0] : (number + 1) * self._shape[0]]

    def map(self, number: int, path: str, nbytes: int) -> bytes:
        """Put a file's first bytes in a chunk's place; what they are is for the caller to prove.

        A file that is replaced later by another one, as all writers here do, leaves the mapping as it is. One that is
        cut short in its place ends the process (SIGBUS) when the lost part is read.

        Args:
            nbytes: of the whole file; what lies behind the chunk's bytes is returned.

        Raises:
            OSError: the file cannot be opened, read or mapped, or has another size.
        """
        start = number * self.chunk_bytes
        descriptor = os.open(path, os.O_RDONLY)
        try:
            # a byte more is asked for than there should be
            behind = os.pread(descriptor, nbytes - self.chunk_bytes + 1, self.chunk_bytes)
            if len(behind) != nbytes - self.chunk_bytes:
                raise OSError(f"{path}: not {nbytes} bytes")
            self._replace(start, mmap.PROT_READ, mmap.MAP_SHARED, descriptor)
            with contextlib.suppress(_Unsupported):
                # here, and not while rows are gathered, a disk that fails is an error that can be caught
                self._populate(start)
            return behind
        finally:
            os.close(descriptor)

    def will_need(self, number: int) -> bool:
        """Have the system begin to read a mapped chunk of which it has taken pages back; nothing is waited for.

        Returns:
            Whether it has. Of files that this user may not write Linux says no.
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
        """Whether a mapped chunk can be read, all of it: its pages are there afterwards. Old kernels cannot tell."""
        try:
            with contextlib.suppress(_Unsupported):
                self._populate(number * self.chunk_bytes)
        except OSError:
            return False
        return True

    def fill(self, number: int, values: NDArray[Any], again: bool = False) -> None:
        """Copy a chunk to its place.

        Args:
            again: the place was filled before and not released since, so that its memory is used again.
        """
        start = number * self.chunk_bytes
        if self.maps_files and not again:
            self._replace(start, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        source = np.ascontiguousarray(values, self._dtype)
        if source.shape != self._shape:
            raise ValueError(f"chunk is {source.shape}, {self._shape} wanted")
        ctypes.memmove(self._bytes.ctypes.data + start, source.ctypes.data, self.chunk_bytes)

    def release(self, number: int) -> None:
        """Give back what a chunk takes."""
        start = number * self.chunk_bytes
        if self.maps_files:
            self._replace(start, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)
            return
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (start + self.chunk_bytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._region.madvise(mmap.MADV_DONTNEED, first, length)

    def _populate(self, start: int) -> None:
        assert _libc is not None  # it maps files
        # not by mmap's own madvise, which keeps Python's lock for as long as the disk takes
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
            said = os.strerror(number)
            if number == errno.ENOMEM:
                said += ": too many files are mapped. Take a smaller window, or raise the system's vm.max_map_count"
            raise OSError(number, said)


class _Unsupported(Exception):
    """This kernel cannot say beforehand whether a page can be read."""


def _reserve(nbytes: int, chunk_bytes: int) -> tuple[mmap.mmap, bool]:
    """Addresses, and whether files can be mapped there."""
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
