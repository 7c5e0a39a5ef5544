"""Images and captions of a cache by name, and their nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.format.tables import CAPTIONS, SAMPLES
from teacher_cache.storage.look.nearest import nearest, unit_rows
from teacher_cache.storage.look.sampling import Progress, require_view, row_blocks, stage
from teacher_cache.storage.observe.logs import say
from teacher_cache.storage.read.reader import EmbeddingReader

_MEMORY_BYTES = 64 << 20  # chunks are read once, in order

_Floats = NDArray[np.float32]


class CaptionRow(BaseModel, frozen=True):
    """A caption."""

    row: int
    text: str
    kind: str | None = Field(None, description="Kind of the caption, if the dataset names kinds.")
    image_row: int
    sample_id: str = Field(description="Name of its image.")
    cosine: float | None = Field(description="Cosine with the row it is shown beside; None without an embedding.")


class ImageRow(BaseModel, frozen=True):
    """An image with its captions."""

    row: int
    sample_id: str
    uri: str
    split: str
    cosine: float | None = Field(None, description="Cosine with the row it is shown beside.")
    norm: float | None = Field(None, description="Norm of the teacher's output; None for neighbours.")
    captions: tuple[CaptionRow, ...] = Field((), description="Its own captions; empty for neighbours.")
    nearest_captions: tuple[CaptionRow, ...] = Field((), description="Nearest captions, its own among them.")


class RowSample(BaseModel, frozen=True):
    """Result of ``teacher-cache look`` for random images."""

    location: str
    split: str | None
    seed: int
    captions_compared: int = Field(description="Number of captions compared. Of a large cache, random chunks are read.")
    images: tuple[ImageRow, ...]


class Neighbours(BaseModel, frozen=True):
    """Result of ``teacher-cache look`` for one row, which is not among its neighbours."""

    location: str
    view: int
    image: ImageRow | None = Field(description="Image whose neighbours these are, or None.")
    caption: CaptionRow | None = Field(description="Caption whose neighbours these are, or None.")
    images_compared: int
    captions_compared: int
    images: tuple[ImageRow, ...]
    captions: tuple[CaptionRow, ...]


def sample_images(
    location: str,
    count: int = 5,
    split: str | None = None,
    captions: int = 3,
    most: int = 200_000,
    seed: int = 0,
    progress: Progress | None = None,
) -> RowSample:
    """Return random images of a sealed cache, each with its captions and its nearest captions.

    Args:
        count: maximum number of images.
        captions: number of nearest captions of each image.
        most: maximum number of captions to compare with; of more, random chunks are used.
        progress: called with (stage, done, total).

    Raises:
        UsageError: no such split.
        CacheError: as ``EmbeddingReader`` raises it.
    """
    reader = EmbeddingReader(location, memory_bytes=_MEMORY_BYTES)
    usable = reader.image_rows(split)
    rows = np.sort(np.random.default_rng(seed).choice(usable, min(count, len(usable)), replace=False))
    embeddings = unit_rows(reader.take("image", rows))
    own, _ = reader.caption_rows(rows)
    compared = _Compared(reader, "text", most, seed, 0, progress, own)
    nearest_captions = compared.nearest(embeddings, captions)
    return RowSample(
        location=location,
        split=split,
        seed=seed,
        captions_compared=compared.count,
        images=tuple(
            _image(reader, int(row), 0).model_copy(update={"nearest_captions": _captions(reader, *near)})
            for row, near in zip(rows, nearest_captions, strict=True)
        ),
    )


def find_neighbours(
    location: str,
    image: str | None = None,
    text_row: int | None = None,
    k: int = 10,
    view: int = 0,
    most: int = 1_000_000,
    progress: Progress | None = None,
) -> Neighbours:
    """Find the images and captions nearest to one row by cosine, best first.

    Args:
        image: row number or sample_id; write ``id:`` before a sample_id that is a number without leading zeros. If the
            row's own sample_id is another number, a line on stderr says so.
        text_row: row of a caption, instead of an image.
        view: view of all images.
        most: maximum number of rows of each tower to compare with; of more, random chunks are used.
        progress: called with (stage, done, total).

    Raises:
        UsageError: no such row, sample_id or view; image and text_row are both set, or neither; a quarantined row.
        CacheError: as ``EmbeddingReader`` raises it.
    """
    if (image is None) == (text_row is None):
        raise UsageError("name one row to compare with: an image by its row or sample_id, or a caption by --text-row N")
    reader = EmbeddingReader(location, memory_bytes=_MEMORY_BYTES)
    require_view(reader, view)
    tower: Tower
    if image is not None:
        tower, row = "image", _row_of(reader, image)
        lost = reader.quarantined_in(view).get(row)
        if lost is not None:
            raise UsageError(
                f"{location}: image row {row} ({lost.sample_id}) has no embedding in view {view}: {lost.reason}: "
                f"{lost.detail}. Ask for another row"
            )
    else:
        tower, row = "text", int(text_row or 0)
        _require_row(reader, "text", row)
    query = unit_rows(reader.take(tower, np.array([row]), view if tower == "image" else 0))
    near: dict[Tower, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}
    compared: dict[Tower, int] = {}
    for other in ("image", "text"):
        # one more than k: the row itself is among the results
        others = _Compared(reader, other, most, 0, view, progress)
        ((rows, cosines),) = others.nearest(query, k + (other == tower))
        compared[other] = others.count
        keep = rows != row if other == tower else np.ones(len(rows), bool)
        near[other] = rows[keep][:k], cosines[keep][:k]
    return Neighbours(
        location=location,
        view=view,
        image=_image(reader, row, view) if tower == "image" else None,
        caption=_captions(reader, np.array([row]), None)[0] if tower == "text" else None,
        images_compared=compared["image"],
        captions_compared=compared["text"],
        images=_images(reader, *near["image"]),
        captions=_captions(reader, *near["text"]),
    )


def _row_of(reader: EmbeddingReader, image: str) -> int:
    if image.isdecimal() and str(int(image)) == image:  # 000005 is a name
        row = int(image)
        _require_row(reader, "image", row)
        shown = reader.table_rows(SAMPLES, np.array([row]))["sample_id"][0].as_py()
        if shown.isdecimal() and shown != image:  # so numbers may be meant as names
            say(f"row {image} is the image {shown}; id:{image} names one by its sample_id")
        return row
    return int(reader.rows_of([image.removeprefix("id:")])[0])


def _require_row(reader: EmbeddingReader, tower: Tower, row: int) -> None:
    rows = reader.manifest.layout.rows(tower)
    if not 0 <= row < rows:
        hint = f". If {row} is a sample_id, write id:{row}" if tower == "image" else ""
        raise UsageError(f"{reader.location}: no {tower} row {row}; rows are 0 to {rows - 1}{hint}")


@dataclass
class _Compared:
    """The rows that queries are compared with: rows of drawn chunks, and ``always``.

    Attributes:
        count: number of rows compared so far.
    """

    reader: EmbeddingReader
    tower: Tower
    most: int
    seed: int
    view: int
    progress: Progress | None
    always: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    count: int = 0

    def nearest(self, queries: _Floats, k: int) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """Return rows and cosines of the k nearest rows of each query."""
        rows, cosines = nearest(queries, self._blocks(), k)
        return list(zip(rows, cosines, strict=True))

    def _blocks(self) -> Iterator[tuple[NDArray[np.int64], _Floats]]:
        if len(self.always):
            self.count += len(self.always)
            yield self.always, unit_rows(self.reader.take(self.tower, self.always))
        progress = stage(self.progress, "compare images" if self.tower == "image" else "compare captions")
        for rows, values in row_blocks(self.reader, self.tower, self.most, self.seed, self.view, progress):
            drawn = ~np.isin(rows, self.always)
            self.count += int(drawn.sum())
            yield rows[drawn], unit_rows(values[drawn])


def _image(reader: EmbeddingReader, row: int, view: int) -> ImageRow:
    """Return an image with its captions, and their cosines with this view of it."""
    shown = _images(reader, np.array([row]), None)[0]
    rows = np.arange(*reader.caption_offsets[row : row + 2])
    query = unit_rows(reader.take("image", np.array([row]), view))
    cosines = (unit_rows(reader.take("text", rows)) @ query[0]).astype(np.float64)
    norm = float(reader.take("image", np.array([row]), view, "norm")[0])
    return shown.model_copy(update={"norm": norm, "captions": _captions(reader, rows, cosines)})


def _images(
    reader: EmbeddingReader, rows: NDArray[np.int64], cosines: NDArray[np.float64] | None
) -> tuple[ImageRow, ...]:
    table = reader.table_rows(SAMPLES, rows).select(["row", "sample_id", "uri", "split"])
    scores = [None] * len(rows) if cosines is None else cosines.tolist()
    return tuple(ImageRow(**fields, cosine=score) for fields, score in zip(table.to_pylist(), scores, strict=True))


def _captions(
    reader: EmbeddingReader, rows: NDArray[np.int64], cosines: NDArray[np.float64] | None
) -> tuple[CaptionRow, ...]:
    fields = reader.table_rows(CAPTIONS, rows).to_pylist()
    owners = np.array([caption["image_row"] for caption in fields], np.int64)
    ids = reader.table_rows(SAMPLES, owners)["sample_id"].to_pylist()
    scores = [None] * len(rows) if cosines is None else cosines.tolist()
    return tuple(
        CaptionRow(**caption, sample_id=sample_id, cosine=score)
        for caption, sample_id, score in zip(fields, ids, scores, strict=True)
    )
