"""Images and captions in two dimensions. Neighbours stay neighbours; large distances have little meaning."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.pipeline.report.data import MapPoint, RowMap
from teacher_cache.storage.format.tables import CAPTIONS, SAMPLES
from teacher_cache.storage.look.stats import ReadRows
from teacher_cache.storage.read.reader import EmbeddingReader

_DIMENSIONS = 50
_FEW, _MANY = 10, 6_000  # limits of t-SNE: fewer points have no neighbourhoods, more take minutes
_PERPLEXITY = 30.0
_DIGITS = 3
_CLASS_FOLDERS = ("imagefolder", "labelled")


def row_map(reader: EmbeddingReader, read: ReadRows, most: int, seed: int, captions: bool = True) -> RowMap | None:
    """Return a map of images and the first caption of each, or None without images.

    Args:
        reader: reader of the cache.
        read: rows to place.
        most: maximum number of images; a sample if there are more.
        seed: seed of the sample.
        captions: False to leave captions out, where they are prompts of classes.
    """
    total = len(read.images)
    if not total:
        return None
    if total > most:
        read = read.of_images(np.sort(np.random.default_rng([seed, 2]).choice(total, most, replace=False)))
    owners, first = np.unique(read.text_image, return_index=True)
    if not captions:
        owners, first = owners[:0], first[:0]
    places, how = place_rows([part for part in (read.images, read.texts[first]) if len(part)])
    samples = reader.table_rows(SAMPLES, read.image_rows)
    ids, splits = samples["sample_id"].to_pylist(), samples["split"].to_pylist()
    texts = reader.table_rows(CAPTIONS, read.caption_rows[first])["text"].to_pylist()
    in_folders = reader.identity.dataset.kind in _CLASS_FOLDERS

    def point(number: int, owner: int, **fields: Any) -> MapPoint:
        x, y = (round(float(value), _DIGITS) for value in places[number])
        fields |= {"image_row": int(read.image_rows[owner]), "split": splits[owner]}
        return MapPoint(x=x, y=y, class_name=PurePosixPath(ids[owner]).parent.name if in_folders else "", **fields)

    points = [point(at, at, tower="image", row=int(row), label=ids[at]) for at, row in enumerate(read.image_rows)]
    points += [
        point(len(ids) + at, owner, tower="text", row=int(read.caption_rows[first[at]]), label=texts[at])
        for at, owner in enumerate(owners)
    ]
    what = "images and the first caption of each" if len(owners) else "images"
    drawn = f"{len(ids):,} of {total:,} images drawn with seed {seed}; " if total > len(ids) else ""
    return RowMap(points=tuple(points), method=f"{what[0].upper()}{what[1:]}: {drawn}{how}", images_of=total)


def place_rows(towers: list[NDArray[np.float32]]) -> tuple[NDArray[np.float64], str]:
    """Return places in two dimensions, tower after tower, and the method in words. Deterministic.

    CLIP's images and captions lie in two distant cones (Liang et al. 2022, "Mind the Gap"), and a map would show only
    these. So each tower is centred on its own mean and normalised again. PCA follows, then t-SNE (van der Maaten &
    Hinton 2008), which starts from the first two components.

    Args:
        towers: (rows, dim) each, of unit norm.
    """
    rows = np.concatenate([_centred(tower) for tower in towers])
    rows -= rows.mean(axis=0)
    _, singular, axes = np.linalg.svd(rows, full_matrices=False)
    keep = int((singular > 1e-6 * max(float(singular[0]), 1e-30)).sum())
    axes = axes[: min(_DIMENSIONS, keep)]
    # the sign of an axis is arbitrary
    axes *= np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]
    components = rows @ axes.T
    centred = "each tower centred on its own mean, since the gap between the two would hide all else"
    if len(towers) < 2:
        centred = "centred on their mean"
    start = np.zeros((len(rows), 2))
    start[:, : min(2, len(axes))] = components[:, :2]
    if not _FEW <= len(rows) <= _MANY or len(axes) < 2:
        return start, f"{centred}, then the first two principal components."
    from sklearn.manifold import TSNE

    perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
    places = TSNE(
        n_components=2,
        perplexity=perplexity,
        # a deterministic start
        init=(1e-4 * start / start[:, 0].std()).astype(np.float32),  # as small as Kobak & Berens 2019 ask for
        max_iter=500,  # 1,000 make no visible difference
        n_jobs=1,  # deterministic order of sums
    ).fit_transform(components.astype(np.float32))
    how = f"{centred}, {components.shape[1]} principal components, then t-SNE, perplexity {perplexity:g}."
    return np.asarray(places, np.float64), f"{how} Near each other means alike; distances across the map mean little."


def _centred(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    moved = rows - rows.mean(axis=0, dtype=np.float64)
    norms = np.linalg.norm(moved, axis=1, keepdims=True)
    return np.asarray(np.divide(moved, norms, out=np.zeros_like(moved), where=norms > 1e-6))
