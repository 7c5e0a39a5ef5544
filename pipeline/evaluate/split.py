"""A split of a cache to measure on, and its embedding by any encoder: the same rows for teacher and students. No torch.

An encoder is the cache (:class:`CachedTeacher`), a torch student (``student_rows.StudentRows``), or two functions of
stored bytes and of captions (:class:`BytesEncoder`), such as an ONNX student's::

    split = open_split(EvaluateConfig(run="runs/a", split="dev"))
    images, captions = embed(split, BytesEncoder(encode_images, encode_captions))
    student = recall_of_ranks(split.ranks(images, captions))
    images, captions = embed(split, CachedTeacher())
    teacher = recall_of_ranks(split.ranks(images, captions))
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from teacher_cache.pipeline.data.batches.stored_images import CachedImages
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.evaluate.recall import RECALL_KS, RetrievalRanks, first_positive_ranks
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.format.tables import CAPTIONS, SAMPLES
from teacher_cache.storage.look.nearest import unit_rows
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.several.joined_caches import JoinedCache

_ROWS_AT_ONCE = 65_536

Progress = Callable[[str, int, int], None]
Embedded = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Rows of the images and of the captions of a split, float32 (rows, dim), unit norm."""


@dataclass(frozen=True)
class EvaluationSplit:
    """The images of one split that have an embedding, with their captions. Positions count from 0 within it.

    Attributes:
        reader: reader of the cache.
        name: name of the split.
        image_rows: (images,) rows of the cache, ascending, without quarantined images.
        caption_rows: (captions,) rows of the cache; captions of an image are adjacent.
        text_image: (captions,) position of each caption's image in ``image_rows``.
        image_root: base of relative uris.
        accepted_mismatches: differences between this cache and the run's that the settings accept.
    """

    reader: EmbeddingReader = field(repr=False)
    name: str
    image_rows: NDArray[np.int64]
    caption_rows: NDArray[np.int64]
    text_image: NDArray[np.int64]
    image_root: str
    accepted_mismatches: tuple[str, ...]

    @classmethod
    def of(
        cls,
        reader: EmbeddingReader,
        name: str,
        image_root: str | None = None,
        accepted: tuple[str, ...] = (),
        caption_kind: str | None = None,
    ) -> EvaluationSplit:
        """Return a split of an open cache.

        Args:
            image_root: base of relative uris. Default: that of the cache.
            accepted: accepted mismatches.
            caption_kind: kind of the captions. Default: all captions.

        Raises:
            UsageError: the split or kind is unknown, or the split has no embedding or has images without captions.
        """
        rows = reader.image_rows(name)
        if not len(rows):
            raise UsageError(f"{reader.location}: no image of split {name!r} has an embedding")
        reader.require_captions(
            rows,
            "Recall cannot be measured without: name a --cache of images with captions, or measure classes by "
            "teacher-cache zero-shot.",
            () if caption_kind is None else (caption_kind,),
        )
        caption_rows, text_image = reader.caption_rows(rows, caption_kind)
        root = image_root or reader.manifest.source.image_root
        return cls(reader, name, rows, caption_rows, text_image, root, accepted)

    @property
    def cache(self) -> str:
        """Location of the cache."""
        return self.reader.location

    @property
    def quarantined(self) -> int:
        """Number of the split's images without an embedding, which are left out."""
        return self.reader.manifest.identity.dataset.splits[self.name] - len(self.image_rows)

    @cached_property
    def sample_ids(self) -> list[str]:
        """Name of each image, in order."""
        ids: list[str] = self.reader.table_rows(SAMPLES, self.image_rows)["sample_id"].to_pylist()
        return ids

    @cached_property
    def content_sha256(self) -> pa.ChunkedArray:
        """Digest of each image's bytes, in order."""
        return self.reader.table_rows(SAMPLES, self.image_rows)["content_sha256"]

    @cached_property
    def _caption_texts(self) -> pa.ChunkedArray:
        return self.reader.table_rows(CAPTIONS, self.caption_rows)["text"]

    @cached_property
    def captions(self) -> list[str]:
        """Text of each caption, in order."""
        texts: list[str] = self._caption_texts.to_pylist()
        return texts

    @property
    def distinct_captions(self) -> int:
        """Number of different texts among the captions."""
        return int(pc.count_distinct(self._caption_texts).as_py())

    def ranks(
        self,
        image: NDArray[np.float32],
        text: NDArray[np.float32],
        depth: int = max(RECALL_KS),
        device: str = "auto",
    ) -> RetrievalRanks:
        """Rank embeddings of these images and captions, from any model.

        Args:
            image: (images, dim) unit norm, in the order of ``image_rows``; dim need not be the teacher's.
            text: (captions, dim) unit norm, in the order of ``caption_rows``.
            depth, device: see ``teacher_cache.pipeline.evaluate.recall.first_positive_ranks``.

        Raises:
            ValueError: the number of rows is wrong, the widths differ, or a value is not finite.
            UsageError: FAISS cannot use the device.
        """
        if len(image) != len(self.image_rows) or len(text) != len(self.caption_rows):
            raise ValueError(
                f"{len(image)} rows of images and {len(text)} of captions: {self.cache} has {len(self.image_rows)} "
                f"and {len(self.caption_rows)} in split {self.name!r}"
            )
        return first_positive_ranks(image, text, self.text_image, depth, device)

    def without(self, rows: Collection[int]) -> tuple[EvaluationSplit, NDArray[np.bool_], NDArray[np.bool_]]:
        """Return the split without some images and their captions, and masks of the images and captions that stay.

        Args:
            rows: rows of the cache.
        """
        images = ~np.isin(self.image_rows, list(rows))
        captions = images[self.text_image]
        number = np.cumsum(images) - 1
        rest = replace(
            self,
            image_rows=self.image_rows[images],
            caption_rows=self.caption_rows[captions],
            text_image=number[self.text_image[captions]],
        )
        return rest, images, captions

    @cached_property
    def images(self) -> CachedImages:
        """Stored bytes of the images by row of the cache."""
        return CachedImages(self.reader, ImageSource(self.image_root), self.image_rows.tolist())

    def image_bytes(self, position: int) -> bytes:
        """Read one image and check that the teacher saw the same bytes. Thread-safe.

        Raises:
            OSError: it cannot be read below ``image_root``.
            CacheMismatchError: it is another image.
        """
        return self.images.read(int(self.image_rows[position]))


def open_split(config: EvaluateConfig) -> EvaluationSplit:
    """Return the split that ``evaluate`` measures with the same settings.

    Raises:
        UsageError: neither cache nor run is set, or the split is unknown, has no embedding or images without captions.
        CacheMismatchError: the run learned from another teacher or other preprocessing.
        CacheError: the cache is missing, unfinished or damaged.
    """
    record = RunFolder(config.run).read() if config.run else None
    if record is None:
        if config.cache is None:
            raise UsageError("nothing to evaluate: give --cache, --run or both")
        reader = EmbeddingReader(config.cache)
        split = _chosen(config.split, reader)
        return EvaluationSplit.of(reader, split, config.image_root, caption_kind=config.caption_kind)
    reader = EmbeddingReader(config.cache or record.config.cache)
    way_out = (
        f"{config.run} was trained on {record.config.cache}: measure on a cache of the same teacher and preprocessing, "
        "or accept a difference by --accept-mismatch FIELD, which the result then names."
    )
    # views may differ: view 0, the only one measured, is the evaluation crop in every cache
    expected = record.identity.model_copy(update={"views": reader.identity.views})
    accepted = reader.identity.require(expected, reader.location, way_out, (*config.accept_mismatch, "dataset"))
    # another dataset's images are below its own root
    root = reader.manifest.source.image_root if accepted else record.image_root
    learned = record.config.split if reader.identity.dataset == record.identity.dataset else "train"
    split, root = _chosen(config.split, reader, learned), config.image_root or root
    return EvaluationSplit.of(reader, split, root, accepted, config.caption_kind)


def _chosen(split: str | None, reader: EmbeddingReader, learned: str = "train") -> str:
    return default_split(reader.location, reader.identity.dataset.splits, learned) if split is None else split


def default_split(cache: str, splits: Mapping[str, int], learned: str = "train") -> str:
    """Return the split to measure on if none is chosen: test, else the only one held out, else the only one.

    Args:
        cache: location of the cache, for the error.
        splits: its images by split.
        learned: split that the student learned from.

    Raises:
        UsageError: several splits are held out; the message lists them.
    """
    held_out = [name for name in splits if name != learned]
    if "test" in held_out:
        return "test"
    if len(held_out) > 1:
        names = ", ".join(f"{name!r} ({splits[name]} images)" for name in held_out)
        raise UsageError(f"{cache}: no split 'test', and several others: {names}. Name one by --split")
    return held_out[0] if held_out else learned


class SplitEncoder(Protocol):
    """A model, or a cache of its embeddings, that yields unit rows of a split in batches, in order."""

    def images(self, split: EvaluationSplit) -> Iterator[NDArray[Any]]:
        """Yield the rows of all images, (batch, dim)."""

    def captions(self, split: EvaluationSplit) -> Iterator[NDArray[Any]]:
        """Yield the rows of all captions, (batch, dim)."""


def embed(split: EvaluationSplit, encoder: SplitEncoder, progress: Progress | None = None) -> Embedded:
    """Embed all images and captions of a split.

    Args:
        progress: called with ("images" or "captions", done, total) after each batch.

    Raises:
        OSError, CacheMismatchError: an image cannot be read, or has changed; see ``EvaluationSplit.image_bytes``.
        ValueError: the encoder's number of rows differs from the split's.
    """
    return (
        _gathered("images", len(split.image_rows), encoder.images(split), progress),
        _gathered("captions", len(split.caption_rows), encoder.captions(split), progress),
    )


def _gathered(
    stage: str, total: int, batches: Iterator[NDArray[Any]], progress: Progress | None
) -> NDArray[np.float32]:
    rows, done = np.empty((0, 0), np.float32), 0
    for batch in batches:
        if not done:
            rows = np.empty((total, batch.shape[1]), np.float32)
        rows[done : done + len(batch)] = batch
        done += len(batch)
        if progress is not None:
            progress(stage, done, total)
    if done != total:
        raise ValueError(f"the encoder gave {done:,} rows for {total:,} {stage}")
    return rows


class CachedTeacher:
    """A teacher's cached rows of view 0, the evaluation crop. No model runs.

    Args:
        other: cache of another teacher, joined to that of the split. Default: the split's teacher.
    """

    def __init__(self, other: JoinedCache | None = None) -> None:
        self._other = other

    def images(self, split: EvaluationSplit) -> Iterator[NDArray[np.float32]]:
        """Yield unit rows of the images."""
        return self._rows(split, "image", split.image_rows, None if self._other is None else self._other.images)

    def captions(self, split: EvaluationSplit) -> Iterator[NDArray[np.float32]]:
        """Yield unit rows of the captions."""
        return self._rows(split, "text", split.caption_rows, None if self._other is None else self._other.captions)

    def _rows(
        self, split: EvaluationSplit, tower: Tower, rows: NDArray[np.int64], places: NDArray[Any] | None
    ) -> Iterator[NDArray[np.float32]]:
        reader = self._other.reader if self._other else split.reader
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[start : start + _ROWS_AT_ONCE]
            yield unit_rows(reader.take(tower, part if places is None else places[part]))


@dataclass(frozen=True)
class BytesEncoder:
    """Two functions that embed stored bytes of images, and captions, into unit rows.

    Attributes:
        batch_size: number of images, or captions, per call.
    """

    encode_images: Callable[[list[bytes]], NDArray[Any]]
    encode_captions: Callable[[list[str]], NDArray[Any]]
    batch_size: int = 256

    def images(self, split: EvaluationSplit) -> Iterator[NDArray[Any]]:
        """Yield rows of the images, after checking their bytes against the cache."""
        for positions in self._batches(range(len(split.image_rows))):
            yield self.encode_images([split.image_bytes(at) for at in positions])

    def captions(self, split: EvaluationSplit) -> Iterator[NDArray[Any]]:
        """Yield rows of the captions."""
        for texts in self._batches(split.captions):
            yield self.encode_captions(list(texts))

    def _batches(self, items: Sequence[Any]) -> Iterator[Sequence[Any]]:
        return (items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size))
