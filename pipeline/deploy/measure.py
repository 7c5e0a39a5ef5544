"""Measurement of a student before it is shipped: teacher, student and ONNX files on the same images and captions."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.pipeline.data.images.decode import decode_image
from teacher_cache.pipeline.deploy.gates import (
    require_features,
    require_finite,
    require_recall,
    require_weights,
    row_cosines,
)
from teacher_cache.pipeline.deploy.onnx_student import OnnxStudent, Tower, towers_of
from teacher_cache.pipeline.deploy.record import Deployment, versions
from teacher_cache.pipeline.deploy.table import Cosine, Gate, Int8Report, Retained, Retention, StudentTable, TableRow
from teacher_cache.pipeline.evaluate.cost.measure import measure_cost, processor
from teacher_cache.pipeline.evaluate.cost.peak_memory import ProbeRequest
from teacher_cache.pipeline.evaluate.cost.results import CostModel, CostResult, ModelFacts
from teacher_cache.pipeline.evaluate.cost.torch_models import TorchModel
from teacher_cache.pipeline.evaluate.embed import BytesEncoder, CachedTeacher, embed
from teacher_cache.pipeline.evaluate.encoders import StudentEncoder, TeacherEncoder
from teacher_cache.pipeline.evaluate.intervals import bootstrap_accuracy_share, bootstrap_share
from teacher_cache.pipeline.evaluate.labelled_images import LabelledDataset
from teacher_cache.pipeline.evaluate.recall import RetrievalRanks, mean_recall, recall_of_ranks, retention
from teacher_cache.pipeline.evaluate.split import EvaluationSplit
from teacher_cache.pipeline.evaluate.zero_shot import Classification, ZeroShotEncoder, classify_dataset, common_rows
from teacher_cache.pipeline.models.student import load_student, student_tokenizer
from teacher_cache.pipeline.models.teacher import LiveTeacher
from teacher_cache.pipeline.settings.deploy import DeployConfig
from teacher_cache.storage.errors import UsageError

__all__ = ["Subject", "measure"]

_BATCHES = (1, 32)
_EMBEDDED_AT_ONCE = 16  # bounds the memory of decoded photographs and activations
_CPU = torch.device("cpu")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Subject:
    """A deployment to measure, with teacher and split.

    Attributes:
        folder: folder of the deployment.
        reports: int8 reports of the quantised towers.
        checkpoint: checkpoint that the files were made from.
        chosen_on: split that the checkpoint was chosen on, if any.
        teacher: the teacher, on the CPU.
        teacher_probe: arguments to load the teacher in another process, which measures its memory.
        zero_shot: labelled images to measure accuracy on, if any.
    """

    folder: Path
    deployment: Deployment
    reports: Mapping[Tower, Int8Report]
    checkpoint: Path
    chosen_on: str | None
    split: EvaluationSplit
    teacher: LiveTeacher
    teacher_probe: dict[str, Any]
    zero_shot: LabelledDataset | None


@dataclass
class _Model:
    """A row of the table while it is measured."""

    name: str
    engine: str
    bytes: int
    parameters: int
    encoder: ZeroShotEncoder
    timed: CostModel
    probe: ProbeRequest
    ranks: RetrievalRanks
    facts: ModelFacts | None = None
    int8_share: float | None = None
    cosine: dict[str, Cosine] | None = None
    places: Classification | None = None


def measure(config: DeployConfig, subject: Subject, progress: Progress) -> StudentTable:
    """Check the gates of all files, then measure every number of the table, on the CPU.

    Raises:
        DeploymentError: a file fails its gate; the message says by how much.
        OSError: an image cannot be read.
    """
    split, zero_shot = subject.split, subject.zero_shot
    before = torch.get_num_threads()
    threads = config.threads or before
    torch.set_num_threads(threads)
    try:
        models, gates = _with_recalls(subject, threads, config.max_recall_loss, progress)
        common = _classify(models, zero_shot, progress)
        cost = measure_cost(
            {model.name: model.timed for model in models},
            {model.name: model.facts for model in models if model.facts is not None},
            {model.name: model.probe for model in models},
            batches=_BATCHES,
            rounds=config.rounds,
            progress=progress,
        )
    finally:
        torch.set_num_threads(before)
    return StudentTable(
        student=subject.deployment.name,
        teacher=subject.deployment.teacher,
        run=subject.deployment.run,
        checkpoint=subject.checkpoint.name,
        chosen_on=subject.chosen_on,
        cache_manifest_digest=split.reader.manifest.digest,
        split=split.name,
        images=len(split.image_rows),
        captions=len(split.captions),
        teacher_precision=split.reader.manifest.identity.teacher.precision,
        quarantined=split.quarantined,
        zero_shot_dataset=None if zero_shot is None else without_folders(zero_shot.images.name),
        zero_shot_lost=0
        if zero_shot is None or common is None
        else len(zero_shot.lost_images) + len(zero_shot.images.labels) - len(common),
        zero_shot_images=None if common is None else len(common),
        zero_shot_classes=None if zero_shot is None else len(zero_shot.prompts),
        zero_shot_prompts=() if zero_shot is None else zero_shot.prompts[0],
        rounds=cost.rounds,
        threads=threads,
        date=datetime.date.today().isoformat(),
        hardware=processor(),
        versions=versions(),
        rows=tuple(_row(model, models[0], cost, split, common) for model in models),
        gates=tuple(gates),
        int8=dict(subject.reports),
    )


def _with_recalls(
    subject: Subject, threads: int, max_recall_loss: float, progress: Progress
) -> tuple[list[_Model], list[Gate]]:
    """Return the models with their ranks, and the gates that the files passed."""
    split, deployment = subject.split, subject.deployment

    def embedded(
        name: str, images: Callable[[list[bytes]], NDArray[np.float32]], encoder: ZeroShotEncoder
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return embed(
            split,
            BytesEncoder(images, encoder.embed_texts, _EMBEDDED_AT_ONCE),
            lambda stage, done, total: progress(f"{name}: {stage}", done, total),
        )

    models = [_teacher(subject, threads)]
    student = StudentEncoder(subject.checkpoint, _CPU)
    image, text = embedded(
        "student fp32", lambda images: student.embed_images([decode_image(data) for data in images]), student
    )
    models.append(_student(subject, student, split.ranks(image, text, device="cpu"), threads))
    gates = [require_weights(subject.folder, split, image, text)]
    for variant in deployment.towers:
        towers = towers_of(deployment, variant)
        onnx = OnnxStudent(subject.folder, towers, threads)
        name = _name(towers)
        found_image, found_text = embedded(name, onnx.embed_images, onnx)
        if variant == "fp32":
            gates += [
                require_features("image.onnx", found_image, image),
                require_features("text.onnx", found_text, text),
            ]
            ranks = split.ranks(found_image, found_text, device="cpu")
        else:
            require_finite(name, found_image, found_text)
            ranks = split.ranks(found_image, found_text, device="cpu")
            gates.append(require_recall(name, ranks, models[-1].ranks, max_recall_loss))
        arguments = {"folder": str(subject.folder.resolve()), "variants": towers, "threads": threads}
        int8 = sum(report.parameters_int8 for report in subject.reports.values())
        models.append(
            _Model(
                name=name,
                engine="ONNX Runtime",
                bytes=sum(deployment.towers[which][tower].bytes for tower, which in towers.items()),
                parameters=deployment.parameters,
                encoder=onnx,
                timed=onnx,
                probe=_probe("teacher_cache.pipeline.deploy.onnx_student:load_onnx_student", arguments, threads),
                ranks=ranks,
                int8_share=None if variant == "fp32" else int8 / deployment.parameters,
                cosine={"image": _cosine(found_image, image), "text": _cosine(found_text, text)},
            )
        )
    return models, gates


def _teacher(subject: Subject, threads: int) -> _Model:
    """Return the teacher: recall from its cached embeddings, cost from the loaded model."""
    teacher = subject.teacher
    timed = TorchModel(teacher.model, teacher.preprocess.size, teacher.tokenizer, _CPU)
    facts = timed.facts()
    return _Model(
        name="teacher fp32",
        engine="torch",
        bytes=facts.state_bytes or 0,
        parameters=facts.parameters or 0,
        encoder=TeacherEncoder(teacher),
        timed=timed,
        facts=facts,
        probe=_probe(
            "teacher_cache.pipeline.evaluate.cost.torch_models:load_teacher_model", subject.teacher_probe, threads
        ),
        ranks=subject.split.ranks(*embed(subject.split, CachedTeacher()), device="cpu"),
    )


def _student(subject: Subject, encoder: StudentEncoder, ranks: RetrievalRanks, threads: int) -> _Model:
    student, config = load_student(subject.checkpoint)
    timed = TorchModel(student.model, student.preprocess.size, student_tokenizer(config), _CPU)
    facts = timed.facts()
    arguments = {"folder": str(subject.checkpoint.resolve()), "device": "cpu"}
    return _Model(
        name="student fp32",
        engine="torch",
        bytes=facts.state_bytes or 0,
        parameters=subject.deployment.parameters,
        encoder=encoder,
        timed=timed,
        facts=facts,
        probe=_probe("teacher_cache.pipeline.evaluate.cost.torch_models:load_student_model", arguments, threads),
        ranks=ranks,
    )


def without_folders(dataset: str) -> str:
    """Return ``imagefolder:cifar10`` for ``imagefolder:/home/me/cifar10``: the table is published."""
    kind, _, rest = dataset.partition(":")
    if kind == "torchvision":
        return f"{kind}:{rest.partition(':')[0]}"
    return f"{kind}:{PurePosixPath(rest.partition('?')[0]).name}"


def _probe(loader: str, arguments: dict[str, Any], threads: int) -> ProbeRequest:
    return ProbeRequest(loader=loader, arguments=arguments, batch=max(_BATCHES), threads=threads)


def _name(towers: Mapping[Tower, str]) -> str:
    if len(set(towers.values())) == 1:
        return f"ONNX {towers['image']}"
    return "ONNX " + ", ".join(f"{variant} {tower}" for tower, variant in towers.items())


def _cosine(found: NDArray[np.float32], reference: NDArray[np.float32]) -> Cosine:
    cosines = row_cosines(found, reference)
    return Cosine(mean=float(cosines.mean()), least=float(cosines.min()))


def _classify(models: list[_Model], zero_shot: LabelledDataset | None, progress: Progress) -> NDArray[np.int64] | None:
    """Classify the labelled images with each model. Return the images that all of them classified."""
    if zero_shot is None:
        return None
    for model in models:

        def report(done: int, total: int, name: str = model.name) -> None:
            progress(f"{name}: zero-shot images", done, total)

        model.places = classify_dataset(model.encoder, zero_shot.images, zero_shot.prompts, progress=report)
    common = common_rows(*(model.places for model in models if model.places is not None))
    if not len(common):
        raise UsageError(f"{zero_shot.images.name}: not one image can be used by all models, so nothing is compared")
    return common


def _row(
    model: _Model, teacher: _Model, cost: CostResult, split: EvaluationSplit, common: NDArray[np.int64] | None
) -> TableRow:
    recalls = recall_of_ranks(model.ranks)
    retained: Retention | None = None
    if model is not teacher:
        shares = retention(recalls, recall_of_ranks(teacher.ranks))
        between = bootstrap_share(model.ranks, teacher.ranks, split.text_image)
        retained = Retention(
            **{
                direction: {
                    name: Retained(share=share, interval=getattr(between, direction)[name])
                    for name, share in shares[direction].items()
                }
                for direction in recalls
            },
            mean=Retained(share=shares["mean"], interval=between.mean),
        )
    accuracy = kept_accuracy = None
    if common is not None and model.places is not None and teacher.places is not None:
        accuracy = model.places.accuracies(common)
        if model is not teacher:
            ours, theirs = model.places.hits(common), teacher.places.hits(common)
            share = 100 * float(ours.sum()) / float(theirs.sum()) if theirs.any() else None
            kept_accuracy = Retained(share=share, interval=bootstrap_accuracy_share(ours, theirs))
    return TableRow(
        name=model.name,
        engine=model.engine,
        bytes=model.bytes,
        parameters=model.parameters,
        int8_share=model.int8_share,
        cost=cost.models[model.name],
        speed=cost.speed.get(model.name),
        recalls=recalls,
        mean_recall=mean_recall(recalls),
        cosine=model.cosine,
        retention=retained,
        zero_shot=accuracy,
        zero_shot_retention=kept_accuracy,
    )
