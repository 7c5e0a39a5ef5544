"""Two hosts of one machine: Linux namespaces with a network, processes, a name and a clock of their own.

``python -m tests.two_hosts JSON`` is ``teacher-cache precompute`` on one of them, watched and with a short lease.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.precompute_process import Event, KillSwitch, watch

BEAT_SECONDS = 1.0
SKEW_MINUTES = {"ahead": 7, "behind": -7}
_PROJECT = Path(__file__).parents[1]
# preloaded; not libfaketime 0.9.10: with it, Python's sleep or its waits with a time limit fail or never end
_CLOCK = """
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += atol(getenv("SKEW_SECONDS"));
    return failed;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return out ? *out = now.tv_sec : now.tv_sec;
}
int gettimeofday(struct timeval *restrict out, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    out->tv_sec = now.tv_sec;
    out->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""


@dataclass(frozen=True)
class Run:
    """One ``precompute`` on a host, with what it prints, and the file that counts its forward passes."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def pid(self) -> int:
        """Number, on this machine, of the process that encodes."""
        pid = self.process.pid
        while children := _children(pid):
            pid = children[0]
        return pid

    @property
    def said(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def passes(self) -> int:
        counted = self.folder / "passes"
        return counted.stat().st_size if counted.exists() else 0

    def wait_until_stopped(self) -> None:
        """Return when it has sent itself SIGSTOP."""
        until = time.monotonic() + 120
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert self.process.poll() is None, self.said
            assert time.monotonic() < until, self.said
            time.sleep(0.05)

    def go_on(self) -> None:
        """Wake it up; nsenter has stopped with it."""
        for pid in (self.pid, self.process.pid):
            os.kill(pid, signal.SIGCONT)

    def result(self, seconds: float = 180) -> dict[str, Any]:
        """Wait for its end, which must be a good one; the result that it printed."""
        assert self.process.wait(seconds) == 0, self.said
        result: dict[str, Any] = json.loads((self.folder / "stdout").read_text())
        return result


@dataclass(frozen=True)
class Host:
    """A host that runs: its first process, whose end ends all others, the link's end on this machine, and its clock."""

    name: str
    first: subprocess.Popen[bytes]
    link: str
    clock: Path
    runs: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def command(self, *words: str) -> list[str]:
        """A command on this host, by its clock."""
        (pid,) = _children(self.first.pid)
        clock = [f"SKEW_SECONDS={60 * SKEW_MINUTES[self.name]}", f"LD_PRELOAD={self.clock}"]
        enter = ["nsenter", f"--target={pid}", "--net", "--uts", "--pid", "--mount", "--wd"]
        return [*enter, "env", *clock, *words]

    def start(
        self,
        config: dict[str, Any],
        folder: Path,
        *,
        environment: dict[str, str] | None = None,
        teacher_seconds: float = 0.0,
        stop_at: Event | None = None,
    ) -> Run:
        """Begin ``precompute``; its output goes to a new folder."""
        folder.mkdir()
        task = json.dumps([config, str(folder / "passes"), teacher_seconds, stop_at])
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            process = subprocess.Popen(
                self.command(sys.executable, "-m", "tests.two_hosts", task),
                env={**os.environ, **(environment or {}), "COLUMNS": "300"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        self.runs.append(process)
        return Run(process, folder)

    def set_link(self, state: str) -> None:
        """Cut its link (``down``), as by a cable far away: what is sent is lost without a word. Or mend it (``up``)."""
        _run("ip", "link", "set", self.link, state)

    def kill(self) -> None:
        """End it with all its processes, as by the loss of power."""
        for process in (self.first, *self.runs):  # a stopped nsenter would not end by itself
            process.kill()
            process.wait()
        subprocess.run(["ip", "link", "delete", self.link], capture_output=True)  # else it goes a moment later


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[str, Host, Host]]:
    """The address of this machine for both, a host whose clock is ahead, and one whose clock is behind.

    They end with the block, and when this process is killed. Skips where hosts cannot be made.
    """
    if subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"], capture_output=True).returncode:
        pytest.skip("namespaces cannot be made: this needs root")
    subnet = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
    with contextlib.ExitStack() as stack:
        clock = _clock(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        hosts = [stack.enter_context(_host(name, subnet, number, clock)) for number, name in enumerate(SKEW_MINUTES)]
        yield f"{subnet}.1", hosts[0], hosts[1]


@contextlib.contextmanager
def _host(name: str, subnet: str, number: int, clock: Path) -> Iterator[Host]:
    link, address = f"tc{os.getpid()}{name[0]}", f"{subnet}.{number + 2}"
    namespaces = ["--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    first = subprocess.Popen(
        # it ends when the pipe does, so also when this process is killed
        ["unshare", *namespaces, "sh", "-c", f"hostname {name}; echo; read _"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=_PROJECT,
        start_new_session=True,
    )
    host = Host(name, first, link, clock)
    assert first.stdin is not None
    assert first.stdout is not None
    try:
        assert first.stdout.readline(), f"{name} did not start"
        _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(first.pid))
        _run("ip", "address", "add", f"{subnet}.1", "peer", address, "dev", link)
        host.set_link("up")
        _run(*host.command("ip", "address", "add", address, "peer", f"{subnet}.1", "dev", "eth0"))
        _run(*host.command("ip", "link", "set", "eth0", "up"))
        yield host
    finally:
        host.kill()
        first.stdin.close()
        first.stdout.close()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _clock(folder: Path) -> Path:
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("clocks that differ need a C compiler: apt-get install gcc")
    source, library = folder / "clock.c", folder / "clock.so"
    source.write_text(_CLOCK)
    _run(compiler, "-shared", "-fPIC", "-o", str(library), str(source))
    return library


def main() -> None:
    """Run the command of ``sys.argv[1]``: settings, file of passes, seconds of a pass, and where to stop."""
    config, passes, teacher_seconds, stop_at = json.loads(sys.argv[1])
    from teacher_cache.pipeline.cli.app import main as teacher_cache
    from teacher_cache.storage.write.claims import Claims

    Claims.__init__.__defaults__ = (BEAT_SECONDS,)  # type: ignore[misc]
    watch(config["cache"], KillSwitch(None, stop_at and tuple(stop_at)), teacher_seconds, Path(passes))
    sys.argv = ["teacher-cache", "precompute", "--json", *(f"--set={name}={value}" for name, value in config.items())]
    teacher_cache()


if __name__ == "__main__":
    main()
