"""Large objects of S3 by obstore, where it is installed: less than half of the processor time that s3fs takes a byte.

It only makes the first try of a read. When that fails, for whatever reason, the object is read as all others are, by
s3fs: so that there is one place that says what went wrong, what is tried again, and what a person can do about it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Hashable
from datetime import UTC, datetime, timedelta
from typing import Any

import fsspec

__all__ = ["ObjectReads", "object_reads"]

_log = logging.getLogger(__name__)
_CREDENTIALS_KEPT = timedelta(minutes=5)  # botocore renews them when they end

_made: dict[Hashable, ObjectReads | None] = {}
_made_lock = threading.Lock()
_runtime_pid: int | None = None


def _renew_lock() -> None:
    global _made_lock
    _made_lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # another thread of the parent may have held it
    os.register_at_fork(after_in_child=_renew_lock)


class ObjectReads:
    """Whole objects of one bucket, by their keys in it. Several threads may read.

    Args:
        store: of obstore.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._worked = self._given_up = False

    def get(self, key: str) -> memoryview | None:
        """The object's bytes, complete, in one request; None when that failed, or has never worked here."""
        if self._given_up:
            return None
        try:
            data = memoryview(self._store.get(key).bytes())
        except Exception as error:  # whatever it is, s3fs will meet it too
            # a setting that is read in another way (proxies, certificates, addresses) would fail each time
            self._given_up = not self._worked
            _log.debug("obstore cannot read %s: %s", key, type(error).__name__)
            return None
        self._worked = True
        return data


def object_reads(bucket: str, environment: Hashable) -> ObjectReads | None:
    """A bucket as the standard chain of settings and credentials leads to it.

    None without obstore; where fsspec's configuration says something about S3, which only s3fs understands; and in a
    forked process whose parent has read by obstore, since its threads are not in the child.

    Args:
        environment: what the answer is kept for, with the bucket.
    """
    global _runtime_pid
    if fsspec.config.conf.get("s3") or fsspec.config.conf.get("s3a"):
        return None
    with _made_lock:
        if _runtime_pid not in (None, os.getpid()):
            return None
        if (bucket, environment) not in _made:
            made = _open(bucket)
            _made[bucket, environment] = made
            if made is not None:
                _runtime_pid = os.getpid()
        return _made[bucket, environment]


def _open(bucket: str) -> ObjectReads | None:
    try:
        import botocore.session
        from obstore.store import S3Store
    except ImportError:
        return None
    session = botocore.session.get_session()
    try:
        client, credentials = session.create_client("s3"), session.get_credentials()
        if credentials is None:
            return None

        def provide() -> dict[str, Any]:
            frozen = credentials.get_frozen_credentials()
            return {
                "access_key_id": frozen.access_key,
                "secret_access_key": frozen.secret_key,
                "token": frozen.token,
                "expires_at": datetime.now(UTC) + _CREDENTIALS_KEPT,
            }

        endpoint: str = client.meta.endpoint_url
        store = S3Store(
            bucket,
            endpoint=endpoint,
            region=client.meta.region_name,
            virtual_hosted_style_request=False,
            client_options={"allow_http": endpoint.startswith("http://")},
            retry_config={"max_retries": 0},
            credential_provider=provide,  # type: ignore[arg-type]
        )
    except Exception as error:  # s3fs says it better, at the first request
        _log.debug("obstore cannot be used for %s: %s", bucket, type(error).__name__)
        return None
    return ObjectReads(store)
