"""SIGTERM and SIGINT in a loop of steps: they wait for the end of a step, and for what it learned to be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, Self, TypeVar

__all__ = ["StopRequests"]

Item = TypeVar("Item")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequests:
    """While the block runs, a SIGTERM or SIGINT is kept until the loop in it says that it may act; a second one acts.

    What it does then is what it would have done at once: the handlers from before are put back, and it is sent again.
    Outside the main thread, which alone can have handlers, nothing is kept, nor is a signal that is ignored.

    Args:
        save: called before a kept signal acts.
        active: whether to keep any.

    Attributes:
        asked: the signal that is kept; None if none came.
    """

    def __init__(self, save: Callable[[], None], active: bool = True) -> None:
        self.asked: signal.Signals | None = None
        self._save, self._active = save, active
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if self._active and threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.getsignal(number)
                # None: not set by Python, and lost if it were replaced
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        self._give_back()
        child = self._before.pop(signal.SIGCHLD, None)
        if child is not None and signal.getsignal(signal.SIGCHLD) == self._nothing:
            signal.signal(signal.SIGCHLD, child)

    def may_act(self) -> None:
        """Call between two steps: a signal that is kept acts now, after ``save``."""
        if self.asked is not None:
            self._save()
            self._act()

    def between_steps(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items, each asked for between two steps: who makes them may end by the signal that is kept.

        Raises:
            RuntimeError: as torch raises it when its workers are gone, and no signal is kept.
        """
        try:
            yield from items
        except RuntimeError:
            self.may_act()
            raise

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            self._act()
            return
        self.asked = signal.Signals(number)
        # who stops all processes of a run stops its decoders too; torch is told of each child that ends, and would
        # raise that in the middle of the step
        self._before.setdefault(signal.SIGCHLD, signal.signal(signal.SIGCHLD, self._nothing))

    def _act(self) -> None:
        asked, self.asked = self.asked, None
        self._give_back()
        assert asked is not None
        signal.raise_signal(asked)
        self.__enter__()  # its handler is one that lets the loop go on

    @staticmethod
    def _nothing(number: int, frame: FrameType | None) -> None:
        pass

    def _give_back(self) -> None:
        for number in _SIGNALS:
            if number in self._before:
                signal.signal(number, self._before.pop(number))
