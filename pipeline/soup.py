"""The mean of students that began at the same weights: one student, as small and as fast as each, often a better one.

Runs that differ in their seed, or in losses or learning rate, but not in where they began, end near enough to each
other for the mean of their weights to be a model too, one that errs less than any of them (Wortsman et al. 2022,
"Model soups", the uniform soup). BatchNorm's statistics are averaged like the weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import SoupConfig
from pipeline.new_folder import new_folder, require_free
from pipeline.runs import ORIGIN, AveragedRun, RunFolder, RunRecord, weights_file_sha256
from pipeline.student import Student, load_student, save_student
from storage.errors import UsageError

__all__ = ["mean_student", "soup"]

_CHECKPOINT = "checkpoints/mean"


def soup(config: SoupConfig) -> RunRecord:
    """Write the mean of finished runs as a run of its own, to be measured, deployed or begun from as any other.

    The folder appears whole or not at all. The runs are left as they are; no cache is opened.

    Raises:
        UsageError: fewer than two runs, one that is not finished, is named twice or is a mean itself, runs of other
            students or caches, runs that did not begin at the same weights, or an output folder that is there already.
    """
    out = Path(config.out)
    require_free(out)
    folders = [RunFolder(Path(run).resolve()) for run in config.runs]
    records = [folder.read() for folder in folders]
    _require_alike(folders, records)
    checkpoints = [folder.checkpoint_path() for folder in folders]
    averaged = tuple(
        AveragedRun(
            run=str(folder.path),
            checkpoint=str(record.checkpoint),
            weights_sha256=weights_file_sha256(checkpoint),
            config=record.config,
        )
        for folder, record, checkpoint in zip(folders, records, checkpoints, strict=True)
    )
    first = records[0]
    student = mean_student(checkpoints)
    made = first.model_copy(
        update={
            "config": first.config.model_copy(update={"out": config.out}),
            "accepted_mismatches": tuple(
                dict.fromkeys(each for record in records for each in record.accepted_mismatches)
            ),
            "view": "; ".join(dict.fromkeys(record.view for record in records)),
            "steps": sum(record.steps for record in records),
            "seconds": sum(record.seconds for record in records),
            "epochs": (),
            "best": None,
            "resumed_at": (),
            "averaged": averaged,
            "checkpoint": _CHECKPOINT,
        }
    )
    with new_folder(out) as folder:
        (folder / _CHECKPOINT).mkdir(parents=True)
        origin = made.model_dump(mode="json", include={*ORIGIN, "averaged"})
        save_student(student, made.student_config, folder / _CHECKPOINT, {**origin, "step": made.steps})
        RunFolder(folder).write(made)
    return made


@torch.no_grad()
def mean_student(checkpoints: list[Path]) -> Student:
    """A student whose every weight, and BatchNorm statistic, is the mean of those in checkpoints of one architecture.

    Summed in float64. What is no floating-point number, as the number of batches that a BatchNorm saw, is the first
    one's.

    Raises:
        UsageError: no checkpoint there, or one that cannot be used.
    """
    student, _ = load_student(checkpoints[0])
    state: dict[str, Tensor] = student.state_dict()
    sums = {name: value.double() for name, value in state.items() if value.is_floating_point()}
    for checkpoint in checkpoints[1:]:
        other = load_student(checkpoint)[0].state_dict()
        for name in sums:
            sums[name] += other[name]
    for name, total in sums.items():
        state[name].copy_(total / len(checkpoints))
    return student


def _require_alike(folders: list[RunFolder], records: list[RunRecord]) -> None:
    """That the mean of these runs can be a student."""
    if len(folders) < 2:
        raise UsageError("two runs or more are wanted: the mean of one is that run")
    twice = [
        str(folder.path) for at, folder in enumerate(folders) if folder.path in [each.path for each in folders[:at]]
    ]
    if twice:
        raise UsageError(f"{twice[0]}: is named twice, and would count double")
    for folder, record in zip(folders, records, strict=True):
        if record.averaged:
            of = " ".join(each.run for each in record.averaged)
            raise UsageError(f"{folder.path}: is a mean itself; name the runs that it is the mean of: {of}")
        if not record.finished:
            raise UsageError(
                f"{folder.path}: {len(record.epochs)} of {record.config.epochs} epochs are trained. Finish it by "
                f"teacher-cache train --resume --out {folder.path}"
            )
    first = records[0]
    for folder, record in zip(folders[1:], records[1:], strict=True):
        both = f"{folder.path} and {folders[0].path}"
        if record.student_config != first.student_config:
            raise UsageError(f"{both}: students of other architectures have no mean; name runs of one student")
        if record.cache_manifest_digest != first.cache_manifest_digest:
            raise UsageError(
                f"{both}: one learned from {record.config.cache} with manifest {record.cache_manifest_digest[:12]}, "
                f"the other from {first.config.cache} with {first.cache_manifest_digest[:12]}; name runs of one cache"
            )
        there, here = _beginning(folder, record), _beginning(folders[0], first)
        if there != here:
            raise UsageError(
                f"{both}: one began at {there}, the other at {here}, and the mean of students that began apart is "
                "worth nothing. Train them from one --init, with another --seed each"
            )


def _beginning(folder: RunFolder, record: RunRecord) -> str:
    """What a run began at, in words; runs of one beginning have the same."""
    if record.initial_weights_sha256 is not None:
        return f"weights {record.initial_weights_sha256[:12]}"
    if record.config.init is not None:
        return f"--init {record.config.init}"
    raise UsageError(
        f"{folder.path}: does not say at which weights it began, since an older version trained it. Train it anew"
    )
