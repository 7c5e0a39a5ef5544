"""Logs of steps and epochs: reproducible values in ``log.jsonl``; trackers such as TensorBoard have timings too."""

from __future__ import annotations

import logging
import time
from typing import Any

from pydantic import BaseModel, Field

from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import EpochRecord, Selection
from teacher_cache.pipeline.train.log.step_values import StepValues
from teacher_cache.pipeline.train.log.trackers import Trackers
from teacher_cache.storage.observe.logs import event, logger

_LOG = logger("train")


class StepLog:
    """The log of a run's steps, and its trackers. Only rank 0 has one."""

    def __init__(self, run: RunFolder, trackers: Trackers) -> None:
        self._run, self._trackers = run, trackers

    def step(self, epoch: int, values: StepValues, samples_per_second: float, data_wait_share: float) -> None:
        """Log one step."""
        after = {
            "learning_rate": values.learning_rate,
            "grad_norm": values.grad_norm,
            "logit_scale": values.logit_scale,
        }
        self._run.log({"step": values.step, "epoch": epoch, "loss": values.loss, **values.parts, **after})
        scalars = {
            "loss": values.loss,
            **{f"loss/{name}": value for name, value in values.parts.items()},
            **after,
            "samples_per_second": samples_per_second,
            "data_wait_share": data_wait_share,
        }
        self._trackers.log(scalars, values.step)

    def epoch(self, step: int, record: EpochRecord) -> None:
        """Log the means of an epoch, and the measurement after it, at its last step."""
        scalars = {"epoch/loss": record.loss}
        if record.selection is not None:
            scalars["select/mean_recall"] = record.selection.mean_recall
            for direction, recalls in record.selection.recalls.items():
                scalars |= {f"select/{direction}_{name}": value for name, value in recalls.items()}
        self._trackers.log(scalars, step)

    def flush(self) -> None:
        """Write all steps to disk. Called before a resume point is saved."""
        self._trackers.flush()
        self._run.sync_log()

    def close(self, finished: bool) -> None:
        """Write all steps and close the trackers."""
        self._trackers.close(finished)


class EpochSums(BaseModel):
    """Sums over the steps of an epoch so far.

    Attributes:
        seconds, waited: seconds of training, and of waiting for batches; pauses between processes do not count.
    """

    steps: int = 0
    values: dict[str, float] = Field(default_factory=dict)
    seconds: float = 0.0
    waited: float = 0.0


class EpochMeter:
    """Timer of an epoch's steps, which adds them to its sums.

    Call :meth:`batch_arrived`, :meth:`step_taken` and :meth:`wait` in this order. Time between the last two, such as
    writing a checkpoint, does not count as waiting. Call :meth:`values_read` before the next step is taken, and before
    the sums are saved.

    Attributes:
        rate: samples per second of this epoch in this process.
        wait_share: share of that time spent waiting for batches.
    """

    def __init__(self, sums: EpochSums, batch_size: int) -> None:
        self._sums, self._batch_size = sums, batch_size
        self._first, self._seconds, self._waited = sums.steps, sums.seconds, sums.waited
        self._started = self._waiting = self._arrived = time.perf_counter()
        self.rate = self.wait_share = 0.0
        self._timed: dict[str, Any] = {}

    def batch_arrived(self) -> None:
        """End the wait for a batch."""
        self._arrived = time.perf_counter()
        self._sums.waited += self._arrived - self._waiting

    def step_taken(self, rows: int) -> None:
        """Add a step on ``rows`` samples of this process."""
        sums, ended = self._sums, time.perf_counter()
        sums.steps += 1
        spent = ended - self._started
        sums.seconds = self._seconds + spent
        self._timed = {"data_wait_seconds": self._arrived - self._waiting, "seconds": ended - self._arrived}
        self._timed["num_samples"] = rows
        self.rate = (sums.steps - self._first) * self._batch_size / spent
        self.wait_share = (sums.waited - self._waited) / spent

    def values_read(self, values: StepValues) -> None:
        """Add the values of the last step taken."""
        for name, value in {"loss": values.loss, **values.parts}.items():
            self._sums.values[name] = self._sums.values.get(name, 0.0) + value
        event(_LOG, logging.DEBUG, "step finished", loss=values.loss, **self._timed)

    def wait(self) -> None:
        """Start the wait for the next batch."""
        self._waiting = time.perf_counter()

    def ended(self) -> None:
        """Count the time until the last step's values were read: a GPU works on it after it was launched."""
        self._sums.seconds = self._seconds + time.perf_counter() - self._started

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
