"""Zero-shot classification: which class's prompts is an image nearest to.

As CLIP does it (Radford et al. 2021, section 3.1.4): every prompt of a class is encoded and normalised, their mean is
normalised again, and an image belongs to the class of the highest cosine. What is measured is anything that embeds
images and texts (:class:`ZeroShotEncoder`): a teacher, a student, its ONNX files.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field

from teacher_cache.pipeline.evaluate.encoders import StudentEncoder, TeacherEncoder
from teacher_cache.pipeline.evaluate.labelled_images import LabelledImages, UnusableImageError, open_labelled
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
_BATCH_PIXELS = 1 << 26  # of decoded images that wait for the encoder: 256 MiB, whatever size the pictures are


class ZeroShotResult(BaseModel, frozen=True):
    """Accuracies in percent."""

    dataset: str
    split: str = Field("", description="As asked for; empty for all images, or for torchvision's test split.")
    images: int
    classes: int
    prompt_set: str = Field("", description="Name of the set whose templates or class names were used.")
    matched_by: str = Field(
        "own names", description="How the dataset's classes found theirs in the list: name, number, WordNet id, ..."
    )
    prompts: tuple[str, ...] = Field(description="Of the first class: the templates, filled in.")
    lost_images: int = Field(0, description="Of the dataset, that are in no usable file; their reasons come first.")
    undecodable: tuple[str, ...] = Field(description="Images left out, with the reason; the first 20.")
    undecodable_images: int
    teacher: dict[str, float] | None
    student: dict[str, float] | None
    teacher_name: str | None
    cache: str | None = Field(None, description="That the teacher's rows were read from.")
    cache_manifest_digest: str | None = None
    teacher_ran: bool = Field(True, description="False when all of its rows were in the cache.")
    run: str | None
    checkpoint: str | None = Field(None, description="Folder of the student's checkpoint in the run.")
    chosen_on: str | None = Field(None, description="Split that this checkpoint was chosen on, for one that was.")
    seconds: float


class ZeroShotEncoder(Protocol):
    """Anything that puts images and texts into one space. Both give unit rows, float32 (n, dim)."""

    def embed_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Of images of any size, as decoded; a ValueError says that one of them cannot be brought into its size."""

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Of texts as they are."""


@dataclass(frozen=True)
class Classification:
    """Where each image's true class came in.

    Attributes:
        labels: (images,) int64, the number of each image's class.
        place: (images,) int64, how many classes scored higher than the true one: 0 for the first place. Of equal
            scores the lower class number comes first. -1 for an image that was not classified.
        lost: images that were not classified, by number, with the reason.
    """

    labels: NDArray[np.int64]
    place: NDArray[np.int64]
    lost: dict[int, str]

    @property
    def rows(self) -> NDArray[np.int64]:
        """Numbers of the images that were classified, ascending."""
        return np.flatnonzero(self.place >= 0).astype(np.int64)

    def hits(self, rows: NDArray[np.int64] | None = None, k: int = 1) -> NDArray[np.bool_]:
        """Whether the true class is among the first ``k``: (rows,) bool, for intervals over images.

        Args:
            rows: those of :func:`common_rows`, to compare models on the same images; all classified ones if left out.
        """
        place = self.place[self.rows if rows is None else rows]
        found: NDArray[np.bool_] = (place >= 0) & (place < k)
        return found

    def accuracies(self, rows: NDArray[np.int64] | None = None) -> dict[str, float]:
        """``top-1``, ``top-5`` and ``mean per class`` (of top-1, over the classes that have images), in percent.

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
        dataset: its labels are positions in ``prompts``.
        prompts: those of each class.
        batch_size: images, or prompts, per call of the encoder; fewer where images are large.
        progress: called with (images done, images in all).

    Raises:
        UsageError: not one image can be used.
        ValueError: a label without prompts, or scores that are not finite.
        OSError: an image cannot be read.
    """
    weights = class_weights(encoder.embed_texts, prompts, batch_size)
    labels = np.asarray(dataset.labels, np.int64)
    place = np.full(len(labels), -1, np.int64)
    lost: dict[int, str] = {}
    with ThreadPoolExecutor(_DECODED_AT_ONCE) as pool:
        for batch in _batches(pool, dataset, batch_size, lost):
            kept, rows = _embed(encoder, dataset, batch, lost)
            if kept:
                place[kept] = places(rows @ weights.T, labels[kept])
            if progress is not None:
                progress(batch[-1][0] + 1, len(labels))
    if progress is not None:
        progress(len(labels), len(labels))  # the last ones may have been lost
    if len(lost) == len(labels):
        raise UsageError(f"{dataset.name}: not one image can be used; the first: {next(iter(lost.values()))}")
    return Classification(labels, place, dict(sorted(lost.items())))


def classify_rows(
    image: NDArray[np.float32], weights: NDArray[np.float32], labels: NDArray[np.int64], lost: dict[int, str]
) -> Classification:
    """Classify images whose rows are there already.

    Args:
        image: (images, dim) unit rows; those in ``lost`` are not looked at.
        weights: (classes, dim), of :func:`class_weights`.
        lost: images without a row, with the reason.
    """
    place = np.full(len(labels), -1, np.int64)
    kept = np.setdiff1d(np.arange(len(labels)), np.fromiter(lost, np.int64, len(lost)))
    for start in range(0, len(kept), 4096):
        part = kept[start : start + 4096]
        place[part] = places(image[part] @ weights.T, labels[part])
    return Classification(labels, place, dict(sorted(lost.items())))


def common_rows(*found: Classification) -> NDArray[np.int64]:
    """Numbers of the images that all of these classified, ascending.

    Raises:
        ValueError: they are not of one dataset.
    """
    if any(not np.array_equal(each.labels, found[0].labels) for each in found):
        raise ValueError("classifications of different datasets cannot be compared")
    return np.flatnonzero(np.all([each.place >= 0 for each in found], axis=0)).astype(np.int64)


def places(scores: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many classes come before the true one: (images,), 0 for the first place; equal scores by class number.

    Raises:
        FloatingPointError: scores that are not finite.
        ValueError: a label without a column.
    """
    if len(labels) and (labels.min() < 0 or labels.max() >= scores.shape[1]):
        raise ValueError(f"labels from {labels.min()} to {labels.max()}, and {scores.shape[1]} classes have prompts")
    if not np.isfinite(scores).all():
        raise FloatingPointError("scores of images are not finite: the model's features are NaN or infinite")
    true = np.take_along_axis(scores, labels[:, None], axis=1)
    before = (scores > true) | ((scores == true) & (np.arange(scores.shape[1]) < labels[:, None]))
    found: NDArray[np.int64] = before.sum(axis=1).astype(np.int64)
    return found


def class_weights(
    encode: Callable[[Sequence[str]], NDArray[np.float32]], prompts: Sequence[Sequence[str]], batch_size: int = 256
) -> NDArray[np.float32]:
    """One normalised vector per class: float32 (classes, dim), the mean of its normalised prompts.

    Args:
        encode: texts to normalised rows, float32 (texts, dim).
        prompts: those of each class.

    Raises:
        ValueError: a class without prompts.
    """
    counts = [len(texts) for texts in prompts]
    if not counts or not min(counts):
        raise ValueError(f"{len(counts)} classes, of which {counts.count(0)} have no prompt; each wants one")
    every = [text for texts in prompts for text in texts]
    rows = [encode(every[start : start + batch_size]) for start in range(0, len(every), batch_size)]
    return mean_rows(np.concatenate(rows), counts)


def mean_rows(rows: NDArray[np.float32], counts: Sequence[int]) -> NDArray[np.float32]:
    """The normalised mean of each class's prompts: float32 (classes, dim).

    Args:
        rows: (prompts, dim) unit, those of a class side by side.
        counts: prompts of each class.
    """
    starts = np.cumsum([0, *counts[:-1]], dtype=np.int64)
    sums = np.add.reduceat(rows.astype(np.float64), starts, axis=0)
    weights: NDArray[np.float32] = (sums / np.linalg.norm(sums, axis=1, keepdims=True)).astype(np.float32)
    return weights


def zero_shot(config: ZeroShotConfig, progress: Callable[[str, int, int], None] | None = None) -> ZeroShotResult:
    """Classify the images of a dataset by the prompts of their classes, with a student, a teacher or both.

    Both are measured on the same images: those that either cannot decode are left out for the two of them.

    Args:
        progress: called with (stage, images done, images in all).

    Raises:
        UsageError: neither model named, a run without such a checkpoint, a dataset of one class, a class that cannot
            be matched with its name for sure, or a setting that cannot be used.
        CacheError: the cache is damaged, or of something else than is asked for.
        OSError: an image cannot be read.
    """
    started = time.perf_counter()
    if config.run is None and config.teacher is None and config.cache is None:
        raise UsageError("nothing to measure: give --run, --teacher or both; or --cache, for the teacher that it is of")
    # before the hours that a teacher may take
    folder = RunFolder(config.run) if config.run is not None else None
    checkpoint = folder.checkpoint_path(config.checkpoint) if folder is not None else None
    chosen_on = folder.read().chosen_on(config.checkpoint) if folder is not None else None
    device = resolve_device(config.device)
    keep_freed_memory(device)
    batch_size = config.batch_size or (16 if device.type == "cpu" else 256)  # as precompute has it, and why
    dataset = open_labelled(config)
    found: dict[str, Classification] = {}
    rows: TeacherRows | None = None

    def stage(name: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(name, done, total) if progress is not None else None

    if config.cache is not None:
        rows = teacher_rows(config, dataset, progress)
        weights = mean_rows(rows.prompts, [len(texts) for texts in dataset.prompts])
        found["teacher"] = classify_rows(rows.image, weights, dataset.images.labels, rows.lost)
    elif config.teacher is not None:
        teacher = TeacherEncoder(load_teacher(config.teacher, config.pretrained, config.device))
        found["teacher"] = classify_dataset(
            teacher, dataset.images, dataset.prompts, batch_size, stage("teacher images")
        )
        del teacher
    if checkpoint is not None:
        found["student"] = classify_dataset(
            StudentEncoder(checkpoint, device),
            dataset.images,
            dataset.prompts,
            batch_size,
            stage("student images"),
        )
    same = common_rows(*found.values())
    if not len(same):
        raise UsageError(f"{config.dataset}: not one image can be used by teacher and student both")
    lost = {row: reason for each in found.values() for row, reason in each.lost.items()}
    measured = {name: each.accuracies(same) for name, each in found.items()}
    return ZeroShotResult(
        dataset=config.dataset,
        split=config.split,
        images=len(same),
        classes=len(dataset.prompts),
        prompt_set=config.prompts,
        matched_by=dataset.found.classes.matched_by,
        prompts=dataset.prompts[0],
        lost_images=len(dataset.lost_images),
        undecodable=(*dataset.lost_images, *(lost[row] for row in sorted(lost)))[:_PROBLEMS_SHOWN],
        undecodable_images=len(lost),
        teacher=measured.get("teacher"),
        student=measured.get("student"),
        teacher_name=rows.teacher if rows is not None else config.teacher,
        cache=config.cache,
        cache_manifest_digest=rows.manifest_digest if rows is not None else None,
        teacher_ran=rows.encoded if rows is not None else config.teacher is not None,
        run=config.run,
        checkpoint=checkpoint.relative_to(folder.path).as_posix() if folder and checkpoint else None,
        chosen_on=chosen_on,
        seconds=time.perf_counter() - started,
    )


_Batch = list[tuple[int, Image.Image]]


def _batches(
    pool: ThreadPoolExecutor, dataset: LabelledImages, batch_size: int, lost: dict[int, str]
) -> Iterator[_Batch]:
    """Decoded images with their numbers; what cannot be decoded goes into ``lost``."""

    def decode(index: int) -> Image.Image | str:
        try:
            return dataset.image(index)
        except UnusableImageError as error:
            return f"{dataset.sample_id(index)}: {error}"

    waiting = iter(range(len(dataset.labels)))
    batch: _Batch = []
    pixels = 0
    while part := list(islice(waiting, min(_DECODED_AT_ONCE, batch_size - len(batch)))):
        for index, found in zip(part, pool.map(decode, part), strict=True):
            if isinstance(found, str):
                lost[index] = found
            else:
                batch.append((index, found))
                pixels += found.width * found.height
        if len(batch) == batch_size or pixels > _BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def _embed(
    encoder: ZeroShotEncoder, dataset: LabelledImages, batch: _Batch, lost: dict[int, str]
) -> tuple[list[int], NDArray[np.float32]]:
    """Numbers and rows of the images that the encoder takes; the others go into ``lost``.

    Raises:
        ValueError: the encoder refuses the batch and none of its images.
    """
    try:
        return [index for index, _ in batch], encoder.embed_images([image for _, image in batch])
    except ValueError:
        refused = {index: reason for index, image in batch if (reason := _refusal(encoder, image))}
        if not refused:
            raise
    lost.update({index: f"{dataset.sample_id(index)}: {reason}" for index, reason in refused.items()})
    kept = [(index, image) for index, image in batch if index not in refused]
    if not kept:
        return [], np.empty((0, 0), np.float32)
    return [index for index, _ in kept], encoder.embed_images([image for _, image in kept])


def _refusal(encoder: ZeroShotEncoder, image: Image.Image) -> str:
    try:
        encoder.embed_images([image])
    except ValueError as error:
        return str(error) or type(error).__name__
    return ""
