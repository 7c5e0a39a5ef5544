"""Forked processes of a flow run end with code 0 again.

Prefect 3.8 registers exit calls for its sender threads (logs, events). A forked process inherits the calls
without the threads, and the calls fail there on an assertion: the process ends with code 1 after it did all
its work, and torch's DataLoader takes that for a crash. So a forked process forgets Prefect's exit calls; this
process keeps them. Import this module in flows whose tasks decode in processes.
"""

from __future__ import annotations

import functools
import os
import threading
from typing import Any

__all__: list[str] = []


def _forget_exit_calls() -> None:
    # where threading keeps what threading._register_atexit got: partials, in all of CPython 3.9 to 3.14
    calls: list[functools.partial[Any]] = getattr(threading, "_threading_atexits", [])
    calls[:] = [call for call in calls if not getattr(call, "func", call).__module__.startswith("prefect.")]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_exit_calls)
