"""Freed memory that a process keeps, instead of giving it back to the kernel and faulting it in again. No torch."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_PILLOW_BLOCKS = 8  # of 16 MiB: a decoded photograph of a few megapixels and its resized copies


def keep_freed_blocks() -> None:
    """Let glibc keep freed memory. By default it maps and unmaps each large block.

    One arena is set, since glibc always trims the others. Does nothing without glibc.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  # these numbers mean something else, or nothing, on musl and macOS
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def keep_freed_images() -> None:
    """Let Pillow keep the memory of freed images. For a process that decodes in one thread: it is not thread-safe."""
    import PIL.Image

    core: Any = PIL.Image.core  # type: ignore[attr-defined]
    core.set_blocks_max(_PILLOW_BLOCKS)
