"""Deployment of a run's student: checked files for each runtime, and a table of size, speed and recall.

The output folder appears after all gates have passed. A command that fails or is killed leaves none.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel

from teacher_cache.pipeline.data.batches.stored_images import CachedImages
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images.decode import decode_image
from teacher_cache.pipeline.data.images.model_input import ModelInput
from teacher_cache.pipeline.deploy.card import draw_table, model_card
from teacher_cache.pipeline.deploy.formats.export_onnx import export_towers
from teacher_cache.pipeline.deploy.formats.openvino_ir import write_openvino
from teacher_cache.pipeline.deploy.formats.quantize import NotQuantisable, quantize_tower
from teacher_cache.pipeline.deploy.formats.web import write_web
from teacher_cache.pipeline.deploy.gates import require_finite_weights
from teacher_cache.pipeline.deploy.measure import Subject, measure
from teacher_cache.pipeline.deploy.record import Artefact, Deployment, Variant, versions
from teacher_cache.pipeline.deploy.table import Int8Report, StudentTable, to_markdown
from teacher_cache.pipeline.deploy.tokens import tokenization_of
from teacher_cache.pipeline.evaluate.learned import count_learned
from teacher_cache.pipeline.evaluate.split import EvaluationSplit, open_split
from teacher_cache.pipeline.evaluate.zero_shot.labelled_images import open_labelled
from teacher_cache.pipeline.models.device import keep_freed_memory
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import CHECKPOINT_WEIGHTS, RunRecord, open_clip_config
from teacher_cache.pipeline.models.student import Student, load_student, student_tokenizer
from teacher_cache.pipeline.models.teacher import LiveTeacher, load_teacher
from teacher_cache.pipeline.settings.deploy import DeployConfig
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig, ZeroShotConfig
from teacher_cache.pipeline.settings.names import CHECKPOINT_CONFIG, without_path
from teacher_cache.pipeline.settings.recipes import trains_bias
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.new_files import new_folder, require_free
from teacher_cache.storage.read.reader import EmbeddingReader


class DeployResult(BaseModel, frozen=True):
    """The result of a deployment."""

    out: str
    deployment: Deployment
    table: StudentTable
    seconds: float


def deploy(config: DeployConfig, progress: Callable[[str, int, int], None] | None = None) -> DeployResult:
    """Export a run's student, check each file against the trained model, measure, and write one folder.

    Args:
        progress: called with (stage, done, total).

    Raises:
        UsageError: ``out`` exists, the checkpoint or split does not, the teacher cannot be loaded, or the architecture
            cannot be exported.
        CacheMismatchError: the cache was made by another teacher or with other preprocessing.
        DeploymentError: weights are not finite, or a file failed its gate; the message says by how much. Nothing is
            written.
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
    evaluated = EvaluateConfig(**config.model_dump(include=set(EvaluateConfig.model_fields)))
    split = open_split(evaluated)
    zero_shot = None
    if config.zero_shot is not None:
        zero_shot = open_labelled(ZeroShotConfig(dataset=config.zero_shot, prompts=config.prompts or ""))
    teacher, teacher_probe = _teacher(config, split)
    keep_freed_memory(torch.device("cpu"))
    student, student_config = load_student(checkpoint)
    require_finite_weights(checkpoint, student)
    calibration = None
    if config.int8:
        reader, root = split.reader, split.image_root
        if split.accepted_mismatches:  # other data are measured than it learned from
            reader, root = EmbeddingReader(record.config.cache), record.image_root
        rows = reader.image_rows(record.config.split)
        rows = rows[np.linspace(0, len(rows) - 1, min(config.calibration_images, len(rows))).round().astype(np.int64)]
        images = CachedImages(reader, ImageSource(root), rows.tolist())
        calibration = calibration_batches(images, rows, student.preprocess.to_config())
    run_name = run.path.resolve().name
    with new_folder(out) as folder:
        deployment, reports = write_files(
            folder, student, student_config, checkpoint, record, run_name, calibration, report
        )
        del student
        if config.web:
            write_web(folder, deployment)
        if config.openvino:
            deployment = write_openvino(folder, deployment)
        chosen_on = record.chosen_on(config.checkpoint)
        learned = count_learned(record, split.content_sha256, split.reader)
        subject = Subject(
            folder, deployment, reports, checkpoint, chosen_on, learned, split, teacher, teacher_probe, zero_shot
        )
        table = measure(config, subject, report)
        (folder / "table.json").write_text(table.model_dump_json(indent=2) + "\n")
        (folder / "table.md").write_text(to_markdown(table))
        draw_table(table, folder / "table.png")
        (folder / "README.md").write_text(model_card(deployment, table, record.averaged))
    return DeployResult(out=str(out), deployment=deployment, table=table, seconds=time.perf_counter() - started)


def _teacher(config: DeployConfig, split: EvaluationSplit) -> tuple[LiveTeacher, dict[str, Any]]:
    """Return the cache's teacher on the CPU, and the arguments to load it again."""
    identity = split.reader.manifest.identity
    recorded = identity.teacher
    name = config.teacher or recorded.name
    schema, _, path = name.partition(":")
    if config.teacher is None and without_path(name) and not Path(path).is_dir():
        raise UsageError(
            f"the table has the teacher beside its student, and {name} is not below {Path.cwd()}: say where it is by "
            f"--teacher {schema}:PATH"
        )
    pretrained = config.pretrained or (None if config.teacher else recorded.pretrained)
    teacher = load_teacher(name, pretrained, device="cpu", decoder=identity.preprocess.decoder)
    # the table times the teacher in fp32, whatever the cache was made in
    teacher.require(
        identity.model_copy(update={"teacher": recorded.model_copy(update={"precision": "fp32"})}), split.cache
    )
    return teacher, {"name": name, "pretrained": pretrained, "device": "cpu"}


_Tower = Literal["image", "text"]
_CALIBRATION_BATCH = 16


def write_files(
    folder: Path,
    student: Student,
    config: dict[str, Any],
    checkpoint: Path,
    record: RunRecord,
    run: str,
    calibration: Callable[[], Iterator[NDArray[np.float32]]] | None,
    progress: Callable[[str, int, int], None],
) -> tuple[Deployment, dict[_Tower, Int8Report]]:
    """Write all files but the table and the model card, the record last.

    Args:
        student: student loaded from ``checkpoint``.
        config: open_clip model config of the student.
        record: record of the run.
        run: name of the run; not its path, since the record is published.
        calibration: call that yields batches of pixels, (batch, 3, height, width); None for no int8 files.
        progress: called with (stage, done, total).

    Returns:
        The record, and the report of each quantised tower.

    Raises:
        UsageError: the architecture or tokenizer cannot be exported.
    """
    progress("export", 0, 4)
    towers = export_towers(student, folder)
    progress("export", 1, 4)
    files: dict[_Tower, Path] = {"image": towers.image, "text": towers.text}
    made: dict[Variant, dict[_Tower, Artefact]] = {"fp32": {name: Artefact.of(path) for name, path in files.items()}}
    refused: dict[str, str] = {}
    reports: dict[_Tower, Int8Report] = {}
    if calibration is not None:
        for done, (tower, path) in enumerate(files.items(), start=1):
            out = path.with_name(f"{tower}.int8.onnx")
            try:
                reports[tower] = quantize_tower(path, out, calibration() if tower == "image" else None)
            except NotQuantisable as error:
                refused[tower] = str(error)
                out.unlink(missing_ok=True)
            else:
                made.setdefault("int8", {})[tower] = Artefact.of(out)
            progress("export", 1 + done, 4)
    tokenization = tokenization_of(student_tokenizer(config), folder, towers.shortens)
    # a copy: promote compares its sha256 with the checkpoint's
    shutil.copyfile(checkpoint / CHECKPOINT_WEIGHTS, folder / CHECKPOINT_WEIGHTS)
    (folder / CHECKPOINT_CONFIG).write_text(open_clip_config(checkpoint))
    deployment = Deployment(
        name=f"{Path(record.config.student).stem}-{run}",
        teacher=record.teacher,
        parameters=student.num_parameters,
        embed_dim=student.embed_dim,
        logit_scale=float(student.model.logit_scale.detach().exp()),  # type: ignore[operator]
        logit_bias=_trained_bias(student, record),
        preprocess=student.preprocess.to_config(),
        tokenization=tokenization,
        towers=made,
        not_quantised=refused,
        weights=Artefact.of(folder / CHECKPOINT_WEIGHTS),
        run=run,
        checkpoint=checkpoint.name,
        cache_manifest_digest=record.cache_manifest_digest,
        made_with=versions(),
    )
    deployment.write(folder)
    progress("export", 4, 4)
    return deployment, reports


def _trained_bias(student: Student, record: RunRecord) -> float | None:
    bias = student.logit_bias
    return None if bias is None or not trains_bias(record.config.losses) else float(bias.detach())


def calibration_batches(
    images: CachedImages, rows: NDArray[np.int64], preprocess: dict[str, Any]
) -> Callable[[], Iterator[NDArray[np.float32]]]:
    """Return a call that yields batches of the student's input: float32 (16 or fewer, 3, height, width).

    Args:
        rows: rows of training images, since the others are measured.
    """
    seen = ModelInput.from_config(preprocess)

    def batches() -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(rows), _CALIBRATION_BATCH):
            part = rows[start : start + _CALIBRATION_BATCH]
            yield np.stack([seen.pixels(decode_image(images.read(int(row)))) for row in part])

    return batches
