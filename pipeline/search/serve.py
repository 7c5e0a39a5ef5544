"""The server of an index's page: the standard library's, on this machine unless told otherwise.

A page elsewhere can neither read it by a name that leads here (the Host header is checked) nor send it a form (Origin).
"""

from __future__ import annotations

import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from teacher_cache.pipeline.search.page import Reply, SearchPage
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.quantities import byte_size

_MOST_BYTES = 64 << 20
_AT_ONCE = 4  # answers; each may decode a picture of some 700 MB
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # not no-referrer: the page's own form would come from Origin "null"
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class _Handler(BaseHTTPRequestHandler):
    server: SearchServer
    server_version, sys_version = "teacher-cache", ""
    timeout = 30  # seconds that an idle connection may hold a thread

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        rest = int(length) if length.isdecimal() and len(length) <= 18 else 0
        if rest <= _MOST_BYTES:
            self._answer(_uploaded(self.headers.get("Content-Type", ""), self.rfile.read(rest)))
            return
        message = f"The picture has {byte_size(rest)}; at most {byte_size(_MOST_BYTES)} are taken."
        self._send(self.server.page.problem(413, message))
        while rest > 0 and (piece := self.rfile.read(min(rest, 1 << 16))):  # else no browser reads the answer
            rest -= len(piece)

    def _answer(self, upload: bytes | None) -> None:
        names = self.server.names(self.connection.getsockname()[0])
        host = self.headers.get("Host", "").lower()
        if host not in names:
            self._send(Reply(421, "text/plain", f"No answer by that name. Open http://{names[0]}/\n".encode()))
        elif self.headers.get("Origin", f"http://{host}") != f"http://{host}":
            self._send(Reply(403, "text/plain", b"No answer to a form of another page.\n"))
        elif upload == b"":
            self._send(self.server.page.problem(400, "No picture was sent. Choose a file first."))
        else:
            with self.server.slots:
                reply = self.server.page.reply(self.path, upload)
            self._send(reply)

    def _send(self, reply: Reply) -> None:
        with suppress(ConnectionError):  # a tab that is closed
            self.send_response(reply.status)
            self.send_header("Content-Type", reply.kind)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            self.wfile.write(reply.body)

    def end_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *values: object) -> None:
        """Log no request: it holds what was typed."""


class SearchServer(ThreadingHTTPServer):
    """A server that listens already; ``serve_forever`` answers. Closing it waits for the answers in the making.

    Args:
        host: name or IPv4 address to listen on. Only a loopback address keeps other machines out.
        port: 0 takes any free one.

    Attributes:
        address: IPv4 address that it listens on.

    Raises:
        UsageError: the address cannot be listened on.
    """

    def __init__(self, page: SearchPage, host: str, port: int) -> None:
        self.page, self.slots, self._host = page, threading.Semaphore(_AT_ONCE), host
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            message = f"--host {host} --port {port}: cannot listen ({error}). Name another; --port 0 takes any free one"
            raise UsageError(message) from error
        self.address: str = self.socket.getsockname()[0]

    def names(self, address: str) -> list[str]:
        """Return the Host headers of a browser that was told to open this server.

        Args:
            address: address at which a connection came in.
        """
        names = [f"{name}:{self.server_port}" for name in (address, "localhost", self._host.lower())]
        return [name.removesuffix(":80") for name in names]  # browsers leave the usual port out

    def server_close(self) -> None:
        """Stop listening and wait until no answer is being made; a thread in native code would crash the exit."""
        super().server_close()
        for _ in range(_AT_ONCE):
            self.slots.acquire()


def _uploaded(content_type: str, body: bytes) -> bytes:
    """Return the file in a form of one field (multipart/form-data, RFC 7578). Empty: none."""
    boundary = content_type.partition("boundary=")[2].strip('"').encode("latin-1")
    return body.partition(b"\r\n\r\n")[2].rpartition(b"\r\n--" + boundary)[0]
