"""Measure a student before it is shipped: the same images, captions and rounds for teacher, student and ONNX files."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config import DeployConfig
from pipeline.cost import hardware
from pipeline.cost_models import TorchModel
from pipeline.deploy_files import versions
from pipeline.deploy_models import Contender, Encoder, OnnxStudent, bytes_to_rows, towers_of
from pipeline.deployment import Deployment, DeploymentError
from pipeline.evaluation_split import EvaluationSplit
from pipeline.intervals import bootstrap_accuracy_share, bootstrap_share
from pipeline.latency import Timing, interleaved, speed_ratio
from pipeline.metrics import RetrievalRanks, mean_recall, recall_of_ranks, retention
from pipeline.parity import WANTED_COSINE, cosines, require_parity
from pipeline.quantize import Int8Report
from pipeline.student import Student, load_student
from pipeline.student_table import Cosine, Gate, Retained, Speed, StudentTable, TableRow
from pipeline.teacher import LiveTeacher
from pipeline.zero_shot import Classification, LabelledImages, classify_dataset, common_rows
from pipeline.zero_shot_models import StudentEncoder, TeacherEncoder

__all__ = ["ZeroShotSet", "measure", "require_recall"]

_BATCHES = (1, 32)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ZeroShotSet:
    """What zero-shot accuracy is measured on."""

    images: LabelledImages
    prompts: list[tuple[str, ...]]


@dataclass
class _Model:
    """One row of the table while it is measured."""

    name: str
    engine: str
    bytes: int
    parameters: int
    encoder: Encoder
    contender: Contender
    ranks: RetrievalRanks
    int8_share: float | None = None
    cosine: dict[str, Cosine] | None = None
    places: Classification | None = None
    speeds: dict[str, dict[int, Timing]] = field(default_factory=dict)


def measure(
    config: DeployConfig,
    folder: Path,
    deployment: Deployment,
    reports: dict[Any, Int8Report],
    split: EvaluationSplit,
    checkpoint: Path,
    chosen_on: str | None,
    teacher: LiveTeacher,
    zero_shot: ZeroShotSet | None,
    progress: Progress,
) -> StudentTable:
    """Every number of the table, and the gates that the files have to pass.

    All on the CPU, where ONNX Runtime is. Gates come before what takes long: a file that fails costs minutes.

    Args:
        folder: of the deployment, its files written.
        reports: what is int8 in which tower.
        checkpoint: that the files were made from.

    Raises:
        DeploymentError: a file is not what it has to be; the message says by how much.
    """
    threads = config.threads or os.cpu_count() or 1
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        models, gates = _recalls(config, folder, deployment, reports, split, checkpoint, teacher, threads, progress)
        common = _classify(models, zero_shot, progress)
        _time(models, config.rounds, progress)
    finally:
        torch.set_num_threads(before)
    rows = tuple(_row(model, models[0], split, common) for model in models)
    return StudentTable(
        student=deployment.name,
        teacher=deployment.teacher,
        run=config.run,
        checkpoint=checkpoint.name,
        chosen_on=chosen_on,
        cache_manifest_digest=split.reader.manifest.digest,
        split=split.name,
        images=len(split.image_rows),
        captions=len(split.captions),
        zero_shot_dataset=None if zero_shot is None else zero_shot.images.name,
        zero_shot_images=None if common is None else len(common),
        rounds=config.rounds,
        threads=threads,
        date=datetime.date.today().isoformat(),
        hardware=hardware(),
        versions=versions(),
        rows=rows,
        gates=tuple(gates),
    )


def _recalls(
    config: DeployConfig,
    folder: Path,
    deployment: Deployment,
    reports: dict[Any, Int8Report],
    split: EvaluationSplit,
    checkpoint: Path,
    teacher: LiveTeacher,
    threads: int,
    progress: Progress,
) -> tuple[list[_Model], list[Gate]]:
    """The models with their ranks, and the gates that they passed."""
    cpu = torch.device("cpu")

    def rows_of(name: str, encoder: Encoder) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return split.embed(
            bytes_to_rows(encoder),
            encoder.embed_texts,
            progress=lambda stage, done, total: progress(f"{name}: {stage}", done, total),
        )

    teacher_state = teacher.model.state_dict().values()
    models = [
        _Model(
            "teacher fp32",
            "torch",
            sum(tensor.numel() * tensor.element_size() for tensor in teacher_state),
            sum(parameter.numel() for parameter in teacher.model.parameters()),
            TeacherEncoder(teacher),
            TorchModel(teacher.model, teacher.preprocess.size, teacher.tokenizer, cpu),
            split.teacher_ranks(),
        )
    ]
    student, student_config = load_student(checkpoint)
    encoder = StudentEncoder(checkpoint, cpu)
    reference = rows_of("student", encoder)
    gates = [_weights_gate(folder, split, student, reference)]
    models.append(
        _Model(
            "student fp32",
            "torch",
            deployment.weights.bytes,
            deployment.parameters,
            encoder,
            _torch_student(student, student_config),
            split.ranks(*reference),
        )
    )
    for variant in deployment.towers:
        towers = towers_of(deployment, variant)
        onnx = OnnxStudent(folder, towers, threads)
        found = rows_of(f"ONNX {variant}", onnx)
        model = _Model(
            _name(towers),
            "ONNX Runtime",
            sum(deployment.towers[of][tower].bytes for tower, of in towers.items()),
            deployment.parameters,
            onnx,
            onnx,
            split.ranks(*found),
            cosine={
                tower: Cosine(mean=float(each.mean()), least=float(each.min()))
                for tower, each in zip(("image", "text"), map(cosines, found, reference), strict=True)
            },
        )
        if variant == "fp32":
            gates += [_parity_gate(f"{tower}.onnx", cosine) for tower, cosine in (model.cosine or {}).items()]
        else:
            model.int8_share = _int8_share(reports, deployment)
            gates.append(require_recall(model.name, model.ranks, models[-1].ranks, config.max_recall_loss))
        models.append(model)
    return models, gates


def _name(towers: dict[Any, Any]) -> str:
    if len(set(towers.values())) == 1:
        return f"ONNX {towers['image']}"
    return "ONNX " + ", ".join(f"{variant} {tower}" for tower, variant in towers.items())


def _int8_share(reports: dict[Any, Int8Report], deployment: Deployment) -> float:
    """Of the parameters of both towers, whether or not a tower has an int8 file."""
    return sum(report.int8_parameters for report in reports.values()) / deployment.parameters


def _torch_student(student: Student, config: dict[str, Any]) -> TorchModel:
    from pipeline.student import student_tokenizer

    return TorchModel(student.model, student.preprocess.size, student_tokenizer(config), torch.device("cpu"))


def _parity_gate(name: str, cosine: Cosine) -> Gate:
    require_parity(name, cosine.least)
    return Gate(name=f"{name}: least cosine to torch", found=cosine.least, wanted=f"> {WANTED_COSINE}", passed=True)


def _weights_gate(
    folder: Path, split: EvaluationSplit, student: Student, reference: tuple[NDArray[np.float32], NDArray[np.float32]]
) -> Gate:
    """``model.safetensors`` as anybody loads it, by open_clip alone, against the student that was trained."""
    import open_clip
    import torch.nn.functional as F

    name = "model.safetensors"
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    count = min(32, len(split.image_rows))
    images = split_images(split, count)
    captions = split.captions[:32]
    with torch.inference_mode():
        image = F.normalize(model.eval().encode_image(torch.stack([preprocess(each) for each in images])), dim=-1)
        text = F.normalize(model.encode_text(tokenizer(captions)), dim=-1)
    least = min(
        float(cosines(image.numpy(), reference[0][:count]).min()),
        float(cosines(text.numpy(), reference[1][: len(captions)]).min()),
    )
    require_parity(name, least)
    return Gate(name=f"{name} in open_clip: least cosine", found=least, wanted=f"> {WANTED_COSINE}", passed=True)


def split_images(split: EvaluationSplit, count: int) -> list[Any]:
    """The first images of a split, decoded."""
    from pipeline.decode import decode_image

    return [decode_image(split.image_bytes(position)) for position in range(count)]


def require_recall(name: str, found: RetrievalRanks, fp32: RetrievalRanks, most: float) -> Gate:
    """Let quantised files pass, or say by how much they fail: no recall may be more than ``most`` points below fp32's.

    Raises:
        DeploymentError: one is; names it with both values.
    """
    ours, theirs = recall_of_ranks(found), recall_of_ranks(fp32)
    losses = {
        f"{direction} {metric}": theirs[direction][metric] - value
        for direction, recalls in ours.items()
        for metric, value in recalls.items()
    }
    worst = max(losses, key=lambda each: losses[each])
    # not greater by rounding: recalls are shares of whole numbers
    if losses[worst] > most + 1e-9:
        direction, metric = worst.split()
        raise DeploymentError(
            f"{name}: {worst} is {ours[direction][metric]:.2f}, and {theirs[direction][metric]:.2f} in fp32: "
            f"{losses[worst]:.2f} points lost, {most:g} at most are wanted, {losses[worst] - most:.2f} too many. Nothing "
            "was deployed. Ship without int8 (--no-int8), calibrate on more images (--calibration-images), or "
            "accept it (--max-recall-loss)."
        )
    return Gate(
        name=f"{name}: points of recall lost to fp32, the most ({worst})",
        found=losses[worst],
        wanted=f"<= {most:g}",
        passed=True,
    )


def _classify(models: list[_Model], zero_shot: ZeroShotSet | None, progress: Progress) -> NDArray[np.int64] | None:
    """Zero-shot places of each model; returns the images that all of them classified."""
    if zero_shot is None:
        return None
    for model in models:

        def report(done: int, total: int, name: str = model.name) -> None:
            progress(f"{name}: zero-shot images", done, total)

        model.places = classify_dataset(model.encoder, zero_shot.images, zero_shot.prompts, progress=report)
    return common_rows(*(model.places for model in models if model.places is not None))


def _time(models: list[_Model], rounds: int, progress: Progress) -> None:
    """All models in turns, a tower and a batch size at a time."""
    total = rounds * len(_BATCHES) * 2
    done = 0
    for tower in ("images", "texts"):
        for batch in _BATCHES:
            work = {model.name: getattr(model.contender, tower)(batch) for model in models}

            def report(finished: int, done: int = done) -> None:
                progress("rounds", done + finished, total)

            found = interleaved(work, rounds, warmup=2, batch=batch, progress=report)
            for model in models:
                model.speeds.setdefault(tower, {})[batch] = found[model.name]
            done += rounds


def _row(model: _Model, teacher: _Model, split: EvaluationSplit, common: NDArray[np.int64] | None) -> TableRow:
    recalls = recall_of_ranks(model.ranks)
    is_teacher = model is teacher
    kept: dict[str, Any] | None = None
    if not is_teacher:
        shares = retention(recalls, recall_of_ranks(teacher.ranks))
        between = bootstrap_share(model.ranks, teacher.ranks, split.text_image)
        kept = {
            direction: {
                name: Retained(share=share, interval=getattr(between, direction)[name])
                for name, share in shares[direction].items()
            }
            for direction in recalls
        }
        kept["mean"] = Retained(share=shares["mean"], interval=between.mean)
    accuracy = retained = None
    if common is not None and model.places is not None and teacher.places is not None:
        accuracy = model.places.accuracies(common)
        if not is_teacher:
            ours, theirs = model.places.hits(common), teacher.places.hits(common)
            share = 100 * float(ours.sum()) / float(theirs.sum()) if theirs.any() else None
            retained = Retained(share=share, interval=bootstrap_accuracy_share(ours, theirs))
    return TableRow(
        name=model.name,
        engine=model.engine,
        bytes=model.bytes,
        parameters=model.parameters,
        int8_share=model.int8_share,
        images=_speeds(model, teacher, "images"),
        texts=_speeds(model, teacher, "texts"),
        recalls=recalls,
        mean_recall=mean_recall(recalls),
        cosine=model.cosine,
        retention=kept,
        zero_shot=accuracy,
        zero_shot_retention=retained,
    )


def _speeds(model: _Model, teacher: _Model, tower: str) -> tuple[Speed, ...]:
    return tuple(
        Speed(
            batch=batch,
            p50_ms=timing.p50_ms,
            p95_ms=timing.p95_ms,
            per_second=timing.per_second,
            ratio=None if model is teacher else speed_ratio(timing, teacher.speeds[tower][batch]),
        )
        for batch, timing in model.speeds[tower].items()
    )
