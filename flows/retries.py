"""Retries of tasks after transient failures (``teacher_cache.storage.files.transient``), and what is logged of others.

Other errors are not retried: a wrong setting, a cache of another teacher or a loss that is not finite fails again, and
a full disk or a missing permission needs a person.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from prefect.cache_policies import NO_CACHE
from prefect.task_engine import TaskRunTimeoutError

from teacher_cache.storage.errors import CacheError, UsageError
from teacher_cache.storage.files.transient import is_transient

RETRIES = 3
RETRY_DELAYS = [10.0, 60.0, 300.0]
_MOST_RENEWALS = 16  # Prefect takes at most 50 delays


def retry_transient(task: Any, task_run: Any, state: Any) -> bool:
    """Return whether to retry: Prefect's ``retry_condition_fn``. The state of a failed try holds its exception.

    An elapsed ``timeout_seconds`` is not retried, although it is a TimeoutError: the work would take as long again.
    """
    if isinstance(state.data, TaskRunTimeoutError):
        return False
    return isinstance(state.data, BaseException) and is_transient(state.data)


# options of a task that may be retried; the store records what is done, so Prefect keeps no results
TRIED_AGAIN: dict[str, Any] = {
    "retries": RETRIES,
    "retry_delay_seconds": RETRY_DELAYS,
    "retry_condition_fn": retry_transient,
    "cache_policy": NO_CACHE,
    "persist_result": False,
}


def tried_again_while(done: Callable[[], int]) -> dict[str, Any]:
    """Return the retry options of a task that keeps what it has done: its tries begin anew when ``done()`` has grown.

    A run of hours outlasts more than three failures, if something is done between them. One that gets nowhere still
    ends after three retries.
    """
    futile, before = 0, done()

    def gets_somewhere(task: Any, task_run: Any, state: Any) -> bool:
        nonlocal futile, before
        futile, before = (futile + 1 if done() == before else 1), done()
        return futile <= RETRIES and retry_transient(task, task_run, state)

    return {
        "retries": RETRIES * _MOST_RENEWALS,
        "retry_delay_seconds": RETRY_DELAYS * _MOST_RENEWALS,
        "retry_condition_fn": gets_somewhere,
    }


def no_traceback(record: logging.LogRecord) -> bool:
    """Return whether Prefect's log keeps a record. One with the traceback of an error that explains itself is dropped.

    The next record, of the failed state, has its message.
    """
    return not (record.exc_info and isinstance(record.exc_info[1], CacheError | UsageError))


for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(no_traceback)
