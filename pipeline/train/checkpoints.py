"""What rank 0 of a run writes: its logs, its checkpoints and its record."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import BestRecord, EpochRecord, RunRecord, Selection
from teacher_cache.pipeline.models.student import save_student
from teacher_cache.pipeline.train.optimizer import measured_weights
from teacher_cache.pipeline.train.resume import TrainState, save_resume_point
from teacher_cache.pipeline.train.step_log import StepLog
from teacher_cache.storage.observe.logs import event, logger

__all__ = ["RunWriter"]

_LOG = logger("train")


class RunWriter:
    """Writes one run while it trains. Only rank 0 has one.

    A run that resumes drops the log lines and the files that its checkpoint does not name.

    Args:
        record: as the run begins or resumes; replaced with each checkpoint.
    """

    def __init__(self, run: RunFolder, record: RunRecord, state: TrainState) -> None:
        self._run, self._record, self._state = run, record, state
        self._origin = record.origin()
        if record.checkpoint is not None:
            run.cut_log(state.point.step)
            run.remove_unnamed(record)
            run.write(record)
        self.log = StepLog(run, state.point.step)
        self._saved_at = time.monotonic()

    def is_due(self) -> bool:
        """Return whether the settings ask for a checkpoint after this step."""
        config = self._record.config
        if config.checkpoint_steps is not None and self._state.point.step % config.checkpoint_steps == 0:
            return True
        return time.monotonic() - self._saved_at >= config.checkpoint_seconds

    def save_step(self) -> None:
        """Save the run after the current step, unless that is saved already."""
        if self._state.point.step > self._record.steps:
            self._save(f"step-{self._state.point.step:08d}")

    def finish_epoch(self, finished: EpochRecord) -> None:
        """Log an epoch and save the run, as the best epoch too if it is. The state is at the next epoch's start."""
        point, before, selection = self._state.point, self._record, finished.selection
        self.log.epoch(point.step, finished)
        event(
            _LOG,
            logging.INFO,
            "epoch finished",
            step=point.step,
            num_rows=before.train_images,
            **finished.model_dump(exclude={"parts"}),
        )
        self._record = before.model_copy(
            update={"seconds": before.seconds + finished.seconds, "epochs": (*before.epochs, finished)}
        )
        best = None
        if selection is not None and (before.best is None or selection.mean_recall > before.best.mean_recall):
            best = self._best(finished.epoch, selection)
        self._save(f"epoch-{finished.epoch + 1:04d}", best)

    def _best(self, epoch: int, selection: Selection) -> BestRecord:
        return BestRecord(
            epoch=epoch,
            split=selection.split,
            mean_recall=selection.mean_recall,
            checkpoint=self._run.best_checkpoint(epoch),
        )

    def _save(self, name: str, best: BestRecord | None = None) -> None:
        self.log.flush()
        record, state = self._record.model_copy(update={"steps": self._state.point.step}), self._state

        def save_model(folder: Path, **more: Any) -> None:
            with measured_weights(state.average):
                origin = {**self._origin, "step": record.steps, **more}
                save_student(state.student, record.student_config, folder, origin)

        def save_all(folder: Path) -> None:
            save_model(folder)
            save_resume_point(folder, state)

        chosen = None
        if best is not None:
            how = best.model_dump(mode="json", exclude={"checkpoint"})
            chosen = (best, lambda folder: save_model(folder, chosen=how))
        self._record = self._run.checkpoint(record, name, save_all, chosen)
        self._saved_at = time.monotonic()
        event(_LOG, logging.INFO, "checkpoint saved", step=record.steps, checkpoint=self._record.checkpoint)
