"""What can be wrong with a cache, grouped by what the reader would do next.

CacheError
   |- CacheNotFoundError     no cache was ever started at this path
   |- CacheIncompleteError   started, chunks missing; precompute again resumes
   |- CacheMismatchError     sound, but another teacher, dataset, preprocessing or layout than asked for
   |- CacheFormatError       written by a newer version, or not a cache manifest at all
   `- CacheCorruptError      bytes disagree with their digest; encode those chunks again

UsageError is apart: a setting, name or path that the caller has to change.
"""

from __future__ import annotations

__all__ = [
    "CacheCorruptError",
    "CacheError",
    "CacheFormatError",
    "CacheIncompleteError",
    "CacheMismatchError",
    "CacheNotFoundError",
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


class UsageError(ValueError):
    """A setting, name or path of the caller's that cannot be used; the command line exits 2."""
