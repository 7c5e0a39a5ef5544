"""How alike the rows of teachers are: effective rank, and the neighbours that two teachers share. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.look.nearest import unit_rows
from teacher_cache.storage.look.sampling import draw_rows, stored_rows
from teacher_cache.storage.read.reader import EmbeddingReader

NEIGHBOURS = 10
MOST_ROWS = 4_096

_Floats = NDArray[np.float32]


def common_rows(readers: Sequence[EmbeddingReader], most: int = MOST_ROWS) -> dict[Tower, list[_Floats]]:
    """Read the rows of the same images, and of the same captions, from the caches of all teachers.

    Args:
        readers: caches of the same dataset. An image that one of them quarantined is left out.
        most: maximum number of images, and of captions. More are sampled.

    Returns:
        By tower the rows of each teacher, (n, its width) float32 of unit norm.
    """
    images = readers[0].image_rows()
    for reader in readers[1:]:
        images = np.intersect1d(images, reader.image_rows(), assume_unique=True)
    layout = readers[0].manifest.layout
    captions, _ = readers[0].caption_rows(images)
    drawn: dict[Tower, NDArray[np.int64]] = {
        "image": draw_rows(images, layout.image_chunk_rows, most, 0),
        "text": draw_rows(captions, layout.text_chunk_rows, most, 0),
    }
    return {tower: [unit_rows(stored_rows(reader, tower, rows)) for reader in readers] for tower, rows in drawn.items()}


def shared_neighbours(rows: Sequence[_Floats], k: int = NEIGHBOURS) -> NDArray[np.float64]:
    """Return the share of each row's k nearest rows that two teachers have in common, on average.

    The mutual k-nearest-neighbour alignment of Huh et al. 2024, "The Platonic Representation Hypothesis", section 3.
    Unrelated teachers share k / (n - 1) of them.

    Args:
        rows: rows of each teacher, (n, any width), of the same n things in the same order.

    Returns:
        (teachers, teachers), 1 on the diagonal; NaN with k rows or fewer.
    """
    count = len(rows[0])
    shares = np.full((len(rows), len(rows)), np.nan)
    if count <= k:
        return shares
    nearest = np.stack([_nearest(own, k) for own in rows])
    for first, second in np.ndindex(shares.shape):
        common = (nearest[first][:, :, None] == nearest[second][:, None, :]).sum()
        shares[first, second] = common / (count * k)
    return shares


def _nearest(rows: _Floats, k: int) -> NDArray[np.int64]:
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -np.inf)
    return np.argpartition(-cosines, k - 1, axis=1)[:, :k]
