"""``make serve``: Prefect's server and worker on 127.0.0.1, with the deployments of ``prefect.yaml``.

Reports are served on the next port, so that a link in Prefect's UI opens them. Prefect keeps its database and settings
in ``.prefect`` of the project, or in PREFECT_HOME. Ctrl-C, SIGTERM or the end of the terminal stops the worker, then
the server. If one of them ends by itself, the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any, NoReturn
from urllib.parse import unquote

# the folder with prefect.yaml: the current one, or the clone that holds this file
PROJECT = Path.cwd() if Path("prefect.yaml").is_file() else Path(__file__).resolve().parent.parent
WORK_POOL = "local"
HOST = "127.0.0.1"
REPORTS_URL = "TEACHER_CACHE_REPORTS_URL"  # variable of the worker's environment: where its reports are served

_START_SECONDS = 180.0  # a fresh database takes 15 s on two idle cores
_STOP_SECONDS = 20.0
# prefixes of settings that may point to another Prefect server of this user
_FOREIGN = tuple(f"PREFECT_{name}" for name in ("API_", "SERVER_", "CLOUD_", "CLIENT_", "PROFILE", "DEFAULT_", "TEST"))
_GENERATOR = b'<meta name="generator" content="teacher-cache'  # of a report page
_HINT = """
In another terminal:

  export PREFECT_API_URL={api}
  {prefect} deployment run precompute-teacher/default --watch
  {prefect} deployment run train-student/default --watch

Settings are parameters, for example: -p dataset=flickr:/data/flickr8k -p cache=caches/flickr8k.cache
What a run has logged, also why it failed: {prefect} flow-run logs UUID
"""


class ServeError(Exception):
    """Error of a process that did not start or ended by itself, or of a home that is in use."""


def main(arguments: list[str] | None = None) -> int:
    """Serve until stopped. Return the exit code: 0 stopped by a signal, 1 a process failed, 2 bad usage."""
    parser = argparse.ArgumentParser(
        prog="python -m teacher_cache.flows.serve", description="A local Prefect server and worker."
    )
    parser.add_argument(
        "--port",
        type=int,
        default=os.environ.get("PREFECT_SERVER_API_PORT", "4200"),
        help="Port of the server; reports are on the next port. Default: 4200",
    )
    parser.add_argument(
        "--limit", type=int, default=1, help="Number of flow runs at once; 1, since they share the device"
    )
    options = parser.parse_args(arguments)
    home = Path(os.environ.get("PREFECT_HOME") or PROJECT / ".prefect").expanduser().resolve()
    stop_on_signals(signal.default_int_handler)
    try:
        with locked(home) as lock, reports_served(options.port + 1):
            _serve(home, options.port, options.limit, lock)
    except KeyboardInterrupt:
        _say("stopped")
        return 0
    except (ServeError, OSError) as error:
        _say(f"error: {error}")
        return 1


def stop_on_signals(handler: Any) -> None:
    """Set the handler of SIGINT, SIGTERM and SIGHUP. SIGHUP stays ignored under nohup."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


@contextlib.contextmanager
def locked(home: Path) -> Iterator[IO[str]]:
    """Lock a home. Server and worker inherit the lock, so processes that outlive a killed serve still hold it.

    Raises:
        ServeError: the home is in use. A second server would treat the first one's runs as abandoned.
    """
    home.mkdir(parents=True, exist_ok=True)
    with (home / "serve.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holders = ", ".join(lock.read().splitlines()) or "just starting"
            raise ServeError(
                f"{home} is in use by another serve, or by processes that a killed one left behind ({holders}). "
                "Stop them, or name another folder by PREFECT_HOME."
            ) from error
        lock.truncate(0)
        yield lock


class _Reports(BaseHTTPRequestHandler):
    """Answer GET /PATH with the report page at that path, and with no other file."""

    def do_GET(self) -> None:
        """Send the page, to a browser that asks for this address: not for a name that a foreign page resolves to it."""
        page = Path(unquote(self.path))
        named = self.headers.get("Host") == "{}:{}".format(*self.connection.getsockname())
        try:
            content = page.read_bytes() if named and page.name.endswith("report.html") else b""
        except (OSError, ValueError):
            content = b""
        if _GENERATOR not in content[:1000]:
            self.send_error(404, "no report here")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a tab that is closed
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


@contextlib.contextmanager
def reports_served(port: int) -> Iterator[None]:
    """Serve report pages while the block runs.

    Raises:
        ServeError: the port is taken.
    """
    try:
        server = ThreadingHTTPServer((HOST, port), _Reports)
    except (OSError, OverflowError) as error:
        raise ServeError(f"port {port}, for the reports, is taken ({error}); name another pair with --port") from error
    threading.Thread(target=server.serve_forever, name="reports", daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def _serve(home: Path, port: int, limit: int, lock: IO[str]) -> NoReturn:
    api = f"http://{HOST}:{port}/api"
    environment = _environment(home, api, port)
    children: dict[str, subprocess.Popen[bytes]] = {}

    def start(name: str, *command: str, stdout: int | None = None) -> subprocess.Popen[bytes]:
        # not by a shell's `&`: its processes ignore SIGINT, which Prefect's worker needs to stop
        children[name] = subprocess.Popen(
            [sys.executable, "-m", "prefect", *command],
            cwd=PROJECT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            start_new_session=True,  # Ctrl-C reaches this process only, which stops the others in order
            pass_fds=[lock.fileno()],
        )
        if name != "setup":
            print(f"{name} {children[name].pid}", file=lock, flush=True)
        return children[name]

    def run(name: str, *command: str) -> None:
        process = start(name, *command, stdout=subprocess.PIPE)
        output, _ = process.communicate()
        if process.returncode:  # else it only tells to start a worker, which is started here
            _say(output.decode(errors="replace"))
            raise ServeError(f"prefect {' '.join(command)} ended with code {process.returncode}")
        del children[name]

    try:
        _say(f"starting the server on {api.removesuffix('/api')}")
        start("server", "server", "start", "--host", HOST, "--port", str(port))
        until = time.monotonic() + _START_SECONDS
        while _ask(f"{api}/health") is not True:
            _check(children)
            if time.monotonic() > until:
                raise ServeError(f"the server was not ready after {_START_SECONDS:.0f} s")
            time.sleep(0.3)
        if _ask(f"{api}/work_pools/{WORK_POOL}") is None:  # an existing pool may be paused, or have a limit
            run("setup", "work-pool", "create", WORK_POOL, "--type", "process")
        run("setup", "--no-prompt", "deploy", "--all")
        _settle_abandoned(api)
        start("worker", "worker", "start", "--pool", WORK_POOL, "--limit", str(limit))
        _say(f"ready: {api.removesuffix('/api')} (Ctrl-C stops it; database in {home})")
        _say(_HINT.format(api=api, prefect=os.path.relpath(Path(sys.executable).with_name("prefect"))))
        while True:
            _check(children)
            time.sleep(0.5)
    finally:
        stop_on_signals(signal.SIG_IGN)  # a second Ctrl-C must not leave a process behind
        for name, process in reversed(children.items()):
            _say(f"stopping the {name}")
            _stop(process)


def _environment(home: Path, api: str, port: int) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)} | {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": api,
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
        # --watch shows what a run logs, the reason of a failure among it
        "PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED": "true",
        "PREFECT_SERVER_LOGS_STREAM_PUBLISHING_ENABLED": "true",
        # on disk: leases in memory are lost if the server dies, and the slots of devices stay taken for ever
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "DO_NOT_TRACK": "1",
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_CLI_COLORS": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",  # until a run is picked up; Prefect's default is 10
        "NO_PROXY": ",".join(filter(None, (os.environ.get("NO_PROXY"), HOST))),
        "PYTHONUNBUFFERED": "1",
        REPORTS_URL: f"http://{HOST}:{port + 1}",
    }


def _check(children: dict[str, subprocess.Popen[bytes]]) -> None:
    for name, process in children.items():
        if (code := process.poll()) is not None:
            raise ServeError(f"the {name} stopped by itself with code {code}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _settle_abandoned(api: str) -> None:
    """Mark runs of a stopped worker as crashed. Unfinished, they would hold their deployment's only slot for ever."""
    unfinished = {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}
    query = {"flow_runs": unfinished, "work_pools": {"name": {"any_": [WORK_POOL]}}}
    for run in _ask(f"{api}/flow_runs/filter", query) or ():
        _say(f"{run['name']} was not finished when its worker stopped; run its deployment again to go on")
        state = {"type": "CRASHED", "name": "Crashed", "message": "Its worker was stopped."}
        _ask(f"{api}/flow_runs/{run['id']}/set_state", {"state": state, "force": True})


def _ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """Return the server's answer, or None if it does not answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=5) as answer:
            return json.load(answer)
    except OSError:
        return None


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
