"""Places of rows: the chunk of each row, and the check that a row exists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.format.layout import Layout, Tower


@dataclass(frozen=True)
class RowPlaces:
    """Rows of one tower and the chunks that hold them. Chunks are numbered view after view.

    Attributes:
        location: Cache, for messages.
        total: Rows of one view.
        chunk_rows: Rows of a whole chunk.
        chunks: Chunks of one view.
        views: Views that can be read; 1 for texts.
    """

    location: str
    tower: Tower
    total: int
    chunk_rows: int
    chunks: int
    views: int

    @classmethod
    def of(cls, location: str, layout: Layout, tower: Tower) -> RowPlaces:
        """Return the places of a tower."""
        views = layout.views if tower == "image" else 1
        return cls(location, tower, layout.rows(tower), layout.chunk_rows(tower), layout.chunks(tower), views)

    def check(
        self, rows: NDArray[np.int64], view: int | NDArray[np.int64] = 0
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return rows and views as int64 arrays; views have the shape () or the shape of the rows.

        Raises:
            ValueError: The number of views is neither 1 nor the number of rows.
            IndexError: A row or view does not exist.
        """
        rows, views = np.asarray(rows, np.int64), np.asarray(view, np.int64)
        if views.shape not in ((), rows.shape):
            raise ValueError(f"{len(rows)} rows and views of shape {views.shape}: give one view, or one for each row")
        for name, values, stop in (("row", rows, self.total), ("view", views, self.views)):
            # one pass: as unsigned numbers, negative ones are large
            if values.size and values.view(np.uint64).max() >= stop:
                outside = values[(values < 0) | (values >= stop)].reshape(-1)[0]
                raise IndexError(
                    f"{self.location}: {self.tower} {name} {outside} asked for, {name}s are 0 to {stop - 1}"
                )
        return rows, views

    def ref(self, number: int) -> ChunkRef:
        """Return the chunk with this number."""
        return ChunkRef(self.tower, *divmod(number, self.chunks))

    def number(self, ref: ChunkRef) -> int:
        """Return the number of a chunk."""
        return ref.view * self.chunks + ref.chunk

    def distinct(self, numbers: NDArray[np.int64]) -> list[int]:
        """Return each chunk number once, ascending."""
        used = np.zeros(self.views * self.chunks, bool)
        used[numbers] = True
        return np.flatnonzero(used).tolist()

    def by_chunk(
        self, rows: NDArray[np.int64], views: NDArray[np.int64]
    ) -> Iterator[tuple[ChunkRef, NDArray[np.intp]]]:
        """Yield each chunk that holds some of the rows, with the positions of these rows."""
        if not len(rows):
            return
        numbers = np.broadcast_to(views * self.chunks, rows.shape) + rows // self.chunk_rows
        if numbers.max() < 2**16:  # numpy sorts these by counting
            numbers = numbers.astype(np.uint16)
        order = np.argsort(numbers, kind="stable")
        for positions in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
            yield self.ref(int(numbers[positions[0]])), positions
