"""Whole-object reads and atomic whole-object writes below one cache location.

Everything in a cache is a small file or a chunk that is written once, whole. Two implementations with the
same promises: a local folder, and any fsspec URL whose puts are atomic (``s3://``, ``gs://``, ``memory://``).
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.local import LocalFiles, ObjectStat
from teacher_cache.storage.files.protocol import REQUESTS_AT_ONCE, CacheFiles
from teacher_cache.storage.observe.safe_text import redact

__all__ = ["LocalFiles", "ObjectStat", "in_parallel", "open_files", "requests_at_once", "results_ahead"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_ONE_SLASH = re.compile(r"([a-z][a-z0-9+.-]+):/(?!/)")

"""Of a store, where each is in memory while it is proven."""
"""Requests that one process has under way at an object store; beyond this a store answers with 503 SlowDown sooner."""


def open_files(location: str | os.PathLike[str]) -> CacheFiles:
    """The files of a cache at a local path or a URL; nothing is created before the first write.

    A ``~`` at the start is the home folder, also where no shell has made it that.

    Raises:
        UsageError: no location, a URL that cannot be used, or one with a credential in it.
    """
    text = os.fspath(location)
    if not text:
        raise UsageError("the location of a cache is empty, a path or a URL is wanted. Is a variable not set?")
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
        raise UsageError(f"{redact(text)}: caches at URLs need obstore: pip install 'teacher-cache[s3]'") from error
    return RemoteFiles(text)


def requests_at_once(files: CacheFiles) -> int:
    """How many requests to this location are worth having under way together: 1 in a folder, which answers at once."""
    return 1 if isinstance(files, LocalFiles) else REQUESTS_AT_ONCE


def in_parallel(
    files: CacheFiles, call: Callable[[_Item], _Result], items: Iterable[_Item], most: int = REQUESTS_AT_ONCE
) -> Iterator[_Result]:
    """``call(item)`` of each item, in their order: one by one in a folder, many under way at once in a store.

    Threads live for this iteration only, so that a fork in between finds none of them.

    Args:
        call: what asks ``files``; from several threads.
        most: under way at once, where what each holds in memory matters.

    Raises:
        Whatever a call raises, when it is its turn; what is not under way then is not begun.
    """
    threads = min(most, requests_at_once(files))
    if threads < 2:
        yield from map(call, items)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="requests") as pool:
        yield from results_ahead(pool, call, items, threads)


def results_ahead(
    pool: Executor, call: Callable[[_Item], _Result], items: Iterable[_Item], ahead: int
) -> Iterator[_Result]:
    """What ``call`` gives for each of ``items``, in their order, while ``pool`` works on those that come next.

    Args:
        ahead: items that are asked for before their turn.

    Raises:
        Whatever a call raises, when it is its turn; what is not under way then is not begun.
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
