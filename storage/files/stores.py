"""Opening of object stores by obstore, and parsing of its errors."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Hashable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from obstore.exceptions import BaseError
from obstore.store import HTTPStore, MemoryStore, S3Store, from_url

from teacher_cache.storage.errors import CacheAccessError, UsageError
from teacher_cache.storage.files.transient import TRANSIENT_STATUS
from teacher_cache.storage.observe.safe_text import redact

_S3 = {"s3", "s3a"}
CREATING = _S3 | {"memory", "gs", "az", "azure", "abfs", "abfss", "adl"}
"""URL schemes of the stores with exclusive creation: exactly one of several writers creates an object."""

CREDENTIAL_ADVICE = (
    "Give credentials by the standard chain: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, "
    "~/.aws, or the machine's role"
)
_ANSWER_SECONDS = 60.0
_CONNECT_TIMEOUT = timedelta(seconds=10)
_TRANSFER_TIMEOUT = timedelta(hours=1)  # the whole answer; obstore's own 30 s would end a large table on a slow line
_CREDENTIALS_KEPT = timedelta(minutes=5)  # botocore renews them before they expire

_memory = MemoryStore()
_stores: dict[Hashable, Any] = {}
_answered = set[Hashable]()
_stores_lock = threading.Lock()
_process: int | None = None


def open_store(url: str, answer_seconds: float = _ANSWER_SECONDS) -> Any:
    """Return obstore's store for the bucket of a URL. Its connections are shared within the process.

    A changed environment (endpoint, credentials) opens a new store.

    Args:
        url: only scheme and bucket are used.
        answer_seconds: maximum wait for the next bytes of an answer.

    Raises:
        UsageError: no store has this scheme, or this process was forked from one that has used a store.
        CacheAccessError: the environment has no credentials.
    """
    global _process
    if url.startswith("memory://"):
        return _memory
    with _stores_lock:
        if _process not in (None, os.getpid()):  # obstore's threads do not exist in a forked child
            raise UsageError(
                f"{url}: this process was forked from one that has used an object store, and cannot use it. Start "
                "workers by forkserver or spawn"
            )
        _process = os.getpid()
        key = _key(url, answer_seconds)
        if key not in _stores:
            _stores[key] = _connect(url, answer_seconds)
        return _stores[key]


def forget_store(url: str, answer_seconds: float = _ANSWER_SECONDS) -> None:
    """Make the next caller open the store again: refused credentials may have been renewed."""
    with _stores_lock:
        _stores.pop(_key(url, answer_seconds), None)


def has_answered(url: str) -> bool:
    """Return whether a store has ever answered this process at this address."""
    return _key(url, 0) in _answered


def note_answer(url: str) -> None:
    """Remember that a store has answered."""
    _answered.add(_key(url, 0))


def _key(url: str, answer_seconds: float) -> Hashable:
    prefixes = ("AWS_", "GOOGLE_", "AZURE_")
    environment = frozenset((name, value) for name, value in os.environ.items() if name.startswith(prefixes))
    return _bucket_url(url), answer_seconds, environment


def _bucket_url(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def _connect(url: str, answer_seconds: float) -> Any:
    scheme, _, bucket = _bucket_url(url).partition("://")
    settings: dict[str, Any] = {
        "client_options": {
            "allow_http": True,  # only where an endpoint says so
            "connect_timeout": _CONNECT_TIMEOUT,
            "read_timeout": timedelta(seconds=answer_seconds),
            "timeout": _TRANSFER_TIMEOUT,
        },
        # RemoteFiles tries again: docs/design/006-object-stores.md
        "retry_config": {"max_retries": 0},
    }
    if scheme in _S3:
        return S3Store(bucket, virtual_hosted_style_request=False, **_s3_settings(), **settings)
    if scheme in ("http", "https"):
        return HTTPStore.from_url(_bucket_url(url), **settings)
    try:
        return from_url(f"{scheme}://{bucket}", **settings)
    except (BaseError, ValueError) as error:  # Azure without AZURE_STORAGE_ACCOUNT_NAME
        raise CacheAccessError(f"{url}: {_first_line(error)}") from None


def _s3_settings() -> dict[str, Any]:
    """Return the settings that obstore does not read from the environment.

    botocore reads profiles, ``~/.aws``, roles and single sign-on. Its import takes 0.4 s, and is skipped if the
    environment has keys.
    """
    environment = os.environ
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    settings = {"endpoint": endpoint} if endpoint else {}
    has_keys = "AWS_ACCESS_KEY_ID" in environment and "AWS_PROFILE" not in environment
    has_place = endpoint or "AWS_REGION" in environment or "AWS_DEFAULT_REGION" in environment
    if "AWS_SKIP_SIGNATURE" in environment or (has_keys and has_place):
        return settings
    try:
        import botocore.session
        from botocore.exceptions import BotoCoreError
    except ImportError:
        return settings
    try:
        session = botocore.session.get_session()
        credentials = session.get_credentials()
        region, profile = session.get_config_variable("region"), session.get_scoped_config()
    except BotoCoreError as error:
        raise CacheAccessError(f"no usable credentials ({redact(str(error))}). {CREDENTIAL_ADVICE}") from None
    if credentials is None:
        raise CacheAccessError(f"no usable credentials. {CREDENTIAL_ADVICE}")

    def provide() -> dict[str, Any]:
        frozen = credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_KEPT,
        }

    if "endpoint" not in settings and profile.get("endpoint_url"):
        settings["endpoint"] = profile["endpoint_url"]
    if region:
        settings["region"] = region
    return {**settings, "credential_provider": provide}


_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_MESSAGE = re.compile(r"<Message>(.*?)</Message>", re.DOTALL)
_SYSTEM_ERROR = re.compile(r'message: "([^"]+)"')
# transient with any status: a broken upload is a 400, two simultaneous conditional puts are a 409
_TRANSIENT_CODES = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "XAmzContentSHA256Mismatch",
}
_NO_BUCKET_CODES = {"NoSuchBucket", "ContainerNotFound"}
_REGION_CODES = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_CREDENTIAL_CODES = {
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidSecurity",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}


class Failure(NamedTuple):
    """Content of an obstore error, parsed from its text: obstore has one class for most errors."""

    status: int
    """HTTP status of the answer; 0 without an answer."""
    code: str
    """Error code in the answer's body, or an empty text."""
    text: str
    """The cause on one line, without credentials."""
    transient: bool
    """Whether the same request may succeed a little later."""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Parse an error of obstore."""
        shown, _, debug = str(error).partition("\n\nDebug source:")
        status, code = _first(_STATUS, shown), _first(_CODE, shown)
        if status:
            answer = ": ".join(part for part in (code, _first(_MESSAGE, shown)) if part) or "no reason given"
            text, transient = f"{answer} (HTTP {status})", int(status) in TRANSIENT_STATUS or code in _TRANSIENT_CODES
        else:
            # no answer, half of one, or a proxy's page in place of a listing
            transient = "HTTP error" in shown or "list response" in shown
            transient = transient and "certificate" not in debug.lower()
            text = _first_line(error)
            if transient:
                reason = "no answer in time" if "TimedOut" in debug else _first(_SYSTEM_ERROR, debug)
                text = reason or text.rpartition(" - ")[2]
        return cls(int(status or 0), code, redact(" ".join(text.split())), transient)

    @property
    def no_bucket(self) -> bool:
        """True if the bucket itself does not exist."""
        return self.code in _NO_BUCKET_CODES

    @property
    def remedy(self) -> str:
        """Advice for a person whose request was refused."""
        if self.code in _REGION_CODES or "redirect" in self.text:
            return (
                f"the bucket is in another region, or the endpoint redirects ({self.text}). Set AWS_DEFAULT_REGION to "
                "the bucket's region, and check AWS_ENDPOINT_URL (http where https is wanted?)"
            )
        if self.code in _CREDENTIAL_CODES:
            return f"the store does not accept the credentials ({self.text}). {CREDENTIAL_ADVICE}"
        if self.status in (401, 403):
            return (
                f"the store denies it ({self.text}). The credentials need the rights to list the bucket and to get, "
                "put and delete its objects"
            )
        return f"{self.text}. Check the location, and AWS_ENDPOINT_URL if it is set"


def _first(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return match[1] if match else ""


def _first_line(error: BaseException) -> str:
    return redact(str(error).partition("\n")[0])
