"""What a command says on stderr: lines for people, or one JSON object a line for machines.

Events go to the loggers below ``teacher_cache`` of Python's own logging. Nothing listens to them until
:func:`start_json_logs` does, or a program that uses this as a library attaches a handler of its own; each carries its
fields as the attribute ``fields`` of the record.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.safe_text import redact

__all__ = [
    "LOG_FORMAT",
    "RUN",
    "JsonFormatter",
    "event",
    "json_logs",
    "log_fields",
    "logger",
    "say",
    "start_json_logs",
    "start_json_logs_if_asked",
    "stop_json_logs",
]

LOG_FORMAT = "TEACHER_CACHE_LOG_FORMAT"
RUN = "TEACHER_CACHE_RUN"

_ROOT = logging.getLogger("teacher_cache")
_ROOT.addHandler(logging.NullHandler())  # else Python prints warnings of loggers that nobody listens to

# of the whole process, since chunks are written and images decoded by threads that were started earlier
_bound: dict[str, Any] = {}
_process_run: str | None = None


class JsonFormatter(logging.Formatter):
    """One record as one line of JSON (RFC 8259).

    Always there: ``time`` (UTC, ISO 8601 with milliseconds), ``level``, ``logger``, ``message`` and ``run``. Then what
    :func:`log_fields` binds, what the event brings, and ``traceback`` where there is one. Credentials in URLs are
    replaced, in fields too; a float that is no number is null.
    """

    def format(self, record: logging.LogRecord) -> str:
        """See the class."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line: dict[str, Any] = {
            "time": time,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "run": _run_of_this_process(),
            **_bound,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(_plain(line), ensure_ascii=False, allow_nan=False)


class _Stderr(logging.Handler):
    """To what stderr is at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        # one write a line: other processes may share this stderr
        sys.stderr.write(self.format(record) + "\n")
        sys.stderr.flush()


_handler = _Stderr()
_handler.setFormatter(JsonFormatter())


def logger(name: str) -> logging.Logger:
    """The logger ``teacher_cache.NAME``."""
    return _ROOT.getChild(name)


def event(log: logging.Logger, level: int, message: str, **fields: Any) -> None:
    """Log one event with its fields; costs next to nothing while nobody listens.

    Args:
        fields: ``chunk`` (its name, ``image/v0/000012``), ``row``, ``rows``, ``step`` and the like.
    """
    if log.isEnabledFor(level):
        log.log(level, "%s", message, extra={"fields": fields})


def say(line: str) -> None:
    """A line on stderr: results alone go to stdout. An event of its own where logs are JSON."""
    if json_logs():
        event(logger("command"), logging.ERROR if line.startswith("error:") else logging.INFO, line)
    else:
        print(line, file=sys.stderr)  # noqa: T201


@contextmanager
def log_fields(**fields: Any) -> Iterator[None]:
    """Give every event of this process these fields while the block runs; blocks inside it add theirs."""
    global _bound
    before = _bound
    _bound = {**before, **fields}
    try:
        yield
    finally:
        _bound = before


def json_logs() -> bool:
    """Whether this process writes JSON to stderr."""
    return _handler in _ROOT.handlers


def start_json_logs() -> None:
    """From now on stderr gets one JSON object a line, from this process and those that it starts."""
    os.environ[LOG_FORMAT] = "json"
    if not json_logs():
        _ROOT.addHandler(_handler)
        _ROOT.setLevel(logging.INFO)
        _ROOT.propagate = False
        if not logging.root.handlers:  # warnings of libraries too, unless a program has its own way with them
            logging.root.addHandler(_handler)


def start_json_logs_if_asked() -> None:
    """As :func:`start_json_logs` if ``TEACHER_CACHE_LOG_FORMAT`` is ``json``, as it is in a process started by one.

    Raises:
        UsageError: it is neither that nor ``text``.
    """
    asked = os.environ.get(LOG_FORMAT) or "text"
    if asked not in ("text", "json"):
        raise UsageError(f"{LOG_FORMAT} is {asked!r}: text or json is wanted")
    if asked == "json":
        start_json_logs()


def stop_json_logs() -> None:
    """Lines for people again."""
    if not json_logs():
        return
    _ROOT.removeHandler(_handler)
    logging.root.removeHandler(_handler)
    _ROOT.setLevel(logging.NOTSET)
    _ROOT.propagate = True


def _run_of_this_process() -> str:
    """What the environment calls it, or a name drawn once: 12 hex digits."""
    global _process_run
    if named := os.environ.get(RUN):
        return named
    if _process_run is None:
        _process_run = uuid.uuid4().hex[:12]
    return _process_run


def _plain(value: Any) -> Any:
    """The same of what JSON knows, without credentials."""
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    return redact(str(value))
