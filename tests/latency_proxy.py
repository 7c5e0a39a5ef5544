"""A TCP proxy on loopback that makes a store as far away as one in a data centre is, and counts what is under way."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tests.object_store import ObjectStore

__all__ = ["LatencyProxy", "start_latency_process", "start_latency_proxy"]


class LatencyProxy:
    """Forwards connections; what a client sends arrives ``seconds`` later, so that each request takes so much longer.

    Connections wait side by side, as they do on a long line. Bytes are not changed.

    Attributes:
        port: on loopback.
        requests: how many came, by method and by the first folder of the key: ``("GET", "commits")``.
        most_at_once: requests that were waiting for the beginning of their answer at the same moment, at most.
    """

    def __init__(self, store: ObjectStore, seconds: float) -> None:
        target = urllib.parse.urlsplit(store.endpoint)
        assert target.hostname is not None
        assert target.port is not None
        self._host, self._target_port, self._seconds = target.hostname, target.port, seconds
        self._store = store
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting = 0
        self.port = 0
        self.forget()

    def forget(self) -> None:
        """Count from here."""
        self.requests: Counter[tuple[str, str]] = Counter()
        self.most_at_once = 0

    def front(self) -> ObjectStore:
        """The store as it is seen through the proxy."""
        return replace(self._store, endpoint=f"http://127.0.0.1:{self.port}")

    async def listen(self) -> asyncio.Server:
        """Begin to accept connections on a free port."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            answers, requests = await asyncio.open_connection(self._host, self._target_port)
            state = _Connection()
            both = [
                asyncio.create_task(self._upstream(reader, requests, state)),
                asyncio.create_task(self._downstream(answers, writer, state)),
            ]
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in both:
                    task.cancel()
                if state.waiting:
                    self._waiting -= 1
                requests.close()
                writer.close()

    async def _upstream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, state: _Connection) -> None:
        loop = asyncio.get_running_loop()
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                due, data = await line.get()
                await asyncio.sleep(due - loop.time())
                writer.write(data)
                await writer.drain()

        delivery = asyncio.create_task(deliver())
        try:
            while data := await reader.read(2**18):
                if not state.waiting:
                    state.waiting = True
                    self._count(data)
                line.put_nowait((loop.time() + self._seconds, data))
        finally:
            delivery.cancel()

    async def _downstream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, state: _Connection) -> None:
        while data := await reader.read(2**18):
            if state.waiting and not data.startswith(b"HTTP/1.1 100"):
                state.waiting = False
                self._waiting -= 1
            writer.write(data)
            await writer.drain()

    def _count(self, data: bytes) -> None:
        method, path = data.split(b" ", 2)[:2]
        inside = urllib.parse.unquote(path.decode()).partition("?")[0].partition(".cache/")[2]
        self.requests[method.decode(), inside.partition("/")[0]] += 1
        self._waiting += 1
        self.most_at_once = max(self.most_at_once, self._waiting)


class _Connection:
    waiting = False


@contextlib.contextmanager
def start_latency_proxy(store: ObjectStore, seconds: float) -> Iterator[LatencyProxy]:
    """A proxy in a thread of this process: its counts can be read."""
    proxy = LatencyProxy(store, seconds)
    ready, over = threading.Event(), threading.Event()

    async def serve() -> None:
        server = await proxy.listen()
        ready.set()
        while not over.is_set():
            await asyncio.sleep(0.05)
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="latency-proxy", daemon=True)
    thread.start()
    assert ready.wait(60), "the proxy did not start"
    try:
        yield proxy
    finally:
        over.set()
        thread.join(60)


@contextlib.contextmanager
def start_latency_process(store: ObjectStore, seconds: float) -> Iterator[ObjectStore]:
    """A proxy in a process of its own, so that measurements do not share its interpreter; the store seen through it."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.latency_proxy", store.endpoint, str(seconds)],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,  # it ends when the pipe does
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        port = child.stdout.readline().strip()
        assert port, "the proxy did not start"
        yield replace(store, endpoint=f"http://127.0.0.1:{port}")
    finally:
        child.stdin.close()
        child.wait(20)
        child.stdout.close()


async def _serve_until_stdin_ends(endpoint: str, seconds: float) -> None:
    proxy = LatencyProxy(ObjectStore("store", endpoint), seconds)
    await proxy.listen()
    sys.stdout.write(f"{proxy.port}\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(_serve_until_stdin_ends(sys.argv[1], float(sys.argv[2])))
