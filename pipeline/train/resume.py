"""A point of a run from which it resumes with the very next batch: safetensors and JSON, no pickle.

Beside the model of a checkpoint, in ``resume/``:

    state.json              step, the sums of the epoch so far, the cache's manifest digest
    weights.safetensors     the student's parameters and buffers, projections included
    optimizer.safetensors   AdamW's moments by parameter: ``exp_avg:model.visual.proj``
    average.safetensors     the averaged parameters, if there is an average
    queue.safetensors       the teacher's rows in the queue, if there is one

No state of a random generator: the order of the rows, the captions and the dropout of a step are functions of the
seed and the step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from teacher_cache.pipeline.models.run_folder import RESUME
from teacher_cache.pipeline.models.student import Student
from teacher_cache.pipeline.models.weights import write_weights
from teacher_cache.pipeline.train.losses import TeacherQueue
from teacher_cache.pipeline.train.optimizer import WeightAverage
from teacher_cache.storage.errors import UsageError

__all__ = ["EpochSums", "ResumePoint", "TrainState", "load_resume_point", "save_resume_point"]

_STATE, _WEIGHTS, _OPTIMIZER, _AVERAGE, _QUEUE = (
    "state.json",
    "weights.safetensors",
    "optimizer.safetensors",
    "average.safetensors",
    "queue.safetensors",
)


class EpochSums(BaseModel):
    """Sums over the steps of an epoch so far.

    Attributes:
        seconds, waited: of training, and of waiting for batches. Time between two processes of a run does not count.
    """

    steps: int = 0
    values: dict[str, float] = Field(default_factory=dict)
    seconds: float = 0.0
    waited: float = 0.0


class ResumePoint(BaseModel):
    """Progress of a run.

    Attributes:
        step: steps taken, which is the number of the next one from 0.
        epoch: number of the epoch that the next step belongs to, from 0.
        sums: of that epoch; 0 steps at its start.
        average_updates: updates of the weight average, if there is one.
        cache_manifest_digest: of the cache that the run learns from.
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
    """Write a resume point into ``folder``, an unfinished checkpoint that no record names yet."""
    folder = folder / RESUME
    folder.mkdir()
    write_weights(_on_cpu(state.student.state_dict()), folder / _WEIGHTS)
    moments = {
        f"{key}:{name}": value
        for name, parameter in state.student.named_parameters()
        for key, value in state.optimizer.state.get(parameter, {}).items()
    }
    write_weights(_on_cpu(moments), folder / _OPTIMIZER)
    if state.average is not None:
        state.point.average_updates = state.average.updates
        write_weights(_on_cpu(state.average.state()), folder / _AVERAGE)
    if state.queue is not None:
        write_weights(_on_cpu(state.queue.state_dict()), folder / _QUEUE)
    (folder / _STATE).write_text(state.point.model_dump_json(indent=2) + "\n")


def load_resume_point(folder: Path, state: TrainState) -> None:
    """Load weights, moments, average, queue and progress from a checkpoint into a state as the run began with it.

    Args:
        folder: of the checkpoint.

    Raises:
        UsageError: the checkpoint is of another student, or cannot be read.
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
    # torch numbers the parameters through all groups, in their order
    ordered = [names[parameter] for group in state.optimizer.param_groups for parameter in group["params"]]
    loaded: dict[str, Any] = state.optimizer.state_dict()
    loaded["state"] = {index: by_name[name] for index, name in enumerate(ordered) if name in by_name}
    state.optimizer.load_state_dict(loaded)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # clone: safetensors refuses tensors that share memory, as tied weights do
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
