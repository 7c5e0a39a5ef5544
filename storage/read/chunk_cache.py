"""Caches in memory by chunk: arrays within a budget of bytes, and values computed from a chunk's rows."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.errors import CacheUnreachableError
from teacher_cache.storage.format.commits import ChunkRef

_Made = TypeVar("_Made")
_Key = tuple[ChunkRef, str]


class ChunkMemory:
    """LRU cache of arrays by chunk and name, within a budget of bytes.

    Threads may share it: they load different chunks at the same time, and each chunk once.

    Args:
        memory_bytes: Budget; one array may exceed it.
        location: Cache, for messages.

    Attributes:
        nbytes: Bytes of the arrays in memory.
    """

    def __init__(self, memory_bytes: int, location: str) -> None:
        self.nbytes = 0
        self._memory_bytes, self._location = memory_bytes, location
        self._arrays: OrderedDict[_Key, NDArray[Any]] = OrderedDict()
        self._loading: dict[_Key, Future[NDArray[Any]]] = {}
        self._lock = threading.Lock()

    def __contains__(self, key: _Key) -> bool:
        return key in self._arrays

    def get(self, key: _Key, load: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """Return an array from memory, or load it. If another thread is loading it, wait for that.

        Raises:
            Exception: The error of ``load``, in this thread or the other one.
            CacheUnreachableError: The other thread was interrupted.
        """
        with self._lock:
            values = self._arrays.get(key)
            if values is not None:
                self._arrays.move_to_end(key)
                return values
            loading = self._loading.get(key)
            if loading is None:
                result = self._loading[key] = Future()
        if loading is not None:
            return loading.result()
        # outside the lock: chunks of several threads are read and proven side by side
        try:
            values = load()
            self._keep(key, values)
        except BaseException as error:
            # an interrupt concerns this thread only
            stopped = CacheUnreachableError(
                f"{self._location}: the thread that read {key[0].name} was stopped. Try again."
            )
            result.set_exception(error if isinstance(error, Exception) else stopped)
            raise
        else:
            result.set_result(values)
        finally:
            self._loading.pop(key, None)
        return values

    def _keep(self, key: _Key, values: NDArray[Any]) -> None:
        with self._lock:
            self._arrays[key] = values
            self.nbytes += values.nbytes
            while self.nbytes > self._memory_bytes and len(self._arrays) > 1:
                _, dropped = self._arrays.popitem(last=False)
                self.nbytes -= dropped.nbytes


class ByChunk(Generic[_Made]):
    """Values computed once per chunk, when one of its rows is needed; the most recently used stay in memory.

    For the order of :func:`teacher_cache.storage.read.shuffle.window_order`, which uses a few chunks at a time.

    Args:
        chunk_rows: Rows of a chunk.
        kept: Number of chunks whose values stay for the next call; at least all chunks of one call stay.
        make: Makes the value of a chunk, by its number.
    """

    def __init__(self, chunk_rows: int, kept: int, make: Callable[[int], _Made]) -> None:
        self._chunk_rows, self._most, self._make = chunk_rows, kept, make
        self._values: dict[int, _Made] = {}

    def of(self, rows: NDArray[np.int64]) -> list[tuple[int, _Made, NDArray[np.intp]]]:
        """Return, for each chunk of some of ``rows``: its first row, its value, and the positions of its rows.

        Raises:
            Exception: The error of ``make``. Values made before it stay.
        """
        chunks = rows // self._chunk_rows
        by_chunk = np.argsort(chunks, kind="stable")
        used, starts = np.unique(chunks[by_chunk], return_index=True)
        parts = []
        for chunk, start, stop in zip(used.tolist(), starts, [*starts[1:], len(rows)], strict=False):
            # inserted last: the dict is ordered by use
            value = self._values.pop(chunk) if chunk in self._values else self._make(chunk)
            self._values[chunk] = value
            parts.append((chunk * self._chunk_rows, value, by_chunk[start:stop]))
        for chunk in list(self._values)[: max(0, len(self._values) - max(self._most, len(used)))]:
            del self._values[chunk]
        return parts
