"""Statistics of a cache's embeddings: norms, cosines, duplicates, rank.

Above a maximum number of rows a sample is drawn, and the result says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from teacher_cache.storage.format.tables import CAPTIONS, KIND, SAMPLES
from teacher_cache.storage.look.nearest import near_pairs, unit_rows
from teacher_cache.storage.look.sampling import Progress, draw_rows, require_view, stage, stored_rows
from teacher_cache.storage.read.reader import EmbeddingReader

_QUANTILES = (1, 5, 25, 50, 75, 95, 99)
_BINS = 20
_PAIRS_NAMED = 20
MEMORY_BYTES = 64 << 20  # each chunk is read once
_DEAD = 0.01  # of the median dimension's standard deviation

_Floats = NDArray[np.float32]
_Rows = NDArray[np.int64]


class Distribution(BaseModel, frozen=True):
    """Summary of numbers."""

    count: int
    mean: float
    std: float
    least: float
    greatest: float
    quantiles: dict[str, float] = Field(description="Percentiles: 1 %, 5 %, 25 %, 50 %, 75 %, 95 % and 99 %.")
    histogram: tuple[int, ...] = Field(description="Counts of 20 equal bins between histogram_ends.")
    histogram_ends: tuple[float, float] = Field(
        description="Least and greatest of the values and of those they are compared with: their bins are the same."
    )

    @classmethod
    def of(cls, values: NDArray[np.floating], beside: NDArray[np.floating] | None = None) -> Distribution | None:
        """Return the distribution of finite numbers; None if there are none.

        Args:
            beside: numbers to compare with, which share the bins of the histogram.
        """
        if not len(values):
            return None
        wide = values.astype(np.float64)
        both = wide if beside is None else np.concatenate([wide, beside])
        counts, edges = np.histogram(wide, bins=_BINS, range=(both.min(), both.max()))
        return cls(
            count=len(wide),
            mean=float(wide.mean()),
            std=float(wide.std()),
            least=float(wide.min()),
            greatest=float(wide.max()),
            quantiles={f"{q} %": float(np.percentile(wide, q)) for q in _QUANTILES},
            histogram=tuple(map(int, counts)),
            histogram_ends=(float(edges[0]), float(edges[-1])),
        )


class TowerStats(BaseModel, frozen=True):
    """Statistics of the rows read from one tower."""

    rows: int = Field(description="Rows in the cache, or in the split.")
    rows_read: int
    missing: int = Field(description="Rows read that are NaN: quarantined.")
    zero: int = Field(description="Rows read that are zero. A writer refuses them.")
    norm: Distribution | None = Field(description="Norm of the teacher's output before it was normalised.")
    cosine: Distribution | None = Field(description="Cosine of random pairs of rows of this tower.")
    equal_rows: int = Field(description="Rows with the same embedding as another row, bit for bit.")
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
    same_bytes: bool = Field(description="True if their files are equal.")


class CacheStats(BaseModel, frozen=True):
    """Result of ``teacher-cache stats``."""

    location: str
    manifest_digest: str
    split: str | None
    view: int
    seed: int
    sampled: bool = Field(description="True if only a sample was read: images of random chunks, with their captions.")
    image: TowerStats
    text: TowerStats
    without_caption: int = Field(
        description="Images read that have no caption. If there are any, the statistics of pairs are None: the "
        "captions of labelled images are prompts of all classes."
    )
    true_pairs: Distribution | None = Field(description="Cosines of each caption with its own image.")
    true_pairs_of: dict[str, Distribution] = Field({}, description="The same, by kind of the captions.")
    random_pairs: Distribution | None = Field(description="Cosines of each caption with a random other image.")
    separation: float | None = Field(
        description="Probability that a true pair has a greater cosine than a random one (area under the ROC curve)."
    )
    near_cosine: float = Field(description="Minimum cosine of near-duplicates.")
    near_images: int = Field(description="Images with a near-duplicate among those read.")
    near_pairs: int
    nearest_pairs: tuple[NearPair, ...] = Field(description="Nearest of these pairs.")


@dataclass(frozen=True)
class ReadRows:
    """Rows of a cache that have an embedding: some images, with their captions.

    Attributes:
        image_rows: (images,) rows of the cache, ascending.
        caption_rows: (captions,) rows of the cache, grouped by image.
        text_image: (captions,) position of each caption's image.
        images, texts: (images, dim) and (captions, dim), float32 of unit norm.
    """

    image_rows: _Rows
    caption_rows: _Rows
    text_image: _Rows
    images: _Floats
    texts: _Floats

    def of_images(self, positions: _Rows) -> ReadRows:
        """Return some of the images, by position and ascending, with their captions."""
        number = np.full(len(self.images), -1)
        number[positions] = np.arange(len(positions))
        captions = number[self.text_image] >= 0
        return ReadRows(
            image_rows=self.image_rows[positions],
            caption_rows=self.caption_rows[captions],
            text_image=number[self.text_image[captions]],
            images=self.images[positions],
            texts=self.texts[captions],
        )


@dataclass(frozen=True)
class DrawnRows:
    """Rows of a cache as they are stored, quarantined ones included: all images of a small one, else some.

    Attributes:
        every: (n,) rows of all images to draw from, ascending.
        image_rows: (images,) rows that were drawn, ascending; of another teacher's cache in the order of the first.
        caption_rows: (captions,) rows of all their captions.
        text_image: (captions,) position of each caption's image in ``image_rows``.
        images, image_norms, texts, text_norms: stored rows and norms.
    """

    reader: EmbeddingReader
    split: str | None
    view: int
    seed: int
    every: _Rows
    image_rows: _Rows
    caption_rows: _Rows
    text_image: _Rows
    images: NDArray[np.floating]
    image_norms: _Floats
    texts: NDArray[np.floating]
    text_norms: _Floats

    @property
    def without_caption(self) -> int:
        """Number of drawn images without a caption."""
        return int((np.diff(self.reader.caption_offsets)[self.image_rows] == 0).sum())

    @cached_property
    def usable(self) -> ReadRows:
        """Rows that have an embedding."""
        images = _usable(self.images)
        captions = images[self.text_image] & _usable(self.texts)
        return ReadRows(
            image_rows=self.image_rows[images],
            caption_rows=self.caption_rows[captions],
            text_image=(np.cumsum(images) - 1)[self.text_image[captions]],
            images=unit_rows(self.images[images]),
            texts=unit_rows(self.texts[captions]),
        )


def read_drawn(
    location: str,
    split: str | None = None,
    view: int = 0,
    most: int = 20_000,
    seed: int = 0,
    progress: Progress | None = None,
) -> DrawnRows:
    """Read images of a sealed cache, with all their captions.

    Args:
        split: split to read. Default: all.
        view: view of the images.
        most: maximum number of images to read. More are sampled.
        seed: seed of the draw.
        progress: called with (stage, done, total).

    Raises:
        UsageError: no such split or view.
        CacheError: as ``EmbeddingReader`` raises it.
    """
    reader = EmbeddingReader(location, memory_bytes=MEMORY_BYTES)
    require_view(reader, view)
    usable = reader.image_rows(split)
    # quarantined rows are drawn too, so that they are counted
    lost = np.array(sorted(reader.quarantined_in(view)), np.int64)
    if split is not None and len(lost):
        splits = reader.table_rows(SAMPLES, lost)["split"].to_pylist()
        lost = lost[[name == split for name in splits]]
    every = np.union1d(usable, lost)
    rows = draw_rows(every, reader.manifest.layout.image_chunk_rows, most, seed)
    caption_rows, text_image = reader.caption_rows(rows)
    return DrawnRows(
        reader=reader,
        split=split,
        view=view,
        seed=seed,
        every=every,
        image_rows=rows,
        caption_rows=caption_rows,
        text_image=text_image,
        **stored_arrays(reader, rows, caption_rows, view, progress),
    )


def stored_arrays(
    reader: EmbeddingReader, image_rows: _Rows, caption_rows: _Rows, view: int = 0, progress: Progress | None = None
) -> dict[str, NDArray[Any]]:
    """Read the rows and norms of both towers: the arrays of :class:`DrawnRows`, by field."""
    return {
        "images": stored_rows(reader, "image", image_rows, view, progress=stage(progress, "read images")),
        "image_norms": stored_rows(reader, "image", image_rows, view, "norm"),
        "texts": stored_rows(reader, "text", caption_rows, progress=stage(progress, "read captions")),
        "text_norms": stored_rows(reader, "text", caption_rows, 0, "norm"),
    }


def cache_stats(
    location: str,
    split: str | None = None,
    view: int = 0,
    most: int = 20_000,
    near: float = 0.99,
    seed: int = 0,
    progress: Progress | None = None,
) -> CacheStats:
    """Read embeddings of a sealed cache and summarize them.

    Args:
        near: minimum cosine of near-duplicates.
        split, view, most, seed, progress: as :func:`read_drawn` takes them.

    Raises:
        UsageError: no such split or view.
        CacheError: as ``EmbeddingReader`` raises it.
    """
    return stats_of(read_drawn(location, split, view, most, seed, progress), near, progress)


def stats_of(drawn: DrawnRows, near: float = 0.99, progress: Progress | None = None) -> CacheStats:
    """Summarize rows that were read.

    Args:
        near: minimum cosine of near-duplicates.
        progress: called with (stage, done, total).
    """
    reader, rows = drawn.reader, drawn.usable
    random = np.random.default_rng([drawn.seed, 1])
    true, other = _pair_cosines(drawn, random)
    pairs, partners, nearest_pairs, cosines = near_pairs(rows.images, near, _PAIRS_NAMED)
    captions = int(np.diff(reader.caption_offsets)[drawn.every].sum())
    image, image_cosines = _tower(drawn.images, drawn.image_norms, len(drawn.every), random)
    report = stage(progress, "sum up")
    report(1, 2)
    text, text_cosines = _tower(drawn.texts, drawn.text_norms, captions, random)
    report(2, 2)
    return CacheStats(
        location=reader.location,
        manifest_digest=reader.manifest.digest,
        split=drawn.split,
        view=drawn.view,
        seed=drawn.seed,
        sampled=len(drawn.image_rows) < len(drawn.every),
        image=image.model_copy(update={"cosine": Distribution.of(image_cosines, text_cosines)}),
        text=text.model_copy(update={"cosine": Distribution.of(text_cosines, image_cosines)}),
        without_caption=drawn.without_caption,
        true_pairs=Distribution.of(true, other),
        true_pairs_of=_by_kind(reader, rows.caption_rows, true, other),
        random_pairs=Distribution.of(other, true),
        separation=_separation(true, other),
        near_cosine=near,
        near_images=int((partners > 0).sum()),
        near_pairs=pairs,
        nearest_pairs=_named(reader, rows.image_rows, nearest_pairs, cosines),
    )


def _by_kind(reader: EmbeddingReader, caption_rows: _Rows, true: _Floats, other: _Floats) -> dict[str, Distribution]:
    """Return the distribution of the cosines of each kind of captions, if there are kinds and cosines."""
    if not reader.caption_kinds or not len(true):
        return {}
    kinds = reader.table_rows(CAPTIONS, caption_rows)[KIND]
    parts = {kind: Distribution.of(true[pc.equal(kinds, kind).to_numpy()], other) for kind in reader.caption_kinds}
    return {kind: values for kind, values in parts.items() if values is not None}


def effective_rank(rows: NDArray[np.floating]) -> float | None:
    """Return exp of the entropy of the singular values over their sum; None without rows.

    Roy & Vetterli, The effective rank, EUSIPCO 2007. Between 1 (all rows on a line) and the width.

    Args:
        rows: (n, dim), not centred.
    """
    if not len(rows):
        return None
    wide = rows.astype(np.float64)
    singular = np.sqrt(np.clip(np.linalg.eigvalsh(wide.T @ wide), 0, None))
    share = singular / singular.sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def _usable(rows: NDArray[np.floating]) -> NDArray[np.bool_]:
    return np.asarray(np.isfinite(rows).all(axis=1) & (rows != 0).any(axis=1))


def _cosines(images: _Floats, texts: _Floats, place: NDArray[np.int64]) -> _Floats:
    return np.concatenate(
        [
            np.einsum("nd,nd->n", texts[at : at + 8192], images[place[at : at + 8192]])
            for at in range(0, len(texts), 8192)
        ]
    )


def _pair_cosines(drawn: DrawnRows, random: np.random.Generator) -> tuple[_Floats, _Floats]:
    """Return cosines of captions with their own image and with a random other one; none if an image has no caption."""
    rows, none = drawn.usable, np.empty(0, np.float32)
    images, place = rows.images, rows.text_image
    if not len(rows.texts) or drawn.without_caption:
        return none, none
    true = _cosines(images, rows.texts, place)
    if len(images) < 2:
        return true, none
    return true, _cosines(images, rows.texts, (place + random.integers(1, len(images), len(place))) % len(images))


def _tower(
    stored: NDArray[np.floating], norm: _Floats, total: int, random: np.random.Generator
) -> tuple[TowerStats, _Floats]:
    """Return the statistics, and cosines of random pairs, which are not summarized yet."""
    usable = _usable(stored)
    rows = unit_rows(stored[usable])
    dead = np.empty(0, np.int64)
    cosine = np.empty(0, np.float32)
    if len(rows) > 1:
        deviation = rows.std(axis=0)
        dead = np.flatnonzero(deviation < _DEAD * np.median(deviation))
        first = random.integers(0, len(rows), min(4 * len(rows), 50_000))
        other = (first + random.integers(1, len(rows), len(first))) % len(rows)
        cosine = _cosines(rows, rows[first], other)
    _, counts = np.unique(
        np.ascontiguousarray(stored[usable]).view(f"V{stored.dtype.itemsize * stored.shape[1]}"), return_counts=True
    )
    stats = TowerStats(
        rows=total,
        rows_read=len(stored),
        missing=int(np.isnan(stored).any(axis=1).sum()),
        zero=int((stored == 0).all(axis=1).sum()),
        norm=Distribution.of(norm[usable]),
        cosine=None,
        equal_rows=int(counts[counts > 1].sum()),
        dead_dimensions=tuple(int(dim) for dim in dead),
        effective_rank=effective_rank(rows),
    )
    return stats, cosine


def _separation(true: _Floats, random: _Floats) -> float | None:
    """Return Mann and Whitney's U over the number of pairs; ties count half."""
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
