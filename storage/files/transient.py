"""Transient errors, which a retry can cure: a lost connection, a stale file handle, a busy server."""

from __future__ import annotations

import errno

from teacher_cache.storage.errors import CacheAccessError, CacheCorruptError, CacheError, CacheUnreachableError

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
TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
"""HTTP status codes after which the same request may succeed."""

# by name, since these libraries are imported only where something is downloaded; subclasses count
_TRANSIENT_NAMES = {
    "aiohttp": {"ClientConnectionError", "ClientPayloadError"},
    "urllib3": {"TimeoutError", "ProtocolError", "NewConnectionError"},
    "requests": {"ConnectionError", "Timeout", "ChunkedEncodingError"},
    "httpx": {"TransportError"},
    "httpx2": {"TransportError"},  # of huggingface_hub
}
# subclasses of the above for a wrong address or certificate
_PERMANENT_NAMES = {
    "aiohttp": {"ClientSSLError", "InvalidURL"},
    "requests": {"SSLError"},
    "huggingface_hub": {"OfflineModeIsEnabled"},
    "httpx": {"UnsupportedProtocol", "ProxyError"},
    "httpx2": {"UnsupportedProtocol", "ProxyError"},
}


def is_transient(error: BaseException) -> bool:
    """Return whether the same call may succeed a little later.

    Only the error itself counts, not its cause: code that turned a lost connection into a ``UsageError`` has decided
    that it is final.
    """
    if _is_named(error, _PERMANENT_NAMES):
        return False
    # subclasses: CacheUnreachableError, and the time-outs of asyncio and fsspec
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status in TRANSIENT_STATUS
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
        return True
    return _is_named(error, _TRANSIENT_NAMES)


def _is_named(error: BaseException, names: dict[str, set[str]]) -> bool:
    return any(kind.__name__ in names.get(kind.__module__.partition(".")[0], ()) for kind in type(error).__mro__)


def read_error(where: str, error: OSError) -> CacheError:
    """Return the error to raise for an object of a cache that exists and cannot be read.

    Args:
        where: path to name if the error has no file name.
    """
    if isinstance(error, CacheError):
        return error
    what = f"{error.filename or where}: cannot be read: {error.strerror or error}."
    if isinstance(error, PermissionError):
        return CacheAccessError(f"{what} Let this user read it.")
    if is_transient(error):
        return CacheUnreachableError(
            f"{what} Try again. If it still fails, delete this object and run teacher-cache repair CACHE."
        )
    return CacheCorruptError(f"{what} Remove what is in its place and run teacher-cache repair CACHE.")
