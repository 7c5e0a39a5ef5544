"""Zero-shot classification: the class whose prompts are nearest to an image.

As in CLIP (Radford et al. 2021, section 3.1.4): every prompt of a class is encoded and normalised, their mean is
normalised again, and an image belongs to the class of the highest cosine. Any :class:`ZeroShotEncoder` can be measured:
a teacher, a student, its ONNX files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field

from teacher_cache.pipeline.data.cores import decode_threads
from teacher_cache.pipeline.data.images.decode import UndecodableImageError
from teacher_cache.pipeline.evaluate.learned import count_learned
from teacher_cache.pipeline.evaluate.zero_shot.cache import TeacherRows, teacher_rows
from teacher_cache.pipeline.evaluate.zero_shot.labelled_images import LabelledDataset, open_labelled
from teacher_cache.pipeline.models.device import full_float32, keep_freed_memory, resolve_device
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.student import load_student, student_tokenizer
from teacher_cache.pipeline.models.teacher import LiveTeacher, load_teacher
from teacher_cache.pipeline.settings.evaluate import ZeroShotConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.look.nearest import unit_rows

_PROBLEMS_SHOWN = 20

Progress = Callable[[str, int, int], None]


class ZeroShotResult(BaseModel, frozen=True):
    """Accuracies in percent."""

    dataset: str
    split: str = Field("", description="Split; empty for all images, or for torchvision's test split.")
    images: int
    classes: int
    prompt_set: str = Field("", description="Name of the prompt set whose templates or class names were used.")
    matched_by: str = Field(
        "own names",
        description="Key that matched the classes with the prompt set: name, number, WordNet id, ...",
    )
    prompts: tuple[str, ...] = Field(description="Prompts of the first class, from the templates.")
    lost_images: int = Field(0, description="Number of images without a usable file.")
    undecodable: tuple[str, ...] = Field(description="First 20 images left out, with the reason; lost images first.")
    undecodable_images: int
    chance: dict[str, float] = Field(description="Accuracies of guessing.")
    teacher: dict[str, float] | None
    student: dict[str, float] | None
    teacher_name: str | None
    cache: str | None = Field(None, description="Cache of the teacher's rows.")
    cache_manifest_digest: str | None = None
    teacher_ran: bool = Field(True, description="False if all of the teacher's rows were in the cache.")
    run: str | None
    checkpoint: str | None = Field(None, description="Folder of the student's checkpoint in the run.")
    chosen_on: str | None = Field(None, description="Split that the checkpoint was chosen on, if any.")
    learned_images: int | None = Field(
        None, description="Number of these images that the student learned from; None where its cache cannot be read."
    )
    seconds: float


class ZeroShotEncoder(Protocol):
    """An encoder of images and texts into one space. The rows are float32 (n, dim), of unit norm."""

    def prepare(self, image: Image.Image) -> Any:
        """Return a decoded image of any size as the model takes it. Thread-safe.

        Raises:
            ValueError, UndecodableImageError: it is too long a strip to be resized.
        """

    def embed_images(self, prepared: Sequence[Any]) -> NDArray[np.float32]:
        """Embed prepared images."""

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts."""


class TeacherEncoder:
    """A live teacher as a :class:`ZeroShotEncoder`. Rows are rounded to float16, as in a float16 cache."""

    def __init__(self, teacher: LiveTeacher) -> None:
        self._teacher = teacher
        self.prepare = teacher.preprocess.transform

    def embed_images(self, prepared: Sequence[torch.Tensor]) -> NDArray[np.float32]:
        """Embed prepared images."""
        return unit_rows(self._teacher.encode_images(torch.stack(list(prepared))).embedding)

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts."""
        return unit_rows(self._teacher.encode_texts(self._teacher.tokenizer(list(texts))).embedding)


class StudentEncoder:
    """The student of a checkpoint folder as a :class:`ZeroShotEncoder`.

    Raises:
        UsageError: the checkpoint is missing or cannot be used.
    """

    def __init__(self, checkpoint: Path, device: torch.device) -> None:
        student, architecture = load_student(checkpoint)
        self._student, self._device = student.to(device).eval(), device
        self._tokenizer = student_tokenizer(architecture)
        self.prepare = student.preprocess.transform

    @torch.inference_mode()
    @full_float32()
    def embed_images(self, prepared: Sequence[torch.Tensor]) -> NDArray[np.float32]:
        """Embed prepared images."""
        return _on_cpu(self._student.encode_image(torch.stack(list(prepared)).to(self._device)))

    @torch.inference_mode()
    @full_float32()
    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts."""
        tokens = self._student.shorten(self._tokenizer(list(texts)))
        return _on_cpu(self._student.encode_text(tokens.to(self._device)))


def _on_cpu(features: torch.Tensor) -> NDArray[np.float32]:
    return np.asarray(features.float().cpu().numpy())


@dataclass(frozen=True)
class Classification:
    """The place of each image's true class among all classes.

    Attributes:
        labels: (images,) int64, class number of each image.
        place: (images,) int64, number of classes that come before the true one: those with a higher score, or an equal
            score and a lower number. -1 for an image that was not classified.
        lost: reason by number of each image that was not classified.
        margin: (images,) float32, score of the second class less that of the first; None unless there are two classes.
    """

    labels: NDArray[np.int64]
    place: NDArray[np.int64]
    lost: dict[int, str]
    margin: NDArray[np.float32] | None = None

    def hits(self, rows: NDArray[np.int64], k: int = 1) -> NDArray[np.bool_]:
        """Return whether the true class is among the first ``k``: (rows,) bool, for intervals over images.

        Args:
            rows: numbers of classified images, as of :func:`common_rows`.
        """
        return np.asarray(self.place[rows] < k)

    def accuracies(self, rows: NDArray[np.int64]) -> dict[str, float]:
        """Return ``top-1``, ``top-5`` and ``mean per class`` (of top-1, over classes with images), in percent.

        Where there are two classes with images, also ``ROC AUC``: the share of pairs of an image of the second class
        and one of the first in which the former has the higher margin; ties count half.

        Args:
            rows: numbers of classified images, as of :func:`common_rows`.

        Raises:
            ValueError: no images.
        """
        if not len(rows):
            raise ValueError("the accuracy over no images is not defined")
        first, labels = self.hits(rows), self.labels[rows]
        per_class = [first[labels == label].mean() for label in np.unique(labels)]
        accuracies = {
            "top-1": 100 * float(first.mean()),
            "top-5": 100 * float(self.hits(rows, 5).mean()),
            "mean per class": 100 * float(np.mean(per_class)),
        }
        if self.margin is not None and len(per_class) == 2:
            accuracies["ROC AUC"] = 100 * _area(self.margin[rows], labels == 1)
        return accuracies


def _area(margin: NDArray[np.float32], positive: NDArray[np.bool_]) -> float:
    """Return the area under the ROC curve: the Mann-Whitney statistic, as a share of all pairs."""
    negative = np.sort(margin[~positive])
    below = [np.searchsorted(negative, margin[positive], side).mean() for side in ("left", "right")]
    return float(np.mean(below)) / len(negative)


def classify_dataset(
    encoder: ZeroShotEncoder,
    dataset: LabelledDataset,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Classification:
    """Classify every image of a dataset.

    Args:
        batch_size: number of images, or prompts, per call of the encoder; fewer where images cannot be used.
        progress: called with (done, total) images.

    Raises:
        UsageError: no image can be used.
        ValueError: a label has no prompts.
        FloatingPointError: scores are not finite.
        OSError: an image cannot be read.
    """
    weights = class_weights(encoder.embed_texts, dataset.prompts, batch_size)
    labels = dataset.labels
    image = np.zeros((len(labels), weights.shape[1]), np.float32)
    lost: dict[int, str] = {}

    def prepared(index: int) -> Any:
        try:
            return encoder.prepare(dataset.image(index))
        except (UndecodableImageError, ValueError) as error:
            lost[index] = f"{dataset.sample_id(index)}: {error}"

    with ThreadPoolExecutor(decode_threads()) as pool:
        for start in range(0, len(labels), batch_size):
            batch = range(start, min(start + batch_size, len(labels)))
            inputs = list(pool.map(prepared, batch))
            usable = [index for index in batch if index not in lost]
            if usable:
                image[usable] = encoder.embed_images([inputs[index - start] for index in usable])
            if progress is not None:
                progress(batch.stop, len(labels))
    if len(lost) == len(labels):
        raise UsageError(f"{dataset.name}: not one image can be used; the first: {lost[0]}")
    return classify_rows(image, weights, labels, lost)


def classify_rows(
    image: NDArray[np.float32], weights: NDArray[np.float32], labels: NDArray[np.int64], lost: dict[int, str]
) -> Classification:
    """Classify images from their embeddings.

    Args:
        image: (images, dim) unit rows; those in ``lost`` are ignored.
        weights: (classes, dim), as from :func:`class_weights`.
        lost: reason by number of each image without a row.
    """
    place = np.full(len(labels), -1, np.int64)
    margin = image @ (weights[1] - weights[0]) if len(weights) == 2 else None
    usable = np.setdiff1d(np.arange(len(labels)), np.fromiter(lost, np.int64, len(lost)))
    for start in range(0, len(usable), 4096):
        part = usable[start : start + 4096]
        place[part] = places(image[part] @ weights.T, labels[part])
    return Classification(labels, place, dict(sorted(lost.items())), margin)


def common_rows(*results: Classification) -> NDArray[np.int64]:
    """Return the numbers of the images that are classified in all results, ascending.

    Raises:
        ValueError: the results are of different datasets.
    """
    if any(not np.array_equal(result.labels, results[0].labels) for result in results):
        raise ValueError("classifications of different datasets cannot be compared")
    return np.flatnonzero(np.all([result.place >= 0 for result in results], axis=0)).astype(np.int64)


def places(scores: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count the classes that come before the true one, (images,); ties are ordered by class number.

    Raises:
        FloatingPointError: a score is not finite.
        ValueError: a label has no column.
    """
    if len(labels) and (labels.min() < 0 or labels.max() >= scores.shape[1]):
        raise ValueError(f"labels from {labels.min()} to {labels.max()}, and {scores.shape[1]} classes have prompts")
    if not np.isfinite(scores).all():
        raise FloatingPointError("scores of images are not finite: the model's features are NaN or infinite")
    true = np.take_along_axis(scores, labels[:, None], axis=1)
    before = (scores > true) | ((scores == true) & (np.arange(scores.shape[1]) < labels[:, None]))
    return np.asarray(before.sum(axis=1), np.int64)


def class_weights(
    encode: Callable[[Sequence[str]], NDArray[np.float32]], prompts: Sequence[Sequence[str]], batch_size: int = 256
) -> NDArray[np.float32]:
    """Return the normalised mean of each class's encoded prompts: float32 (classes, dim).

    Args:
        encode: function from texts to normalised rows, float32 (texts, dim).
        prompts: prompts of each class.

    Raises:
        ValueError: a class has no prompts.
    """
    counts = [len(texts) for texts in prompts]
    if not counts or not min(counts):
        raise ValueError(f"{len(counts)} classes, of which {counts.count(0)} have no prompt; each wants one")
    every = [text for texts in prompts for text in texts]
    rows = [encode(every[start : start + batch_size]) for start in range(0, len(every), batch_size)]
    return mean_rows(np.concatenate(rows), counts)


def mean_rows(rows: NDArray[np.float32], counts: Sequence[int]) -> NDArray[np.float32]:
    """Return the normalised mean of each class's prompts: float32 (classes, dim).

    Args:
        rows: (prompts, dim) unit rows, ordered by class.
        counts: number of prompts of each class.
    """
    starts = np.cumsum([0, *counts[:-1]], dtype=np.int64)
    sums = np.add.reduceat(rows.astype(np.float64), starts, axis=0)
    weights: NDArray[np.float32] = (sums / np.linalg.norm(sums, axis=1, keepdims=True)).astype(np.float32)
    return weights


def zero_shot(config: ZeroShotConfig, progress: Progress | None = None) -> ZeroShotResult:
    """Measure zero-shot classification of a dataset by a student, a teacher or both.

    Both are measured on the same images: an image that one of them cannot use is left out for both.

    Args:
        progress: called with (stage, done, total) images.

    Raises:
        UsageError: no model is set, the run has no such checkpoint, the dataset has one class, a class has no certain
            match, or a setting cannot be used.
        CacheError: the cache is damaged, or does not match the settings.
        OSError: an image cannot be read.
    """
    started = time.perf_counter()
    config.require_model()
    # checked first: a teacher may take hours
    folder = RunFolder(config.run) if config.run is not None else None
    record = checkpoint = student = None
    device = resolve_device(config.device)
    if folder is not None:
        record, checkpoint, student = folder.load_checkpoint(
            config.checkpoint, lambda path: StudentEncoder(path, device)
        )
    dataset = open_labelled(config)
    results, rows = _classified(config, dataset, student, device, progress)
    same = common_rows(*results.values())
    if not len(same):
        raise UsageError(f"{config.dataset}: not one image can be used by teacher and student both")
    accuracies = {name: result.accuracies(same) for name, result in results.items()}
    lost = {row: reason for result in results.values() for row, reason in result.lost.items()}
    undecodable = [lost[row] for row in sorted(lost)]
    chance = 100 / len(dataset.prompts)
    guessed = {"top-1": chance, "top-5": min(5 * chance, 100.0), "mean per class": chance, "ROC AUC": 50.0}
    digests = pa.chunked_array([pa.array(dataset.digests).take(pa.array(same))])
    return ZeroShotResult(
        dataset=config.dataset,
        split=dataset.split,
        images=len(same),
        classes=len(dataset.prompts),
        prompt_set=dict(dataset.spec.options).get("prompts", ""),
        matched_by=dataset.found.classes.matched_by,
        prompts=dataset.prompts[0],
        lost_images=len(dataset.lost_images),
        undecodable=(*dataset.lost_images, *undecodable)[:_PROBLEMS_SHOWN],
        undecodable_images=len(lost),
        chance={name: guessed[name] for name in next(iter(accuracies.values()))},
        teacher=accuracies.get("teacher"),
        student=accuracies.get("student"),
        teacher_name=rows.teacher if rows else config.teacher,
        cache=config.cache,
        cache_manifest_digest=rows.manifest_digest if rows else None,
        teacher_ran=rows.encoded if rows else config.teacher is not None,
        run=config.run,
        checkpoint=checkpoint.relative_to(folder.path).as_posix() if folder and checkpoint else None,
        chosen_on=record.chosen_on(config.checkpoint) if record else None,
        learned_images=count_learned(record, digests) if record else None,
        seconds=time.perf_counter() - started,
    )


def _classified(
    config: ZeroShotConfig,
    dataset: LabelledDataset,
    student: StudentEncoder | None,
    device: torch.device,
    progress: Progress | None,
) -> tuple[dict[str, Classification], TeacherRows | None]:
    """Classify the dataset by "teacher" and "student"; also return the teacher's cached rows, if a cache is set."""
    keep_freed_memory(device)
    batch_size = config.batch_size or (16 if device.type == "cpu" else 256)  # as in precompute

    def classify(name: str, encoder: ZeroShotEncoder) -> Classification:
        report = None if progress is None else lambda done, total: progress(f"{name} images", done, total)
        return classify_dataset(encoder, dataset, batch_size, report)

    results: dict[str, Classification] = {}
    rows = None
    if config.cache is not None:
        rows = teacher_rows(config, dataset, progress)
        weights = mean_rows(rows.prompts, [len(texts) for texts in dataset.prompts])
        results["teacher"] = classify_rows(rows.image, weights, dataset.labels, rows.lost)
    elif config.teacher is not None:
        teacher = load_teacher(config.teacher, config.pretrained, config.device)
        results["teacher"] = classify("teacher", TeacherEncoder(teacher))
    if student is not None:
        results["student"] = classify("student", student)
    return results, rows
