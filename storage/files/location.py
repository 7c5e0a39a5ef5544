"""Opening of a cache's files by location, and parallel requests to object stores.

Everything in a cache is a small file or a chunk, written once and whole. Two implementations give the same guarantees:
a local folder, and an object store (``s3://``, ``gs://``, ``az://``).
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from teacher_cache.storage.errors import MissingPackageError, UsageError
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.files.protocol import REQUESTS_AT_ONCE, CacheFiles
from teacher_cache.storage.observe.safe_text import redact

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_ONE_SLASH = re.compile(r"([a-z][a-z0-9+.-]+):/(?!/)")


def open_files(location: str | os.PathLike[str]) -> CacheFiles:
    """Return the files of a cache at a local path or a URL. Nothing is created before the first write.

    A ``~`` at the start is the home folder, even if no shell has expanded it.

    Raises:
        UsageError: the location is empty, or a URL that cannot be used or holds a credential.
    """
    text = os.fspath(location)
    if not text:
        raise UsageError("the location of a cache is empty, name a path or a URL. Is a variable not set?")
    if "://" not in text:
        scheme = _ONE_SLASH.match(text)
        if scheme is not None:
            raise UsageError(f"{text}: a URL has two slashes, {scheme[1]}://... ; a folder of that name is ./{text}")
        return LocalFiles(str(Path(text).expanduser()) if text.startswith("~") else text)
    if text.startswith("file://"):
        return LocalFiles(text.removeprefix("file://"))
    try:
        from teacher_cache.storage.files.remote import RemoteFiles
    except ImportError as error:
        raise MissingPackageError("obstore", f"{redact(text)}, a cache at a URL,") from error
    return RemoteFiles(text)


def is_several(location: str | os.PathLike[str]) -> bool:
    """Return whether a location names several caches by a pattern: ``parts/*.cache``."""
    return "*" in os.fspath(location)


def absolute_location(location: str) -> str:
    """Return a location that is the same from any working directory: an absolute path, or a URL as it is."""
    return location if "://" in location else str(Path(location).resolve())


def requests_at_once(files: CacheFiles) -> int:
    """Return the number of parallel requests to use for this location: 1 for a folder."""
    return 1 if isinstance(files, LocalFiles) else REQUESTS_AT_ONCE


def in_parallel(
    files: CacheFiles, call: Callable[[_Item], _Result], items: Iterable[_Item], most: int = REQUESTS_AT_ONCE
) -> Iterator[_Result]:
    """Yield ``call(item)`` of each item in order: one by one in a folder, many in parallel in a store.

    Args:
        call: called from several threads.
        most: maximum number of parallel calls, to bound their memory.

    Raises:
        Exception: the error of a call, at its place in the order. Calls that have not started are cancelled.
    """
    threads = min(most, requests_at_once(files))
    if threads < 2:
        yield from map(call, items)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="requests") as pool:
        yield from results_ahead(pool, call, items, threads)


def begun_ahead(begin: Callable[[_Item], _Result], items: Iterable[_Item], ahead: int) -> Iterator[_Result]:
    """Yield ``begin(item)`` of each item in order, after the next ``ahead`` items were started too.

    Args:
        begin: starts work in other threads, and returns its futures.
        ahead: number of items started before their turn.
    """
    waiting: deque[_Result] = deque()
    for item in items:
        waiting.append(begin(item))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def results_ahead(
    pool: Executor, call: Callable[[_Item], _Result], items: Iterable[_Item], ahead: int
) -> Iterator[_Result]:
    """Yield ``call(item)`` of each item in order, while ``pool`` works on the next ones.

    Args:
        ahead: number of items submitted before their turn.

    Raises:
        Exception: the error of a call, at its place in the order. Calls that have not started are cancelled.
    """
    waiting: deque[Future[_Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(call, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
