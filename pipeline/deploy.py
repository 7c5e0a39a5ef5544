"""Ship a run's student: files for open_clip and ONNX Runtime, each proven, and one table of what all of it is worth.

Nothing lies in the output folder before everything has passed: a command that fails, or is killed, ships nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from pipeline.config import DeployConfig, EvaluateConfig, ZeroShotConfig
from pipeline.deploy_files import calibration_batches, write_files
from pipeline.deploy_gates import require_finite_weights
from pipeline.deploy_measure import Subject, measure
from pipeline.deployment import Deployment
from pipeline.device import keep_freed_memory
from pipeline.evaluation_split import EvaluationSplit, open_split
from pipeline.labelled import open_labelled
from pipeline.model_card import model_card
from pipeline.new_folder import new_folder, require_free
from pipeline.runs import RunFolder
from pipeline.student import load_student
from pipeline.student_table import StudentTable, to_markdown
from pipeline.table_picture import draw_table
from pipeline.teacher import LiveTeacher, load_teacher
from storage.errors import UsageError

__all__ = ["DeployResult", "deploy"]


class DeployResult(BaseModel, frozen=True):
    """What was shipped, and its table."""

    out: str
    deployment: Deployment
    table: StudentTable
    seconds: float


def deploy(config: DeployConfig, progress: Callable[[str, int, int], None] | None = None) -> DeployResult:
    """Export a run's student, prove each file against the trained model, measure all, and write them as one folder.

    Args:
        progress: called with (stage, done, of how many).

    Raises:
        UsageError: ``out`` is there, no such checkpoint or split, a teacher that cannot be loaded, an architecture that
            cannot be exported.
        CacheMismatchError: the teacher is not the cache's, or the cache not the run's.
        DeploymentError: weights that are no numbers; or a file failed its gate, the message says by how much. Nothing
            is written.
        OSError: an image cannot be read.
    """
    started = time.perf_counter()
    report = progress or (lambda stage, done, total: None)
    out = Path(config.out)
    require_free(out)
    run = RunFolder(config.run)
    record = run.read()
    run.require_finished(record)
    checkpoint = run.checkpoint_path(config.checkpoint)
    split = open_split(_as_evaluated(config), f"{config.run} was trained on another cache: leave --cache out.")
    zero_shot = None
    if config.zero_shot is not None:
        zero_shot = open_labelled(ZeroShotConfig(dataset=config.zero_shot, prompts=config.prompts or ""))
    teacher, teacher_probe = _teacher(config, split)
    keep_freed_memory(torch.device("cpu"))
    student, student_config = load_student(checkpoint)
    require_finite_weights(checkpoint, student)
    calibration = None
    if config.int8:
        rows = split.reader.image_rows(record.config.split)
        calibration = calibration_batches(split, rows, student.preprocess.to_config(), config.calibration_images)
    run_name = run.path.resolve().name
    name = f"{Path(record.config.student).stem}-{run_name}"
    with new_folder(out) as folder:
        deployment, reports = write_files(
            folder, student, student_config, checkpoint, record, name, run_name, calibration, report
        )
        del student
        chosen_on = record.chosen_on(config.checkpoint)
        subject = Subject(folder, deployment, reports, checkpoint, chosen_on, split, teacher, teacher_probe, zero_shot)
        table = measure(config, subject, report)
        (folder / "table.json").write_text(table.model_dump_json(indent=2) + "\n")
        (folder / "table.md").write_text(to_markdown(table))
        draw_table(table, folder / "table.png")
        (folder / "README.md").write_text(model_card(deployment, table, record.averaged))
    return DeployResult(out=str(out), deployment=deployment, table=table, seconds=time.perf_counter() - started)


def _as_evaluated(config: DeployConfig) -> EvaluateConfig:
    return EvaluateConfig(
        run=config.run,
        cache=config.cache,
        checkpoint=config.checkpoint,
        split=config.split,
        image_root=config.image_root,
    )


def _teacher(config: DeployConfig, split: EvaluationSplit) -> tuple[LiveTeacher, dict[str, Any]]:
    """The teacher of the cache, on the CPU, to be timed beside its student; and how to load it again.

    Raises:
        UsageError: it cannot be loaded.
        CacheMismatchError: it is another one.
    """
    identity = split.reader.manifest.identity
    recorded = identity.teacher
    name = config.teacher or recorded.name
    if config.teacher is None and name.startswith("local-dir:") and not Path(name.removeprefix("local-dir:")).is_dir():
        raise UsageError(
            f"the table has the teacher beside its student, and {name} is not below {Path.cwd()}: say where it is by "
            "--teacher local-dir:PATH"
        )
    pretrained = config.pretrained or (None if config.teacher else recorded.pretrained)
    teacher = load_teacher(name, pretrained, device="cpu", decoder=identity.preprocess.decoder)
    # its arithmetic is fp32 here, whatever the cache was made in
    teacher.require(
        identity.model_copy(update={"teacher": recorded.model_copy(update={"precision": "fp32"})}), split.cache
    )
    return teacher, {"name": name, "pretrained": pretrained, "device": "cpu"}
