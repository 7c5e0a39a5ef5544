"""Checkpoints of a run. A run resumes from one with the next batch. No pickle.

A checkpoint has, beside the model, a folder ``resume/``:

    state.json              step, the sums of the epoch so far, the cache's manifest digest
    weights.safetensors     the student's parameters and buffers, projections included
    optimizer.safetensors   AdamW's moments by parameter: ``exp_avg:model.visual.proj``
    average.safetensors     the averaged parameters, if any
    queue.safetensors       the teacher's rows in the queue, if any

No state of a random generator is saved: the rows, captions and dropout of a step are functions of seed and step.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from teacher_cache.pipeline.models.run_folder import RESUME, RunFolder
from teacher_cache.pipeline.models.run_record import BestRecord, EpochRecord, RunRecord
from teacher_cache.pipeline.models.student import Student, save_student
from teacher_cache.pipeline.models.weights import write_weights
from teacher_cache.pipeline.train.log.step_log import EpochSums, StepLog
from teacher_cache.pipeline.train.log.trackers import Trackers
from teacher_cache.pipeline.train.losses import TeacherQueue
from teacher_cache.pipeline.train.optimizer import WeightAverage, measured_weights
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.logs import event, logger

_LOG = logger("train")

_STATE, _WEIGHTS, _OPTIMIZER = "state.json", "weights.safetensors", "optimizer.safetensors"
_AVERAGE, _QUEUE = "average.safetensors", "queue.safetensors"


class ResumePoint(BaseModel):
    """Progress of a run.

    Attributes:
        step: number of steps taken.
        epoch: epoch of the next step, from 0; ``sums`` are over that epoch so far.
        average_updates: number of updates of the weight average.
    """

    step: int = 0
    epoch: int = 0
    sums: EpochSums = Field(default_factory=EpochSums)
    average_updates: int = 0
    cache_manifest_digest: str = ""


@dataclass
class TrainState:
    """Everything that training changes from step to step, on its device."""

    student: Student
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None = None
    queue: TeacherQueue | None = None
    point: ResumePoint = field(default_factory=ResumePoint)


def save_resume_point(folder: Path, state: TrainState) -> None:
    """Write a resume point into ``folder``, a checkpoint that the run's record does not name yet."""
    folder = folder / RESUME
    folder.mkdir()
    files = {_WEIGHTS: state.student.state_dict()}
    files[_OPTIMIZER] = {
        f"{key}:{name}": value
        for name, parameter in state.student.named_parameters()
        for key, value in state.optimizer.state.get(parameter, {}).items()
    }
    if state.average is not None:
        state.point.average_updates = state.average.updates
        files[_AVERAGE] = state.average.state()
    if state.queue is not None:
        files[_QUEUE] = state.queue.state_dict()
    for name, tensors in files.items():
        # clone: safetensors refuses tied weights, which share memory
        write_weights(
            {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}, folder / name
        )
    (folder / _STATE).write_text(state.point.model_dump_json(indent=2) + "\n")


def load_resume_point(folder: Path, state: TrainState) -> None:
    """Load weights, moments, average, queue and progress from a checkpoint's folder into a fresh state.

    Raises:
        UsageError: the checkpoint belongs to another student, or cannot be read.
    """
    folder = folder / RESUME
    try:
        state.point = ResumePoint.model_validate_json((folder / _STATE).read_bytes())
        state.student.load_state_dict(load_file(folder / _WEIGHTS))
        _load_moments(state, load_file(folder / _OPTIMIZER))
        if state.average is not None:
            state.average.load(load_file(folder / _AVERAGE), state.point.average_updates)
        if state.queue is not None:
            state.queue.load_state_dict(load_file(folder / _QUEUE))
    except (OSError, ValidationError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise UsageError(
            f"{folder}: no point that this run could go on from: {type(error).__name__}: {error}. "
            "Train anew with another --out."
        ) from error


def _load_moments(state: TrainState, moments: dict[str, Tensor]) -> None:
    names = {parameter: name for name, parameter in state.student.named_parameters()}
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in moments.items():
        kind, _, name = key.partition(":")
        by_name.setdefault(name, {})[kind] = value
    # torch numbers the parameters across all groups
    ordered = [names[parameter] for group in state.optimizer.param_groups for parameter in group["params"]]
    loaded: dict[str, Any] = state.optimizer.state_dict()
    loaded["state"] = {index: by_name[name] for index, name in enumerate(ordered) if name in by_name}
    state.optimizer.load_state_dict(loaded)


class RunWriter:
    """Writer of one run's log and checkpoints. Only rank 0 has one.

    On resume, log lines after the checkpoint and files that the record does not name are removed.

    Args:
        record: record at the start or resume of the run; replaced with each checkpoint.
    """

    def __init__(self, run: RunFolder, record: RunRecord, state: TrainState, trackers: Trackers) -> None:
        self._run, self._record, self._state = run, record, state
        self._origin = record.origin()
        if record.checkpoint is not None:
            run.cut_log(state.point.step)
            run.switch(record)
        self.log = StepLog(run, trackers)
        self._saved_at = time.monotonic()

    def is_due(self) -> bool:
        """Return whether the settings ask for a checkpoint after this step."""
        config = self._record.config
        if config.checkpoint_steps is not None and self._state.point.step % config.checkpoint_steps == 0:
            return True
        return time.monotonic() - self._saved_at >= config.checkpoint_seconds

    def save_step(self) -> None:
        """Save the run after the current step, unless it is already saved."""
        if self._state.point.step > self._record.steps:
            self._save(f"step-{self._state.point.step:08d}")

    def finish_epoch(self, finished: EpochRecord) -> None:
        """Log a finished epoch and save the run, also as the best if it is. The state is at the next epoch."""
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
        name, best = f"epoch-{finished.epoch + 1:04d}", None
        if selection is not None and (before.best is None or selection.mean_recall > before.best.mean_recall):
            best = BestRecord(
                epoch=finished.epoch,
                split=selection.split,
                mean_recall=selection.mean_recall,
                checkpoint=f"checkpoints/best-{name}",
            )
        self._save(name, best)

    def _save(self, name: str, best: BestRecord | None = None) -> None:
        self.log.flush()
        checkpoint = f"checkpoints/{name}"
        record = self._record.model_copy(update={"steps": self._state.point.step, "checkpoint": checkpoint})
        with self._run.new_checkpoint(checkpoint) as folder:
            self._save_model(folder)
            save_resume_point(folder, self._state)
        if best is not None:
            record = record.model_copy(update={"best": best})
            with self._run.new_checkpoint(best.checkpoint) as folder:
                self._save_model(folder, chosen=best.model_dump(mode="json", exclude={"checkpoint"}))
        self._run.switch(record)
        self._record = record
        self._saved_at = time.monotonic()
        event(_LOG, logging.INFO, "checkpoint saved", step=record.steps, checkpoint=checkpoint)

    def _save_model(self, folder: Path, **more: Any) -> None:
        with measured_weights(self._state.average):
            origin = {**self._origin, "step": self._state.point.step, **more}
            save_student(self._state.student, self._record.student_config, folder, origin)
