"""Zero-shot classification: which class's prompts is an image nearest to.

As CLIP does it (Radford et al. 2021, section 3.1.4): every prompt of a class is encoded and normalised, their mean is
normalised again, and an image belongs to the class of the highest cosine. The classes and their prompts come from
the dataset: images with the same captions are of one class, and those captions are its prompts. So
``imagefolder:PATH?templates=openai`` measures with CLIP's 80 templates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from pipeline.config import ZeroShotConfig
from pipeline.datasets.base import Sample
from pipeline.decode import UndecodableImageError, decode_image
from pipeline.device import keep_freed_memory, resolve_device
from pipeline.metrics import classification_accuracy
from pipeline.preprocess import Preprocess
from pipeline.runs import RunFolder
from pipeline.samples import DatasetSpec, ImageSource, load_samples
from pipeline.student import load_student, student_tokenizer
from storage.errors import UsageError

__all__ = ["ZeroShotResult", "class_weights", "zero_shot"]

_PROBLEMS_SHOWN = 20


class ZeroShotResult(BaseModel, frozen=True):
    """Accuracies in percent."""

    dataset: str
    images: int
    classes: int
    prompts: tuple[str, ...] = Field(description="Of the first class: the templates, filled in.")
    undecodable: tuple[str, ...] = Field(description="Images left out, with the reason; the first 20.")
    undecodable_images: int
    teacher: dict[str, float] | None
    student: dict[str, float] | None
    teacher_name: str | None
    run: str | None
    checkpoint: str | None = Field(None, description="Folder of the student's checkpoint in the run.")
    chosen_on: str | None = Field(None, description="Split that this checkpoint was chosen on, for one that was.")
    seconds: float


@dataclass(frozen=True)
class _Encoder:
    """A model as this measurement needs it: both return normalised float32 rows."""

    preprocess: Preprocess
    images: Callable[[torch.Tensor], NDArray[np.float32]]
    texts: Callable[[Sequence[str]], NDArray[np.float32]]


def zero_shot(config: ZeroShotConfig, progress: Callable[[str, int, int], None] | None = None) -> ZeroShotResult:
    """Classify the images of a dataset by the prompts of their classes, with a student, a teacher or both.

    Both are measured on the same images: those that either cannot decode are left out for the two of them.

    Args:
        progress: called with (stage, images done, images in all).

    Raises:
        UsageError: neither model named, a run without such a checkpoint, a dataset of one class, or a setting that
            cannot be used.
        OSError: an image cannot be read.
    """
    started = time.perf_counter()
    if config.run is None and config.teacher is None:
        raise UsageError("nothing to measure: give --run, --teacher or both")
    # before the hours that a teacher may take
    folder = RunFolder(config.run) if config.run is not None else None
    checkpoint = folder.checkpoint_path(config.checkpoint) if folder is not None else None
    best = folder.read().best if folder is not None and config.checkpoint == "best" else None
    spec = DatasetSpec.parse(config.dataset)
    device = resolve_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    samples = load_samples(spec)[0]
    prompts = list(dict.fromkeys(sample.captions for sample in samples.samples))
    if len(prompts) < 2:
        raise UsageError(f"{spec}: all images have the same captions, so there is one class; use imagefolder:PATH")
    number = {captions: index for index, captions in enumerate(prompts)}
    labels = np.array([number[sample.captions] for sample in samples.samples])
    source = ImageSource(samples.root)
    lost: dict[int, str] = {}
    scores: dict[str, NDArray[np.float32]] = {}
    for name, encoder in _encoders(config, checkpoint, device):

        def report(done: int, name: str = name) -> None:
            if progress is not None:
                progress(f"{name} images", done, len(samples.samples))

        weights = class_weights(encoder.texts, prompts)
        image, undecodable = _embed(encoder, source, samples.samples, config.batch_size, report)
        lost.update(undecodable)
        if len(lost) == len(labels):
            raise UsageError(f"{spec}: not one image can be decoded; the first: {next(iter(lost.values()))}")
        scores[name] = image @ weights.T
    kept = np.setdiff1d(np.arange(len(labels)), list(lost))
    measured = {name: classification_accuracy(found[kept], labels[kept]) for name, found in scores.items()}
    return ZeroShotResult(
        dataset=str(spec),
        images=len(labels) - len(lost),
        classes=len(prompts),
        prompts=tuple(prompts[0]),
        undecodable=tuple(lost[row] for row in sorted(lost)[:_PROBLEMS_SHOWN]),
        undecodable_images=len(lost),
        teacher=measured.get("teacher"),
        student=measured.get("student"),
        teacher_name=config.teacher,
        run=config.run,
        checkpoint=checkpoint.relative_to(folder.path).as_posix() if folder and checkpoint else None,
        chosen_on=best.split if best else None,
        seconds=time.perf_counter() - started,
    )


def class_weights(
    encode: Callable[[Sequence[str]], NDArray[np.float32]], prompts: Sequence[Sequence[str]]
) -> NDArray[np.float32]:
    """One normalised vector per class: float32 (classes, dim), the mean of its normalised prompts.

    Args:
        encode: texts to normalised rows, float32 (texts, dim).
        prompts: those of each class.
    """
    means = np.stack([encode(texts).mean(axis=0) for texts in prompts])
    weights: NDArray[np.float32] = means / np.linalg.norm(means, axis=1, keepdims=True)
    return weights


def _encoders(config: ZeroShotConfig, checkpoint: Path | None, device: torch.device) -> Iterator[tuple[str, _Encoder]]:
    if config.teacher is not None:
        from pipeline.teacher import load_teacher

        teacher = load_teacher(config.teacher, config.pretrained, config.device)
        yield (
            "teacher",
            _Encoder(
                teacher.preprocess,
                lambda pixels: teacher.encode_images(pixels).embedding.astype(np.float32),
                lambda texts: teacher.encode_texts(teacher.tokenizer(list(texts))).embedding.astype(np.float32),
            ),
        )
    if checkpoint is not None:
        student, architecture = load_student(checkpoint)
        student.to(device)
        tokenizer = student_tokenizer(architecture)

        @torch.inference_mode()
        def images(pixels: torch.Tensor) -> NDArray[np.float32]:
            return np.asarray(student.encode_image(pixels.to(device)).cpu().numpy())

        @torch.inference_mode()
        def texts(part: Sequence[str]) -> NDArray[np.float32]:
            return np.asarray(student.encode_text(student.shorten(tokenizer(list(part))).to(device)).cpu().numpy())

        yield "student", _Encoder(student.preprocess, images, texts)


def _embed(
    encoder: _Encoder,
    source: ImageSource,
    samples: Sequence[Sample],
    batch_size: int,
    report: Callable[[int], None],
) -> tuple[NDArray[np.float32], dict[int, str]]:
    """Rows of all images in order; and, by number, those that cannot be decoded, whose rows are NaN."""
    transform = encoder.preprocess.transform()

    def decode(sample: Sample) -> torch.Tensor | str:
        data = source.read(sample.uri, sample.offset, sample.length)
        try:
            return transform(decode_image(data))
        except (UndecodableImageError, ValueError) as error:
            return f"{sample.sample_id}: {error}"

    rows: list[NDArray[Any]] = []
    lost: dict[int, str] = {}
    blank = torch.zeros(3, *encoder.preprocess.size)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(samples), batch_size):
            decoded = list(pool.map(decode, samples[start : start + batch_size]))
            found = encoder.images(torch.stack([blank if isinstance(each, str) else each for each in decoded]))
            for index, each in enumerate(decoded):
                if isinstance(each, str):
                    lost[start + index] = each
                    found[index] = np.nan
            rows.append(found)
            report(start + len(decoded))
    return np.concatenate(rows), lost
