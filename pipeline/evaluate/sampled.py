"""Ranks and recall of the cached teacher on a sample of a cache, for reports. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel

from teacher_cache.pipeline.evaluate.recall import Recalls, RetrievalRanks, first_positive_ranks, recall_of_ranks
from teacher_cache.storage.look.stats import DrawnRows, ReadRows, read_drawn

_IMAGES = 5_000


class SampledRecall(BaseModel, frozen=True):
    """Recall of the teacher in percent, among a sample of images and their captions."""

    images: int
    captions: int
    i2t: dict[str, float]
    t2i: dict[str, float]

    @property
    def by_direction(self) -> Recalls:
        """Recall by direction and K."""
        return {"i2t": self.i2t, "t2i": self.t2i}


@dataclass(frozen=True)
class RankedRows:
    """A sample of images and captions, with their ranks among each other."""

    rows: ReadRows
    ranks: RetrievalRanks

    @property
    def recall(self) -> SampledRecall:
        """Recall among these rows."""
        recalls = recall_of_ranks(self.ranks, (1, 5, 10))
        return SampledRecall(images=len(self.ranks.i2t), captions=len(self.ranks.t2i), **recalls)


def rank_rows(
    drawn: DrawnRows, depth: int | None = None, progress: Callable[[str, int, int], None] | None = None
) -> RankedRows | None:
    """Rank the rows of a sample; of more than 5,000 images, a random 5,000 and their captions.

    Args:
        depth: greatest rank to search. Default: all.
        progress: called with ("recall", done, total).

    Returns:
        The ranks, or None if no caption has an embedding or an image has no caption, as in a labelled dataset.
    """
    rows = drawn.usable
    if drawn.without_caption or not len(rows.texts):
        return None
    if len(rows.images) > _IMAGES:
        random = np.random.default_rng([drawn.seed, 2])
        rows = rows.of_images(np.sort(random.choice(len(rows.images), _IMAGES, replace=False)))
        if not len(rows.texts):
            return None
    report = progress or (lambda stage, done, total: None)
    report("recall", 0, 1)
    ranks = first_positive_ranks(rows.images, rows.texts, rows.text_image, depth)
    report("recall", 1, 1)
    return RankedRows(rows, ranks)


def sampled_recall(location: str) -> SampledRecall | None:
    """Return the teacher's recall among the images of a sealed cache, or among a random 5,000 of more.

    Raises:
        CacheError: as ``EmbeddingReader`` raises it.
        UsageError: FAISS is not installed.
    """
    ranked = rank_rows(read_drawn(location, most=_IMAGES), depth=10)
    return ranked.recall if ranked else None
