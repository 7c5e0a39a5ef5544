"""Bytes by key, in a folder or at a URL: written whole or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_cache.lazy_names import lazy_names

if TYPE_CHECKING:
    from teacher_cache.storage.files.checksum import crc32c as crc32c
    from teacher_cache.storage.files.local import LocalFiles as LocalFiles
    from teacher_cache.storage.files.location import in_parallel as in_parallel
    from teacher_cache.storage.files.location import open_files as open_files
    from teacher_cache.storage.files.new_files import new_folder as new_folder
    from teacher_cache.storage.files.protocol import CacheFiles as CacheFiles
    from teacher_cache.storage.files.transient import is_transient as is_transient

__all__ = [
    "CacheFiles",
    "LocalFiles",
    "crc32c",
    "in_parallel",
    "is_transient",
    "new_folder",
    "open_files",
]

_HOMES = {
    "CacheFiles": "protocol",
    "LocalFiles": "local",
    "crc32c": "checksum",
    "in_parallel": "location",
    "is_transient": "transient",
    "new_folder": "new_files",
    "open_files": "location",
}

__getattr__ = lazy_names(__name__, _HOMES)
