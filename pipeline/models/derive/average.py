"""Mean of students that started from the same weights: one student of the same size and speed.

Runs that start from one trained model and differ in their seed end close together. The mean of their weights is better
than they are on average, and often better than the best (Wortsman et al. 2022, "Model soups": the uniform soup). Runs
with different losses or learning rates may be averaged too; measure whether that helps. BatchNorm statistics are
averaged like the weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import AveragedRun, RunRecord, weights_file_sha256
from teacher_cache.pipeline.models.student import Student, architecture_differences, load_student, save_run
from teacher_cache.pipeline.settings.student import MeanConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.new_files import require_free


def mean(config: MeanConfig) -> RunRecord:
    """Write the mean of finished runs as a run of its own, to be measured, deployed or started from like any other.

    The folder is created atomically. The runs stay unchanged; no cache is opened.

    Raises:
        UsageError: a run that is unfinished, repeated, a mean itself or without its checkpoint;
            runs of different students or caches, or from different initial weights; or the output folder exists.
    """
    require_free(Path(config.out))
    folders = [RunFolder(Path(run).resolve()) for run in config.runs]
    records = [folder.read() for folder in folders]
    _require_alike(folders, records)
    checkpoints = [folder.checkpoint_path() for folder in folders]
    student = mean_student(checkpoints)
    averaged = tuple(
        AveragedRun(
            run=str(folder.path),
            checkpoint=str(record.checkpoint),
            weights_sha256=weights_file_sha256(checkpoint),
            config=record.config,
            chosen_on=record.chosen_on("last"),
        )
        for folder, record, checkpoint in zip(folders, records, checkpoints, strict=True)
    )
    _require_different(averaged)
    mismatches = [mismatch for record in records for mismatch in record.accepted_mismatches]
    made = records[0].model_copy(
        update={
            "config": records[0].config.model_copy(update={"out": config.out}),
            "accepted_mismatches": tuple(dict.fromkeys(mismatches)),
            "view": "; ".join(dict.fromkeys(record.view for record in records)),
            "steps": sum(record.steps for record in records),
            "seconds": sum(record.seconds for record in records),
            "epochs": (),
            "best": None,
            "resumed_at": (),
            "averaged": averaged,
            "resized": None,
            "checkpoint": "checkpoints/mean",
        }
    )
    save_run(student, made, Path(config.out), {"step": made.steps})
    return made


@torch.no_grad()
def mean_student(checkpoints: list[Path]) -> Student:
    """Return the mean of students of one architecture: every weight and every BatchNorm statistic.

    The factors of a factorised token embedding are averaged separately. Sums are in float64. Values that are not
    floating-point, such as BatchNorm's number of batches, come from the first student.

    Raises:
        UsageError: a checkpoint is missing, cannot be used, or has another architecture than the first.
    """
    student, _ = load_student(checkpoints[0])
    state: dict[str, Tensor] = student.state_dict()
    sums = {name: value.double() for name, value in state.items() if value.is_floating_point()}
    for checkpoint in checkpoints[1:]:
        other, _ = load_student(checkpoint)
        if different := architecture_differences(other, student):
            raise UsageError(
                f"{checkpoint}: another student than that of {checkpoints[0]}: {'; '.join(different)}. Name "
                "runs of one student"
            )
        values = other.state_dict()
        for name in sums:
            sums[name] += values[name]
    for name, total in sums.items():
        state[name].copy_(total / len(checkpoints))
    return student


def _require_alike(folders: list[RunFolder], records: list[RunRecord]) -> None:
    """Check by their records that the runs can be averaged."""
    first = records[0]
    for folder, record in zip(folders, records, strict=True):
        if record.averaged:
            of = " ".join(one.run for one in record.averaged)
            raise UsageError(f"{folder.path}: is a mean itself; name the runs that it is the mean of: {of}")
        folder.require_finished(record)
        if record.config.init is None:
            raise UsageError(
                f"{folder.path}: began at random weights, and runs that did may end too far apart for a mean. Train "
                f"from one --init, for example --init {folder.path / str(record.checkpoint)}, with another --seed each"
            )
        both = f"{folder.path} and {folders[0].path}"
        if record.manifest_digests != first.manifest_digests:
            one, other = (
                " and ".join(map("{} with manifest {:.12}".format, each.config.caches, each.manifest_digests))
                for each in (record, first)
            )
            raise UsageError(f"{both}: one learned from {one}, the other from {other}; name runs of one cache")
        if apart := _apart(record, first):
            raise UsageError(
                f"{both}: {apart}. The mean of students that began apart is worth nothing: train them from one --init, "
                "with another --seed each"
            )


def _apart(one: RunRecord, other: RunRecord) -> str | None:
    """Return why two runs may have started from different weights. None: they started from the same.

    Runs are compared by the digest of their initial weights; runs of older versions, which have none, by the name of
    ``--init``.
    """
    first, second = one.initial_weights_sha256, other.initial_weights_sha256
    same_name = one.config.init == other.config.init
    if first == second is not None or (same_name and None in (first, second)):
        return None
    names = f"one began at --init {one.config.init}, the other at --init {other.config.init}"
    if first is None or second is None:
        return f"{names}; older versions did not record the weights, and the names are not the same"
    # of one name: for another teacher width the seed sets the projections
    why = ": what lies there was changed meanwhile, or has no projections to this teacher's width" if same_name else ""
    return f"{names}, with weights {first[:12]} and {second[:12]}{why}"


def _require_different(averaged: tuple[AveragedRun, ...]) -> None:
    """Check that no two runs have the same weights under different folder names."""
    seen: dict[str, str] = {}
    for run in averaged:
        if run.weights_sha256 in seen:
            raise UsageError(
                f"{run.run}: the very weights of {seen[run.weights_sha256]}, which would count double. Name each run "
                "once, and train each with another --seed"
            )
        seen[run.weights_sha256] = run.run
