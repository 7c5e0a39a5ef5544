"""Errors that another try can cure; more of them in the flows' tests."""

from __future__ import annotations

import pickle

import pytest
from obstore.exceptions import BaseError

from teacher_cache.storage.errors import CacheAccessError, CacheUnreachableError, UsageError
from teacher_cache.storage.files.stores import Failure
from teacher_cache.storage.files.transient import is_transient


@pytest.mark.parametrize(
    ("status", "code", "transient"),
    [
        (503, "SlowDown", True),
        (500, "InternalError", True),
        (502, "", True),
        (504, "AnythingNew", True),
        (400, "RequestTimeout", True),
        (400, "IncompleteBody", True),
        (409, "ConditionalRequestConflict", True),
        (400, "AnythingNew", False),
        (403, "AccessDenied", False),
        (404, "NoSuchKey", False),
        (412, "PreconditionFailed", False),
    ],
)
def test_status_and_code_of_an_answer_decide(status: int, code: str, transient: bool) -> None:
    """As obstore words its errors."""
    body = f"<Error><Code>{code}</Code><Message>because\\nso</Message></Error>" if code else ""
    text = f"Error performing GET http://x/k in 2ms - Server returned non-2xx status code: {status} Words: {body}"
    failure = Failure.of(BaseError(f"Generic S3 error: {text}\n\nDebug source:\nGeneric {{ status: 200 }}"))
    assert (failure.status, failure.code, failure.transient) == (status, code, transient)
    assert "\n" not in failure.text


@pytest.mark.parametrize(
    ("debug", "transient", "text"),
    [
        ('Os { code: 111, message: "Connection refused" }', True, "Connection refused"),
        ("source: TimedOut", True, "no answer in time"),
        ("source: hyper", True, "HTTP error: error sending request"),
        ("InvalidCertificate(UnknownIssuer)", False, None),
    ],
)
def test_errors_without_an_answer(debug: str, transient: bool, text: str | None) -> None:
    error = BaseError(
        "Generic S3 error: Error performing GET http://x/k in 2ms - HTTP error: error sending request"
        f"\n\nDebug source:\n{debug}"
    )
    failure = Failure.of(error)
    assert (failure.status, failure.transient) == (0, transient)
    assert text is None or failure.text == text


def test_a_store_that_was_given_up_counts_as_a_lost_connection_across_processes_too() -> None:
    assert is_transient(pickle.loads(pickle.dumps(CacheUnreachableError("s3://b/c: cannot read k: 6 tries failed"))))
    assert not is_transient(CacheAccessError("no"))
    assert is_transient(OSError(5, "Input/output error"))
    usage = UsageError("no")
    usage.__cause__ = OSError(5, "Input/output error")
    assert not is_transient(usage)
