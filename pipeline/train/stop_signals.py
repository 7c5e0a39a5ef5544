"""SIGTERM and SIGINT in a loop of steps: they wait for the end of a step, and for what it learned to be saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, NoReturn, Self, TypeVar

__all__ = ["StopRequests", "interrupt"]

_Item = TypeVar("_Item")

# timeout(1) sends its signal twice, to the command and to its whole group
_ONE_REQUEST_SECONDS = 0.5


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """What a command does at SIGTERM: end as by Ctrl-C.

    Who stops all processes of a run, as systemd and timeout do, stops its decoders too. torch is told of each child
    that ends and would take that for a failure, down to the interpreter's last moments; it is not told any more.
    """
    signal.signal(signal.SIGCHLD, _nothing_more)
    raise KeyboardInterrupt


class StopRequests:
    """While the block runs, a SIGTERM or SIGINT is kept until it may act; a second one, later than at once, acts.

    What it does then is what it would have done: the handler from before is put back, and it is sent again. Kept are
    signals that end this program: by Python's handlers, by the system's or by :func:`interrupt`. A handler of others,
    as Prefect's, is left in its place, and so is one outside the main thread, which alone can have them.

    Args:
        save: called before a kept signal acts, where no step is half done.
        active: whether to keep any.

    Attributes:
        asked: the signal that is kept; None if none came.
    """

    def __init__(self, save: Callable[[], None] = lambda: None, active: bool = True) -> None:
        self.asked: signal.Signals | None = None
        self._save, self._active = save, active
        self._before: dict[int, Any] = {}
        self._process = os.getpid()
        self._asked_at = 0.0
        self._waiting = False

    def __enter__(self) -> Self:
        if self._active and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before in (signal.SIG_DFL, signal.default_int_handler, interrupt):
                    self._before[number] = before
                    signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                self.may_act()
        finally:
            self._give_back()
            child = self._before.pop(signal.SIGCHLD, None)
            if child is not None and signal.getsignal(signal.SIGCHLD) is _nothing:
                signal.signal(signal.SIGCHLD, child)
            self._act()

    def may_act(self) -> None:
        """Call between two steps: a signal that is kept acts now, after ``save``."""
        if self.asked is not None:
            self._save()
            self._act()

    def between_steps(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """The same items, each asked for between two steps: a signal that comes meanwhile does not wait for it.

        Raises:
            RuntimeError, OSError, EOFError: as torch raises them when its workers are gone, and no signal is kept.
        """
        iterator = iter(items)
        while True:
            try:
                self._waiting = True
                try:
                    item = next(iterator)
                finally:
                    self._waiting = False
            except StopIteration:
                return
            except _MayActError:
                self.may_act()
                raise
            except (RuntimeError, OSError, EOFError):
                self.may_act()  # who makes them has ended by the signal, too
                raise
            yield item

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if os.getpid() != self._process:  # forked from within; torch has handlers of its own for other signals there
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
        elif self.asked is None:
            self.asked, self._asked_at = signal.Signals(number), now
            self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, _nothing)  # see interrupt
            if self._waiting:
                raise _MayActError
        elif now - self._asked_at >= _ONE_REQUEST_SECONDS:
            self._act()

    def _act(self) -> None:
        asked, self.asked = self.asked, None
        self._give_back()
        if asked is not None:
            signal.raise_signal(asked)

    def _give_back(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            if number in self._before:
                signal.signal(number, self._before.pop(number))


class _MayActError(BaseException):
    """Out of a wait for the next item, past all who catch an Exception on the way."""


def _nothing(number: int, frame: FrameType | None) -> None:
    pass


def _nothing_more(number: int, frame: FrameType | None) -> None:
    pass
