"""Statistics of several teachers' caches on the same images and captions."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, Field

from teacher_cache.storage.look.sampling import Progress, draw_rows
from teacher_cache.storage.look.stats import MEMORY_BYTES, CacheStats, DrawnRows, stats_of, stored_arrays
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.several.joined_caches import join_caches


class SideBySide(BaseModel, frozen=True):
    """Result of ``teacher-cache stats`` with several caches."""

    images: int = Field(description="Images of the first cache, or of its split, that all caches have.")
    dropped_images: int = Field(description="Images of the first cache that another one lacks, or lacks a caption of.")
    caches: tuple[CacheStats, ...] = Field(description="Statistics of the same images and captions, in each cache.")


def read_side_by_side(
    locations: Sequence[str],
    split: str | None = None,
    most: int = 20_000,
    seed: int = 0,
    drop: bool = False,
    progress: Progress | None = None,
) -> tuple[list[DrawnRows], int]:
    """Read the same images, with all their captions, from caches of several teachers.

    Images and captions are joined by content to those of the first cache, as ``train`` joins them. View 0 is read:
    each teacher's own evaluation crop.

    Args:
        locations: caches of several teachers; the first one's split and rows are drawn from.
        split: split of the first cache. Default: all.
        most: maximum number of images to read. More are sampled.
        seed: seed of the draw.
        drop: leave out images that a cache lacks, or of which it lacks a caption, instead of refusing.
        progress: called with (stage, done, total).

    Returns:
        The rows of each cache, all in the order of the first one's, and the number of images left out.

    Raises:
        UsageError: no such split; two caches are the same; or one lacks an image or a caption.
        CacheError: as ``EmbeddingReader`` raises it.
    """
    readers = [EmbeddingReader(location, memory_bytes=MEMORY_BYTES) for location in locations]
    first = readers[0]
    common = first.row_set(split)
    asked = len(common)
    joined = join_caches(
        first, readers[1:], common, drop=drop, way_out="To look at the images that all caches have: --unmatched drop."
    )
    every = common.numbers()
    images = draw_rows(every, first.manifest.layout.image_chunk_rows, most, seed)
    captions, text_image = first.caption_rows(images)
    places = [(every, images, captions)]
    places += [(cache.images[every], cache.images[images], cache.captions[captions]) for cache in joined]
    drawn = [
        DrawnRows(
            reader=reader,
            split=split,
            view=0,
            seed=seed,
            every=all_rows,
            image_rows=image_rows,
            caption_rows=caption_rows,
            text_image=text_image,
            **stored_arrays(reader, image_rows, caption_rows, progress=progress),
        )
        for reader, (all_rows, image_rows, caption_rows) in zip(readers, places, strict=True)
    ]
    return drawn, asked - len(every)


def stats_side_by_side(
    locations: Sequence[str],
    split: str | None = None,
    most: int = 20_000,
    near: float = 0.99,
    seed: int = 0,
    drop: bool = False,
    progress: Progress | None = None,
) -> SideBySide:
    """Summarize the embeddings of the same images and captions in caches of several teachers.

    Args:
        near: minimum cosine of near-duplicates.
        locations, split, most, seed, drop, progress: as :func:`read_side_by_side` takes them.

    Raises:
        UsageError, CacheError: as :func:`read_side_by_side` raises them.
    """
    drawn, dropped = read_side_by_side(locations, split, most, seed, drop, progress)
    caches = tuple(stats_of(rows, near, progress) for rows in drawn)
    return SideBySide(images=len(drawn[0].every), dropped_images=dropped, caches=caches)
