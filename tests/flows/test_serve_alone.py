"""A home that one serve works in: no second one beside it, and no process that outlives its terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from teacher_cache.flows import serve
from teacher_cache.flows.serve import ServeError
from tests.flows.conftest import running
from tests.object_store import free_ports

# locks a home as serve does, with a child that sleeps in place of server and worker
HOLDS = """
import signal, subprocess, sys, time
from pathlib import Path
from teacher_cache.flows import serve
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as in a terminal; the test runner may ignore it
serve.stop_on_signals(signal.default_int_handler)
with serve.locked(Path(sys.argv[1])) as lock:
    child = subprocess.Popen(["sleep", "600"], start_new_session=True, pass_fds=[lock.fileno()])
    print("server", child.pid, file=lock, flush=True)
    try:
        print(child.pid, flush=True)
        time.sleep(600)
    finally:
        child.kill()
        child.wait()
"""


class Holder:
    def __init__(self, home: Path) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", HOLDS, home], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.child = int(self.process.stdout.readline())

    def end_with(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait(30)

    def close(self) -> None:
        self.process.kill()
        if running(self.child):
            os.kill(self.child, signal.SIGKILL)
        self.process.communicate()  # the child holds its output too


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    holder = Holder(tmp_path / "home")
    yield holder
    holder.close()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_the_end_of_a_terminal_leaves_no_process_behind(holder: Holder, number: int) -> None:
    assert running(holder.child)
    holder.end_with(number)
    assert not running(holder.child)


def test_under_nohup_the_end_of_a_terminal_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: dict[int, object] = {}
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    monkeypatch.setattr(signal, "signal", set_to.__setitem__)
    serve.stop_on_signals(signal.default_int_handler)
    assert set(set_to) == {signal.SIGINT, signal.SIGTERM}


def test_a_home_in_use_is_refused_also_where_a_killed_serve_left_its_server(holder: Holder, tmp_path: Path) -> None:
    home = tmp_path / "home"
    message = rf"home is in use by another serve, .* left behind \(server {holder.child}\)\. Stop them, or"
    with pytest.raises(ServeError, match=message), serve.locked(home):
        pass
    holder.end_with(signal.SIGKILL)
    assert running(holder.child)
    with pytest.raises(ServeError, match=message), serve.locked(home):
        pass
    os.kill(holder.child, signal.SIGKILL)
    while running(holder.child):
        pass
    with serve.locked(home) as lock:
        assert not lock.read()


GENERATOR = '<!doctype html><meta name="generator" content="teacher-cache 0.1.0">'


def test_reports_are_served_and_nothing_else(tmp_path: Path) -> None:
    """A report by its path, to a browser that names this address; a page elsewhere could resolve its own name to it."""
    (port,) = free_ports(1)
    (tmp_path / "a b").mkdir()
    pages = {
        "a b/report.html": GENERATOR,
        "f8k.report.html": GENERATOR,
        "key.html": GENERATOR,
        "my-report.html": "mine",
    }
    for name, text in pages.items():
        (tmp_path / name).write_text(text)

    def answer(path: str, **headers: str) -> int:
        try:
            url = f"http://127.0.0.1:{port}{quote(path)}"
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as page:
                assert page.read().decode() == GENERATOR
                return int(page.status)
        except urllib.error.HTTPError as error:
            return error.code

    with serve.reports_served(port):
        assert [answer(f"{tmp_path}/{name}") for name in pages] == [200, 200, 404, 404]
        assert answer("/etc/passwd") == answer(f"{tmp_path}/gone/report.html") == answer(str(tmp_path)) == 404
        assert answer(f"{tmp_path}/f8k.report.html", Host=f"evil.example:{port}") == 404
        with pytest.raises(ServeError, match=rf"^port {port}, for the reports, is taken"), serve.reports_served(port):
            pass
    with serve.reports_served(port):  # the port is free again
        pass
