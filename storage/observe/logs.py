"""Output of commands on stderr: lines for people, or one JSON object per line for machines.

Events go to the loggers below ``teacher_cache`` of Python's own logging. They are written once :func:`start_json_logs`
is called or a program attaches a handler of its own; the record's attributes ``event`` and ``fields`` hold the message
and the fields of an event. Lines for people leave events out: the results of commands say the same.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.safe_text import escaped_json, redact, shown

LOG_FORMAT = "TEACHER_CACHE_LOG_FORMAT"
RUN = "TEACHER_CACHE_RUN"

_ROOT = logging.getLogger("teacher_cache")
_ROOT.addHandler(logging.NullHandler())  # else Python prints warnings of loggers without a handler

# for the whole process: threads that were started earlier write chunks and decode images
_bound: dict[str, Any] = {}
_process_run: str | None = None
_count: Callable[[str, dict[str, Any]], None] | None = None
_hear: Callable[[str], None] | None = None


class JsonFormatter(logging.Formatter):
    """One record as one line of JSON (RFC 8259).

    Every line has ``time`` (UTC, ISO 8601 with milliseconds), ``level``, ``logger``, ``message`` and ``run``, then the
    fields of :func:`log_fields` and of the event, and ``traceback`` after an error. Credentials in URLs are replaced,
    in fields too; NaN and infinity are null.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line: dict[str, Any] = {
            "time": time,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": getattr(record, "event", None) or record.getMessage(),
            "run": _run_of_this_process(),
            **_bound,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return escaped_json(json.dumps(_plain(line), ensure_ascii=False, allow_nan=False))


class _LineFormatter(logging.Formatter):
    """One record as one line for people: ``warning: open_clip: ...``. Our own name is left out."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        source = record.name.partition(".")[0]
        if source == "root":  # open_clip logs through the root logger
            source = Path(record.pathname).parent.name
        named = "" if source == _ROOT.name else f"{source}: "
        return shown(redact(f"{record.levelname.lower()}: {named}{' '.join(record.getMessage().split())}"))


class _Stderr(logging.Handler):
    """A handler that writes to the current ``sys.stderr``."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        # one write per line: other processes may share this stderr
        sys.stderr.write(self.format(record) + "\n")
        sys.stderr.flush()


_json_lines = _Stderr(JsonFormatter())
_text_lines = _Stderr(_LineFormatter())
_text_lines.addFilter(lambda record: not hasattr(record, "fields"))


def logger(name: str) -> logging.Logger:
    """Return the logger ``teacher_cache.NAME``."""
    return _ROOT.getChild(name)


def event(log: logging.Logger, level: int, message: str, **fields: Any) -> None:
    """Log one event with its fields, and count it. Nearly free without a listener.

    Args:
        fields: ``chunk`` (its name, ``image/v0/000012``), ``row``, ``rows``, ``step`` and the like.
    """
    if _count is not None:
        _count(message, fields)
    if log.isEnabledFor(level):
        # in full for the handlers of a program, or of a library, that know nothing of fields
        text = ", ".join(f"{name} {value}" for name, value in fields.items())
        log.log(level, "%s", f"{message}: {text}" if text else message, extra={"event": message, "fields": fields})


@contextmanager
def events_counted_by(count: Callable[[str, dict[str, Any]], None]) -> Iterator[None]:
    """Call ``count`` with the message and the fields of every event of this process while the block runs.

    Not a logging handler: that would need loggers at DEBUG, and other handlers would write the events that are only
    counted.
    """
    global _count
    _count = count
    try:
        yield
    finally:
        _count = None


def events_are_counted() -> bool:
    """Return whether a block of :func:`events_counted_by` runs."""
    return _count is not None


def say(line: str) -> None:
    """Write a line to stderr, as an event if logs are JSON. Only results go to stdout."""
    if json_logs():
        event(logger("command"), logging.ERROR if line.startswith("error:") else logging.INFO, line)
    else:
        print(shown(line), file=sys.stderr)  # noqa: T201


def hint(line: str) -> None:
    """Say what a person should know or change before the next run, or pass it to :func:`hints_heard_by`."""
    (_hear or say)(line)


@contextmanager
def hints_heard_by(hear: Callable[[str], None]) -> Iterator[None]:
    """Pass the lines of :func:`hint` in this process to ``hear`` while the block runs, not to stderr."""
    global _hear
    _hear = hear
    try:
        yield
    finally:
        _hear = None


def suggest_next(*words: str, **options: Any) -> None:
    """Say which command to type next. Not for results in JSON. Arguments as of :func:`command_line`."""
    say(f"next: {command_line(*words, **options)}")


def command_line(*words: str, **options: Any) -> str:
    """Return a ``teacher-cache`` command, quoted for a shell.

    Args:
        words: the verb and its arguments. What a person fills in is in capitals: ``STUDENT``.
        options: values by flag; one of None is left out.
    """
    flags = ((f"--{name.replace('_', '-')}", str(value)) for name, value in options.items() if value is not None)
    return f"teacher-cache {shlex.join([*words, *(word for flag in flags for word in flag)])}"


@contextmanager
def log_fields(**fields: Any) -> Iterator[None]:
    """Add these fields to every event of this process while the block runs; inner blocks add theirs."""
    global _bound
    before = _bound
    _bound = {**before, **fields}
    try:
        yield
    finally:
        _bound = before


def json_logs() -> bool:
    """Return whether this process writes JSON to stderr."""
    return _json_lines in _ROOT.handlers


def start_json_logs() -> None:
    """Write JSON lines to stderr from now on, in this process and in those that it starts."""
    os.environ[LOG_FORMAT] = "json"
    if not json_logs():
        _write_by(_json_lines, logging.INFO)


def start_text_logs() -> None:
    """Write warnings of this package and of libraries to stderr, as lines for people."""
    _write_by(_text_lines, logging.NOTSET)


def stop_logs() -> None:
    """Leave the records to the handlers of the program."""
    _write_by(None, logging.NOTSET)


def _write_by(handler: logging.Handler | None, level: int) -> None:
    for log in (_ROOT, logging.root):
        log.removeHandler(_json_lines)
        log.removeHandler(_text_lines)
    _ROOT.setLevel(level)
    _ROOT.propagate = handler is None
    if handler is not None:
        _ROOT.addHandler(handler)
        if not logging.root.handlers:  # records of libraries too, unless a program handles them
            logging.root.addHandler(handler)


def start_json_logs_if_asked() -> None:
    """Call :func:`start_json_logs` if ``TEACHER_CACHE_LOG_FORMAT`` is ``json``, as a parent process may have set it.

    Raises:
        UsageError: the variable is neither ``json`` nor ``text``.
    """
    chosen = os.environ.get(LOG_FORMAT) or "text"
    if chosen not in ("text", "json"):
        raise UsageError(f"{LOG_FORMAT} is {chosen!r}: text or json is wanted")
    if chosen == "json":
        start_json_logs()


def _run_of_this_process() -> str:
    """Return the run's name from the environment, or 12 random hex digits, drawn once."""
    global _process_run
    if named := os.environ.get(RUN):
        return named
    if _process_run is None:
        _process_run = uuid.uuid4().hex[:12]
    return _process_run


def _plain(value: Any) -> Any:
    """Convert a value to JSON types, without credentials."""
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    return redact(str(value))
