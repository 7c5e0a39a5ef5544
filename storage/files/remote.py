"""A cache at a URL: each object is one put, and transient failures are retried."""

from __future__ import annotations

import logging
import os
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from obstore.exceptions import AlreadyExistsError, BaseError

from teacher_cache.storage.errors import CacheAccessError, CacheUnreachableError, UsageError
from teacher_cache.storage.files.processes import this_process
from teacher_cache.storage.files.protocol import CacheFiles, ObjectStat
from teacher_cache.storage.files.stores import (
    CREATING,
    CREDENTIAL_ADVICE,
    Failure,
    forget_store,
    has_answered,
    note_answer,
    open_store,
)
from teacher_cache.storage.observe.safe_text import redact

_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetryPolicy:
    """Limits of a request: number of tries, pauses between them, and time until an answer.

    Pauses double with each try, and are shortened at random by up to half. A store that has never answered this process
    is given up after ``first_answer_seconds``: its address is probably wrong.
    """

    tries: int = 6
    first_pause_seconds: float = 0.5
    longest_pause_seconds: float = 20.0
    answer_seconds: float = 60.0
    first_answer_seconds: float = 10.0

    def pause_seconds(self, failures: int) -> float:
        """Return the pause after that many failures in a row."""
        whole = min(self.longest_pause_seconds, self.first_pause_seconds * 2.0 ** (failures - 1))
        # not the global generator, which the caller may have seeded
        return whole * (0.5 + random.SystemRandom().random() / 2)


RETRY = RetryPolicy()
"""Default policy: about 15 seconds of pauses before it gives up."""

_MARK = "createdby"  # metadata of an object made by create(); Azure takes identifiers only
_ONE_PUT_BYTES = 64 << 20  # a larger object goes part after part, each with its own time limit; a created one has more
_PART_BYTES = 16 << 20


class RemoteFiles(CacheFiles):
    """Objects below a URL (``s3://``, ``gs://``, ``az://``, ``http://`` for reading, ``memory://`` for tests).

    Object stores show an object only when its put has ended.

    Args:
        location: URL of the cache, without credentials.
        retry: default: :data:`RETRY`.
    """

    def __init__(self, location: str, retry: RetryPolicy | None = None) -> None:
        _check_location(location)
        self.location = location
        self._retry = retry
        scheme, _, rest = location.partition("://")
        self._can_create = scheme in CREATING
        # the store is opened for the server or bucket; the rest of the URL is a prefix of each key
        self._root = (rest if scheme == "memory" else rest.partition("/")[2]).strip("/")
        self._create_is_proven = False
        self._bucket_exists = False
        self._store: Any = None
        self._has_answered = False
        self._answer_seconds = 0.0  # limit of the opened store
        self._process: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFiles, (self.location, self._retry)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if self._root and key else key or self._root

    def read(self, key: str) -> bytes:
        """Return the object's bytes. One request."""
        return bytes(self.read_buffer(key))

    def read_buffer(self, key: str) -> memoryview:
        """Return the object's bytes in obstore's own memory: large ones are not copied again."""
        return self._try("read", key, lambda store, path: memoryview(store.get(path).bytes()))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes from ``start`` on, or fewer where the object ends."""
        return self._try("read", key, lambda store, path: bytes(store.get_range(path, start=start, length=length)))

    def write(self, key: str, data: bytes) -> None:
        """Replace the object."""

        def put(store: Any, path: str) -> None:
            store.put(path, data, use_multipart=len(data) > _ONE_PUT_BYTES, chunk_size=_PART_BYTES)

        self._try("write", key, put)

    def create(self, key: str, data: bytes) -> bool:
        """Create the object if it does not exist. The server decides: a put with ``If-None-Match: *``.

        The first call checks with a probe object that the server refuses a second put: some ignore the condition.
        """
        if not self._create_is_proven:
            self._prove_create(key)
            self._create_is_proven = True
        return self._create(key, data, key)

    def _create(self, key: str, data: bytes, named: str) -> bool:
        # A put may succeed although its reply is lost; the retry, by us or by a proxy, then finds our own object.
        # A mark in its metadata identifies it; in a store without metadata, its bytes do.
        mark = secrets.token_hex(16)
        is_unsure = False

        def attempt(store: Any, path: str) -> bool:
            nonlocal is_unsure
            while True:
                try:
                    store.put(path, data, mode="create", attributes={_MARK: mark}, use_multipart=False)
                    return True
                except BaseError as error:
                    if not isinstance(error, AlreadyExistsError) or Failure.of(error).transient:
                        is_unsure = True
                        raise
                try:
                    owner = store.get(path, options={"head": True}).attributes.get(_MARK)
                    if owner is not None:
                        return bool(owner == mark)
                    return is_unsure and bytes(store.get(path).bytes()) == data
                except FileNotFoundError:
                    continue  # deleted between the two calls: free again

        return self._try("create", key, attempt, named, 1 + len(data) // _ONE_PUT_BYTES)

    def _prove_create(self, named: str) -> None:
        if not self._can_create:
            raise UsageError(
                f"{self.location}: this kind of store cannot promise that only one of several writers creates an "
                "object. Use a local folder or s3://"
            )
        probe = f".partial-{this_process().tag}-{secrets.token_hex(4)}"
        self._create(probe, b"first", named)
        try:
            if self._create(probe, b"second", named):
                raise UsageError(
                    f"{self.location}: the server ignores If-None-Match, so two writers could both create an object. "
                    "Use a server that honours it (AWS and SeaweedFS do), or a local folder"
                )
        finally:
            self.delete(probe)

    def exists(self, key: str) -> bool:
        """Return whether the object exists. One request, and one more until the bucket is known to exist."""
        try:
            self._try("look at", key, lambda store, path: store.head(path))
        except FileNotFoundError:
            if not self._bucket_exists:  # the answer to a HEAD does not tell a missing bucket from a missing object
                self._try("look at", key, lambda store, path: store.list_with_delimiter(path))
            return False
        return True

    def folders(self, prefix: str = "") -> list[str]:
        """Return the names of the folders directly below ``prefix``, sorted. One level is listed."""
        result = self._try("list", prefix.rstrip("/"), lambda store, path: store.list_with_delimiter(path or None))
        return sorted(folder.rstrip("/").rpartition("/")[2] for folder in result["common_prefixes"])

    def all_keys(self, prefix: str = "") -> list[str]:
        """Return the keys of all objects below ``prefix``, and those that a killed :meth:`create` left; sorted."""
        entries = self._try("list", prefix.rstrip("/"), lambda store, path: store.list(path or None).collect())
        cut = len(self._root) + 1 if self._root else 0
        # consoles put empty objects named `folder/` to show folders; obstore drops the slash
        return sorted(
            key for entry in entries if (key := entry["path"][cut:]) and (entry["size"] or self._is_object(key))
        )

    def _is_object(self, key: str) -> bool:
        try:
            self.stat(key)
        except FileNotFoundError:
            return False
        return True

    def stat(self, key: str) -> ObjectStat:
        """Return size and age of the object."""
        entry = self._try("look at", key, lambda store, path: store.head(path))
        return ObjectStat(int(entry["size"]), entry["last_modified"])

    def delete(self, key: str) -> None:
        """Remove the object if it exists."""
        try:
            self._try("delete", key, lambda store, path: store.delete(path))
        except FileNotFoundError:
            return

    def remove_partials(self) -> int:
        """Do nothing: the few bytes of :meth:`partials` are not worth a listing of the whole cache."""
        return 0

    def _try(
        self, verb: str, key: str, call: Callable[[Any, str], _Result], named: str | None = None, patience: int = 1
    ) -> _Result:
        """Return the call's result. Retries transient failures.

        Args:
            call: takes the store and the key's path in it.
            named: key to name in errors. Default: ``key``.
            patience: factor of ``RetryPolicy.answer_seconds``.

        Raises:
            FileNotFoundError: the object does not exist.
            CacheUnreachableError: every try failed.
            CacheAccessError: the store refuses.
        """
        retry = self._retry or RETRY
        where = f"{self.location}: cannot {verb} {named or key or 'the cache'}"
        failures, began = 0, time.monotonic()
        while True:
            try:
                result = call(self._opened(retry, where, patience), self._path(key))
                self._bucket_exists = True
                self._note_answer()
                return result
            except (BaseError, FileNotFoundError) as error:
                failure = Failure.of(error)
                is_missing = isinstance(error, FileNotFoundError)
            if is_missing or failure.status:
                self._note_answer()
            # `raise from None`: the cause may show what redact() hides
            if failure.no_bucket:
                raise CacheAccessError(f"{where}: the bucket does not exist. Make it, or correct the location")
            if is_missing:
                raise FileNotFoundError(f"{self.location}: there is no object {key}")
            if not failure.transient:
                forget_store(self.location, self._answer_seconds)
                self._store = None
                raise CacheAccessError(f"{where}: {failure.remedy}")
            failures += 1
            if failures == retry.tries:
                raise CacheUnreachableError(
                    f"{where}: {failures} tries failed, the last with {failure.text}. Run the same command again when "
                    "the store answers"
                )
            pause, waited = retry.pause_seconds(failures), time.monotonic() - began
            if not self._has_answered and waited + pause > retry.first_answer_seconds:
                raise CacheUnreachableError(
                    f"{where}: no answer in {waited:.0f} s ({failure.text}). Check the location"
                    f"{', AWS_ENDPOINT_URL' if self.location.startswith('s3') else ''} and the network, and run the "
                    "same command again"
                )
            level = logging.WARNING if self._has_answered else logging.INFO
            _log.log(level, "%s (%s); try %d of %d in %.1f s", where, failure.text, failures + 1, retry.tries, pause)
            time.sleep(pause)

    def _opened(self, retry: RetryPolicy, where: str, patience: int) -> Any:
        self._has_answered = self._has_answered or has_answered(self.location)
        seconds = retry.answer_seconds * patience
        if not self._has_answered:
            seconds = min(seconds, retry.first_answer_seconds)
        if self._store is None or self._process != os.getpid() or self._answer_seconds != seconds:
            try:
                self._store, self._answer_seconds = open_store(self.location, seconds), seconds
            except CacheAccessError as error:
                raise CacheAccessError(f"{where}: {error}") from None
            self._process = os.getpid()
        return self._store

    def _note_answer(self) -> None:
        if not self._has_answered:
            note_answer(self.location)
            self._has_answered = True


def _check_location(location: str) -> None:
    shown = redact(location)
    if shown != location:
        raise UsageError(
            f"{shown}: a location must not hold credentials, since it is written into logs and files. "
            f"{CREDENTIAL_ADVICE}"
        )
    scheme, _, rest = location.partition("://")
    if "::" in scheme:
        raise UsageError(f"{location}: chained URLs may answer from a local copy. Name the store itself")
    if "?versionId=" in rest:
        raise UsageError(f"{location}: a cache is not one version of an object. Leave out ?versionId=")
    if not rest.partition("/")[0]:
        raise UsageError(f"{location}: names no bucket. Write {scheme}://BUCKET/NAME.cache")
    if scheme not in CREATING | {"http", "https"}:
        known = ", ".join(sorted(CREATING))
        raise UsageError(f"{location}: no store is known by {scheme}://. Use a folder, or one of {known}")
