"""A split of a cache as the thing to measure on: the same images and captions for teacher and every student. No torch.

Whoever can embed images and captions, in whatever runtime, is measured on the very rows that ``evaluate`` takes::

    split = open_split(EvaluateConfig(run="runs/a", split="dev"))
    image, text = split.embed(encode_images, encode_texts)     # two functions: bytes and captions to unit rows
    student = split.ranks(image, text)
    teacher = split.teacher_ranks()
    recall_of_ranks(student), recall_of_ranks(teacher)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.pipeline.data.batches.stored_images import CachedImages
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.evaluate.recall import RECALL_KS, RetrievalRanks, first_positive_ranks
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.format.tables import CAPTIONS, SAMPLES
from teacher_cache.storage.look.nearest import unit_rows
from teacher_cache.storage.read.reader import EmbeddingReader

__all__ = ["EvaluationSplit", "open_split"]


@dataclass(frozen=True)
class EvaluationSplit:
    """Images of one split that have an embedding, with all their captions. Positions count from 0 within it.

    Attributes:
        cache: its location.
        name: of the split.
        image_rows: (images,) rows of the cache, ascending; quarantined ones are left out.
        caption_rows: (captions,) rows of the cache, those of an image side by side.
        text_image: (captions,) position of each caption's image in ``image_rows``.
        quarantined: images of the split that are left out because they have no embedding.
        image_root: where relative uris start from.
        accepted_mismatches: between this cache and that of the run, accepted by the settings.
        reader: of the cache.
    """

    cache: str
    name: str
    image_rows: NDArray[np.int64]
    caption_rows: NDArray[np.int64]
    text_image: NDArray[np.int64]
    quarantined: int
    image_root: str
    accepted_mismatches: tuple[str, ...]
    reader: EmbeddingReader = field(repr=False)

    @cached_property
    def sample_ids(self) -> list[str]:
        """Of each image, in order."""
        ids: list[str] = self.reader.table_rows(SAMPLES, self.image_rows)["sample_id"].to_pylist()
        return ids

    @cached_property
    def captions(self) -> list[str]:
        """Text of each caption, in order."""
        texts: list[str] = self.reader.table_rows(CAPTIONS, self.caption_rows)["text"].to_pylist()
        return texts

    def teacher_image(self) -> NDArray[np.float32]:
        """The teacher's rows of the images, float32 (images, dim), unit norm; view 0, the evaluation crop."""
        return unit_rows(self.reader.take("image", self.image_rows))

    def teacher_text(self) -> NDArray[np.float32]:
        """The teacher's rows of the captions, float32 (captions, dim), unit norm."""
        return unit_rows(self.reader.take("text", self.caption_rows))

    def teacher_ranks(self, depth: int = max(RECALL_KS)) -> RetrievalRanks:
        """Ranks of the teacher, from its cached rows."""
        image, text = self.reader.take("image", self.image_rows), self.reader.take("text", self.caption_rows)
        return self.ranks(image, text, depth, cosine=True)

    def ranks(
        self, image: NDArray[Any], text: NDArray[Any], depth: int = max(RECALL_KS), cosine: bool = False
    ) -> RetrievalRanks:
        """Ranks of anybody's embeddings of these images and captions.

        Args:
            image: (images, dim) unit norm, in the order of ``image_rows``; dim need not be the teacher's.
            text: (captions, dim) unit norm, in the order of ``caption_rows``.
            depth, cosine: how far down to look, and whether to normalise first; see
                ``teacher_cache.pipeline.evaluate.recall.first_positive_ranks``.

        Raises:
            ValueError: another number of rows, other widths, or a value that is not finite.
        """
        if len(image) != len(self.image_rows) or len(text) != len(self.caption_rows):
            raise ValueError(
                f"{len(image)} rows of images and {len(text)} of captions: {self.cache} has {len(self.image_rows)} "
                f"and {len(self.caption_rows)} in split {self.name!r}"
            )
        return first_positive_ranks(image, text, self.text_image, depth, cosine)

    @cached_property
    def images(self) -> CachedImages:
        """Stored bytes of the images by row of the cache."""
        return CachedImages(self.reader, ImageSource(self.image_root), self.image_rows.tolist())

    def image_bytes(self, position: int) -> bytes:
        """Stored bytes of one image, proven to be those that the teacher saw. Safe for several threads.

        Raises:
            OSError: it cannot be read where ``image_root`` says.
            CacheMismatchError: it is there and is another image.
        """
        return self.images.read(int(self.image_rows[position]))

    def embed(
        self,
        encode_images: Callable[[list[bytes]], NDArray[np.float32]],
        encode_texts: Callable[[list[str]], NDArray[np.float32]],
        batch_size: int = 256,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """All images and captions through two functions, in order.

        Args:
            encode_images: stored bytes of some images to rows (images, dim) of unit norm.
            encode_texts: some captions to rows (captions, dim) of unit norm.
            batch_size: images, or captions, per call.
            progress: called with (images or captions, done, of how many).

        Returns:
            float32 (images, dim) and (captions, dim).

        Raises:
            OSError, CacheMismatchError: as :meth:`image_bytes`.
        """

        def all_of(stage: str, total: int, encode: Callable[[range], NDArray[np.float32]]) -> NDArray[np.float32]:
            parts = []
            for start in range(0, total, batch_size):
                stop = min(start + batch_size, total)
                parts.append(np.asarray(encode(range(start, stop)), np.float32))
                if progress is not None:
                    progress(stage, stop, total)
            return np.concatenate(parts)

        return (
            all_of("images", len(self.image_rows), lambda part: encode_images([self.image_bytes(at) for at in part])),
            all_of("captions", len(self.captions), lambda part: encode_texts([self.captions[at] for at in part])),
        )


def open_split(config: EvaluateConfig, way_out: str | None = None) -> EvaluationSplit:
    """The split that ``evaluate`` measures with the same settings.

    Args:
        way_out: what to do where the cache is not the run's; ``evaluate``'s flags if left out.

    Raises:
        UsageError: neither cache nor run given, an unknown split, or one without an embedding.
        CacheMismatchError: the run was trained on another cache than the one given.
        CacheError: the cache is missing, unfinished or damaged.
    """
    record = RunFolder(config.run).read() if config.run else None
    cache = config.cache
    if cache is None:
        if record is None:
            raise UsageError("nothing to evaluate: give --cache, --run or both")
        cache = record.config.cache
    reader = EmbeddingReader(cache)
    accepted: tuple[str, ...] = ()
    root = reader.manifest.source.image_root
    if record is not None:
        way_out = way_out or (
            f"{config.run} was trained on {record.config.cache}: evaluate on that, or accept a difference by "
            "--accept-mismatch FIELD (dataset, for a cache of other images), which the result then names."
        )
        # only view 0 is looked at here, and that is the evaluation crop in every cache, whatever was added since
        wanted = record.identity.model_copy(update={"views": reader.manifest.identity.views})
        accepted = reader.manifest.identity.require(wanted, cache, way_out, config.accept_mismatch)
        if not accepted:  # images of another dataset are where its own cache found them
            root = record.image_root
    rows = reader.image_rows(config.split)
    if not len(rows):
        raise UsageError(f"{cache}: no image of split {config.split!r} has an embedding")
    reader.require_captions(rows)
    caption_rows, text_image = reader.caption_rows(rows)
    return EvaluationSplit(
        cache=cache,
        name=config.split,
        image_rows=rows,
        caption_rows=caption_rows,
        text_image=text_image,
        quarantined=reader.manifest.identity.dataset.splits[config.split] - len(rows),
        image_root=config.image_root or root,
        accepted_mismatches=accepted,
        reader=reader,
    )
