"""What another try can cure, of the answers of S3; the flows' tests ask the rest."""

from __future__ import annotations

import pickle

import pytest
from botocore.exceptions import ClientError, FlexibleChecksumError, NoCredentialsError
from s3fs.errors import translate_boto_error

from teacher_cache.storage.errors import CacheAccessError, CacheUnreachableError, UsageError
from teacher_cache.storage.files.transient import is_transient, s3_answer


@pytest.mark.parametrize(
    ("status", "code", "wanted"),
    [
        (503, "SlowDown", True),
        (500, "InternalError", True),
        (502, "502", True),
        (504, "AnythingNew", True),
        (400, "RequestTimeout", True),
        (400, "IncompleteBody", True),
        (409, "ConditionalRequestConflict", True),
        (400, "AnythingNew", False),  # s3fs makes EIO of it, which elsewhere is a server that was lost
        (403, "AccessDenied", False),
        (404, "NoSuchKey", False),
        (412, "PreconditionFailed", False),
    ],
)
def test_the_answer_decides_not_the_errno_that_s3fs_gives_it(status: int, code: str, wanted: bool) -> None:
    answer = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error = ClientError(answer, "GetObject")  # type: ignore[arg-type]
    for raised in (error, translate_boto_error(error)):
        assert s3_answer(raised) == (status, code)
        assert is_transient(raised) is wanted


def test_errors_without_an_answer() -> None:
    assert is_transient(FlexibleChecksumError(error_msg="body and checksum differ"))
    assert not is_transient(NoCredentialsError())
    assert is_transient(OSError(5, "Input/output error"))
    assert s3_answer(OSError(5, "Input/output error")) is None


def test_a_store_that_was_given_up_counts_as_a_lost_connection_across_processes_too() -> None:
    assert is_transient(pickle.loads(pickle.dumps(CacheUnreachableError("s3://b/c: cannot read k: 6 tries failed"))))
    assert not is_transient(CacheAccessError("no"))
    lost = OSError(5, "Input/output error")
    usage = UsageError("no")
    usage.__cause__ = lost
    assert not is_transient(usage)
