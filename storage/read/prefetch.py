"""Loads in the background, by threads: what is asked for early is there when it is needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

__all__ = ["ReadAhead"]

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class ReadAhead(Generic[_Key, _Value]):
    """Values by key, loaded by ``threads`` threads in the order in which they were asked for; a context manager.

    Whoever asks decides how much: what was asked for stays until it is dropped. For one consumer.

    Args:
        load: makes the value of a key; called in several threads at once. Its error is raised by :meth:`get`.
        release: takes apart what ``load`` made of a key, once it is dropped: at once, or in one of these threads where
            it is being loaded then; before the same key is loaded again. Not called where ``load`` failed.
        threads: loads at the same time, at most.
    """

    def __init__(self, load: Callable[[_Key], _Value], release: Callable[[_Key], None], threads: int) -> None:
        self._load, self._release = load, release
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")
        self._process = os.getpid()
        self._asked: dict[_Key, Future[_Value]] = {}
        self._leaving: dict[_Key, Future[None]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Forget all: what is being loaded at this moment is waited for, what has not begun is not loaded."""
        if os.getpid() != self._process:
            return  # a fork's copy: nothing here would ever be done
        for future in self._asked.values():
            future.cancel()
        try:
            self.drop(keep=[])
        finally:
            self._pool.shutdown(wait=True)

    def __contains__(self, key: _Key) -> bool:
        return key in self._asked

    def beside(self, keys: Iterable[_Key]) -> int:
        """How many were asked for and not dropped, these not counted."""
        return len(self._asked.keys() - set(keys))

    def ask(self, keys: Iterable[_Key]) -> None:
        """Load these too; nothing happens for a key that was asked for already.

        Raises:
            RuntimeError: in a process that was forked since; the threads are not in it.
        """
        if os.getpid() != self._process:
            raise RuntimeError("this was begun before the process was forked, and its threads are not here: begin anew")
        for key in keys:
            if key not in self._asked:
                self._asked[key] = self._pool.submit(self._load_after, self._leaving.get(key), key)

    def _load_after(self, leaving: Future[None] | None, key: _Key) -> _Value:
        if leaving is not None:  # begun before this one: the pool takes them in their order
            leaving.result()
        return self._load(key)

    def get(self, key: _Key) -> _Value:
        """The value of a key, once it is loaded.

        Raises:
            What ``load`` raised.
        """
        self.ask([key])
        return self._asked[key].result()

    def drop(self, keep: Iterable[_Key]) -> None:
        """Forget all keys but these; those whose load has not begun are never loaded."""
        kept = set(keep)
        self._leaving = {key: future for key, future in self._leaving.items() if not future.done()}
        for key in [key for key in self._asked if key not in kept]:
            loaded = self._asked.pop(key)
            if loaded.cancel():
                continue
            if loaded.done():
                self._release_after(loaded, key)
            else:
                self._leaving[key] = self._pool.submit(self._release_after, loaded, key)

    def _release_after(self, loaded: Future[_Value], key: _Key) -> None:
        if loaded.exception() is None:
            self._release(key)
