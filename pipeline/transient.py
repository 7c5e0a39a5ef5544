"""Which failures another try can cure: a connection, a stale file handle, a server that is busy. Nothing else."""

from __future__ import annotations

import errno
from collections.abc import Iterator

__all__ = ["is_transient"]

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

# by name, since fsspec's backends bring these libraries only where they are installed; subclasses count
_TRANSIENT_NAMES = {
    "aiohttp": {"ClientConnectionError", "ClientPayloadError"},
    "botocore": {"ConnectionError", "HTTPClientError", "ReadTimeoutError", "IncompleteReadError"},
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
    ``UsageError`` has decided that it is final.
    """
    if _named(error, _PERMANENT_NAMES):
        return False
    # asyncio's and fsspec's time-outs are TimeoutError too
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status in _TRANSIENT_STATUS
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
        return True
    return _named(error, _TRANSIENT_NAMES)


def _named(error: BaseException, names: dict[str, set[str]]) -> bool:
    return any(name in names.get(package, ()) for package, name in _classes(error))


def _classes(error: BaseException) -> Iterator[tuple[str, str]]:
    for kind in type(error).__mro__:
        yield kind.__module__.partition(".")[0], kind.__name__
