"""How a progress artifact moves, with a server that only notes what it is told."""

from __future__ import annotations

from uuid import uuid4

import pytest

from flows.progress import LoggedProgress, Share


class Log:
    def __init__(self):
        self.lines = []

    def info(self, message):
        self.lines.append(message)

    def warning(self, message):
        self.lines.append(f"warning: {message}")


@pytest.fixture
def server(monkeypatch):
    """What the server was told and, in ``away``, whether it answers; ``now`` is the time in seconds."""

    class Server:
        now, away = 100.0, False
        told: list[tuple[float, str]] = []  # noqa: RUF012

    def update(artifact, progress, description):
        if Server.away:
            raise ConnectionRefusedError("refused")
        Server.told.append((progress, description))

    monkeypatch.setattr("flows.progress.update_progress_artifact", update)
    monkeypatch.setattr("flows.progress.time.monotonic", lambda: Server.now)
    return Server


def test_it_moves_within_its_share_at_most_every_two_seconds(server):
    share = Share(artifact=uuid4(), what="c.cache").part(0.25, 0.75)
    log = Log()
    progress = LoggedProgress(log, share)
    for second in range(5):
        server.now = 100.0 + second
        progress("images", second, 4)
    progress.end("all of it")
    assert server.told == [
        (25.0, "`c.cache`: images: 0 of 4"),
        (50.0, "`c.cache`: images: 2 of 4"),
        (75.0, "`c.cache`: images: 4 of 4"),
        (75.0, "`c.cache`: all of it"),
    ]
    assert log.lines == []  # a line every 30 seconds


def test_a_part_of_a_part_and_a_stage_of_nothing(server):
    share = Share(artifact=uuid4(), what="w", first=20.0, last=60.0).part(0.5, 1.0)
    assert (share.first, share.last) == (40.0, 60.0)
    share.move(0, 0, "nothing to do")
    assert server.told == [(60.0, "`w`: nothing to do")]


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
    for second in (0, 10, 20, 61, 122):
        server.now = 100.0 + second
        progress("step", second, 200)
    warnings = [line for line in log.lines if line.startswith("warning")]
    assert warnings == ["warning: the progress artifact cannot be moved: ConnectionRefusedError: refused"]
    server.away = False
    server.now = 150.0 + 122  # within a minute of the last failure it is left alone
    progress("step", 172, 200)
    assert server.told == []
    server.now = 160.0 + 122
    progress("step", 190, 200)
    assert server.told == [(95.0, "`runs/a`: step: 190 of 200")]
