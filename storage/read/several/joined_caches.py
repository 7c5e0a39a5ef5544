"""Caches of several teachers over the same images and captions, joined by content to the first one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.errors import CacheMismatchError, UsageError
from teacher_cache.storage.format.tables import CAPTIONS, SAMPLES
from teacher_cache.storage.observe.logs import command_line
from teacher_cache.storage.read.content_index import ContentIndex
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.rows import RowSet


@dataclass(frozen=True)
class JoinedCache:
    """Another teacher's cache, and where in it the images and captions of the first cache are.

    Attributes:
        images: (images of the first cache,) int32 or int64, the row of each here; -1 if it has no embedding here.
        captions: (captions of the first cache,), the same of each caption.
    """

    reader: EmbeddingReader
    images: NDArray[Any]
    captions: NDArray[Any]


def join_caches(
    first: EmbeddingReader,
    others: Sequence[EmbeddingReader],
    rows: RowSet,
    captions: Sequence[str | None] = (None,),
    drop: bool = False,
    way_out: str = "",
) -> tuple[JoinedCache, ...]:
    """Join other teachers' caches to the first one, by the sha256 of stored bytes and the text of captions.

    Two columns of the tables of each cache are read, once. The result takes 4 bytes for each image and caption of the
    first cache; while a cache is looked up, each of its images and captions takes 24 more. Caches whose tables have the
    same digest need no look-up.

    Args:
        rows: images of the first cache that must be in all of them. With ``drop`` it is changed: what another cache
            lacks is removed.
        captions: kinds of captions of these images that must be there too; None for all captions, empty for none.
        drop: drop images that a cache lacks, or of which it lacks a caption, instead of refusing.
        way_out: further advice for the error.

    Raises:
        UsageError: two caches are the same; or one lacks an image or a caption, with ``drop`` of all images.
        CacheError: a table or the commits cannot be read.
    """
    seen = {first.manifest.digest: first.location}
    joined = []
    for other in others:
        digest = other.manifest.digest
        if digest in seen:
            raise UsageError(
                f"{seen[digest]} and {other.location} are one and the same cache, manifest {digest[:12]}: name the "
                "cache of another teacher"
            )
        seen[digest] = other.location
        cache = _joined(first, other, bool(captions))
        lacking, without_image = _lacking(first, cache, rows, captions)
        if len(lacking) and (not drop or len(lacking) == len(rows)):
            raise UsageError(_refusal(first, cache, len(rows), lacking, without_image, captions) + way_out * (not drop))
        for row in lacking.tolist():
            rows.remove(row)
        joined.append(cache)
    return tuple(joined)


def require_same_crops(first: EmbeddingReader, other: EmbeddingReader, views: int) -> None:
    """Check that two teachers saw the same crop of an image in each view that is used.

    A crop is a function of the image's bytes, the number of the view and the settings of the draw, so these are
    compared. View 0 is each teacher's own evaluation crop.

    Raises:
        CacheMismatchError: the crops differ, or the other cache has too few; the message has both values.
    """
    used, theirs = first.identity.views.model_copy(update={"count": views}), other.identity.views
    if views == 1 or theirs.holds(used):
        return
    own, others = used.fields(), theirs.fields()
    differ = [
        f"{name} is {own[name]} in {first.location} and {others.get(name)} in {other.location}"
        for name in own
        if own[name] != others.get(name) and (name != "count" or theirs.count < views)
    ]
    raise CacheMismatchError(
        f"views: {'; '.join(differ)}. Targets of other crops would be of other pixels than the student sees. Train on "
        f"the evaluation crop alone: --set views=1; or make {other.location} anew with as many views and the same "
        "view_seed, crop_scale, crop_ratio and crop_flip as the first cache"
    )


def _joined(first: EmbeddingReader, other: EmbeddingReader, captions: bool) -> JoinedCache:
    index = ContentIndex(other.column, other.location)  # one of its own, which ends with the join
    own, theirs, layout = first.identity.dataset, other.identity.dataset, other.manifest.layout
    dtype = np.int32 if max(layout.image_rows, layout.text_rows) < 2**31 else np.int64

    def places(same: bool, table: str, column: str, held: Callable[[list[str]], NDArray[np.int64]]) -> NDArray[Any]:
        if same:
            return np.arange(layout.rows("image" if table == SAMPLES else "text"), dtype=dtype)
        parts = (held(part.to_pylist()).astype(dtype) for part in first.column(table, column))
        return np.concatenate([np.empty(0, dtype), *parts])

    images = places(own.samples_sha256 == theirs.samples_sha256, SAMPLES, "content_sha256", index.images_held)
    images[np.isin(images, [row.row for row in other.quarantined])] = -1
    if not captions:
        return JoinedCache(other, images, np.empty(0, dtype))
    texts = places(own.captions_sha256 == theirs.captions_sha256, CAPTIONS, "text", index.captions_held)
    return JoinedCache(other, images, texts)


def _lost_captions(
    first: EmbeddingReader, cache: JoinedCache, rows: NDArray[np.int64], kinds: Sequence[str | None]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the captions of images that the other cache lacks, and the position of each one's image."""
    none = np.empty(0, np.int64)
    texts, owners = map(
        np.concatenate, zip((none, none), *(first.caption_rows(rows, kind) for kind in kinds), strict=True)
    )
    lost = cache.captions[texts] < 0
    return texts[lost], owners[lost]


def _lacking(
    first: EmbeddingReader, cache: JoinedCache, rows: RowSet, kinds: Sequence[str | None]
) -> tuple[NDArray[np.int64], int]:
    """Return the images without a counterpart, or with a caption without one, and the number of the former."""
    lacking, without_image = [np.empty(0, np.int64)], 0
    for part in rows.parts():
        lost = cache.images[part] < 0
        without_image += int(lost.sum())
        lost[_lost_captions(first, cache, part, kinds)[1]] = True
        lacking.append(part[lost])
    return np.concatenate(lacking), without_image


def _refusal(
    first: EmbeddingReader,
    cache: JoinedCache,
    images: int,
    lacking: NDArray[np.int64],
    without_image: int,
    kinds: Sequence[str | None],
) -> str:
    """Return what is missing in words: both caches, the counts, the first image or caption, and the way out."""
    other, row = cache.reader, lacking[:1]
    sample = first.table_rows(SAMPLES, row).to_pylist()[0]
    lost = f"the image {sample['sample_id']} (sha256 {sample['content_sha256'][:12]})"
    if cache.images[row[0]] >= 0:
        texts, _ = _lost_captions(first, cache, row, kinds)
        missing = first.table_rows(CAPTIONS, texts[:1])["text"][0].as_py()
        lost = f"the caption {missing!r} of {lost}"
    return (
        f"{other.location}: of the {images:,} images of {first.location} that are asked for, {without_image:,} have no "
        f"embedding in it, and of {len(lacking) - without_image:,} others a caption is missing; the first is {lost}. "
        f"{first.location} is of {first.manifest.source.dataset}, {other.location} of {other.manifest.source.dataset}. "
        f"Make one of the same dataset: "
        f"{command_line('precompute', dataset=first.manifest.source.dataset, reuse=other.location)}, with its teacher "
        "and a new --cache. "
    )
