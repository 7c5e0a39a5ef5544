"""Sums and speeds of an epoch."""

from __future__ import annotations

import logging
import time

from teacher_cache.pipeline.models.run_record import EpochRecord, Selection
from teacher_cache.pipeline.train.resume import EpochSums
from teacher_cache.pipeline.train.step import StepValues
from teacher_cache.storage.observe.logs import event, logger

__all__ = ["EpochMeter"]

_LOG = logger("train")


class EpochMeter:
    """Adds the steps of an epoch to its sums, and times them.

    Call :meth:`batch_arrived`, :meth:`step_taken` and :meth:`wait` in this order. What happens between the last two,
    such as writing a checkpoint, is no wait for data.

    Attributes:
        rate: samples per second of this epoch in this process.
        wait_share: share of the seconds in which it waited for batches.
    """

    def __init__(self, sums: EpochSums, batch_size: int) -> None:
        self._sums, self._batch_size = sums, batch_size
        self._first, self._seconds, self._waited = sums.steps, sums.seconds, sums.waited
        self._started = self._waiting = self._arrived = time.perf_counter()
        self.rate = self.wait_share = 0.0

    def batch_arrived(self) -> None:
        """Add the wait for a batch."""
        self._arrived = time.perf_counter()
        self._sums.waited += self._arrived - self._waiting

    def step_taken(self, values: StepValues, rows: int) -> None:
        """Add a step on ``rows`` rows of this process."""
        sums, ended = self._sums, time.perf_counter()
        sums.steps += 1
        for name, value in {"loss": values.loss, **values.parts}.items():
            sums.values[name] = sums.values.get(name, 0.0) + value
        spent = ended - self._started
        sums.seconds = self._seconds + spent
        timed = {"data_wait_seconds": self._arrived - self._waiting, "seconds": ended - self._arrived}
        event(_LOG, logging.DEBUG, "step finished", num_samples=rows, loss=values.loss, **timed)
        self.rate = (sums.steps - self._first) * self._batch_size / spent
        self.wait_share = (sums.waited - self._waited) / spent

    def wait(self) -> None:
        """Begin to wait for the next batch."""
        self._waiting = time.perf_counter()

    @staticmethod
    def finished(epoch: int, sums: EpochSums, batch_size: int, selection: Selection | None) -> EpochRecord:
        """Return the means of a finished epoch."""
        means = {name: total / sums.steps for name, total in sums.values.items()}
        return EpochRecord(
            epoch=epoch,
            loss=means.pop("loss"),
            parts=means,
            seconds=sums.seconds,
            samples_per_second=sums.steps * batch_size / sums.seconds,
            data_wait_share=sums.waited / sums.seconds,
            selection=selection,
        )
