"""The mean of students that began at the same weights: one student, as small and as fast as each of them.

Runs that begin at one trained model and differ in their seed end close together. The mean of their weights is a model
too, better than they are on average and often better than the best of them (Wortsman et al. 2022, "Model soups": the
uniform soup). Runs that also differ in losses or learning rate may be averaged; whether
that helps is to be measured. BatchNorm's statistics are averaged like the weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import AveragedRun, RunRecord, weights_file_sha256
from teacher_cache.pipeline.models.student import Student, architecture_differences, load_student, save_student
from teacher_cache.pipeline.settings.student import MeanConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.new_files import new_folder, require_free

__all__ = ["mean_student", "soup"]

_CHECKPOINT = "checkpoints/mean"


def soup(config: MeanConfig) -> RunRecord:
    """Write the mean of finished runs as a run of its own, to be measured, deployed or begun from as any other.

    The folder appears whole or not at all. The runs are left as they are; no cache is opened.

    Raises:
        UsageError: fewer than two runs, one that is not finished, is there twice, is a mean itself or has lost its
            checkpoint, runs of other students or caches, runs that did not begin at the same trained weights, or an
            output folder that is there already.
    """
    out = Path(config.out)
    require_free(out)
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
    first = records[0]
    _require_different(averaged)
    made = first.model_copy(
        update={
            "config": first.config.model_copy(update={"out": config.out}),
            "accepted_mismatches": tuple(
                dict.fromkeys(mismatch for record in records for mismatch in record.accepted_mismatches)
            ),
            "view": "; ".join(dict.fromkeys(record.view for record in records)),
            "steps": sum(record.steps for record in records),
            "seconds": sum(record.seconds for record in records),
            "epochs": (),
            "best": None,
            "resumed_at": (),
            "averaged": averaged,
            "resized": None,
            "checkpoint": _CHECKPOINT,
        }
    )
    with new_folder(out) as folder:
        (folder / _CHECKPOINT).mkdir(parents=True)
        save_student(student, made.student_config, folder / _CHECKPOINT, {**made.origin(), "step": made.steps})
        RunFolder(folder).write(made)
    return made


@torch.no_grad()
def mean_student(checkpoints: list[Path]) -> Student:
    """Return the mean of students of one architecture: every weight, and every BatchNorm statistic.

    Of a factorised token embedding each factor is the mean. Summed in float64. What is no floating-point number, as the
    number of batches that a BatchNorm saw, is the first one's.

    Raises:
        UsageError: no checkpoint there, one that cannot be used, or one of another architecture than the first.
    """
    student, _ = load_student(checkpoints[0])
    state: dict[str, Tensor] = student.state_dict()
    sums = {name: value.double() for name, value in state.items() if value.is_floating_point()}
    for checkpoint in checkpoints[1:]:
        other, _ = load_student(checkpoint)
        different = architecture_differences(other, student)
        if different:
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
    """Check by their records that the runs can have a mean."""
    if len(folders) < 2:
        named = f"only {folders[0].path}" if folders else "none"
        raise UsageError(f"a mean is of two runs or more, found {named}. Name others that began at the same --init")
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
    first = records[0]
    for folder, record in zip(folders[1:], records[1:], strict=True):
        both = f"{folder.path} and {folders[0].path}"
        if record.cache_manifest_digest != first.cache_manifest_digest:
            raise UsageError(
                f"{both}: one learned from {record.config.cache} with manifest {record.cache_manifest_digest[:12]}, "
                f"the other from {first.config.cache} with {first.cache_manifest_digest[:12]}; name runs of one cache"
            )
        apart = _apart(record, first)
        if apart:
            raise UsageError(
                f"{both}: {apart}. The mean of students that began apart is worth nothing: train them from one --init, "
                "with another --seed each"
            )


def _apart(one: RunRecord, other: RunRecord) -> str | None:
    """Return why two runs are not known to have begun at the same weights. None: they are.

    Runs are compared by the digest of those weights. Older versions recorded none: then by the name of ``--init``.
    """
    first, second = one.initial_weights_sha256, other.initial_weights_sha256
    names = f"one began at --init {one.config.init}, the other at --init {other.config.init}"
    if first is None or second is None:
        older = "older versions did not record the weights, and the names are not the same"
        return f"{names}; {older}" if one.config.init != other.config.init else None
    if first == second:
        return None
    digests = f"{names}, with weights {first[:12]} and {second[:12]}"
    if one.config.init != other.config.init:
        return digests
    # an --init of another width's teacher leaves the projections to the seed
    return f"{digests}: what lies there was changed meanwhile, or has no projections to this teacher's width"


def _require_different(averaged: tuple[AveragedRun, ...]) -> None:
    """Check that no two runs have the same weights, whatever their folders are called."""
    seen: dict[str, str] = {}
    for run in averaged:
        if run.weights_sha256 in seen:
            raise UsageError(
                f"{run.run}: the very weights of {seen[run.weights_sha256]}, which would count double. Name each run "
                "once, and train each with another --seed"
            )
        seen[run.weights_sha256] = run.run
