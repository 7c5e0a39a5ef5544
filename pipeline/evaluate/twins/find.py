"""Twins between the images that a student learns from and others: candidates by embedding, decided by pixels. No torch.

Each other image is compared with the nearest rows of those to learn from: equal digests of the stored bytes are told as
such, the others are decoded and compared. Nothing of a cache is written.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from teacher_cache.pipeline.data.batches.cached_samples import SampleRecord, sample_records
from teacher_cache.pipeline.data.batches.stored_images import StoredImages
from teacher_cache.pipeline.data.cores import decode_threads
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images.decode import UndecodableImageError
from teacher_cache.pipeline.evaluate.twins.near_rows import NearRows, nearest_rows, read_queries, usual_cosine
from teacher_cache.pipeline.evaluate.twins.pictures import LEAST_LIKENESS, Picture
from teacher_cache.storage.errors import CacheMismatchError, UsageError
from teacher_cache.storage.format.tables import SAMPLES
from teacher_cache.storage.look.sampling import Progress, stage
from teacher_cache.storage.observe.quantities import counted
from teacher_cache.storage.read.reader import EmbeddingReader

_MEMORY_BYTES = 64 << 20  # each chunk is read once
_CLOSER = 4  # candidates are this many times as near as two images usually are
_MOST_LEAST = 0.98  # images that are nearly all alike: float16 rows of equal ones differ
_MOST_NEAR = 16
_MISSES = 3  # nearest rows in a row that are other pictures, after which no further one is compared
_AT_ONCE = 1_024
_OPEN_FILES = 16  # of a table: each is proven when it is opened

_Rows = NDArray[np.int64]
Kind = Literal["same bytes", "same picture", "mirrored"]


class Twin(BaseModel, frozen=True):
    """An image to learn from that shows the same picture as another image."""

    sample_id: str = Field(description="The image to learn from.")
    row: int
    twin: str = Field(description="sample_id of the other image.")
    twin_row: int
    twin_split: str
    kind: Kind = Field(description="same bytes: equal files. mirrored: one is the mirror image of the other.")
    cosine: float = Field(description="Cosine of the embeddings.")
    likeness: float = Field(description="Likeness of the pixels, at most 1.")


class Twins(BaseModel, frozen=True):
    """Result of ``teacher-cache twins``, and the list that ``train --exclude`` takes."""

    cache: str = Field(description="Location of the cache to learn from.")
    split: str = Field(description="Split to learn from.")
    samples_sha256: str = Field(description="Digest of the cache's images, by which train knows its list.")
    images: int = Field(description="Number of images of the split that have an embedding.")
    against: str = Field(description="Location of the cache of the other images.")
    against_samples_sha256: str
    others: int = Field(description="Number of other images that have an embedding.")
    quarantined: int = Field(description="Number of images of both without an embedding, which are not compared.")
    least_cosine: float = Field(description="Minimum cosine of pairs whose pictures are compared.")
    least_likeness: float = Field(description="Likeness of pixels from which two pictures are the same.")
    near: int = Field(description="Number of pairs that reach the minimum cosine: the 16 nearest of each other image.")
    unread: int = Field(description="Number of other images that were not compared: a picture cannot be read.")
    unread_first: str | None = Field(None, description="Reason for the first of them.")
    cut: int = Field(description="Number of other images that may have more twins: only the nearest 16 are compared.")
    twins: tuple[Twin, ...] = Field(description="The twins, by row of the image to learn from.")
    seconds: float

    @property
    def excluded(self) -> int:
        """Number of images to learn from that have a twin."""
        return len({twin.row for twin in self.twins})

    @property
    def others_with_twin(self) -> int:
        """Number of other images that have a twin."""
        return len({twin.twin_row for twin in self.twins})

    @property
    def summary(self) -> str:
        """The result in one sentence."""
        have = "has" if self.excluded == 1 else "have"
        others = counted(self.others, "other image") + (f" of {self.against}" if self.against != self.cache else "")
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(Counter(t.kind for t in self.twins).items()))
        return (
            f"{self.cache}{f', {self.split}' if self.split else ''}: {self.excluded:,} of "
            f"{counted(self.images, 'image')} {have} a twin among {others}" + (f": {kinds}" if kinds else "")
        )


@dataclass(frozen=True)
class Images:
    """Images of a cache, by their rows. Each has an embedding.

    Attributes:
        root: base of relative uris.
    """

    reader: EmbeddingReader
    rows: _Rows
    root: str


class _Compared(NamedTuple):
    """Result for one other image.

    Attributes:
        unread: reason why it was not compared with all of its nearest rows, if so.
        cut: further rows may be twins too: the nearest ones ended before some in a row were other pictures.
    """

    twins: list[Twin]
    unread: str | None
    cut: bool


def find_twins(
    cache: str,
    against: str | None = None,
    *,
    split: str | None = None,
    against_split: str | None = None,
    least: float | None = None,
    image_root: str | None = None,
    against_root: str | None = None,
    progress: Progress | None = None,
) -> Twins:
    """Find the images of a split that have a twin among other images.

    Args:
        cache: cache to learn from.
        against: cache of the other images. Default: the same.
        split: split to learn from. Default: train, or the cache's only one.
        against_split: split of the other images. Default: all; of the same cache all but ``split``.
        least: minimum cosine of the pairs whose pictures are compared. Default: two images of the pair are four times
            as near as two of the other images usually are, ``1 - (1 - mean cosine) / 4``.
        image_root, against_root: folder of the images of each cache. Default: the recorded place.
        progress: called with (stage, done, total).

    Raises:
        UsageError: a split does not exist, or there are no other images.
        CacheMismatchError: the two caches are not of one teacher and preprocessing.
        CacheError: a cache is missing, unfinished or damaged.
    """
    started = time.perf_counter()
    reader = EmbeddingReader(cache, memory_bytes=_MEMORY_BYTES)
    other = reader if against is None else EmbeddingReader(against, memory_bytes=_MEMORY_BYTES)
    require_comparable(reader, other)
    splits = reader.identity.dataset.splits
    split = split or ("train" if len(splits) > 1 else next(iter(splits)))
    rows = reader.image_rows(split)
    same = reader.identity.dataset.samples_sha256 == other.identity.dataset.samples_sha256
    other_rows, other_count = _others(other, against_split, split if same else None)
    learned = Images(reader, rows, image_root or reader.manifest.source.image_root)
    others = Images(other, other_rows, (against_root if against else image_root) or other.manifest.source.image_root)
    found = twins_among(learned, others, least, progress)
    return found.model_copy(
        update={
            "split": split,
            "quarantined": splits[split] + other_count - len(rows) - len(other_rows),
            "seconds": time.perf_counter() - started,
        }
    )


def require_comparable(reader: EmbeddingReader, other: EmbeddingReader) -> None:
    """Check that rows of two caches may be compared: one teacher, and one preprocessing.

    Raises:
        CacheMismatchError: names each field that differs, with both values.
    """
    other.identity.require(
        reader.identity,
        other.location,
        f"Its rows cannot be compared with those of {reader.location}: precompute it with the same teacher.",
        ("dataset", "targets", "views", "tokenizer"),
    )


def _others(other: EmbeddingReader, chosen: str | None, learned: str | None) -> tuple[_Rows, int]:
    """Return the rows of the other images, ascending, and their number with the quarantined ones."""
    splits = other.identity.dataset.splits
    if chosen is not None and chosen == learned:
        raise UsageError(f"{other.location}: {chosen!r} is the split to learn from; name another --against-split")
    if learned is not None and len(splits) == 1:
        raise UsageError(
            f"{other.location}: all {splits[learned]:,} images are of split {learned!r}, and there are no others to "
            "compare with: name a cache of other images by --against"
        )
    if chosen is not None:
        return other.image_rows(chosen), splits[chosen]
    rows, count = other.image_rows(), sum(splits.values())
    if learned is None:
        return rows, count
    return np.setdiff1d(rows, other.image_rows(learned), assume_unique=True), count - splits[learned]


def twins_among(learned: Images, others: Images, least: float | None = None, progress: Progress | None = None) -> Twins:
    """Find the images to learn from that have a twin among other images, for caches that may be compared.

    Arguments and errors as of :func:`find_twins`; ``split`` and ``quarantined`` of the result are empty.
    """
    started = time.perf_counter()
    queries = read_queries(others.reader, others.rows)
    if least is None:
        least = min(1 - (1 - usual_cosine(queries)) / _CLOSER, _MOST_LEAST)
    near = nearest_rows(queries, learned.reader, learned.rows, least, _MOST_NEAR, stage(progress, "compare rows"))
    compared = list(_compared(learned, others, near, stage(progress, "compare pictures")))
    unread = [result.unread for result in compared if result.unread is not None]
    twins = sorted((twin for result in compared for twin in result.twins), key=lambda twin: (twin.row, twin.twin_row))
    return Twins(
        cache=learned.reader.location,
        split="",
        samples_sha256=learned.reader.identity.dataset.samples_sha256,
        images=len(learned.rows),
        against=others.reader.location,
        against_samples_sha256=others.reader.identity.dataset.samples_sha256,
        others=len(others.rows),
        quarantined=0,
        least_cosine=least,
        least_likeness=LEAST_LIKENESS,
        near=len(near.query),
        unread=len(unread),
        unread_first=next(iter(unread), None),
        cut=sum(result.cut for result in compared),
        twins=tuple(twins),
        seconds=time.perf_counter() - started,
    )


def _compared(
    learned: Images, others: Images, near: NearRows, progress: Callable[[int, int], None]
) -> Iterator[_Compared]:
    """Yield the result of each other image that has near rows."""
    sources = StoredImages(ImageSource(learned.root)), StoredImages(ImageSource(others.root))
    samples, own_samples = (images.reader.table(SAMPLES, open_files=_OPEN_FILES) for images in (learned, others))
    starts = np.flatnonzero(np.diff(near.query, prepend=-1))
    with ThreadPoolExecutor(max(decode_threads(), _fetches(learned), _fetches(others))) as pool:
        for at in range(0, len(starts), _AT_ONCE):
            stop = starts[at + _AT_ONCE] if at + _AT_ONCE < len(starts) else len(near.query)
            part = near.taken(slice(starts[at], stop))
            records = sample_records(samples.take(part.row))
            queries, first = np.unique(part.query, return_index=True)
            own = own_samples.take(others.rows[queries])
            groups = [
                (image, split, records[start:end], part.cosine[start:end].tolist())
                for image, split, start, end in zip(
                    sample_records(own), own["split"].to_pylist(), first, [*first[1:], len(records)], strict=True
                )
            ]
            yield from pool.map(lambda group: _compare(sources, *group), groups)
            progress(min(at + _AT_ONCE, len(starts)), len(starts))


def _fetches(images: Images) -> int:
    """Return the number of pictures to fetch at a time, by the place of the first; 0: they are on this machine."""
    uris = images.reader.table_rows(SAMPLES, images.rows[:1])["uri"].to_pylist()
    return max((ImageSource(images.root).fetches(uri) for uri in uris), default=0)


def _compare(
    sources: tuple[StoredImages, StoredImages],
    image: SampleRecord,
    split: str | None,
    near: Sequence[SampleRecord],
    cosines: Sequence[float],
) -> _Compared:
    """Compare one other image with its nearest rows, until some in a row are other pictures."""
    twins: list[Twin] = []
    picture, misses, unread = None, 0, None

    def add(row: SampleRecord, cosine: float, kind: Kind, likeness: float) -> None:
        both = {"sample_id": row.sample_id, "row": row.row, "twin": image.sample_id, "twin_row": image.row}
        twins.append(Twin(**both, twin_split=split or "", kind=kind, cosine=min(cosine, 1.0), likeness=likeness))

    for row, cosine in zip(near, cosines, strict=True):
        if row.content_sha256 == image.content_sha256:
            add(row, cosine, "same bytes", 1.0)
            continue
        if misses == _MISSES:
            continue
        try:
            picture = picture or Picture(sources[1].read(image))
            value, mirrored = picture.likeness(Picture(sources[0].read(row)))
        except (OSError, CacheMismatchError, UndecodableImageError) as error:
            unread, misses = unread or str(error), misses + 1
            continue
        if value >= LEAST_LIKENESS:
            add(row, cosine, "mirrored" if mirrored else "same picture", value)
        misses = 0 if value >= LEAST_LIKENESS else misses + 1
    return _Compared(twins, unread, len(near) == _MOST_NEAR and misses < _MISSES)
