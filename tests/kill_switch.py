"""Counts what happens in a process, and kills it at a chosen event."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

Event = tuple[str, str]
"""What happened, and to which object."""


class KillSwitch:
    """Call it with (kind, key) for each event; at event ``kill_at`` it sends its own process SIGKILL."""

    def __init__(self, kill_at: int | None) -> None:
        self.events: list[Event] = []
        self._kill_at = kill_at
        self._lock = threading.Lock()

    def __call__(self, kind: str, key: str, ruin: Callable[[], None] | None = None) -> None:
        """Note an event.

        Args:
            ruin: called before the kill: what a kill in the middle of it leaves.
        """
        with self._lock:  # events come from several threads
            if len(self.events) == self._kill_at:
                if ruin is not None:
                    ruin()
                os.kill(os.getpid(), signal.SIGKILL)
            self.events.append((kind, key))
