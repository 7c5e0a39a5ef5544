"""Real object stores on loopback for tests: moto (in memory) and SeaweedFS (on disk), started and stopped here.

Their address and credentials go to the code under test by the standard environment variables, nothing else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
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

__all__ = ["ObjectStore", "ServerEndedError", "free_ports", "start_moto", "start_seaweedfs", "started"]

_Server = TypeVar("_Server")

# bounds for a machine under load, not expectations
_START_SECONDS = 120
_STOP_SECONDS = 20


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
def start_moto() -> Iterator[ObjectStore]:
    """A moto server in a process of its own; what it holds is gone when it ends."""
    code = "from tests.object_store import serve_moto; serve_moto()"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
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
        assert port, "moto did not start"
        store = ObjectStore("moto", f"http://127.0.0.1:{port}")
        store.client().create_bucket(Bucket=store.bucket)
        yield store
    finally:
        child.stdin.close()
        try:
            child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()


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
def start_seaweedfs(folder: Path) -> Iterator[ObjectStore]:
    """SeaweedFS (master, volume server, filer and S3 gateway in one process) with its files in ``folder``.

    Raises:
        ServerEndedError: it ended before it was ready, each of three times.
    """
    with contextlib.ExitStack() as stack:
        yield started(lambda: stack.enter_context(_seaweedfs(folder)), lambda: shutil.rmtree(folder))


@contextlib.contextmanager
def _seaweedfs(folder: Path) -> Iterator[ObjectStore]:
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    assert weed, "the weed binary is missing: make install"
    folder.mkdir(parents=True, exist_ok=True)
    ports = iter(free_ports(8))
    s3_port = next(ports)
    options = {
        "dir": folder,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
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
    with (folder / "weed.log").open("wb") as log:
        child = subprocess.Popen(
            [weed, "server", *(f"-{name}={value}" for name, value in options.items())],
            cwd=folder,
            env={**os.environ, "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-secret"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        # a session that is killed runs no `finally`: then the pipe ends, and so does the server
        watch = subprocess.Popen(
            ["sh", "-c", 'read _; kill -9 "$1"', "sh", str(child.pid)], stdin=subprocess.PIPE, start_new_session=True
        )
        assert watch.stdin is not None
        store = ObjectStore("seaweedfs", f"http://127.0.0.1:{s3_port}")
        try:
            _wait_until_it_writes(store, child, folder / "weed.log")
            yield store
        finally:
            watch.kill()
            watch.wait()
            watch.stdin.close()
            child.kill()  # its own way of stopping takes 20 seconds, and nobody needs the files
            child.wait()


def _wait_until_it_writes(store: ObjectStore, child: subprocess.Popen[bytes], log: Path) -> None:
    # the gateway answers before there is a volume to write to
    from botocore.exceptions import BotoCoreError, ClientError

    deadline = time.monotonic() + _START_SECONDS
    made = False
    while True:
        if child.poll() is not None:
            raise ServerEndedError(f"weed ended: {log.read_text()[-2000:]}")
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
