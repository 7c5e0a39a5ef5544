"""Zero-shot classification: the class whose prompts are nearest to an image.

As in CLIP (Radford et al. 2021, section 3.1.4): every prompt of a class is encoded and normalised, their mean is
normalised again, and an image belongs to the class of the highest cosine. Any :class:`ZeroShotEncoder` can be measured:
a teacher, a student, its ONNX files.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field

from teacher_cache.pipeline.evaluate.encoders import StudentEncoder, TeacherEncoder
from teacher_cache.pipeline.evaluate.labelled_images import (
    LabelledDataset,
    LabelledImages,
    UnusableImageError,
    open_labelled,
)
from teacher_cache.pipeline.evaluate.zero_shot_cache import TeacherRows, teacher_rows
from teacher_cache.pipeline.models.device import keep_freed_memory, resolve_device
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.pipeline.settings.evaluate import ZeroShotConfig
from teacher_cache.storage.errors import UsageError

__all__ = [
    "Classification",
    "ZeroShotEncoder",
    "ZeroShotResult",
    "class_weights",
    "classify_dataset",
    "classify_rows",
    "common_rows",
    "zero_shot",
]

_DECODED_AT_ONCE = os.cpu_count() or 1
_PROBLEMS_SHOWN = 20
_BATCH_PIXELS = 1 << 26  # of decoded images that wait for the encoder: 256 MiB


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
    teacher: dict[str, float] | None
    student: dict[str, float] | None
    teacher_name: str | None
    cache: str | None = Field(None, description="Cache of the teacher's rows.")
    cache_manifest_digest: str | None = None
    teacher_ran: bool = Field(True, description="False if all of the teacher's rows were in the cache.")
    run: str | None
    checkpoint: str | None = Field(None, description="Folder of the student's checkpoint in the run.")
    chosen_on: str | None = Field(None, description="Split that the checkpoint was chosen on, if any.")
    seconds: float


class ZeroShotEncoder(Protocol):
    """An encoder of images and texts into one space. Both methods return unit rows, float32 (n, dim)."""

    def embed_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Embed decoded images of any size. Raise ValueError if one cannot be resized."""

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts."""


@dataclass(frozen=True)
class Classification:
    """The place of each image's true class among all classes.

    Attributes:
        labels: (images,) int64, class number of each image.
        place: (images,) int64, number of classes that come before the true one: those with a higher score, or an equal
            score and a lower number. -1 for an image that was not classified.
        lost: reason by number of each image that was not classified.
    """

    labels: NDArray[np.int64]
    place: NDArray[np.int64]
    lost: dict[int, str]

    @property
    def rows(self) -> NDArray[np.int64]:
        """Numbers of the images that were classified, ascending."""
        return np.flatnonzero(self.place >= 0).astype(np.int64)

    def hits(self, rows: NDArray[np.int64] | None = None, k: int = 1) -> NDArray[np.bool_]:
        """Return whether the true class is among the first ``k``: (rows,) bool, for intervals over images.

        Args:
            rows: image numbers, as of :func:`common_rows`. Default: all classified images.
        """
        place = self.place[self.rows if rows is None else rows]
        return np.asarray((place >= 0) & (place < k))

    def accuracies(self, rows: NDArray[np.int64] | None = None) -> dict[str, float]:
        """Return ``top-1``, ``top-5`` and ``mean per class`` (of top-1, over classes with images), in percent.

        Raises:
            ValueError: no image was classified.
        """
        rows = self.rows if rows is None else rows
        if not len(rows):
            raise ValueError("the accuracy over no images is not defined")
        first, labels = self.hits(rows), self.labels[rows]
        per_class = [first[labels == label].mean() for label in np.unique(labels)]
        return {
            "top-1": 100 * float(first.mean()),
            "top-5": 100 * float(self.hits(rows, 5).mean()),
            "mean per class": 100 * float(np.mean(per_class)),
        }


def classify_dataset(
    encoder: ZeroShotEncoder,
    dataset: LabelledImages,
    prompts: Sequence[Sequence[str]],
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Classification:
    """Classify every image of a dataset.

    Args:
        dataset: images with labels, which are positions in ``prompts``.
        prompts: prompts of each class.
        batch_size: number of images, or prompts, per call of the encoder; fewer for large images.
        progress: called with (done, total) images.

    Raises:
        UsageError: no image can be used.
        ValueError: a label has no prompts.
        FloatingPointError: scores are not finite.
        OSError: an image cannot be read.
    """
    weights = class_weights(encoder.embed_texts, prompts, batch_size)
    labels = np.asarray(dataset.labels, np.int64)
    place = np.full(len(labels), -1, np.int64)
    lost: dict[int, str] = {}
    with ThreadPoolExecutor(_DECODED_AT_ONCE) as pool:
        for batch in _batches(pool, dataset, batch_size, lost):
            numbers, rows = _embed(encoder, dataset, batch, lost)
            if numbers:
                place[numbers] = places(rows @ weights.T, labels[numbers])
            if progress is not None:
                progress(batch[-1][0] + 1, len(labels))
    if progress is not None:
        progress(len(labels), len(labels))  # the last images may be lost
    if len(lost) == len(labels):
        raise UsageError(f"{dataset.name}: not one image can be used; the first: {next(iter(lost.values()))}")
    return Classification(labels, place, dict(sorted(lost.items())))


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
    usable = np.setdiff1d(np.arange(len(labels)), np.fromiter(lost, np.int64, len(lost)))
    for start in range(0, len(usable), 4096):
        part = usable[start : start + 4096]
        place[part] = places(image[part] @ weights.T, labels[part])
    return Classification(labels, place, dict(sorted(lost.items())))


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


@dataclass
class _Models:
    """The models to measure, with their results.

    Attributes:
        results: classification by "teacher" and "student".
        rows: the teacher's cached rows, if a cache is set.
    """

    config: ZeroShotConfig
    dataset: LabelledDataset
    progress: Callable[[str, int, int], None] | None
    results: dict[str, Classification] = field(default_factory=dict)
    rows: TeacherRows | None = None

    def measure(self, checkpoint: Path | None) -> None:
        """Classify with teacher and student."""
        config, dataset = self.config, self.dataset
        device = resolve_device(config.device)
        keep_freed_memory(device)
        if config.cache is not None:
            self.rows = teacher_rows(config, dataset, self.progress)
            weights = mean_rows(self.rows.prompts, [len(texts) for texts in dataset.prompts])
            self.results["teacher"] = classify_rows(self.rows.image, weights, dataset.images.labels, self.rows.lost)
        elif config.teacher is not None:
            teacher = load_teacher(config.teacher, config.pretrained, config.device)
            self._classify("teacher", TeacherEncoder(teacher), device)
        if checkpoint is not None:
            self._classify("student", StudentEncoder(checkpoint, device), device)

    def _classify(self, name: str, encoder: ZeroShotEncoder, device: torch.device) -> None:
        batch_size = self.config.batch_size or (16 if device.type == "cpu" else 256)  # as in precompute

        def report(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(f"{name} images", done, total)

        dataset = self.dataset
        self.results[name] = classify_dataset(encoder, dataset.images, dataset.prompts, batch_size, report)

    def accuracies(self) -> tuple[int, dict[str, dict[str, float]]]:
        """Return the number of images that all models classified, and each model's accuracies on them.

        Raises:
            UsageError: there is no such image.
        """
        same = common_rows(*self.results.values())
        if not len(same):
            raise UsageError(f"{self.config.dataset}: not one image can be used by teacher and student both")
        return len(same), {name: result.accuracies(same) for name, result in self.results.items()}

    def lost(self) -> list[str]:
        """Return the reason for each image that a model could not use, in order."""
        lost = {row: reason for result in self.results.values() for row, reason in result.lost.items()}
        return [lost[row] for row in sorted(lost)]


def zero_shot(config: ZeroShotConfig, progress: Callable[[str, int, int], None] | None = None) -> ZeroShotResult:
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
    if config.run is None and config.teacher is None and config.cache is None:
        raise UsageError("nothing to measure: give --run, --teacher or both; or --cache, for the teacher that it is of")
    # checked first: a teacher may take hours
    folder = RunFolder(config.run) if config.run is not None else None
    checkpoint = folder.checkpoint_path(config.checkpoint) if folder is not None else None
    dataset = open_labelled(config)
    models = _Models(config, dataset, progress)
    models.measure(checkpoint)
    images, accuracies = models.accuracies()
    lost, rows = models.lost(), models.rows
    return ZeroShotResult(
        dataset=config.dataset,
        split=config.split,
        images=images,
        classes=len(dataset.prompts),
        prompt_set=config.prompts,
        matched_by=dataset.found.classes.matched_by,
        prompts=dataset.prompts[0],
        lost_images=len(dataset.lost_images),
        undecodable=(*dataset.lost_images, *lost)[:_PROBLEMS_SHOWN],
        undecodable_images=len(lost),
        teacher=accuracies.get("teacher"),
        student=accuracies.get("student"),
        teacher_name=rows.teacher if rows else config.teacher,
        cache=config.cache,
        cache_manifest_digest=rows.manifest_digest if rows else None,
        teacher_ran=rows.encoded if rows else config.teacher is not None,
        run=config.run,
        checkpoint=checkpoint.relative_to(folder.path).as_posix() if folder and checkpoint else None,
        chosen_on=folder.read().chosen_on(config.checkpoint) if folder else None,
        seconds=time.perf_counter() - started,
    )


_Batch = list[tuple[int, Image.Image]]


def _batches(
    pool: ThreadPoolExecutor, dataset: LabelledImages, batch_size: int, lost: dict[int, str]
) -> Iterator[_Batch]:
    """Yield batches of decoded images with their numbers; add undecodable ones to ``lost``."""

    def decode(index: int) -> Image.Image | str:
        try:
            return dataset.image(index)
        except UnusableImageError as error:
            return f"{dataset.sample_id(index)}: {error}"

    waiting = iter(range(len(dataset.labels)))
    batch: _Batch = []
    pixels = 0
    while part := list(islice(waiting, min(_DECODED_AT_ONCE, batch_size - len(batch)))):
        for index, decoded in zip(part, pool.map(decode, part), strict=True):
            if isinstance(decoded, str):
                lost[index] = decoded
            else:
                batch.append((index, decoded))
                pixels += decoded.width * decoded.height
        if len(batch) == batch_size or pixels > _BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def _embed(
    encoder: ZeroShotEncoder, dataset: LabelledImages, batch: _Batch, lost: dict[int, str]
) -> tuple[list[int], NDArray[np.float32]]:
    """Return numbers and rows of the images that the encoder accepts; add the others to ``lost``.

    Raises:
        ValueError: the encoder refuses the batch but none of its images.
    """
    try:
        return [index for index, _ in batch], encoder.embed_images([image for _, image in batch])
    except ValueError:
        refused = {index: reason for index, image in batch if (reason := _refusal(encoder, image))}
        if not refused:
            raise
    lost.update({index: f"{dataset.sample_id(index)}: {reason}" for index, reason in refused.items()})
    batch = [(index, image) for index, image in batch if index not in refused]
    if not batch:
        return [], np.empty((0, 0), np.float32)
    return [index for index, _ in batch], encoder.embed_images([image for _, image in batch])


def _refusal(encoder: ZeroShotEncoder, image: Image.Image) -> str:
    try:
        encoder.embed_images([image])
    except ValueError as error:
        return str(error) or type(error).__name__
    return ""
