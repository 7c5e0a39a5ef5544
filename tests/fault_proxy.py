"""An HTTP proxy on loopback between S3 clients and a server: it counts requests, fails as networks do, or is far away.

``python -m tests.fault_proxy ENDPOINT SECONDS`` is a distant one until stdin ends; it prints its port.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.object_store import ObjectStore, start_printing_port


@dataclass(frozen=True)
class Fault:
    """What happens to one request.

    ``refuse``: answered with ``status`` and ``code``, never forwarded. ``drop``: connection reset, never forwarded.
    ``lose``: forwarded, then the connection is reset in place of an answer. ``cut``: half of the answer's body, then
    a reset. ``truncate``: half of the body, then an orderly end. ``stall``: forwarded, answered after ``seconds``.
    """

    kind: str
    status: int = 503
    code: str = "SlowDown"
    seconds: float = 0.0
    text: str = "Please reduce your request rate."


def refusal(status: int, code: str, text: str = "no") -> Fault:
    """An answer of the server's own that says no."""
    return Fault("refuse", status, code, text=text)


@dataclass(frozen=True)
class Request:
    """One request as it came, before any fault."""

    method: str
    key: str
    conditional: bool


class FaultProxy(ThreadingHTTPServer):
    """Forwards to a store, each request ``delay`` seconds later.

    ``requests`` lists what came; ``plan`` chooses a fault, or none, for each request. ``most_at_once`` is the largest
    number of requests that waited for their answer at the same moment, ``bytes_sent`` the bytes of all answers.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, store: ObjectStore, delay: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store = store
        self.delay = delay
        self.waiting = self.most_at_once = self.bytes_sent = 0
        self.requests: list[Request] = []
        self.injected: list[tuple[Request, Fault]] = []
        self.plan: Callable[[Request], Fault | None] = lambda request: None
        self.strip_conditions = False
        self.lock = threading.Lock()
        self.over = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that give up early are part of the tests."""

    def front(self) -> ObjectStore:
        """The store as it is seen through the proxy."""
        return replace(self.store, endpoint=f"http://127.0.0.1:{self.server_address[1]}")

    def counts(self) -> Counter[tuple[str, str]]:
        """How many requests came, by method and by the first folder of a cache: ``("GET", "commits")``."""
        return Counter(
            (request.method, request.key.partition(".cache/")[2].partition("/")[0]) for request in self.requests
        )

    def forget(self) -> None:
        """Count from here."""
        self.requests.clear()
        self.most_at_once = self.bytes_sent = 0

    def next_requests(self, *faults: Fault, method: str | None = None) -> None:
        """These faults, in order, to the next requests (of a method); then none."""
        left = list(faults)
        self.plan = lambda request: left.pop(0) if left and method in (None, request.method) else None

    def always(self, fault: Fault, method: str | None = None) -> None:
        """This fault to every request (of a method)."""
        self.plan = lambda request: fault if method in (None, request.method) else None

    def seeded(self, seed: int, share: float, faults: list[Fault], most_in_a_row: int) -> None:
        """Faults by chance, but at most so many in a row to one method and key, whichever clients ask for it."""
        rng = random.Random(seed)
        rows: dict[tuple[str, str], int] = {}

        def plan(request: Request) -> Fault | None:
            name = (request.method, request.key)
            if rng.random() < share and rows.get(name, 0) < most_in_a_row:
                rows[name] = rows.get(name, 0) + 1
                return rng.choice(faults)
            rows[name] = 0
            return None

        self.plan = plan


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        bucket_and_key = urllib.parse.unquote(self.path.partition("?")[0]).lstrip("/")
        request = Request(self.command, bucket_and_key.partition("/")[2], "If-None-Match" in self.headers)
        with self.server.lock:
            self.server.requests.append(request)
            fault = self.server.plan(request)
            if fault is not None:
                self.server.injected.append((request, fault))
        kind = fault.kind if fault else ""
        if fault and kind == "refuse":
            self._refuse(fault)
            return
        if kind == "drop":
            self._reset()
            return
        status, headers, data = self._waited(body)
        with self.server.lock:
            self.server.bytes_sent += len(data)
        if kind == "lose":
            self._reset()
            return
        if fault and kind == "stall":
            self.server.over.wait(fault.seconds)
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("connection", "content-length", "transfer-encoding", "server", "date"):
                self.send_header(name, value)
        length = next((value for name, value in headers if name.lower() == "content-length"), str(len(data)))
        if status not in (204, 304):
            self.send_header("Content-Length", length)
        self.end_headers()
        half = kind in ("cut", "truncate")
        self.wfile.write(data[: len(data) // 2] if half else data)
        self.wfile.flush()
        if kind == "cut":
            self._reset()
        elif half:
            self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _answer

    def _waited(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        with self.server.lock:
            self.server.waiting += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.waiting)
        try:
            time.sleep(self.server.delay)
            return self._forward(body)
        finally:
            with self.server.lock:
                self.server.waiting -= 1

    def _refuse(self, fault: Fault) -> None:
        xml = f"<Error><Code>{fault.code}</Code><Message>{fault.text}</Message></Error>".encode()
        self.send_response(fault.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(xml)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(xml)

    def _reset(self) -> None:
        # an end with linger 0 is a reset: what the client has not read yet is lost
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        target = urllib.parse.urlsplit(self.server.store.endpoint)
        assert target.hostname is not None
        connection = http.client.HTTPConnection(target.hostname, target.port, timeout=60)
        try:
            # the Host header as it came: it is part of the signature
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                stripped = self.server.strip_conditions and name.lower() == "if-none-match"
                if name.lower() not in ("expect", "connection") and not stripped:
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


@contextlib.contextmanager
def start_fault_proxy(store: ObjectStore, delay: float = 0.0) -> Iterator[FaultProxy]:
    """A proxy in front of a store, in a thread of this process, without faults yet."""
    proxy = FaultProxy(store, delay)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.over.set()
        proxy.shutdown()
        thread.join()
        proxy.server_close()


@contextlib.contextmanager
def start_distant_process(store: ObjectStore, seconds: float) -> Iterator[ObjectStore]:
    """A store behind a proxy in a process of its own, so that measurements do not share its interpreter."""
    with start_printing_port("-m", "tests.fault_proxy", store.endpoint, str(seconds)) as port:
        yield replace(store, endpoint=f"http://127.0.0.1:{port}")


if __name__ == "__main__":
    with start_fault_proxy(ObjectStore("store", sys.argv[1]), float(sys.argv[2])) as distant:
        sys.stdout.write(f"{distant.server_address[1]}\n")
        sys.stdout.flush()
        sys.stdin.read()
