"""Real object stores on loopback for tests: moto (in memory) and SeaweedFS (on disk), started and stopped here.

Their address and credentials go to the code under test by the standard environment variables, nothing else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

_Server = TypeVar("_Server")

# bounds for a machine under load, not expectations
_START_SECONDS = 180
_STOP_SECONDS = 60


@dataclass(frozen=True)
class ObjectStore:
    """A server that is up, with one empty bucket."""

    name: str
    endpoint: str
    bucket: str = "caches"

    @property
    def environment(self) -> dict[str, str]:
        """What the standard chain needs to find it; for ``monkeypatch.setenv`` or a child process."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def location(self, name: str) -> str:
        """URL of a cache of that name."""
        return f"s3://{self.bucket}/{name}"

    def client(self) -> Any:
        """A boto3 client: reads and damages objects past the code under test."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id="testing",
            aws_secret_access_key="testing-secret",
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
        )


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody listens on now, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


@contextlib.contextmanager
def start_printing_port(*command: str) -> Iterator[str]:
    """A Python process that serves until its stdin ends, and whose first line is its port on loopback."""
    child = subprocess.Popen(
        [sys.executable, *command],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,  # it ends when the pipe does, so also when this process is killed
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # a Ctrl-C or a signal to the group is for the tests
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        port = child.stdout.readline().strip()
        assert port, f"{command} did not start"
        yield port
    finally:
        child.stdin.close()
        try:
            child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()


@contextlib.contextmanager
def start_moto() -> Iterator[ObjectStore]:
    """A moto server in a process of its own; what it holds is gone when it ends."""
    with start_printing_port("-c", "from tests.object_store import serve_moto; serve_moto()") as port:
        store = ObjectStore("moto", f"http://127.0.0.1:{port}")
        store.client().create_bucket(Bucket=store.bucket)
        yield store


def serve_moto() -> None:
    """Serve on a free port, which is printed, until stdin ends. One request at a time.

    moto looks for an object and puts one in two steps, so its conditional puts are exclusive only like this.
    """
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    app = DomainDispatcherApplication(create_backend_app)
    turn = threading.Lock()

    def one_at_a_time(environ: Any, start_response: Any) -> Any:
        with turn:
            return list(app(environ, start_response))

    server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)


@dataclass
class Started:
    """A service that runs: its process and its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    watch: subprocess.Popen[bytes]

    @classmethod
    def start(cls, name: str, command: list[str], log: Path, **options: Any) -> Started:
        """Start it in a session of its own: a Ctrl-C is for the tests, which stop it in order."""
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **options,
            )
        # a session that is killed runs no `finally`: then the pipe ends, and the service is asked to stop
        watch = subprocess.Popen(
            ["sh", "-c", 'read _; kill "$1"', "sh", str(process.pid)], stdin=subprocess.PIPE, start_new_session=True
        )
        return cls(name, process, log, watch)

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Return once it is ready. AssertionError with its log: it ended, or took too long."""
        until = time.monotonic() + _START_SECONDS
        while not ready():
            assert self.process.poll() is None, f"{self.name} ended: {self.log.read_text()[-3000:]}"
            assert time.monotonic() < until, f"{self.name} is not ready: {self.log.read_text()[-3000:]}"
            time.sleep(0.3)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to stop; kill it if it does not. Returns its exit code, also the second time."""
        if self.watch.stdin is not None and not self.watch.stdin.closed:
            self.watch.kill()
            self.watch.wait()
            self.watch.stdin.close()
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()


class ServerEndedError(Exception):
    """A server ended before it was ready."""


def started(start: Callable[[], _Server], begin_anew: Callable[[], None]) -> _Server:
    """A server, by at most three tries: another process may take a free port before the server does.

    Raises:
        ServerEndedError: it ended before it was ready each time.
    """
    for _ in range(2):
        try:
            return start()
        except ServerEndedError:
            begin_anew()
    return start()


@contextlib.contextmanager
def start_seaweedfs(folder: Path, address: str = "127.0.0.1") -> Iterator[ObjectStore]:
    """SeaweedFS (master, volume server, filer and S3 gateway in one process) with its files in ``folder``.

    Args:
        address: of this machine, to listen on: loopback, or a private link.

    Raises:
        ServerEndedError: it ended before it was ready, each of three times.
    """
    with contextlib.ExitStack() as stack:
        yield started(lambda: stack.enter_context(_seaweedfs(folder, address)), lambda: shutil.rmtree(folder))


@contextlib.contextmanager
def _seaweedfs(folder: Path, address: str) -> Iterator[ObjectStore]:
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    assert weed, "the weed binary is missing: make dev"
    folder.mkdir(parents=True, exist_ok=True)
    ports = iter(free_ports(8))
    s3_port = next(ports)
    options = {
        "dir": folder,
        "ip": address,
        "ip.bind": address,
        "master.port": next(ports),
        "master.port.grpc": next(ports),
        "master.volumeSizeLimitMB": 64,
        "volume.port": next(ports),
        "volume.port.grpc": next(ports),
        "volume.max": 50,
        "filer": "true",
        "filer.port": next(ports),
        "filer.port.grpc": next(ports),
        "s3": "true",
        "s3.port": s3_port,
        "s3.port.grpc": next(ports),
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.autoCreateBucket": "false",  # as AWS: a put into a bucket that is not there fails
    }
    command = [weed, "server", *(f"-{name}={value}" for name, value in options.items())]
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-secret"}
    server = Started.start("weed", command, folder / "weed.log", cwd=folder, env={**os.environ, **keys})
    store = ObjectStore("seaweedfs", f"http://{address}:{s3_port}")
    try:
        _wait_until_it_writes(store, server)
        yield store
    finally:
        server.stop(signal.SIGKILL)  # its own way of stopping takes 20 seconds, and nobody needs the files


def _wait_until_it_writes(store: ObjectStore, server: Started) -> None:
    # the gateway answers before there is a volume to write to
    from botocore.exceptions import BotoCoreError, ClientError

    deadline = time.monotonic() + _START_SECONDS
    made = False
    while True:
        if server.process.poll() is not None:
            raise ServerEndedError(f"weed ended: {server.log.read_text()[-2000:]}")
        try:
            urllib.request.urlopen(f"{store.endpoint}/status", timeout=5).close()
            client = store.client()
            if not made:
                client.create_bucket(Bucket=store.bucket)
                made = True
            client.put_object(Bucket=store.bucket, Key="ready", Body=b"x")
            client.delete_object(Bucket=store.bucket, Key="ready")
            return
        except (OSError, BotoCoreError, ClientError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
