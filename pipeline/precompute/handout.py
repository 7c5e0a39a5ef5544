"""Which chunks a worker gets next, and what becomes of those of a worker that was lost. No engine, no clock.

Spans are long while there is much to do, so that a worker's decoding, forward passes and writing overlap across chunks,
and short towards the end, so that nobody waits for the last one. A chunk whose worker was lost is given out again,
behind all others and by itself: if it ends worker after worker, it is known by name.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence

from teacher_cache.storage.format.commits import ChunkRef

__all__ = ["Handout"]

_MOST_CHUNKS = 8
_SPANS_A_WORKER = 4  # so many are still to come when a span is cut: the last ones are short


class Handout:
    """The chunks of one run that are waiting, and those that are with a worker.

    Args:
        tries: workers that a chunk may end, or errors of the moment that it may meet, until the run is stopped.
    """

    def __init__(self, refs: Iterable[ChunkRef], tries: int = 3) -> None:
        self._waiting = deque(refs)
        self._again: deque[ChunkRef] = deque()
        self._out: set[ChunkRef] = set()
        self._failures: Counter[ChunkRef] = Counter()
        self._tries = tries

    @property
    def waiting(self) -> int:
        """Chunks that nobody has."""
        return len(self._waiting) + len(self._again)

    @property
    def left(self) -> int:
        """Chunks that are not done."""
        return self.waiting + len(self._out)

    def take(self, workers: int) -> list[ChunkRef]:
        """Chunks for one of so many workers; none when nobody waits."""
        if self._waiting:
            size = min(_MOST_CHUNKS, max(1, len(self._waiting) // (_SPANS_A_WORKER * max(1, workers))))
            span = [self._waiting.popleft() for _ in range(size)]
        else:
            # not before: the claims of a lost worker on another machine have gone stale by then
            span = [self._again.popleft()] if self._again else []
        self._out.update(span)
        return span

    def done(self, span: Sequence[ChunkRef]) -> None:
        """These are committed."""
        self._out.difference_update(span)

    def give_back(self, span: Sequence[ChunkRef], why: Exception | None) -> None:
        """These are not done: to be given out again, one at a time.

        Args:
            why: the failure, which counts against each of them: a ChildProcessError where their worker was lost. None
                if it says nothing about them, as the loss of a node.

        Raises:
            Exception: ``why``, when a chunk has failed as often as it may; of a lost worker with the name of the chunk.
        """
        self._out.difference_update(span)
        self._again.extend(span)
        if why is None:
            return
        self._failures.update(span)
        for ref in span:
            if self._failures[ref] >= self._tries:
                if not isinstance(why, ChildProcessError):
                    raise why
                raise ChildProcessError(
                    f"chunk {ref.name} ended {self._tries} workers one after another, so it is not tried again; {why}"
                ) from why
