"""A cache at an fsspec URL: every object one put, tried again while the store is in trouble.

This is the only layer that tries again: botocore and s3fs, which have one each, are told to try once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import secrets
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import fsspec

from teacher_cache.storage.errors import CacheAccessError, CacheUnreachableError, UsageError
from teacher_cache.storage.files.local import PARTIAL, ObjectStat, left_behind
from teacher_cache.storage.files.obstore_reads import object_reads
from teacher_cache.storage.files.processes import this_process
from teacher_cache.storage.files.protocol import REQUESTS_AT_ONCE
from teacher_cache.storage.files.transient import is_transient, s3_answer
from teacher_cache.storage.observe.safe_text import redact

__all__ = ["RETRY", "RemoteFiles", "RetryPolicy", "filesystem_of"]

_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetryPolicy:
    """How often a call is tried in all, and the pauses between: doubled each time, shortened by chance up to half."""

    tries: int = 6
    first_pause_seconds: float = 0.5
    longest_pause_seconds: float = 20.0

    def pause_seconds(self, failures: int) -> float:
        """The pause after that many failures in a row."""
        whole = min(self.longest_pause_seconds, self.first_pause_seconds * 2.0 ** (failures - 1))
        # not the global generator: its state belongs to whoever seeded it
        return whole * (0.5 + random.SystemRandom().random() / 2)


RETRY = RetryPolicy()
"""What every location does that is not told otherwise: about 15 seconds of pauses before it gives up."""

# backends whose conditional put the server decides; fsspec's own default looks first and then writes.
# s3 and memory are tested here; of gcsfs (ifGenerationMatch=0) and adlfs (overwrite=False) the source was read
_CREATES = {"s3", "s3a", "memory", "gs", "gcs", "abfs", "abfss", "az", "adl"}
_memory_create = threading.Lock()

_shared: dict[Hashable, Any] = {}
_kept: list[Any] = []
_shared_lock = threading.Lock()


def _renew_locks() -> None:
    global _shared_lock, _memory_create
    _shared_lock, _memory_create = threading.Lock(), threading.Lock()


if hasattr(os, "register_at_fork"):  # another thread of the parent may have held them
    os.register_at_fork(after_in_child=_renew_locks)

_CONNECTIONS = 4 * REQUESTS_AT_ONCE  # of a process: chunks, commits and images; left out, botocore keeps to 10
_MARK = "created-by"  # metadata of an object that came by create()

_CREDENTIAL_ADVICE = (
    "Give credentials by the standard chain: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, "
    "~/.aws, the machine's role, or fsspec's configuration"
)
_REGION_CODES = {"301", "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_CREDENTIAL_CODES = {
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidSecurity",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
_CREDENTIAL_NAMES = {
    "CredentialRetrievalError",
    "NoAuthTokenError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "SSOError",
    "TokenRetrievalError",
}


class RemoteFiles:
    """An fsspec URL. One put per write: object stores show an object only when its put has ended.

    Failures that may pass are tried again as ``retry`` says (default: :data:`RETRY`), each with a line in the log.
    """

    def __init__(self, location: str, retry: RetryPolicy | None = None) -> None:
        _check_location(location)
        self.location = location
        self._retry = retry
        self._creates_proven = False
        self._bucket_found = False
        self._connect()

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFiles, (self.location, self._retry)

    def _connect(self) -> None:
        self._fs, self._root = filesystem_of(self.location)
        self._pid = os.getpid()

    def _filesystem(self) -> Any:
        if self._pid != os.getpid():  # a fork took the object but not the thread that does its work
            self._connect()
        return self._fs

    def _path(self, key: str) -> str:
        if "?versionId=" in key:
            raise ValueError(f"{key!r}: s3fs takes what follows the question mark for a version of another object")
        return f"{self._root.rstrip('/')}/{key}" if key else self._root

    def read(self, key: str) -> bytes:
        """See :class:`teacher_cache.storage.files.protocol.CacheFiles`. One request."""
        data: bytes = self._try("read", key, lambda fs, path: fs.cat_file(path))
        return data

    def read_buffer(self, key: str) -> bytes | memoryview:
        """As :meth:`read`, of large objects; where obstore can be used by it, whose bytes are not copied again."""
        if _is_s3(self.location):
            bucket, _, path = self._path(key).partition("/")
            fast = object_reads(bucket, _shared_key())
            data = fast.get(path) if fast is not None else None
            if data is not None:
                return data
        return self.read(key)

    def write(self, key: str, data: bytes) -> None:
        """See :class:`teacher_cache.storage.files.protocol.CacheFiles`."""
        self._try("write", key, lambda fs, path: fs.pipe_file(path, data))

    def create(self, key: str, data: bytes) -> bool:
        """See :class:`teacher_cache.storage.files.protocol.CacheFiles`. The server decides: a put with
        ``If-None-Match: *``.

        The first call proves with an object of its own that the server refuses a second put; some ignore the
        condition.
        """
        if not self._creates_proven:
            self._prove_create(key)
            self._creates_proven = True
        return self._create(key, data, key)

    def _create(self, key: str, data: bytes, named: str) -> bool:
        # A put may be made, its answer lost, and the put sent again: by the loop in _try, but also, unseen, by
        # aiohttp on a kept connection and by proxies, for which a PUT is idempotent. So an object that is there
        # may be our own; on S3 a mark in its metadata tells, elsewhere its bytes do, after a failure
        mark = secrets.token_hex(16)
        marked = {"Metadata": {_MARK: mark}} if _is_s3(self.location) else {}
        unsure = False

        def attempt(fs: Any, path: str) -> bool:
            nonlocal unsure
            while True:
                try:
                    # memory:// looks first, then writes
                    with _memory_create if "memory" in _protocols(fs) else contextlib.nullcontext():
                        fs.pipe_file(path, data, mode="create", **marked)
                    return True
                except Exception as error:
                    if not _was_there(error):
                        unsure = True
                        raise
                try:
                    if marked and (found := fs.metadata(path, refresh=True).get(_MARK)):
                        return bool(found == mark)
                    return unsure and bool(fs.cat_file(path) == data)
                except FileNotFoundError:
                    continue  # taken away between the two calls: free again

        return self._try("create", key, attempt, named)

    def _prove_create(self, named: str) -> None:
        if not _CREATES.intersection(_protocols(self._filesystem())):
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
        """See :class:`teacher_cache.storage.files.protocol.CacheFiles`. One request; one more until it is known that
        there is the bucket."""

        def look(fs: Any, path: str) -> bool:
            if self._bucket_found and _is_s3(self.location):
                fs.metadata(path, refresh=True)  # a HEAD, which does not tell a missing bucket from a missing object
                return True
            # not isfile(): that says False to any error, a busy server's too
            return bool(fs.info(path)["type"] == "file")

        try:
            return self._try("look at", key, look)
        except FileNotFoundError:
            self._bucket_found = True
            return False

    def folders(self, prefix: str = "") -> list[str]:
        """See :class:`teacher_cache.storage.files.protocol.CacheFiles`. One level of the listing, however much lies
        below."""
        folder = prefix.rstrip("/")

        def look(fs: Any, path: str) -> list[str]:
            fs.invalidate_cache()
            try:
                entries = fs.ls(path, detail=True)
            except FileNotFoundError as error:
                if _no_bucket(error):
                    raise
                return []
            return [str(entry["name"]) for entry in entries if entry["type"] == "directory"]

        here = self._path(folder).rstrip("/")
        names = [path.rstrip("/").rpartition("/")[2] for path in self._try("list", folder, look) if path != here]
        return sorted({name for name in names if name})

    def partials(self) -> list[str]:
        """See :class:`teacher_cache.storage.files.protocol.CacheFiles`. Of :meth:`create` only: a put is whole or not
        at all."""
        return [key for key in self._find() if left_behind(key, self.stat)]

    def _find(self, prefix: str = "") -> list[str]:
        """As :meth:`list`, with what is not finished."""
        folder = prefix.rstrip("/")

        def find(fs: Any, path: str) -> list[str]:
            fs.invalidate_cache()
            try:
                found: list[str] = fs.find(path)
            except FileNotFoundError as error:
                if _no_bucket(error):
                    raise
                return []
            return found

        cut = len(self._root.rstrip("/")) + 1
        keys = [path[cut:] for path in self._try("list", folder, find)]
        # consoles leave empty objects with a slash at the end to show folders; an object of the folder's own name
        # is not below it
        return sorted(
            key for key in keys if key.startswith(f"{folder}/" if folder else "") and not key.endswith("/") and key
        )

    def list(self, prefix: str = "") -> list[str]:
        """See :class:`teacher_cache.storage.files.protocol.CacheFiles`."""
        return [key for key in self._find(prefix) if not PARTIAL.match(key.rpartition("/")[2])]

    def stat(self, key: str) -> ObjectStat:
        """See :class:`teacher_cache.storage.files.protocol.CacheFiles`."""
        found = self._try("look at", key, lambda fs, path: fs.info(path))
        if found["type"] != "file":
            raise FileNotFoundError(f"{self.location}: there is no object {key}")
        # by name of the protocol: s3, gcs and abfs, memory
        times = (found.get(name) for name in ("LastModified", "updated", "last_modified", "created"))
        modified = next((time for time in times if isinstance(time, datetime)), None)
        return ObjectStat(int(found["size"] or 0), modified)

    def delete(self, key: str) -> None:
        """See :class:`teacher_cache.storage.files.protocol.CacheFiles`."""
        try:
            self._try("delete", key, lambda fs, path: fs.rm_file(path))
        except FileNotFoundError:
            return

    def remove_partials(self) -> int:
        """Does nothing: the few bytes that :meth:`partials` may find are not worth a listing of the whole cache."""
        return 0

    def _try(self, verb: str, key: str, call: Callable[[Any, str], _Result], named: str | None = None) -> _Result:
        """The call's result, after as many tries as it takes.

        Args:
            call: gets the filesystem and the key's path on it.
            named: what errors name, if that is not the key.

        Raises:
            FileNotFoundError: there is no such object.
            CacheUnreachableError: every try failed.
            CacheAccessError: the store refuses.
        """
        retry = self._retry or RETRY
        where = f"{self.location}: cannot {verb} {named or key or 'the cache'}"
        for failures in range(1, retry.tries + 1):
            try:
                result = call(self._filesystem(), self._path(key))
                self._bucket_found = True
                return result
            except FileNotFoundError as error:
                if not _no_bucket(error):
                    raise FileNotFoundError(f"{self.location}: there is no object {key}") from None
                reason: str | None = "the bucket does not exist. Make it, or correct the location"
            except Exception as error:
                # fsspec's own time-out says nothing; what it came from does
                shown = error if str(error) or error.__cause__ is None else error.__cause__
                cause = redact(f"{type(shown).__name__}: {shown}")
                if is_transient(error):
                    reason = None
                else:
                    reason = _refusal(error)
                    if reason is None:
                        raise
                    reason = redact(reason)
            # `from None` below: what caused it may show what redact() hides
            if reason is not None:
                if _is_s3(self.location):
                    _forget_filesystem()
                raise CacheAccessError(f"{where}: {reason}") from None
            if failures < retry.tries:
                pause = retry.pause_seconds(failures)
                _log.warning("%s (%s); try %d of %d in %.1f s", where, cause, failures + 1, retry.tries, pause)
                time.sleep(pause)
        raise CacheUnreachableError(
            f"{where}: {retry.tries} tries failed, the last with {cause}. Run the same command again when the store "
            "answers"
        ) from None


def _check_location(location: str) -> None:
    shown = redact(location)
    if shown != location:
        raise UsageError(
            f"{shown}: a location must not hold credentials, since it is written into logs and files. "
            f"{_CREDENTIAL_ADVICE}"
        )
    protocol, _, rest = location.partition("://")
    if "::" in protocol:
        raise UsageError(f"{location}: chained locations may answer from a cache of their own. Name the store itself")
    if "?versionId=" in rest:
        raise UsageError(f"{location}: a cache is not one version of an object. Leave out ?versionId=")
    if not rest or (_is_s3(location) and rest.startswith("/")):
        raise UsageError(f"{location}: names no bucket. Write {protocol}://BUCKET/NAME.cache")


def _is_s3(location: str) -> bool:
    return location.partition("://")[0] in ("s3", "s3a")


def filesystem_of(location: str) -> tuple[Any, str]:
    """Filesystem and path of a URL: one that neither remembers listings, nor tries again, nor asks for sizes first.

    Those of S3 are shared by all locations of a process and never let go: when one is collected while another event
    loop runs (zarr's), s3fs closes its connections in that loop, which fails. fsspec's own cache would also give the
    old one after the environment has changed, to another endpoint or to new credentials.
    """
    if not _is_s3(location):
        fs, root = fsspec.core.url_to_fs(location, skip_instance_cache=True)
        return fs, root
    configured = {**fsspec.config.conf.get("s3", {}), **fsspec.config.conf.get("s3a", {})}
    with _shared_lock:
        key = _shared_key()
        if key not in _shared:
            _shared[key], _ = fsspec.core.url_to_fs(
                location,
                skip_instance_cache=True,
                use_listings_cache=False,
                max_concurrency=1,  # with more, each read starts with a HEAD
                config_kwargs={
                    "max_pool_connections": _CONNECTIONS,
                    **configured.get("config_kwargs", {}),
                    "retries": {"total_max_attempts": 1, "mode": "standard"},
                },
            )
            _shared[key].retries = 1  # tries in all; for reads they would multiply with those inside of each
        return _shared[key], _shared[key]._strip_protocol(location)


def _shared_key() -> Hashable:
    # fsspec.config may change too, but not by the environment: that is read once, at import
    environment = frozenset((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    return os.getpid(), environment, repr(fsspec.config.conf)


def _forget_filesystem() -> None:
    """Let the next location start anew: keys and tokens in files may have been renewed."""
    with _shared_lock:
        used = _shared.pop(_shared_key(), None)
        if used is not None:
            _kept.append(used)


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _was_there(error: BaseException) -> bool:
    answer = s3_answer(error)
    return isinstance(error, FileExistsError) or (answer is not None and answer[0] == 412)


def _no_bucket(error: BaseException) -> bool:
    answer = s3_answer(error)
    return answer is not None and answer[1] == "NoSuchBucket"


def _refusal(error: BaseException) -> str | None:
    """What a person can do about it; None for an error that is no answer of a store, so a fault of ours."""
    status, code = s3_answer(error) or (0, "")
    cause = f"{type(error).__name__}: {error}"
    if isinstance(error, RecursionError):  # botocore follows a redirect to the bucket's region by asking there again
        return (
            "the endpoint answers every request with a redirect. Check AWS_ENDPOINT_URL (http where https is wanted?) "
            "and AWS_DEFAULT_REGION"
        )
    if code in _REGION_CODES or status == 301:
        return f"the bucket is in another region ({cause}). Set AWS_DEFAULT_REGION to the bucket's region"
    if code in _CREDENTIAL_CODES:
        return f"the store does not accept the credentials ({code}: {error}). {_CREDENTIAL_ADVICE}"
    if {kind.__name__ for kind in type(error).__mro__} & _CREDENTIAL_NAMES:
        return f"no usable credentials ({cause}). {_CREDENTIAL_ADVICE}"
    if status == 403 or isinstance(error, PermissionError):
        return (
            f"the store denies it ({code or type(error).__name__}: {error}). The credentials need the rights to list "
            "the bucket and to get, put and delete its objects"
        )
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in ("botocore", "aiohttp"):
        return f"{cause}. Check the location, and AWS_ENDPOINT_URL if it is set"
    return None
