"""Which failures another try can cure: a connection, a stale file handle, a server that is busy. Nothing else.

A wrong setting, a cache of another teacher or a loss that is not finite fails the same way again, and a full
disk or a missing right wants a person; retrying those only hides them for minutes.
"""

from __future__ import annotations

from typing import Any

from pipeline.transient import is_transient

__all__ = ["RETRIES", "RETRY_DELAYS", "is_transient", "retry_transient"]

RETRIES = 3
RETRY_DELAYS = [10.0, 60.0, 300.0]


def retry_transient(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's ``retry_condition_fn``: the state of a failed try holds its exception."""
    return isinstance(state.data, BaseException) and is_transient(state.data)
