"""Measurement of a student before it is shipped: teacher, student and ONNX files on the same images and captions."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.pipeline.data.images.decode import decode_image
from teacher_cache.pipeline.deploy.gates import (
    require_finite,
    require_parity,
    require_recall,
    require_weights,
    row_cosines,
)
from teacher_cache.pipeline.deploy.onnx_student import OnnxStudent, Tower, towers_of
from teacher_cache.pipeline.deploy.record import Deployment, Variant
from teacher_cache.pipeline.deploy.table import Cosine, Gate, Int8Report, Retained, Retention, StudentTable, TableRow
from teacher_cache.pipeline.evaluate.cost.measure import measure_cost, processor
from teacher_cache.pipeline.evaluate.cost.peak_memory import ProbeRequest
from teacher_cache.pipeline.evaluate.cost.results import CostResult, MeasuredModel
from teacher_cache.pipeline.evaluate.cost.torch_models import TorchModel, load_student_model, load_teacher_model, loaded
from teacher_cache.pipeline.evaluate.intervals import bootstrap_accuracy_share, bootstrap_share
from teacher_cache.pipeline.evaluate.recall import (
    RetrievalRanks,
    mean_recall,
    recall_of_ranks,
    retention,
)
from teacher_cache.pipeline.evaluate.split import BytesEncoder, CachedTeacher, Embedded, EvaluationSplit, embed
from teacher_cache.pipeline.evaluate.zero_shot.labelled_images import LabelledDataset
from teacher_cache.pipeline.evaluate.zero_shot.measure import (
    Classification,
    StudentEncoder,
    TeacherEncoder,
    ZeroShotEncoder,
    classify_dataset,
    common_rows,
)
from teacher_cache.pipeline.models.teacher import LiveTeacher
from teacher_cache.pipeline.settings.deploy import DeployConfig
from teacher_cache.storage.errors import UsageError

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
        learned_images: number of the split's images that the student learned from; None if it is not known.
        teacher: the teacher, on the CPU.
        teacher_probe: arguments to load the teacher in another process, which measures its memory.
        zero_shot: labelled images to measure accuracy on, if any.
    """

    folder: Path
    deployment: Deployment
    reports: Mapping[Tower, Int8Report]
    checkpoint: Path
    chosen_on: str | None
    learned_images: int | None
    split: EvaluationSplit
    teacher: LiveTeacher
    teacher_probe: dict[str, Any]
    zero_shot: LabelledDataset | None


@dataclass(frozen=True)
class _Model:
    """A row of the table before zero-shot accuracy and cost are measured."""

    name: str
    encoder: ZeroShotEncoder
    measured: MeasuredModel
    bytes: int
    ranks: RetrievalRanks
    engine: str = "torch"
    int8_share: float | None = None
    cosine: dict[str, Cosine] | None = None


def measure(config: DeployConfig, subject: Subject, progress: Progress) -> StudentTable:
    """Check the gates of all files, then measure every number of the table, on the CPU.

    Raises:
        DeploymentError: a file fails its gate; the message says by how much.
        OSError: an image cannot be read.
    """
    split, deployment = subject.split, subject.deployment
    before = torch.get_num_threads()
    threads = config.threads or before
    torch.set_num_threads(threads)
    try:
        models, gates = _with_recalls(subject, threads, config.max_recall_loss, progress)
        places = _classify(models, subject.zero_shot, progress) if subject.zero_shot is not None else {}
        cost = measure_cost({model.name: model.measured for model in models}, _BATCHES, config.rounds, progress)
    finally:
        torch.set_num_threads(before)
    return StudentTable(
        student=deployment.name,
        teacher=deployment.teacher,
        run=deployment.run,
        checkpoint=subject.checkpoint.name,
        chosen_on=subject.chosen_on,
        cache_manifest_digest=split.reader.manifest.digest,
        split=split.name,
        images=len(split.image_rows),
        captions=len(split.captions),
        learned_images=subject.learned_images,
        teacher_precision=split.reader.manifest.identity.teacher.precision,
        quarantined=split.quarantined,
        **({} if subject.zero_shot is None else _zero_shot_facts(subject.zero_shot, places)),
        rounds=cost.rounds,
        threads=threads,
        date=datetime.date.today().isoformat(),
        hardware=processor(),
        versions=deployment.made_with,
        rows=tuple(_row(subject, model, models[0], cost, places) for model in models),
        gates=tuple(gates),
        int8=dict(subject.reports),
    )


def _with_recalls(
    subject: Subject, threads: int, max_recall_loss: float, progress: Progress
) -> tuple[list[_Model], list[Gate]]:
    """Return the models with their ranks, and the gates that the files passed."""
    split = subject.split
    models = [_teacher(subject, threads)]
    student = StudentEncoder(subject.checkpoint, _CPU)
    own = _embedded(split, "student fp32", student, progress)
    arguments = {"folder": str(subject.checkpoint.resolve()), "device": "cpu"}
    measured = loaded(load_student_model, arguments, max(_BATCHES), threads)
    ranks = split.ranks(*own, device="cpu")
    models.append(_Model("student fp32", student, measured, measured.facts.state_bytes or 0, ranks))
    gates = [require_weights(subject.folder, split, *own)]
    for variant in subject.deployment.towers:
        towers, files = towers_of(subject.deployment, variant), subject.deployment.towers[variant]
        name = _name(towers)
        onnx = OnnxStudent(subject.folder, towers, threads)
        features = _embedded(split, name, onnx, progress)
        cosines = {tower: _cosine(*rows) for tower, *rows in zip(("image", "text"), features, own, strict=True)}
        if variant == "int8":
            require_finite(name, *features)
        else:
            for artefact, cosine, rows in zip(files.values(), cosines.values(), features, strict=True):
                number = f"least cosine to torch, {len(rows):,} rows"
                gates.append(require_parity(artefact.file, cosine.least, number))
        ranks = split.ranks(*features, device="cpu")
        if variant == "int8":
            gates.append(require_recall(name, ranks, models[-1].ranks, max_recall_loss))
        models.append(_onnx(subject, towers, onnx, ranks, cosines, threads))
    return models, gates


def _embedded(split: EvaluationSplit, name: str, encoder: ZeroShotEncoder, progress: Progress) -> Embedded:
    with ThreadPoolExecutor() as pool:

        def images(stored: list[bytes]) -> NDArray[np.float32]:
            return encoder.embed_images(list(pool.map(lambda data: encoder.prepare(decode_image(data)), stored)))

        return embed(
            split,
            BytesEncoder(images, encoder.embed_texts, _EMBEDDED_AT_ONCE),
            lambda stage, done, total: progress(f"{name}: {stage}", done, total),
        )


def _teacher(subject: Subject, threads: int) -> _Model:
    """Return the teacher: recall from its cached embeddings, cost from the loaded model."""
    teacher = subject.teacher
    timed = TorchModel(teacher.model, teacher.preprocess.size, teacher.tokenizer, _CPU)
    probe = ProbeRequest.of(load_teacher_model, subject.teacher_probe, max(_BATCHES), threads)
    measured = MeasuredModel(timed, probe, timed.facts())
    ranks = subject.split.ranks(*embed(subject.split, CachedTeacher()), device="cpu")
    return _Model("teacher fp32", TeacherEncoder(teacher), measured, measured.facts.state_bytes or 0, ranks)


def _onnx(
    subject: Subject,
    towers: dict[Tower, Variant],
    onnx: OnnxStudent,
    ranks: RetrievalRanks,
    cosines: dict[str, Cosine],
    threads: int,
) -> _Model:
    deployment = subject.deployment
    arguments = {"folder": str(subject.folder.resolve()), "variants": towers, "threads": threads}
    int8 = sum(report.parameters_int8 for tower, report in subject.reports.items() if towers[tower] == "int8")
    return _Model(
        name=_name(towers),
        encoder=onnx,
        measured=MeasuredModel(onnx, ProbeRequest.of(OnnxStudent, arguments, max(_BATCHES), threads)),
        bytes=sum(deployment.towers[which][tower].bytes for tower, which in towers.items()),
        ranks=ranks,
        engine="OpenVINO" if "openvino" in towers.values() else "ONNX Runtime",
        int8_share=int8 / deployment.parameters if int8 else None,
        cosine=cosines,
    )


def without_folders(dataset: str) -> str:
    """Return ``imagefolder:cifar10`` for ``imagefolder:/home/me/cifar10``: the table is published."""
    kind, _, rest = dataset.partition(":")
    if kind == "torchvision":
        return f"{kind}:{rest.partition(':')[0]}"
    return f"{kind}:{PurePosixPath(rest.partition('?')[0]).name}"


def _name(towers: Mapping[Tower, str]) -> str:
    if len(set(towers.values())) == 1:
        return "OpenVINO" if towers["image"] == "openvino" else f"ONNX {towers['image']}"
    return "ONNX " + ", ".join(f"{variant} {tower}" for tower, variant in towers.items())


def _cosine(found: NDArray[np.float32], reference: NDArray[np.float32]) -> Cosine:
    cosines = row_cosines(found, reference)
    return Cosine(mean=float(cosines.mean()), least=float(cosines.min()))


def _classify(models: list[_Model], labelled: LabelledDataset, progress: Progress) -> dict[str, Classification]:
    """Classify the labelled images with each model."""
    places = {}
    for model in models:

        def report(done: int, total: int, name: str = model.name) -> None:
            progress(f"{name}: zero-shot images", done, total)

        places[model.name] = classify_dataset(model.encoder, labelled, progress=report)
    if not len(common_rows(*places.values())):
        raise UsageError(f"{labelled.name}: not one image can be used by all models, so nothing is compared")
    return places


def _zero_shot_facts(labelled: LabelledDataset, places: Mapping[str, Classification]) -> dict[str, Any]:
    images = len(common_rows(*places.values()))
    return {
        "zero_shot_dataset": without_folders(labelled.name),
        "zero_shot_lost": len(labelled.lost_images) + len(labelled.labels) - images,
        "zero_shot_images": images,
        "zero_shot_classes": len(labelled.prompts),
        "zero_shot_prompts": labelled.prompts[0],
    }


def _row(
    subject: Subject, model: _Model, teacher: _Model, cost: CostResult, places: Mapping[str, Classification]
) -> TableRow:
    recalls = recall_of_ranks(model.ranks)
    accuracy = retention = kept_accuracy = None
    if places:
        common = common_rows(*places.values())
        accuracy = places[model.name].accuracies(common)
    if model is not teacher:
        retention = _retention(model.ranks, teacher.ranks, subject.split.text_image)
        if places:
            ours, theirs = places[model.name].hits(common), places[teacher.name].hits(common)
            share = 100 * float(ours.sum()) / float(theirs.sum()) if theirs.any() else None
            kept_accuracy = Retained(share=share, interval=bootstrap_accuracy_share(ours, theirs))
    return TableRow(
        name=model.name,
        engine=model.engine,
        bytes=model.bytes,
        parameters=model.measured.facts.parameters or subject.deployment.parameters,
        int8_share=model.int8_share,
        cost=cost.models[model.name],
        speed=cost.speed.get(model.name),
        recalls=recalls,
        mean_recall=mean_recall(recalls),
        cosine=model.cosine,
        retention=retention,
        zero_shot=accuracy,
        zero_shot_retention=kept_accuracy,
    )


def _retention(model: RetrievalRanks, teacher: RetrievalRanks, text_image: NDArray[np.int64]) -> Retention:
    shares = retention(recall_of_ranks(model), recall_of_ranks(teacher))
    between = bootstrap_share(model, teacher, text_image)
    directions = {
        direction: {
            name: Retained(share=share, interval=getattr(between, direction)[name])
            for name, share in shares[direction].items()
        }
        for direction in ("i2t", "t2i")
    }
    return Retention(**directions, mean=Retained(share=shares["mean"], interval=between.mean))
