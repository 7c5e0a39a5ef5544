"""What a forked child has to make good: another thread of the parent may have been between two lines of it."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["Renewed", "renew_after_fork"]


class Renewed(Protocol):
    """What threads share."""

    def renew(self) -> None:
        """In the child, before anything else: new locks in place of those that a thread may hold which is not there."""


_ALIVE: weakref.WeakSet[Renewed] = weakref.WeakSet()


def renew_after_fork(shared: Renewed) -> None:
    """Have ``shared.renew`` called in each child that is forked while it is there."""
    _ALIVE.add(shared)


def _renew_all() -> None:
    for shared in _ALIVE:
        shared.renew()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_renew_all)
