"""Prefetch of values by key, in threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class ReadAhead(Generic[_Key, _Value]):
    """Values by key, prefetched by threads in the order of the requests; a context manager, for one consumer.

    A value stays until the consumer drops it: the consumer decides how much is prefetched.

    Args:
        load: Makes the value of a key; called by several threads in parallel. :meth:`get` raises its error.
        release: Undoes ``load`` of a key that was dropped, before the key is loaded again. Called at once, or by a
            thread if the key is being loaded. Not called if ``load`` failed.
        threads: Maximum number of loads at the same time.
    """

    def __init__(self, load: Callable[[_Key], _Value], release: Callable[[_Key], None], threads: int) -> None:
        self._load, self._release = load, release
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")
        self._process = os.getpid()
        self._requested: dict[_Key, Future[_Value]] = {}
        self._leaving: dict[_Key, Future[None]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop all keys: wait for loads that run, and cancel those that have not begun."""
        if os.getpid() != self._process:
            return  # a forked child has none of the threads
        for future in self._requested.values():
            future.cancel()
        try:
            self.drop(keep=[])
        finally:
            self._pool.shutdown(wait=True)

    def __contains__(self, key: _Key) -> bool:
        return key in self._requested

    def beside(self, keys: Iterable[_Key]) -> int:
        """Return the number of requested keys that are not dropped and not in ``keys``."""
        return len(self._requested.keys() - set(keys))

    def ask(self, keys: Iterable[_Key]) -> None:
        """Request keys. Keys that were requested before are ignored.

        Raises:
            RuntimeError: This is a forked process, which has none of the threads.
        """
        if os.getpid() != self._process:
            raise RuntimeError(
                "this stream was begun before the process was forked, without its threads: begin a new one"
            )
        for key in keys:
            if key not in self._requested:
                self._requested[key] = self._pool.submit(self._load_after, self._leaving.get(key), key)

    def _load_after(self, leaving: Future[None] | None, key: _Key) -> _Value:
        if leaving is not None:  # it has started: the pool takes its tasks in order
            leaving.result()
        return self._load(key)

    def get(self, key: _Key) -> _Value:
        """Wait for the value of a key. Requests it if that was not done.

        Raises:
            Exception: The error of ``load``.
        """
        self.ask([key])
        return self._requested[key].result()

    def drop(self, keep: Iterable[_Key]) -> None:
        """Drop all keys but these; loads that have not begun are cancelled."""
        keep = set(keep)
        self._leaving = {key: future for key, future in self._leaving.items() if not future.done()}
        for key in [key for key in self._requested if key not in keep]:
            loaded = self._requested.pop(key)
            if loaded.cancel():
                continue
            if loaded.done():
                self._release_after(loaded, key)
            else:
                self._leaving[key] = self._pool.submit(self._release_after, loaded, key)

    def _release_after(self, loaded: Future[_Value], key: _Key) -> None:
        if loaded.exception() is None:
            self._release(key)
