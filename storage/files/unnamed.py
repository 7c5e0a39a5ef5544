"""Files without a name, whose memory goes with the last process that has them open."""

from __future__ import annotations

import contextlib
import os
import tempfile


def unnamed_file(name: str) -> int:
    """Open a file without a path and return its descriptor: in memory if the system lets it.

    Args:
        name: what ``/proc`` shows.
    """
    with contextlib.suppress(AttributeError, OSError):  # another system, or a container that forbids it
        return os.memfd_create(name)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
