"""Logs for machines: every line is JSON, carries its run, and shows no credential."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.logs import (
    LOG_FORMAT,
    RUN,
    JsonFormatter,
    event,
    json_logs,
    log_fields,
    logger,
    say,
    start_json_logs,
    start_json_logs_if_asked,
    start_text_logs,
    stop_logs,
    suggest_next,
)

LOG = logger("test")


@pytest.fixture
def as_json(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(LOG_FORMAT, "text")  # so that it is put back
    monkeypatch.setenv(RUN, "nightly-7")
    start_json_logs()
    yield
    stop_logs()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


@pytest.mark.usefixtures("as_json")
def test_an_event_has_its_fields_and_those_of_the_blocks_around_it(capsys: pytest.CaptureFixture[str]) -> None:
    with log_fields(cache="c", run="runs/a"):
        with log_fields(rank=1):
            event(LOG, logging.INFO, "chunk committed", chunk="image/v0/000003", rows=[24, 32])
        event(LOG, logging.WARNING, "100% odd", row=7)
    event(LOG, logging.INFO, "after")
    first, second, third = lines(capsys)
    assert first["chunk"] == "image/v0/000003"
    assert first["rows"] == [24, 32]
    assert (first["run"], first["cache"], first["rank"], first["level"]) == ("runs/a", "c", 1, "info")
    assert (second["message"], second["row"], second["level"]) == ("100% odd", 7, "warning")
    assert "rank" not in second
    assert (third["run"], third["logger"]) == ("nightly-7", "teacher_cache.test")
    assert "cache" not in third


@pytest.mark.usefixtures("as_json")
def test_a_line_is_one_line_of_strict_json_without_credentials(capsys: pytest.CaptureFixture[str]) -> None:
    odd = {"nan": float("nan"), "path": Path("a/b"), "place": {"url": "s3://KEY:SECRET@bucket"}}
    event(LOG, logging.INFO, "two\nlines of https://me:pw@host/x", **odd)
    (found,) = lines(capsys)
    assert found["message"] == "two\nlines of https://***@host/x"
    assert (found["nan"], found["path"], found["place"]) == (None, "a/b", {"url": "s3://***@bucket"})


@pytest.mark.usefixtures("as_json")
def test_what_a_command_says_is_an_event_too(capsys: pytest.CaptureFixture[str]) -> None:
    say("stopped")
    say("error: no cache there")
    assert [(line["message"], line["level"]) for line in lines(capsys)] == [
        ("stopped", "info"),
        ("error: no cache there", "error"),
    ]


def test_a_traceback_is_a_field() -> None:
    try:
        raise ValueError("at s3://KEY:SECRET@bucket")
    except ValueError:
        import sys

        record = logging.LogRecord("teacher_cache.x", logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
    found = json.loads(JsonFormatter().format(record))
    assert found["traceback"].endswith("ValueError: at s3://***@bucket")


def test_without_it_stderr_is_for_people_and_events_go_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert not json_logs()
    event(LOG, logging.ERROR, "nobody listens")
    say("a line")
    assert capsys.readouterr().err == "a line\n"


def test_an_event_has_its_fields_for_a_handler_that_knows_nothing_of_them(caplog: pytest.LogCaptureFixture) -> None:
    event(LOG, logging.WARNING, "problem in the dataset", kind="missing-file", where="a.png")
    event(LOG, logging.WARNING, "100% odd")
    assert caplog.messages == ["problem in the dataset: kind missing-file, where a.png", "100% odd"]


def test_a_line_for_people_names_the_library_and_appears_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events are left out, and a library that calls ``basicConfig``, as open_clip does, adds no handler."""
    monkeypatch.setattr(logging.root, "handlers", [])
    start_text_logs()
    try:
        logging.info("of no interest")
        logging.warning("from the root\nlogger")
        logging.getLogger("library.part").warning("cannot reach https://me:pw@host/x")
        event(LOG, logging.WARNING, "problem in the dataset", where="a.png")
        LOG.warning("again in 0.5 s")
        assert len(logging.root.handlers) == 1
    finally:
        stop_logs()
    folder = Path(__file__).parent.name
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {folder}: from the root logger",
        "warning: library: cannot reach https://***@host/x",
        "warning: again in 0.5 s",
    ]
    assert not logging.root.handlers


def test_the_next_command_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    suggest_next("train", cache="my caches/a.cache", student="STUDENT", image_root=None, batch_size=8)
    said = "next: teacher-cache train --cache 'my caches/a.cache' --student STUDENT --batch-size 8\n"
    assert capsys.readouterr().err == said


def test_a_process_that_is_started_by_one_with_json_logs_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOG_FORMAT, "text")
    start_json_logs_if_asked()
    assert not json_logs()
    monkeypatch.setenv(LOG_FORMAT, "json")
    start_json_logs_if_asked()
    try:
        assert json_logs()
    finally:
        stop_logs()


def test_a_format_that_is_none_is_refused_by_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOG_FORMAT, "xml")
    with pytest.raises(UsageError, match="TEACHER_CACHE_LOG_FORMAT is 'xml': text or json is wanted"):
        start_json_logs_if_asked()


@pytest.mark.usefixtures("as_json")
def test_verify_names_the_chunk_and_the_rows_of_what_is_damaged(
    known_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = known_cache / "targets.zarr" / "image" / "embedding" / "c" / "1" / "0" / "0"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    report = verify_cache(str(known_cache))
    found = lines(capsys)
    damaged = [line for line in found if line["level"] == "error"]
    assert [(line["chunk"], line["rows"], line["kind"]) for line in damaged] == [("image/v0/000001", [4, 8], "damaged")]
    assert damaged[0]["message"] == report.findings[0].message
    sound = [line["chunk"] for line in found if line["message"] == "chunk sound"]
    assert len(sound) == len(set(sound)) == report.chunks - 1
    assert found[-1]["message"] == "cache verified"
    assert (found[-1]["findings"], {line["run"] for line in found}) == (1, {"nightly-7"})


def test_no_line_for_people_can_command_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Errors repeat names and digests that a file of somebody else holds."""
    say("error: a\x1b[2Jb\x9b31m")
    start_text_logs()
    logging.getLogger("teacher_cache.x").warning("c\x1b]0;d\x07")
    stop_logs()
    assert capsys.readouterr().err == "error: a\ufffd[2Jb\ufffd31m\nwarning: c\ufffd]0;d\ufffd\n"
    record = logging.makeLogRecord({"msg": "a\x1b[2Jb\x9b31m\u202e\né"})
    line = JsonFormatter().format(record)
    assert line.replace("é", "").isascii()
    assert line.isprintable()
    assert json.loads(line)["message"] == record.msg
