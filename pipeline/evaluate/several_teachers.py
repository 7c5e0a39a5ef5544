"""Recall of further teachers on a split, and of all teachers together, from their caches. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, Field

from teacher_cache.pipeline.evaluate.recall import Recalls, recall_of_ranks
from teacher_cache.pipeline.evaluate.split import CachedTeacher, Embedded, EvaluationSplit, embed
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.rows import RowSet
from teacher_cache.storage.read.several.joined_caches import join_caches


class OtherTeacher(BaseModel, frozen=True):
    """A further teacher, measured on the images and captions of the first one's split."""

    teacher_name: str
    cache: str
    cache_manifest_digest: str
    recall: Recalls = Field(description="In percent.")


def measure_others(
    split: EvaluationSplit, first: Embedded, caches: Sequence[str], device: str, kind: str | None = None
) -> tuple[tuple[OtherTeacher, ...], Recalls]:
    """Measure further teachers, and all of them together: by the mean of their logits, each at its own scale.

    Args:
        first: rows of the first teacher.
        caches: the caches of the others, which are joined to the split's by content.
        kind: kind of the split's captions. Default: all captions.

    Raises:
        UsageError: a cache lacks an image or a caption of the split.
        CacheError: a cache is missing, unfinished or damaged.
    """
    readers = [EmbeddingReader(cache) for cache in caches]
    rows = RowSet.of(split.image_rows)
    joined = join_caches(split.reader, readers, rows, [kind], way_out="Or measure it by itself.")
    embedded = [first, *(embed(split, CachedTeacher(cache)) for cache in joined)]
    scales = [reader.identity.teacher.logit_scale for reader in (split.reader, *readers)]
    # the dot product of the rows side by side is the mean of the logits, but for a factor
    shares = np.sqrt(np.array(scales, np.float32) / sum(scales))
    images, captions = (
        np.concatenate([share * rows for share, rows in zip(shares, tower, strict=True)], axis=1)
        for tower in zip(*embedded, strict=True)
    )
    others = [
        OtherTeacher(
            teacher_name=reader.identity.teacher.name,
            cache=reader.location,
            cache_manifest_digest=reader.manifest.digest,
            recall=recall_of_ranks(split.ranks(*rows, device=device)),
        )
        for reader, rows in zip(readers, embedded[1:], strict=True)
    ]
    return tuple(others), recall_of_ranks(split.ranks(images, captions, device=device))
