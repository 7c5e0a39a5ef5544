"""Worker process of the decode service, as it sees itself and as its parent sees it. No torch."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib import import_module
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import PIL.Image

from teacher_cache.pipeline.data.service.fork_server import start_fork_server
from teacher_cache.pipeline.data.service.slots import Slots

_START = threading.Lock()
# Pillow's memory of freed images that a worker keeps, of 16 MiB each: for a few megapixels and its resized copies. Only
# a process that decodes in one thread may do so
_PILLOW_BLOCKS = 8
_WHERE = ("__file__", "__spec__")  # by these a new process finds the script
_MOST_SECONDS = 1800.0  # for a ticket: with all tries, a store that is slow takes minutes


class Prepare(Protocol):
    """Preparation of a service's items. It is pickled once per worker, which calls it for one ticket at a time.

    Attributes:
        modules: modules that it needs and a worker's parent imports once for all of them.
    """

    modules: tuple[str, ...]

    def __call__(self, items: Sequence[Any], slots: Slots) -> list[Any]:
        """Write pixels or tokens of items into slots, and return a small result for each item."""
        ...

    def named(self, item: Any) -> str:
        """Return an item's name for a message."""
        ...


class _Failed(NamedTuple):
    """Reply to a ticket that raised."""

    error: Exception


class Worker:
    """A worker process. Started when it is made; :meth:`ready` waits until it takes tickets."""

    def __init__(self, prepare: Prepare, slots: Slots) -> None:
        context = start_fork_server(*prepare.modules)
        self._connection, other = context.Pipe()
        self._hung = False
        self._process = context.Process(target=_serve, args=(other, prepare, slots), name="decode", daemon=True)
        try:
            with _START, _hidden_main():
                self._process.start()
        except (EOFError, RuntimeError) as error:  # the server could not fork
            raise OSError(f"a decoding process cannot be started: {error or 'the system refuses'}") from error
        finally:
            other.close()

    def ready(self) -> Worker:
        """Wait until the process takes tickets, and return the worker.

        Raises:
            OSError: it ended before.
        """
        try:
            self._connection.recv()
        except (EOFError, OSError) as error:
            raise OSError(f"a decoding process ended at its start, {self.end()}; its own message is above") from error
        return self

    @property
    def pid(self) -> int | None:
        """Process id."""
        pid: int | None = self._process.pid
        return pid

    def send(self, items: Sequence[Any]) -> None:
        """Hand over a ticket. The worker takes them in order.

        Raises:
            OSError: the worker has ended.
            TicketError: an item cannot be pickled. Nothing was sent.
        """
        try:
            message = ForkingPickler.dumps(items)
        except Exception as error:
            raise TicketError(error) from error
        self._connection.send_bytes(message)

    def receive(self) -> list[Any]:
        """Wait for the results of the oldest ticket that was handed over.

        Raises:
            EOFError, OSError: the worker has ended, or was killed since it hangs.
            TicketError: the ticket raised, or its results cannot be read.
        """
        if not self._connection.poll(_MOST_SECONDS):
            self._hung = True
            self.kill()
        message = self._connection.recv_bytes()
        try:
            reply = ForkingPickler.loads(message)
        except Exception as error:
            raise TicketError(error) from error
        if isinstance(reply, _Failed):
            raise TicketError(reply.error)
        results: list[Any] = reply
        return results

    def is_alive(self) -> bool:
        """Return whether the process runs."""
        return bool(self._process.is_alive())

    def kill(self) -> None:
        """End the process. A thread that waits for its results gets an EOFError."""
        if self.is_alive():  # else its id may be another process's by now
            self._process.kill()

    def end(self) -> str:
        """Return how the process ended, and close the connection. No thread may wait for its results.

        It is killed if it has not ended within a second: its end is seen here before it is over.
        """
        self._process.join(1)
        self.kill()
        self._process.join()
        self._connection.close()
        if self._hung:
            return f"killed after {_MOST_SECONDS:g} s without a result"
        code = self._process.exitcode or 0
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"exit code {code}"


class TicketError(Exception):
    """A ticket raised ``error``."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _serve(parent: Connection, prepare: Prepare, slots: Slots) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends this one
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()
    for name in prepare.modules:
        import_module(name)
    core: Any = PIL.Image.core  # type: ignore[attr-defined]
    core.set_blocks_max(_PILLOW_BLOCKS)
    if "torch" in sys.modules:  # for a decoder that needs it: more threads would compete with the other workers
        sys.modules["torch"].set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):  # the parent has gone
        parent.send("ready")
        while True:
            items = parent.recv()
            try:
                reply = ForkingPickler.dumps(prepare(items, slots))
            except Exception as error:
                reply = ForkingPickler.dumps(_Failed(portable(error)))
            parent.send_bytes(reply)


def _end_with_parent() -> None:
    """End this worker when the process that it works for is killed. The fork server would live on with it."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker has one
    connection.wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Keep new processes from running the user's script again. They need nothing from it.

    Other threads meanwhile find all names of the script, to pickle them.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = stand_in = ModuleType("__main__")
    stand_in.__dict__.update({name: value for name, value in vars(main).items() if name not in _WHERE})
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def portable(error: Exception, where: str = "") -> Exception:
    """Return an error in a form that another process can rebuild, without its cause; at worst as an OSError.

    Args:
        where: is added to the message.
    """
    with contextlib.suppress(Exception):
        rebuilt: Exception = ForkingPickler.loads(ForkingPickler.dumps(error))
        if type(rebuilt) is type(error) and str(rebuilt) == str(error):
            if where and rebuilt.args == (str(error),):
                rebuilt.args = (f"{error} {where}",)
            return rebuilt
    return OSError(f"{type(error).__name__}: {error} {where}".rstrip())
