"""What people and logs get to see of URLs with secrets."""

from __future__ import annotations

import pytest

from teacher_cache.storage.observe.safe_text import redact

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"s3://AKIAEXAMPLE:{SECRET}@bucket/a.cache", "s3://***@bucket/a.cache"),
        ("cannot read https://me:pass@word@host/a: gone", "cannot read https://***@host/a: gone"),
        ("https://ghp_token@host/a", "https://***@host/a"),
        ("two: http://a:b@h/x and ftp://c:d@h/y", "two: http://***@h/x and ftp://***@h/y"),
        ("redis://:pw@127.0.0.1:6379/0", "redis://***@127.0.0.1:6379/0"),
        (
            "https://b.s3.amazonaws.com/k?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA%2F2026&X-Amz-Date=1"
            "&X-Amz-Security-Token=abc%3D&X-Amz-Signature=0f0f",
            "https://b.s3.amazonaws.com/k?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=***&X-Amz-Date=1"
            "&X-Amz-Security-Token=***&X-Amz-Signature=***",
        ),
        (
            "https://h/k?AWSAccessKeyId=AKIA&Signature=ab%3D&Expires=1",
            "https://h/k?AWSAccessKeyId=***&Signature=***&Expires=1",
        ),
        ("https://a.blob.core.windows.net/c/k?sv=1&sig=xyz", "https://a.blob.core.windows.net/c/k?sv=1&sig=***"),
        ("('https://h/k?token=abc', 404)", "('https://h/k?token=***', 404)"),
        ("https://h/k?a=1;access_token=abc#api_key=def", "https://h/k?a=1;access_token=***#api_key=***"),
        (
            "https://p/?url=https%3A%2F%2Fh%2Fk%3Fsig%3Dabc%26x%3D1",
            "https://p/?url=https%3A%2F%2Fh%2Fk%3Fsig%3D***%26x%3D1",
        ),
    ],
)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b.cache",
        "s3://bucket/a:b@c.cache",
        "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/mine/a@b",
        "http://127.0.0.1:9000/bucket/me@example.jpg",
        "abfs://container@account.dfs.core.windows.net/a.cache",
        "sftp://user@host/a.cache",
        "table:pairs.parquet?caption=title&image=path",
        "webdataset:shards/{000..099}.tar?ids=key&txt=lines",
        "row 3: key = 4; mail me@example.org: it says what? token=",
        "C:/a/b@c",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert redact(text) == text
