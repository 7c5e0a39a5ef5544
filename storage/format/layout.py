"""The arrays of a cache: names, stored types, shapes of chunks, bytes. No numpy: ``info`` starts without it."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.format.identity import Record

MOST_ROWS, MOST_CHUNKS, MOST_DIM = 10**10, 2**22, 2**16
"""Limits of a layout, so that a few numbers in a hostile manifest cannot fill the memory of who opens it."""
CRC_BYTES = 4
"""Bytes of the checksum behind each chunk object."""

# tower -> array -> dtype, as encoders make them; shapes follow from the layout
ARRAYS: dict[Tower, dict[str, str]] = {
    "image": {"embedding": "<f2", "norm": "<f4", "view": "<f4"},
    "text": {"embedding": "<f2", "norm": "<f4"},
}
VIEW_FIELDS = ("top", "left", "height", "width", "flip")
SCALE = "scale"
"""Name of the array that int8 caches have in addition: the scale of each column, chunk by chunk."""


def stored_arrays(layout: Layout, tower: Tower) -> dict[str, str]:
    """Return the dtype of each array on disk by name: :data:`ARRAYS`, or int8 embeddings with their scales."""
    if layout.embedding_dtype is None:
        return ARRAYS[tower]
    return {**ARRAYS[tower], "embedding": "|i1", SCALE: "<f4"}


def chunk_shape(layout: Layout, tower: Tower, name: str) -> tuple[int, ...]:
    """Return the shape of one chunk as readers and writers see it, without the axis of the single view."""
    if name == SCALE:
        return (1, layout.embed_dim)
    tail = {"embedding": (layout.embed_dim,), "norm": (), "view": (len(VIEW_FIELDS),)}[name]
    return (layout.chunk_rows(tower), *tail)


Tower = Literal["image", "text"]


class Layout(Record):
    """Shapes of the Zarr arrays and of their chunks."""

    embed_dim: int = Field(gt=0, le=MOST_DIM)
    views: int = Field(1, gt=0)
    image_rows: int = Field(ge=0, le=MOST_ROWS)
    text_rows: int = Field(ge=0, le=MOST_ROWS)
    image_chunk_rows: int = Field(gt=0, description="Images per chunk: unit of work, write, commit, retry, read.")
    text_chunk_rows: int = Field(gt=0, description="Captions per chunk.")
    batch_rows: int = Field(gt=0, description="Rows per forward pass. Another number rounds differently.")
    text_order: Literal["characters"] | None = Field(
        None,
        description="Order in which a chunk's captions share forward passes: the shortest first. Default: by row.",
    )
    embedding_dtype: Literal["int8"] | None = Field(
        None, description="Storage type of the embeddings, if not float16. Each chunk then has an object of scales."
    )
    compressor: Literal["blosc"] | None = Field(
        None, description="Codec of all arrays between zarr's bytes and crc32c: blosc of shuffled bytes, or none."
    )

    @model_validator(mode="after")
    def _chunks_can_be_listed(self) -> Self:
        if self.num_chunks > MOST_CHUNKS:
            raise ValueError(f"{self.num_chunks:,} chunks, at most {MOST_CHUNKS:,} are read: larger chunks are wanted")
        return self

    def rows(self, tower: Literal["image", "text"]) -> int:
        """Return the number of rows of a tower."""
        return self.image_rows if tower == "image" else self.text_rows

    def chunk_rows(self, tower: Literal["image", "text"]) -> int:
        """Return the number of rows of a whole chunk of a tower."""
        return self.image_chunk_rows if tower == "image" else self.text_chunk_rows

    def chunks(self, tower: Literal["image", "text"]) -> int:
        """Return the number of chunks of a tower, per view."""
        return -(-self.rows(tower) // self.chunk_rows(tower))

    @property
    def num_chunks(self) -> int:
        """All chunks of the cache."""
        return self.chunks("image") * self.views + self.chunks("text")


def planned_layout(location: str, **shapes: Any) -> Layout:
    """Return the layout of a new cache, by the fields of :class:`Layout`.

    Raises:
        UsageError: a cache cannot have so many rows or chunks, or rows so wide.
    """
    try:
        return Layout(**shapes)
    except ValidationError as error:
        problem = error.errors()[0]
        words = ": ".join([*map(str, problem["loc"]), problem["msg"].removeprefix("Value error, ")])
        if not problem["loc"]:  # too many chunks
            least = -(-(shapes["image_rows"] * shapes["views"] + shapes["text_rows"]) // (MOST_CHUNKS // 2))
            words += f". Set chunk_rows to {least:,} or more"
        raise UsageError(f"{location}: {words}") from error
