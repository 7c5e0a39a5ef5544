"""Delay of SIGTERM and SIGINT in a training loop, until the current step is saved."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, NoReturn, Self, TypeVar

_Item = TypeVar("_Item")
Vote = Callable[[bool], bool]

# timeout(1) sends its signal twice, to the command and to its whole group
_ONE_REQUEST_SECONDS = 0.5


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Raise KeyboardInterrupt, so that SIGTERM ends a command as Ctrl-C does."""
    raise KeyboardInterrupt


class StopRequests:
    """A block in which the first SIGTERM or SIGINT is delayed; a second one takes effect at once.

    For a signal to take effect, the previous handler is restored and the signal is sent again. Only signals that end
    the program are delayed: those handled by Python, by the system or by :func:`interrupt`. Other handlers, such as
    Prefect's, stay in place. Outside the main thread nothing is delayed: Python allows handlers only there.

    Args:
        save: called before a delayed signal takes effect, between two steps.
        active: whether to delay signals.
        vote: one of several processes that stop behind the same step calls it behind each of them: with whether it was
            asked to stop, and gets whether all stop now. A signal then acts there, or at the end of the block.

    Attributes:
        request: the delayed signal, or None.
    """

    def __init__(self, save: Callable[[], None] = lambda: None, active: bool = True, vote: Vote | None = None) -> None:
        self.request: signal.Signals | None = None
        self._save, self._active, self._vote = save, active, vote
        self._before: dict[int, Any] = {}
        self._requested_at = 0.0
        self._waiting = False

    def __enter__(self) -> Self:
        if self._active and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before in (signal.SIG_DFL, signal.default_int_handler, interrupt):
                    self._before[number] = before
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None and self._vote is None:
                self.may_act()
        finally:
            self._act()

    def may_act(self) -> None:
        """Save, then let a delayed signal take effect. Call between two steps."""
        if self._vote is not None:
            if not self._vote(self.request is not None):
                return
            self.request = self.request or signal.SIGTERM  # another process was asked
        if self.request is not None:
            self._save()
            self._act()

    def between_steps(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """Yield the items. A signal during the wait for the next item takes effect without that item, unless all vote.

        Raises:
            RuntimeError, OSError, EOFError: worker processes ended, but not by a signal to this process.
        """
        if self._vote is not None:
            yield from items
            return
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
            except (_MayActError, RuntimeError, OSError, EOFError):
                self.may_act()  # the same signal may have ended the workers
                raise
            yield item

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.request is None:
            self.request, self._requested_at = signal.Signals(number), now
            if self._waiting:
                raise _MayActError
        elif now - self._requested_at >= _ONE_REQUEST_SECONDS:
            self._act()

    def _act(self) -> None:
        request, self.request = self.request, None
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        if request is not None:
            signal.raise_signal(request)


class _MayActError(BaseException):
    """The end of a wait for the next item. Not an Exception, so that no handler catches it."""
