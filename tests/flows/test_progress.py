"""How a progress artifact moves, with a server that only notes what it is told."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from pathlib import Path
from uuid import uuid4

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

import teacher_cache.flows.progress
from teacher_cache.flows.progress import LoggedProgress, Share, hints_logged, progress_artifact
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.logs import hint


class Log:
    def __init__(self):
        self.lines = []

    def info(self, message):
        self.lines.append(message)

    def warning(self, message):
        self.lines.append(f"warning: {message}")


def settled():
    return teacher_cache.flows.progress._mover.settled(60)


@pytest.fixture
def mover(monkeypatch):
    """A new one, at rest again when the test ends."""
    monkeypatch.setattr("teacher_cache.flows.progress._mover", teacher_cache.flows.progress._Mover())
    yield teacher_cache.flows.progress._mover
    assert settled()


@pytest.fixture
def server(monkeypatch, mover):
    """What the server was told and, in ``away``, whether it is there; ``now`` is the time in seconds.

    While ``answers`` is not set it keeps who asks waiting, in ``asked`` how many.
    """

    class Server:
        now, away = 100.0, False
        told: list[tuple[float, str]] = []  # noqa: RUF012
        asked = threading.Semaphore(0)
        answers = threading.Event()

    def update(artifact, progress, description):
        Server.asked.release()
        assert Server.answers.wait(60)
        if Server.away:
            raise ConnectionRefusedError("refused")
        Server.told.append((progress, description))

    Server.answers.set()
    monkeypatch.setattr("teacher_cache.flows.progress._update", update)
    monkeypatch.setattr("teacher_cache.flows.progress.time.monotonic", lambda: Server.now)
    return Server


def test_it_moves_within_its_share_at_most_every_two_seconds(server):
    share = Share(artifact=uuid4(), what="c.cache").part(0.25, 0.75)
    log = Log()
    progress = LoggedProgress(log, share)
    for second in range(5):
        server.now = 100.0 + second
        progress("images", second, 4)
        assert settled()
    progress.end("all of it")
    assert server.told == [
        (25.0, "`c.cache`: images: 0 of 4"),
        (50.0, "`c.cache`: images: 2 of 4"),
        (75.0, "`c.cache`: images: 4 of 4"),
        (75.0, "`c.cache`: all of it"),
    ]
    assert log.lines == []  # a line every 30 seconds


def test_a_share_of_two_stages_goes_one_way_also_if_they_take_turns(server):
    progress = LoggedProgress(Log(), Share(artifact=uuid4(), what="c.cache"), {"images": 1, "captions": 3})
    for stage, done in (("images", 4), ("captions", 4), ("images", 8), ("captions", 8)):
        server.now += 10
        progress(stage, done, 8)
        assert settled()
    assert [percent for percent, _ in server.told] == [12.5, 50.0, 62.5, 100.0]


def test_a_part_of_a_part_and_a_stage_of_nothing(server):
    share = Share(artifact=uuid4(), what="w", first=20.0, last=60.0).part(0.5, 1.0)
    assert (share.first, share.last) == (40.0, 60.0)
    share.move(0, 0, "nothing to do")
    assert server.told == [(60.0, "`w`: nothing to do")]


def test_an_error_that_ends_the_run_is_shown_where_the_progress_stopped(server, monkeypatch):
    artifact = uuid4()
    monkeypatch.setattr("teacher_cache.flows.progress.create_progress_artifact", lambda *_, **__: artifact)
    monkeypatch.setattr("teacher_cache.flows.progress.get_run_logger", Log)

    def run():
        with progress_artifact("precompute-teacher", "c.cache") as share:
            LoggedProgress(Log(), share)("images", 1, 4)
            assert settled()
            raise UsageError("dataset kind 'flicker' is not known")

    with pytest.raises(UsageError, match="flicker"):
        run()
    assert server.told == [
        (25.0, "`c.cache`: images: 1 of 4"),
        (None, "`c.cache`: failed, UsageError: dataset kind 'flicker' is not known"),
    ]


def test_a_hint_is_logged_once_and_kept_and_not_said_elsewhere(monkeypatch, capsys):
    log = Log()
    monkeypatch.setattr("teacher_cache.flows.progress.get_run_logger", lambda: log)
    with hints_logged() as hints:
        for line in ("?txt=lines splits them", "?txt=lines splits them", "nothing is held out"):
            hint(line)
    assert hints == ["?txt=lines splits them", "nothing is held out"]
    assert log.lines == [f"warning: {line}" for line in hints]
    assert capsys.readouterr().err == ""
    hint("said")
    assert (hints[2:], capsys.readouterr().err) == ([], "said\n")


def test_lines_are_written_every_half_minute_with_or_without_an_artifact(server):
    log = Log()
    progress = LoggedProgress(log)
    for second in range(0, 65, 5):
        server.now = 100.0 + second
        progress("step", second, 1000, "loss 1.5")
    progress.end("done")
    assert log.lines == ["step: 35 of 1,000 loss 1.5"]
    assert server.told == []


def test_a_server_that_is_away_ends_no_work_and_is_said_once(server):
    log = Log()
    progress = LoggedProgress(log, Share(artifact=uuid4(), what="runs/a"))
    server.away = True
    asked = []
    for second in range(0, 500, 10):
        server.now = 100.0 + second
        progress("step", second, 1000)
        assert settled()
        if server.asked.acquire(blocking=False):
            asked.append(second)
    assert asked == [0, 60, 180, 420]  # a minute of rest, then two, then four
    warnings = [line for line in log.lines if line.startswith("warning")]
    assert warnings == ["warning: the progress artifact cannot be moved: ConnectionRefusedError: refused"]
    server.away = False
    server.now = 100.0 + 890  # within eight minutes of the last failure it is left alone
    progress("step", 890, 1000)
    assert settled()
    assert server.told == []
    server.now = 100.0 + 900
    progress("step", 900, 1000)
    assert settled()
    server.now = 100.0 + 902  # it answered: every two seconds again
    progress("step", 902, 1000)
    assert settled()
    assert server.told == [(90.0, "`runs/a`: step: 900 of 1,000"), (90.2, "`runs/a`: step: 902 of 1,000")]


def test_the_end_is_sent_while_it_rests(server):
    progress = LoggedProgress(Log(), Share(artifact=uuid4(), what="runs/a"))
    server.away = True
    progress("step", 1, 10)
    assert settled()
    server.away = False
    progress.end("all of it")
    assert server.told == [(100.0, "`runs/a`: all of it")]


def moved_while_it_waits(server, count, end=False):
    """A first move that waits for its answer, then so many more."""
    progress = LoggedProgress(Log(), Share(artifact=uuid4(), what="w"))
    server.answers.clear()
    for number in range(count + 1):
        server.now += 10
        progress("step", number, count)
        if number == 0:
            assert server.asked.acquire(timeout=60)
    if end:
        progress.end("all of it")
    server.answers.set()
    assert settled()


def test_of_what_came_during_a_request_the_newest_is_sent(server):
    moved_while_it_waits(server, 4)
    assert server.told == [(0.0, "`w`: step: 0 of 4"), (100.0, "`w`: step: 4 of 4")]


def test_a_request_that_fails_at_last_is_not_followed_by_another_but_for_the_end(server, monkeypatch):
    monkeypatch.setattr("teacher_cache.flows.progress._SECONDS_FOR_THE_LAST", 0.0)
    server.away = True
    moved_while_it_waits(server, 4)
    assert not server.asked.acquire(blocking=False)
    server.now += 60
    moved_while_it_waits(server, 4, end=True)
    assert server.asked.acquire(blocking=False)
    assert not server.asked.acquire(blocking=False)


def test_the_work_goes_on_while_a_server_accepts_and_never_answers(mover, monkeypatch):
    monkeypatch.setattr("teacher_cache.flows.progress._SECONDS_BETWEEN_MOVES", 0.0)
    monkeypatch.setattr("teacher_cache.flows.progress._SECONDS_FOR_THE_LAST", 0.1)
    log = Log()
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listening.settimeout(60)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
        stack.enter_context(temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}))
        progress = LoggedProgress(log, Share(artifact=uuid4(), what="w"))
        progress("step", 0, 1000)
        asking = stack.enter_context(listening.accept()[0])
        assert asking.recv(4).decode() in ("GET ", "PATC")
        for step in range(1, 1001):
            progress("step", step, 1000)
        progress.end("done")
        assert log.lines == ["warning: the progress artifact cannot be moved: the server does not answer"]
        assert not mover.settled(0)  # still the first request
    assert settled()
    assert len(log.lines) == 1


def test_a_process_ends_while_a_request_lasts():
    code = """
import threading
from uuid import uuid4
import teacher_cache.flows.progress as progress
from tests.flows.test_progress import Log

share = progress.Share(artifact=uuid4(), what="w")
asked = threading.Event()
progress._update = lambda *_: (asked.set(), threading.Event().wait())
progress.LoggedProgress(Log(), share)("step", 1, 2)
assert asked.wait(60)
print("the end")
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "the end\n"), done.stderr
