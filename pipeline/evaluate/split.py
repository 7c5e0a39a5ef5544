"""A split of a cache to measure on: the same images and captions for teacher and students. No torch.

Any function that embeds images and captions can be measured on the same rows as ``evaluate``::

    split = open_split(EvaluateConfig(run="runs/a", split="dev"))
    images, captions = embed(split, BytesEncoder(encode_images, encode_captions))
    student = recall_of_ranks(split.ranks(images, captions))
    images, captions = embed(split, CachedTeacher())
    teacher = recall_of_ranks(split.ranks(images, captions))
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from teacher_cache.pipeline.data.batches.stored_images import CachedImages
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.evaluate.recall import RECALL_KS, RetrievalRanks, first_positive_ranks
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.format.tables import CAPTIONS, SAMPLES
from teacher_cache.storage.read.reader import EmbeddingReader

__all__ = ["EvaluationSplit", "open_split"]


@dataclass(frozen=True)
class EvaluationSplit:
    """The images of one split that have an embedding, with all their captions. Positions count from 0 within it.

    Attributes:
        cache: location of the cache.
        name: name of the split.
        image_rows: (images,) rows of the cache, ascending, without quarantined images.
        caption_rows: (captions,) rows of the cache; captions of an image are adjacent.
        text_image: (captions,) position of each caption's image in ``image_rows``.
        quarantined: number of the split's images without an embedding, which are left out.
        image_root: base of relative uris.
        accepted_mismatches: differences between this cache and the run's that the settings accept.
        reader: reader of the cache.
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

    @classmethod
    def of(
        cls, reader: EmbeddingReader, name: str, image_root: str | None = None, accepted: tuple[str, ...] = ()
    ) -> EvaluationSplit:
        """Return a split of an open cache.

        Args:
            image_root: base of relative uris. Default: that of the cache.
            accepted: accepted mismatches.

        Raises:
            UsageError: the split is unknown or has no embedding.
        """
        rows = reader.image_rows(name)
        if not len(rows):
            raise UsageError(f"{reader.location}: no image of split {name!r} has an embedding")
        caption_rows, text_image = reader.caption_rows(rows)
        return cls(
            cache=reader.location,
            name=name,
            image_rows=rows,
            caption_rows=caption_rows,
            text_image=text_image,
            quarantined=reader.manifest.identity.dataset.splits[name] - len(rows),
            image_root=image_root or reader.manifest.source.image_root,
            accepted_mismatches=accepted,
            reader=reader,
        )

    @cached_property
    def sample_ids(self) -> list[str]:
        """Name of each image, in order."""
        ids: list[str] = self.reader.table_rows(SAMPLES, self.image_rows)["sample_id"].to_pylist()
        return ids

    @cached_property
    def captions(self) -> list[str]:
        """Text of each caption, in order."""
        texts: list[str] = self.reader.table_rows(CAPTIONS, self.caption_rows)["text"].to_pylist()
        return texts

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


def open_split(config: EvaluateConfig, way_out: str | None = None) -> EvaluationSplit:
    """Return the split that ``evaluate`` measures with the same settings.

    Args:
        way_out: advice for the error if the cache is not the run's. Default: ``evaluate``'s flags.

    Raises:
        UsageError: neither cache nor run is set, or the split is unknown, has no embedding or images without captions.
        CacheMismatchError: the run was trained on another cache.
        CacheError: the cache is missing, unfinished or damaged.
    """
    record = RunFolder(config.run).read() if config.run else None
    if record is None:
        if config.cache is None:
            raise UsageError("nothing to evaluate: give --cache, --run or both")
        return _with_captions(EvaluationSplit.of(EmbeddingReader(config.cache), config.split, config.image_root))
    reader = EmbeddingReader(config.cache or record.config.cache)
    way_out = way_out or (
        f"{config.run} was trained on {record.config.cache}: evaluate on that, or accept a difference by "
        "--accept-mismatch FIELD (dataset, for a cache of other images), which the result then names."
    )
    # views may differ: view 0, the only one measured, is the evaluation crop in every cache
    expected = record.identity.model_copy(update={"views": reader.manifest.identity.views})
    accepted = reader.manifest.identity.require(expected, reader.location, way_out, config.accept_mismatch)
    # another dataset's images are below its own root
    root = reader.manifest.source.image_root if accepted else record.image_root
    return _with_captions(EvaluationSplit.of(reader, config.split, config.image_root or root, accepted))


def _with_captions(split: EvaluationSplit) -> EvaluationSplit:
    split.reader.require_captions(split.image_rows)
    return split
