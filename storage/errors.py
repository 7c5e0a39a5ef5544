"""What can be wrong with a cache, grouped by what the reader would do next.

    CacheError
       |- CacheNotFoundError     no cache was ever started at this path
       |- CacheIncompleteError   started, chunks missing; precompute again resumes
       |- CacheMismatchError     sound, but another teacher, dataset, preprocessing or layout than asked for
       |- CacheFormatError       written by a newer version, or not a cache manifest at all
       |- CacheCorruptError      bytes disagree with their digest; teacher-cache repair mends it
       |- CacheUnreachableError  the store did not answer, however often it was asked; run the same command again
       `- CacheAccessError       the store refuses: credentials, rights, bucket or region have to change

UsageError is apart: a setting, name or path that the caller has to change.
"""

from __future__ import annotations

__all__ = [
    "CacheAccessError",
    "CacheCorruptError",
    "CacheError",
    "CacheFormatError",
    "CacheIncompleteError",
    "CacheMismatchError",
    "CacheNotFoundError",
    "CacheUnreachableError",
    "UsageError",
]


class CacheError(Exception):
    """Base of all; the command line prints its message as one line and exits 1."""


class CacheNotFoundError(CacheError):
    """No cache was ever started at this path."""


class CacheIncompleteError(CacheError):
    """The cache was started and some chunks are missing."""


class CacheMismatchError(CacheError):
    """The cache is sound but is not the one that was asked for."""


class CacheFormatError(CacheError):
    """The manifest is of a newer format, or is not a manifest."""


class CacheCorruptError(CacheError):
    """Bytes on disk disagree with the digest that was recorded when they were written."""


class CacheUnreachableError(CacheError, ConnectionError):
    """The store of the cache failed at every try; a later one may succeed, so it counts as a lost connection."""


class CacheAccessError(CacheError):
    """The store of the cache refuses this caller; trying again changes nothing."""


class UsageError(ValueError):
    """A setting, name or path of the caller's that cannot be used; the command line exits 2."""
