"""What the embeddings of a cache look like: norms, cosines, duplicates, rank, and the teacher's own recall.

Above a stated number of rows a part of them is drawn, and the result says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.format.tables import SAMPLES
from teacher_cache.storage.look.nearest import near_pairs, unit_rows
from teacher_cache.storage.look.ranks import first_positive_ranks, recall_of_ranks
from teacher_cache.storage.look.sampling import draw_rows, stored_rows
from teacher_cache.storage.read.reader import EmbeddingReader

__all__ = [
    "CacheStats",
    "Distribution",
    "NearPair",
    "Ranks",
    "ReadRows",
    "RecallStats",
    "TowerStats",
    "cache_stats",
    "effective_rank",
    "stats_and_rows",
]

_QUANTILES = (1, 5, 25, 50, 75, 95, 99)
_BINS = 20
_RECALL_KS = (1, 5, 10)
_RECALL_IMAGES = 5000
_PAIRS_NAMED = 20
_MEMORY_BYTES = 64 << 20  # each chunk is read once
_DEAD = 0.01  # of the median dimension's standard deviation

Progress = Callable[[str, int, int], None]
_Floats = NDArray[np.float32]


class Distribution(BaseModel, frozen=True):
    """Numbers, summed up."""

    count: int
    mean: float
    std: float
    least: float
    greatest: float
    quantiles: dict[str, float] = Field(description="Percentiles: 1 %, 5 %, 25 %, 50 %, 75 %, 95 % and 99 %.")
    histogram: tuple[int, ...] = Field(description="Counts of 20 equal bins from the least to the greatest.")

    @classmethod
    def of(cls, values: NDArray[np.floating]) -> Distribution | None:
        """Of finite numbers; None of none."""
        if not len(values):
            return None
        wide = values.astype(np.float64)
        return cls(
            count=len(wide),
            mean=float(wide.mean()),
            std=float(wide.std()),
            least=float(wide.min()),
            greatest=float(wide.max()),
            quantiles={f"{q} %": float(np.percentile(wide, q)) for q in _QUANTILES},
            histogram=tuple(int(count) for count in np.histogram(wide, bins=_BINS)[0]),
        )


class TowerStats(BaseModel, frozen=True):
    """The rows of one tower that were read."""

    rows: int = Field(description="In the cache, or in the split.")
    rows_read: int
    missing: int = Field(description="Of those read, NaN: quarantined.")
    zero: int = Field(description="Of those read, without a direction. A writer refuses them.")
    norm: Distribution | None = Field(description="Of the teacher's output before it was normalised.")
    cosine: Distribution | None = Field(description="Of random pairs of rows of this tower.")
    equal_rows: int = Field(description="Rows whose embedding another row has too, bit for bit.")
    dead_dimensions: tuple[int, ...] = Field(
        description="Dimensions whose standard deviation is below 1 % of the median dimension's."
    )
    effective_rank: float | None = Field(
        description="exp of the entropy of the normalised singular values (Roy & Vetterli 2007); at most the width."
    )


class NearPair(BaseModel, frozen=True):
    """Two images with nearly the same embedding."""

    rows: tuple[int, int]
    sample_ids: tuple[str, str]
    cosine: float
    same_bytes: bool = Field(description="Their files are equal.")


class RecallStats(BaseModel, frozen=True):
    """The teacher's own recall in percent, among the images that were read and their captions."""

    images: int
    captions: int
    i2t: dict[str, float]
    t2i: dict[str, float]


class CacheStats(BaseModel, frozen=True):
    """The answer of ``teacher-cache stats``."""

    location: str
    manifest_digest: str
    split: str | None
    view: int
    seed: int
    sampled: bool = Field(
        description="Not all rows were read: rows of random chunks, and the captions of those images."
    )
    image: TowerStats
    text: TowerStats
    without_caption: int = Field(
        description="Images of those read that no caption is of. Where there are any, the captions are prompts of "
        "classes, and nothing is said of pairs."
    )
    true_pairs: Distribution | None = Field(description="Cosines of each caption with its own image.")
    random_pairs: Distribution | None = Field(description="Cosines of each caption with a random other image.")
    separation: float | None = Field(
        description="Probability that a true pair has a greater cosine than a random one (area under the ROC curve)."
    )
    near_cosine: float = Field(description="From which on two images count as near-duplicates.")
    near_images: int = Field(description="Images with a near-duplicate among those read.")
    near_pairs: int
    nearest_pairs: tuple[NearPair, ...] = Field(description="The nearest of them.")
    recall: RecallStats | None


@dataclass(frozen=True)
class ReadRows:
    """Rows that statistics were made of, those without an embedding left out.

    Attributes:
        image_rows: (images,) rows of the cache, ascending.
        caption_rows: (captions,) rows of the cache, those of an image side by side.
        text_image: (captions,) position of each caption's image.
        images, texts: (images, dim) and (captions, dim), float32 of unit norm.
    """

    image_rows: NDArray[np.int64]
    caption_rows: NDArray[np.int64]
    text_image: NDArray[np.int64]
    images: _Floats
    texts: _Floats

    def of_images(self, kept: NDArray[np.int64]) -> ReadRows:
        """Some of the images, by position and ascending, with their captions."""
        number = np.full(len(self.images), -1)
        number[kept] = np.arange(len(kept))
        mine = number[self.text_image] >= 0
        return ReadRows(
            image_rows=self.image_rows[kept],
            caption_rows=self.caption_rows[mine],
            text_image=number[self.text_image[mine]],
            images=self.images[kept],
            texts=self.texts[mine],
        )


@dataclass(frozen=True)
class Ranks:
    """How many rows came before the first positive of each query; ``teacher_cache.storage.look.ranks.NO_POSITIVE``
    where it has none.

    Attributes:
        rows: what was compared, all with all.
        i2t: (images,).
        t2i: (captions,).
    """

    rows: ReadRows
    i2t: NDArray[np.int64]
    t2i: NDArray[np.int64]


def cache_stats(
    location: str,
    split: str | None = None,
    view: int = 0,
    most: int = 20_000,
    near: float = 0.99,
    seed: int = 0,
    progress: Progress | None = None,
) -> CacheStats:
    """Read embeddings of a sealed cache and sum them up.

    Args:
        split: images of one split, or of all.
        view: of the images.
        most: images that are read; of more, so many are drawn. Their captions are read all.
        near: cosine from which on two images are near-duplicates.
        seed: of what is drawn.
        progress: called with (stage, done, total).

    Raises:
        UsageError: no such split or view.
        CacheError: as ``EmbeddingReader`` raises it.
    """
    return stats_and_rows(location, split, view, most, near, seed, progress)[0]


def stats_and_rows(
    location: str,
    split: str | None = None,
    view: int = 0,
    most: int = 20_000,
    near: float = 0.99,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[CacheStats, ReadRows, Ranks | None]:
    """:func:`cache_stats`, with the rows it read and the ranks behind its recall; None where there is no recall.

    Raises:
        UsageError, CacheError: as :func:`cache_stats`.
    """
    reader = EmbeddingReader(location, memory_bytes=_MEMORY_BYTES)
    if not 0 <= view < reader.views:
        raise UsageError(f"{location}: no view {view}; views 0 to {reader.views - 1} can be read")
    layout = reader.manifest.layout
    usable = reader.image_rows(split)
    # quarantined rows are among those that are looked at, so that they are counted
    lost = np.array(sorted(reader.quarantined_in(view)), np.int64)
    if split is not None and len(lost):
        splits = reader.table_rows(SAMPLES, lost)["split"].to_pylist()
        lost = lost[[name == split for name in splits]]
    every = np.union1d(usable, lost)
    rows = draw_rows(every, layout.image_chunk_rows, most, seed)
    image = stored_rows(reader, "image", rows, view, progress=_stage(progress, "read images"))
    image_norm = stored_rows(reader, "image", rows, view, "norm")
    caption_rows, position = reader.caption_rows(rows)
    text = stored_rows(reader, "text", caption_rows, progress=_stage(progress, "read captions"))
    text_norm = stored_rows(reader, "text", caption_rows, 0, "norm")

    there = _usable(image)
    have_image = there[position] & _usable(text)
    read = ReadRows(
        image_rows=rows[there],
        caption_rows=caption_rows[have_image],
        text_image=(np.cumsum(there) - 1)[position[have_image]],
        images=unit_rows(image[there]),
        texts=unit_rows(text[have_image]),
    )
    images, texts, place = read.images, read.texts, read.text_image
    random = np.random.default_rng([seed, 1])
    true = random_cosines = np.empty(0, np.float32)
    bare = int((np.diff(reader.caption_offsets)[rows] == 0).sum())
    if len(texts) and not bare:
        true = _cosines(images, texts, place)
        if len(images) > 1:
            other = (place + random.integers(1, len(images), len(place))) % len(images)
            random_cosines = _cosines(images, texts, other)
    pairs, partners, nearest_pairs, cosines = near_pairs(images, near, _PAIRS_NAMED)
    every_caption = int(np.diff(reader.caption_offsets)[every].sum())
    towers = {
        "image": _tower("image", image, image_norm, len(every), random, progress),
        "text": _tower("text", text, text_norm, every_caption, random, progress),
    }
    ranks = None if bare else _ranks(read, random, progress)
    stats = CacheStats(
        location=location,
        manifest_digest=reader.manifest.digest,
        split=split,
        view=view,
        seed=seed,
        sampled=len(rows) < len(every),
        image=towers["image"],
        text=towers["text"],
        without_caption=bare,
        true_pairs=Distribution.of(true),
        random_pairs=Distribution.of(random_cosines),
        separation=_separation(true, random_cosines),
        near_cosine=near,
        near_images=int((partners > 0).sum()),
        near_pairs=pairs,
        nearest_pairs=_named(reader, read.image_rows, nearest_pairs, cosines),
        recall=None if ranks is None else _recall(ranks),
    )
    return stats, read, ranks


def effective_rank(rows: NDArray[np.floating]) -> float | None:
    """exp of the entropy of the singular values over their sum; None without rows.

    Roy & Vetterli, The effective rank, EUSIPCO 2007. Between 1 (all rows on a line) and the width.

    Args:
        rows: (n, dim), taken as they are, not centred.
    """
    if not len(rows):
        return None
    wide = rows.astype(np.float64)
    singular = np.sqrt(np.clip(np.linalg.eigvalsh(wide.T @ wide), 0, None))
    share = singular / singular.sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def _stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(name, done, total)


def _usable(rows: NDArray[np.floating]) -> NDArray[np.bool_]:
    return np.asarray(np.isfinite(rows).all(axis=1) & (rows != 0).any(axis=1))


def _cosines(images: _Floats, texts: _Floats, place: NDArray[np.int64]) -> _Floats:
    return np.concatenate(
        [
            np.einsum("nd,nd->n", texts[at : at + 8192], images[place[at : at + 8192]])
            for at in range(0, len(texts), 8192)
        ]
    )


def _tower(
    tower: Tower,
    stored: NDArray[np.floating],
    norm: _Floats,
    total: int,
    random: np.random.Generator,
    progress: Progress | None,
) -> TowerStats:
    usable = _usable(stored)
    rows = unit_rows(stored[usable])
    dead = np.empty(0, np.int64)
    cosine = np.empty(0, np.float32)
    if len(rows) > 1:
        deviation = rows.std(axis=0)
        dead = np.flatnonzero(deviation < _DEAD * np.median(deviation))
        left = random.integers(0, len(rows), min(4 * len(rows), 50_000))
        right = (left + random.integers(1, len(rows), len(left))) % len(rows)
        cosine = _cosines(rows, rows[left], right)
    _, counts = np.unique(
        np.ascontiguousarray(stored[usable]).view(f"V{stored.dtype.itemsize * stored.shape[1]}"), return_counts=True
    )
    if progress is not None:
        progress("sum up", 1 if tower == "image" else 2, 2)
    return TowerStats(
        rows=total,
        rows_read=len(stored),
        missing=int(np.isnan(stored).any(axis=1).sum()),
        zero=int((stored == 0).all(axis=1).sum()),
        norm=Distribution.of(norm[usable]),
        cosine=Distribution.of(cosine),
        equal_rows=int(counts[counts > 1].sum()),
        dead_dimensions=tuple(int(dim) for dim in dead),
        effective_rank=effective_rank(rows),
    )


def _separation(true: _Floats, random: _Floats) -> float | None:
    """Mann and Whitney's U over the number of pairs: ties count half."""
    if not len(true) or not len(random):
        return None
    order = np.sort(random)
    below, up_to = np.searchsorted(order, true, side="left"), np.searchsorted(order, true, side="right")
    return float((below + up_to).mean() / (2 * len(random)))


def _named(
    reader: EmbeddingReader, rows: NDArray[np.int64], pairs: NDArray[np.int64], cosines: NDArray[np.float64]
) -> tuple[NearPair, ...]:
    numbers = rows[pairs]
    table = reader.table_rows(SAMPLES, numbers.reshape(-1))
    ids, digests = table["sample_id"].to_pylist(), table["content_sha256"].to_pylist()
    return tuple(
        NearPair(
            rows=(int(numbers[at, 0]), int(numbers[at, 1])),
            sample_ids=(ids[2 * at], ids[2 * at + 1]),
            cosine=float(cosines[at]),
            same_bytes=digests[2 * at] == digests[2 * at + 1],
        )
        for at in range(len(pairs))
    )


def _ranks(read: ReadRows, random: np.random.Generator, progress: Progress | None) -> Ranks | None:
    if len(read.images) > _RECALL_IMAGES:
        read = read.of_images(np.sort(random.choice(len(read.images), _RECALL_IMAGES, replace=False)))
    if not len(read.texts):
        return None
    ranks = first_positive_ranks(read.images, read.texts, read.text_image, progress=_stage(progress, "recall"))
    return Ranks(read, *ranks)


def _recall(ranks: Ranks) -> RecallStats:
    return RecallStats(
        images=len(ranks.i2t),
        captions=len(ranks.t2i),
        i2t=recall_of_ranks(ranks.i2t, _RECALL_KS),
        t2i=recall_of_ranks(ranks.t2i, _RECALL_KS),
    )
