"""Which failures another try can cure: a connection, a stale file handle, a server that is busy. Nothing else."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from teacher_cache.storage.errors import CacheAccessError, CacheCorruptError, CacheError, CacheUnreachableError

__all__ = ["is_transient", "read_error", "s3_answer"]

_TRANSIENT_ERRNOS = {
    getattr(errno, name)
    for name in (
        "EAGAIN",
        "EBUSY",
        "ECONNABORTED",
        "ECONNREFUSED",
        "ECONNRESET",
        "EHOSTDOWN",
        "EHOSTUNREACH",
        "EINTR",
        "EIO",  # a network file system that lost its server answers with this
        "ENETDOWN",
        "ENETRESET",
        "ENETUNREACH",
        "ENOLINK",
        "ENOTCONN",
        "EPIPE",
        "EREMOTEIO",
        "ESTALE",
        "ETIMEDOUT",
    )
    if hasattr(errno, name)  # a few are Linux only
}
_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
# of S3, whatever the status is: a broken upload is a 400, two conditional puts at the same moment are a 409
_TRANSIENT_CODES = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "XAmzContentSHA256Mismatch",
}

# by name, since fsspec's backends bring these libraries only where they are installed; subclasses count
_TRANSIENT_NAMES = {
    "aiohttp": {"ClientConnectionError", "ClientPayloadError"},
    "botocore": {
        "ConnectionError",
        "HTTPClientError",
        "ReadTimeoutError",
        "IncompleteReadError",
        "FlexibleChecksumError",  # the body does not match the checksum in its headers
        "ResponseParserError",  # half an XML document, or a proxy's page in place of one
    },
    "urllib3": {"TimeoutError", "ProtocolError", "NewConnectionError"},
    "requests": {"ConnectionError", "Timeout", "ChunkedEncodingError"},
    "httpx": {"TransportError"},
}
# subclasses of the above that say something about the address or the certificate, not about the moment
_PERMANENT_NAMES = {
    "aiohttp": {"ClientSSLError", "InvalidURL"},
    "botocore": {"SSLError"},
    "urllib3": set[str](),
    "requests": {"SSLError"},
    "httpx": {"UnsupportedProtocol", "ProxyError"},
}


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a little later.

    Only the error itself is looked at, not what caused it: code that turned a lost connection into a
    ``UsageError`` has decided that it is final. (s3fs turns the answers of S3 into OSErrors that say less than
    the answer itself; of those the answer decides.)
    """
    if _named(error, _PERMANENT_NAMES):
        return False
    answer = s3_answer(error)
    if answer is not None:  # before the errno: s3fs gives EIO to every answer that it does not know
        return answer[0] in _TRANSIENT_STATUS or answer[1] in _TRANSIENT_CODES
    # asyncio's and fsspec's time-outs are TimeoutError too
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status in _TRANSIENT_STATUS
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
        return True
    return _named(error, _TRANSIENT_NAMES)


def s3_answer(error: BaseException) -> tuple[int, str] | None:
    """HTTP status and S3 error code of botocore's ClientError, or of the OSError that s3fs made of it."""
    for candidate in (error, error.__cause__ if isinstance(error, OSError) else None):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status), str(response.get("Error", {}).get("Code", ""))
    return None


def _named(error: BaseException, names: dict[str, set[str]]) -> bool:
    return any(name in names.get(package, ()) for package, name in _classes(error))


def _classes(error: BaseException) -> Iterator[tuple[str, str]]:
    for kind in type(error).__mro__:
        yield kind.__module__.partition(".")[0], kind.__name__


def read_error(where: str, error: OSError) -> CacheError:
    """What to raise for an object of a cache that is there and cannot be read, by what the caller can do about it.

    Args:
        where: it lies, for the message, if the error does not say.
    """
    if isinstance(error, CacheError):
        return error
    what = f"{error.filename or where}: cannot be read: {error.strerror or error}."
    if isinstance(error, PermissionError):
        return CacheAccessError(f"{what} Let this user read it.")
    if is_transient(error):
        return CacheUnreachableError(
            f"{what} Try again; if it stays so, delete this object and run teacher-cache repair CACHE."
        )
    return CacheCorruptError(f"{what} Remove what is in its place and run teacher-cache repair CACHE.")
