"""What is tried again and what is not."""

from __future__ import annotations

import errno
import logging
from types import SimpleNamespace

import aiohttp
import fsspec.exceptions
import pytest
from prefect.task_engine import TaskRunTimeoutError

from teacher_cache.flows import evaluate_student, precompute_teacher, train_student
from teacher_cache.flows.deploy_student import deploy_run
from teacher_cache.flows.evaluate_student import evaluate_run
from teacher_cache.flows.precompute_teacher import encode, fan_out, plan, seal
from teacher_cache.flows.retries import RETRIES, RETRY_DELAYS, retry_transient, tried_again_while
from teacher_cache.flows.train_student import train_run
from teacher_cache.pipeline.deploy.record import DeploymentError
from teacher_cache.storage import errors
from teacher_cache.storage.files.transient import is_transient


def http_error(status):
    return aiohttp.ClientResponseError(SimpleNamespace(real_url="http://x"), (), status=status)


REPORTS = [module.describe for module in (precompute_teacher, train_student, evaluate_student)]
TRANSIENT = [
    ConnectionResetError("reset"),
    ConnectionRefusedError("refused"),
    BrokenPipeError("broken"),
    TimeoutError("slow"),
    fsspec.exceptions.FSTimeoutError(),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    OSError(errno.EHOSTUNREACH, "No route to host"),
    OSError(errno.EBUSY, "SlowDown"),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientPayloadError("cut"),
    http_error(503),
    http_error(429),
]
PERMANENT = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError(errno.EROFS, "Read-only file system"),
    PermissionError(errno.EACCES, "Permission denied"),
    FileNotFoundError(errno.ENOENT, "No such file"),
    OSError("a.tar: 10 bytes at offset 512, 20 wanted; the file is cut short"),
    http_error(403),
    http_error(404),
    errors.UsageError("no such split"),
    errors.CacheError("x"),
    errors.CacheMismatchError("another teacher"),
    errors.CacheCorruptError("bad bytes"),
    DeploymentError("int8: i2t R@1 is 1.00, and 9.00 in fp32"),
    ValueError("wrong"),
    FloatingPointError("loss is nan"),
    MemoryError(),
    RuntimeError("CUDA out of memory"),
    AssertionError(),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_another_try_may_help(error):
    assert is_transient(error)
    assert retry_transient(None, None, SimpleNamespace(data=error))


def test_time_that_ran_out_is_final():
    """Prefect's timeout_seconds raises a TimeoutError, as a slow network does."""
    assert is_transient(TaskRunTimeoutError())
    assert not retry_transient(None, None, SimpleNamespace(data=TaskRunTimeoutError()))
    assert not retry_transient(None, None, SimpleNamespace(data=None))


@pytest.mark.parametrize("error", PERMANENT, ids=repr)
def test_another_try_cannot_help(error):
    assert not is_transient(error)
    assert not retry_transient(None, None, SimpleNamespace(data=error))


def test_what_an_error_was_made_of_does_not_count():
    """A teacher that could not be fetched is a UsageError, and stays one."""
    error = errors.UsageError("teacher cannot be loaded")
    error.__cause__ = ConnectionResetError()
    assert not is_transient(error)


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (errors.UsageError("no such split"), False),
        (errors.CacheCorruptError("bad bytes"), False),
        (DeploymentError("int8: i2t R@1 is 1.00, and 9.00 in fp32"), False),
        (RuntimeError("CUDA out of memory"), True),
    ],
    ids=repr,
)
@pytest.mark.parametrize("logger", ["prefect.flow_runs", "prefect.task_runs"])
def test_an_error_that_explains_itself_has_no_traceback_in_the_log(error, kept, logger):
    """The failed state, which is logged next, has its message."""
    record = logging.makeLogRecord({"msg": "Encountered exception", "exc_info": (type(error), error, None)})
    assert bool(logging.getLogger(logger).filter(record)) is kept
    assert logging.getLogger(logger).filter(logging.makeLogRecord({"msg": "at work"}))


def test_tasks_wait_longer_each_time_keep_no_results_and_training_is_never_repeated():
    """The store says what is done."""
    assert len(RETRY_DELAYS) == RETRIES
    assert sorted(RETRY_DELAYS) == RETRY_DELAYS
    for task in (plan, encode, fan_out, seal, train_run, evaluate_run, deploy_run, *REPORTS):
        assert task.persist_result is False
        assert task.cache_policy.compute_key(None, {}, {}) is None
        if task is train_run:
            assert task.retries == 0
            continue
        assert (task.retries, task.retry_delay_seconds) == (RETRIES, RETRY_DELAYS)
        assert task.retry_condition_fn is retry_transient


def test_tries_that_keep_something_begin_anew_and_those_that_do_not_are_three():
    done, lost = 0, SimpleNamespace(data=ConnectionResetError("reset"))
    options = tried_again_while(lambda: done)
    again = options["retry_condition_fn"]
    for _ in range(3 * RETRIES):
        done += 1
        assert again(None, None, lost)
    assert [again(None, None, lost) for _ in range(RETRIES)] == [True] * (RETRIES - 1) + [False]
    done += 1
    assert not again(None, None, SimpleNamespace(data=errors.CacheCorruptError("bad bytes")))
    # whenever it begins, one that gets nowhere waits as long as any other task
    delays = options["retry_delay_seconds"]
    assert len(delays) == options["retries"] <= 50
    assert all(sorted(delays[first : first + RETRIES]) == RETRY_DELAYS for first in range(len(delays) - RETRIES))


def test_the_first_tries_are_three_too():
    again = tried_again_while(lambda: 7)["retry_condition_fn"]
    failures = [again(None, None, SimpleNamespace(data=TimeoutError("slow"))) for _ in range(RETRIES + 1)]
    assert failures == [True] * RETRIES + [False]
