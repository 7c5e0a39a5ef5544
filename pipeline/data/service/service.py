"""Decode service: tickets of items in, results out in any order, pixels and tokens in shared slots.

Two forms have one interface. Threads are used where cores are few or the teacher runs on the CPU, which is the limit
there. Processes are used to feed a GPU: Python's lock lets threads prepare some 5,000 images/s, whatever the cores.

A ticket's results depend on its items alone, and its places are chosen before it is handed over. So the bytes that are
prepared do not depend on the number of workers, on their order or on a worker that is replaced.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from teacher_cache.pipeline.data.service.slots import Slots
from teacher_cache.pipeline.data.service.worker import Prepare, TicketError, Worker

IMAGES_PER_TICKET = 32
_SENT_AHEAD = 2  # tickets at one worker: it begins the second while the first one's results are on their way
_MOST_DEATHS = 2


class DecodeService(ABC):
    """Interface of both forms. As a context manager it is closed at the end.

    Attributes:
        ticket: number of images per ticket that suits this form.
    """

    ticket: int

    @abstractmethod
    def submit(self, items: Sequence[Any]) -> Future[list[Any]]:
        """Prepare items in order of submission. The future has a result per item, or the error of one.

        A ticket that no worker has taken can be cancelled by its future.
        """

    @abstractmethod
    def close(self) -> None:
        """Cancel what has not begun, and end all workers."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class DecodeThreads(DecodeService):
    """Service by threads of this process."""

    ticket = 1

    def __init__(self, prepare: Prepare, slots: Slots, threads: int) -> None:
        self._prepare, self._slots = prepare, slots
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def submit(self, items: Sequence[Any]) -> Future[list[Any]]:
        """See :class:`DecodeService`."""
        return self._pool.submit(self._prepare, items, self._slots)

    def close(self) -> None:
        """See :class:`DecodeService`."""
        self._pool.shutdown(cancel_futures=True)


@dataclass
class _Ticket:
    """Items that were submitted together, and their results as they come."""

    items: Sequence[Any]
    future: Future[list[Any]] = field(default_factory=Future)
    deaths_alone: int = 0
    begun: bool = False

    def begin(self) -> bool:
        """Mark it as begun, and return whether it is still wanted: not if it was cancelled."""
        self.begun = self.begun or self.future.set_running_or_notify_cancel()
        return self.begun

    def give_up(self) -> None:
        """End it without results."""
        if not self.future.cancel() and not self.future.done():
            self.future.set_exception(CancelledError())

    def alone(self) -> list[_Ticket]:
        """Return a ticket for each item. When the last one has ended, this one ends: with the first error, if any."""
        parts = [_Ticket([item], deaths_alone=self.deaths_alone) for item in self.items]

        def settle() -> None:
            errors = [CancelledError() if part.future.cancelled() else part.future.exception() for part in parts]
            if error := next(filter(None, errors), None):
                self.future.set_exception(error)
            else:
                self.future.set_result([result for part in parts for result in part.future.result()])

        when_all_done([part.future for part in parts], settle)
        return parts


def when_all_done(jobs: Sequence[Future[list[Any]]], call: Callable[[], None]) -> None:
    """Call a function once when all jobs have ended, in the thread of the last one; at once if they have."""
    remaining, lock = len(jobs), threading.Lock()

    def ended(_: Future[list[Any]]) -> None:
        nonlocal remaining
        with lock:
            remaining -= 1
            is_last = remaining == 0
        if is_last:
            call()

    for job in jobs:
        job.add_done_callback(ended)


class DecodeProcesses(DecodeService):
    """Service by worker processes, each served by a thread of this process.

    A worker that dies, or takes half an hour for a ticket and is killed, is replaced. The items that it had are
    prepared again, each alone. An item that is alone at two deaths ends with an OSError that names it. It is never
    taken for damaged, since the machine may be at fault.

    Raises:
        OSError: a worker cannot be started.
    """

    ticket = IMAGES_PER_TICKET

    def __init__(self, prepare: Prepare, slots: Slots, processes: int) -> None:
        self._prepare, self._slots = prepare, slots
        self._changed = threading.Condition()
        self._tickets: deque[_Ticket] = deque()
        self._idle, self._closed = 0, False
        self._failed: Exception | None = None
        self._workers = [Worker(prepare, slots) for _ in range(processes)]
        try:
            for worker in self._workers:
                worker.ready()
        except OSError:
            for worker in self._workers:
                worker.kill()
            raise
        self._threads = [
            threading.Thread(target=self._serve, args=(number,), name=f"decode {number}", daemon=True)
            for number in range(processes)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pids(self) -> list[int | None]:
        """Process ids of the workers."""
        return [worker.pid for worker in self._workers]

    def submit(self, items: Sequence[Any]) -> Future[list[Any]]:
        """See :class:`DecodeService`."""
        ticket = _Ticket(items)
        with self._changed:
            if self._closed:
                raise ValueError("this service is closed, and its processes have ended: make another one")
            if self._failed is not None:
                raise self._failed
            self._tickets.append(ticket)
            self._changed.notify()
        return ticket.future

    def close(self) -> None:
        """See :class:`DecodeService`."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            workers = [*self._workers]
        for worker in workers:
            worker.kill()
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            worker.end()
        for ticket in self._tickets:
            ticket.give_up()

    def _next(self, wait: bool) -> _Ticket | None:
        """Return the oldest ticket. None: closed; without ``wait`` also if idle workers will take what there is."""
        with self._changed:
            while not self._closed:
                if len(self._tickets) > (0 if wait else self._idle):
                    ticket = self._tickets.popleft()
                    if ticket.begin():
                        return ticket
                elif wait:
                    self._idle += 1
                    self._changed.wait()
                    self._idle -= 1
                else:
                    break
            return None

    def _serve(self, number: int) -> None:
        """Hand tickets to one worker until the service is closed, or no worker can be started."""
        sent: deque[_Ticket] = deque()
        try:
            while (ticket := self._next(wait=not sent)) or sent:
                try:
                    if ticket is not None:
                        self._send(number, ticket, sent)
                    if ticket is None or len(sent) == _SENT_AHEAD:
                        _settle(sent, self._workers[number])
                except (EOFError, OSError):
                    if self._closed:
                        break
                    self._blame(number, sent)
                    self._start(number)
        except Exception as error:  # no worker can be started
            self._fail(error)
        for ticket in sent:
            ticket.give_up()

    def _send(self, number: int, ticket: _Ticket, sent: deque[_Ticket]) -> None:
        """Hand a ticket to a worker. One that has died without work is replaced, and no ticket is blamed for it."""
        if not sent and not self._workers[number].is_alive():
            self._tickets_again([ticket])
            raise EOFError
        try:
            self._workers[number].send(ticket.items)
        except TicketError as raised:  # its items cannot be pickled
            ticket.future.set_exception(raised.error)
        except OSError:
            self._tickets_again([ticket])
            raise
        else:
            sent.append(ticket)

    def _blame(self, number: int, sent: deque[_Ticket]) -> None:
        """Queue the tickets of a dead worker again, the items of the one that it had begun each alone."""
        how = self._workers[number].end()
        if not sent:
            return
        first, *others = sent
        sent.clear()
        first.deaths_alone += len(first.items) == 1  # of several items, nobody knows which one did it
        if first.deaths_alone == _MOST_DEATHS:
            first.future.set_exception(OSError(self._fatal(first, how)))
        else:
            others = [*first.alone(), *others]
        self._tickets_again(others)

    def _tickets_again(self, tickets: Sequence[_Ticket]) -> None:
        with self._changed:
            self._tickets.extendleft(reversed(tickets))
            self._changed.notify_all()

    def _start(self, number: int) -> None:
        """Start a worker in place of a dead one.

        Raises:
            OSError: it cannot be started.
        """
        worker = Worker(self._prepare, self._slots)
        with self._changed:
            self._workers[number] = worker
            if self._closed:
                worker.kill()
        if not self._closed:
            worker.ready()

    def _fatal(self, ticket: _Ticket, how: str) -> str:
        return (
            f"{self._prepare.named(ticket.items[0])}: two processes ended while they had only this to prepare, the "
            f"second one {how}. Is this machine short of memory? Else leave it out"
        )

    def _fail(self, error: Exception) -> None:
        with self._changed:
            waiting = [*self._tickets]
            self._tickets.clear()
            self._failed = error
        for ticket in waiting:
            if ticket.begin():
                ticket.future.set_exception(error)


def _settle(sent: deque[_Ticket], worker: Worker) -> None:
    """Wait for the oldest ticket's reply, and pass it on."""
    try:
        results = worker.receive()
    except TicketError as raised:
        sent.popleft().future.set_exception(raised.error)
    else:
        sent.popleft().future.set_result(results)
