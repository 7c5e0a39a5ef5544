"""``python -m teacher_cache.flows.serve``: a local Prefect server with a worker and the deployments of
``prefect.yaml``.

Everything that Prefect keeps (database, settings, logs) goes to ``.prefect`` in the project, or to PREFECT_HOME
if that is set, so that another Prefect of the same user is not touched. The server listens on 127.0.0.1 only,
and no telemetry is sent. Ctrl-C, SIGTERM or the end of the terminal stops the worker, then the server. If one of
the two dies, the other is stopped and the exit code is 1.

Children are started from Python rather than from a shell: a shell's ``&`` makes them ignore SIGINT, and a
Prefect worker that ignores it cannot be stopped politely.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

__all__ = ["main"]

# the folder with prefect.yaml: where we are called, or the clone that this file is in
PROJECT = Path.cwd() if Path("prefect.yaml").is_file() else Path(__file__).resolve().parent.parent
WORK_POOL = "local"
HOST = "127.0.0.1"

_START_SECONDS = 180.0  # a fresh database takes 15 s on two idle cores, and this machine may be busy
_STOP_SECONDS = 20.0
_LOG_LINES_SHOWN = 20
# of another Prefect of this user: a database, profile or key that does not belong to the server started here
_FOREIGN_SETTINGS = (
    *("PREFECT_API_", "PREFECT_SERVER_", "PREFECT_CLOUD_", "PREFECT_CLIENT_"),
    *("PREFECT_PROFILE", "PREFECT_DEFAULT_", "PREFECT_TEST"),
)
"""Their names begin so."""


class ServeError(Exception):
    """Something did not start, or died; the message names what and shows its last lines."""


@dataclass
class Child:
    """A process of ours, where its output goes, and what it started itself.

    A worker starts each flow run in a session of its own. It ends them when it is stopped; when it is killed,
    they would go on for ever without a server to report to, so they are noted while it lives.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    started: set[tuple[int, str]] = field(default_factory=set)  # process id, time of its start

    def check(self) -> None:
        """Raise ServeError if it is no longer running."""
        code = self.process.poll()
        if code is not None:
            raise ServeError(f"the {self.name} stopped by itself with code {code}. {_last_lines(self.log)}")
        self.started = _started_by(self.process.pid)

    def stop(self) -> None:
        """Ask it to stop, wait, and kill it if it does not."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                _say(f"{self.name} did not stop within {_STOP_SECONDS:.0f} s, killing it")
                self.process.kill()
                self.process.wait()
        for pid, at in self.started:
            # the time proves that the id has not gone to another process since
            if _start_time(pid) == at:
                _say(f"stopping what the {self.name} left behind, process {pid}")
                _end_orphan(pid, at)


def main(arguments: list[str] | None = None) -> int:
    """Serve until stopped. Returns the exit code: 0 stopped by a signal, 1 something failed, 2 bad usage."""
    parser = argparse.ArgumentParser(
        prog="python -m teacher_cache.flows.serve", description="A local Prefect server and worker."
    )
    parser.add_argument("--port", type=int, default=os.environ.get("PREFECT_SERVER_API_PORT", "4200"))
    parser.add_argument("--limit", type=int, default=1, help="flow runs at once; 1, since they share the device")
    options = parser.parse_args(arguments)
    home = Path(os.environ.get("PREFECT_HOME") or PROJECT / ".prefect").expanduser().resolve()
    api = f"http://{HOST}:{options.port}/api"
    _on_stop(_interrupt)
    try:
        with _alone(home) as lock, _serving(home, api, options.port, options.limit, lock) as children:
            _say(_what_to_type(home, api))
            while True:
                for child in children:
                    child.check()
                time.sleep(0.5)
    except KeyboardInterrupt:
        _say("stopped")
        return 0
    except (ServeError, OSError) as error:
        _say(f"error: {error}")
        return 1


def _on_stop(action: Any) -> None:
    """What SIGINT, SIGTERM and SIGHUP do; under nohup the last one stays ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, action)


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[IO[str]]:
    """The lock of a home, which server and worker hold too: of a killed serve they may still be working.

    A second server on the same database would take the runs of the first one's worker for left behind.
    """
    home.mkdir(parents=True, exist_ok=True)
    with (home / "serve.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            whose = ", ".join(lock.read().splitlines()) or "just starting"
            raise ServeError(
                f"{home} is in use by another serve, or by what one that was killed has left behind ({whose}). Stop "
                "that, or give another folder as PREFECT_HOME."
            ) from error
        lock.truncate(0)
        yield lock


@contextlib.contextmanager
def _serving(home: Path, api: str, port: int, limit: int, lock: IO[str]) -> Iterator[list[Child]]:
    """Server and worker, started in this order and stopped in the other one."""
    _require_free(port)
    if home == PROJECT / ".prefect":
        (home / ".gitignore").write_text("*\n")
    environment = _environment(home, api, port)
    children: list[Child] = []
    try:
        _say(f"starting the server on {api.removesuffix('/api')} (log: {home / 'server.log'})")
        server = _start("server", ["server", "start", "--host", HOST, "--port", str(port)], home, environment, lock)
        children.append(server)
        _wait(lambda: _ask(f"{api}/health") is True, server)
        _say("creating the work pool and deploying prefect.yaml")
        if _ask(f"{api}/work_pools/{WORK_POOL}") is None:  # one that is there may be paused, or have a limit
            _run(["work-pool", "create", WORK_POOL, "--type", "process"], home, environment)
        _run(["--no-prompt", "deploy", "--all"], home, environment)
        _settle_leftovers(api)
        _say(f"starting the worker (log: {home / 'worker.log'})")
        work = ["worker", "start", "--pool", WORK_POOL, "--limit", str(limit)]
        worker = _start("worker", work, home, environment, lock)
        children.append(worker)
        _wait(lambda: _worker_is_online(api), worker)
        yield children
    finally:
        # a second Ctrl-C must not leave a process behind
        _on_stop(signal.SIG_IGN)
        for child in reversed(children):
            _say(f"stopping the {child.name}")
            child.stop()


def _environment(home: Path, api: str, port: int) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN_SETTINGS)}
    return environment | {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": api,
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
        # in memory, the slot of a device would stay taken for ever when the server dies
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "DO_NOT_TRACK": "1",
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_CLI_COLORS": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",  # how long a run waits to be picked up; 10 by default
        "NO_PROXY": ",".join(filter(None, (os.environ.get("NO_PROXY"), HOST))),
        "PYTHONUNBUFFERED": "1",  # so that the logs end with what happened last
    }


def _start(name: str, command: list[str], home: Path, environment: dict[str, str], lock: IO[str]) -> Child:
    log = home / f"{name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *command],
            cwd=PROJECT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C then reaches only us, and we stop them in order
            pass_fds=[lock.fileno()],
        )
    print(f"{name} {process.pid}", file=lock, flush=True)
    return Child(name, process, log)


def _run(command: list[str], home: Path, environment: dict[str, str]) -> None:
    log = home / "setup.log"
    with log.open("wb") as file:
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *command],
            cwd=PROJECT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        raise ServeError(f"prefect {' '.join(command)} ended with code {done.returncode}. {_last_lines(log)}")


def _wait(ready: Callable[[], bool], child: Child) -> None:
    until = time.monotonic() + _START_SECONDS
    while not ready():
        child.check()
        if time.monotonic() > until:
            raise ServeError(f"the {child.name} was not ready after {_START_SECONDS:.0f} s. {_last_lines(child.log)}")
        time.sleep(0.3)


def _worker_is_online(api: str) -> bool:
    workers = _ask(f"{api}/work_pools/{WORK_POOL}/workers/filter", {})
    return any(worker.get("status") == "ONLINE" for worker in workers or ())


def _settle_leftovers(api: str) -> None:
    """Mark runs as crashed that a stopped worker left as running.

    No worker of ours runs yet, so nobody works on them; left alone they would hold the one slot that
    ``concurrency_limit`` gives their deployment, and every later run would wait for ever.
    """
    unfinished = {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}
    wanted = {"flow_runs": unfinished, "work_pools": {"name": {"any_": [WORK_POOL]}}}
    for run in _ask(f"{api}/flow_runs/filter", wanted) or ():
        _say(f"{run['name']} was not finished when its worker stopped; run its deployment again to go on")
        state = {"type": "CRASHED", "name": "Crashed", "message": "Its worker was stopped."}
        _ask(f"{api}/flow_runs/{run['id']}/set_state", {"state": state, "force": True})


def _started_by(pid: int) -> set[tuple[int, str]]:
    """Processes that a process started and that still run; none where there is no /proc."""
    found: set[tuple[int, str]] = set()
    with contextlib.suppress(OSError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            found.update((int(child), _start_time(int(child))) for child in children.read_text().split())
    return found


def _start_time(pid: int) -> str:
    """When a process started, in ticks since boot; empty if there is no such process, or only its exit code."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else fields[18]


def _end_orphan(pid: int, started_at: str) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        until = time.monotonic() + _STOP_SECONDS / 4
        while time.monotonic() < until and _start_time(pid) == started_at:
            time.sleep(0.1)
        if _start_time(pid) != started_at:
            return


def _ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """What the server answers, or None while it does not."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=5) as answer:
            return json.load(answer)
    except (urllib.error.URLError, OSError):
        return None


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ServeError(
                f"port {port} of {HOST} cannot be used ({error.strerror}). Give another one with --port or "
                "PREFECT_SERVER_API_PORT."
            ) from error


def _what_to_type(home: Path, api: str) -> str:
    prefect = Path(sys.executable).with_name("prefect")
    with contextlib.suppress(ValueError):
        prefect = prefect.relative_to(Path.cwd())
    return (
        f"ready: {api.removesuffix('/api')} (Ctrl-C stops it; logs and database in {home})\n\n"
        "In another terminal:\n\n"
        f"  export PREFECT_API_URL={api}\n"
        f"  {prefect} deployment run precompute-teacher/default --watch\n"
        f"  {prefect} deployment run train-student/default --watch\n"
        f"  {prefect} deployment run evaluate-student/default -p run=runs/NAME --watch\n"
        f"  {prefect} deployment run deploy-student/default -p run=runs/NAME --watch\n\n"
        "Settings are parameters, for example: -p dataset=flickr:/data/flickr8k -p cache=caches/flickr8k.cache"
    )


def _last_lines(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES_SHOWN:]
    return f"The last lines of {log}:\n" + "\n".join(f"  {line}" for line in lines)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
