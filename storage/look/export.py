"""A cache as plain files for other tools: the folders that clip-retrieval writes and autofaiss reads.

``img_emb/img_emb_N.npy``, ``text_emb/text_emb_N.npy`` and ``metadata/metadata_N.parquet``: equal rows of the three are
one pair. Numbers are padded with zeros, so that files sort by row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.new_files import new_folder, require_free
from teacher_cache.storage.format.tables import CAPTIONS, KIND, SAMPLES
from teacher_cache.storage.look.sampling import Progress, require_view, stage
from teacher_cache.storage.read.reader import EmbeddingReader

EXPORT_KEY = "export.json"
_ROWS_AT_ONCE = 65_536
MEMORY_BYTES = 256 << 20

Captions: TypeAlias = Literal["first", "all", "none"]


class ExportResult(BaseModel, frozen=True):
    """The record of an export; ``export.json`` in the folder holds the same."""

    out: str
    cache: str
    manifest_digest: str
    identity_digest: str
    split: str | None
    view: int
    captions: Captions
    rows: int = Field(description="Pairs of an image and a caption, or images.")
    images: int
    captions_left_out: int = Field(description="Further captions of these images, which are not exported.")
    embed_dim: int
    dtype: str
    parts: int = Field(description="Files in each of the three folders.")
    quarantined: int = Field(description="Images left out: they have no embedding in some view.")


def export_rows(
    location: str,
    out: str,
    split: str | None = None,
    captions: Captions = "first",
    view: int = 0,
    rows_per_file: int = 1_000_000,
    progress: Progress | None = None,
) -> ExportResult:
    """Write the rows of a sealed cache as npy and parquet. Embeddings are float16, as stored or dequantized from int8.

    Args:
        out: new folder, which appears when the export is complete.
        captions: the first of each image; all, with the image repeated for each; or none, as for a cache without any:
            then there is no text_emb.
        view: view of the images.
        progress: called with (``export``, rows done, rows in all).

    Raises:
        UsageError: the folder exists or is a URL, the cache has no such split or view, or images have no caption.
        CacheError: as ``EmbeddingReader`` raises it.
    """
    require_local_folder(out)
    reader = EmbeddingReader(location, memory_bytes=MEMORY_BYTES)
    require_view(reader, view)
    images = reader.image_rows(split)
    if not reader.manifest.layout.text_rows:
        captions = "none"
    if captions != "none":
        reader.require_captions(images, "To export the images alone add --captions none.")
    left_out = 0
    if captions == "none":
        image_rows, text_rows = images, None
    elif captions == "first":
        offsets = reader.caption_offsets
        image_rows, text_rows = images, offsets[images]
        left_out = int((offsets[images + 1] - text_rows - 1).sum())
    else:
        text_rows, position = reader.caption_rows(images)
        image_rows = images[position]
    if not len(image_rows):
        raise UsageError(f"{location}: no image with an embedding to export; teacher-cache info counts them")
    parts = -(-len(image_rows) // rows_per_file)
    result = ExportResult(
        out=out,
        cache=location,
        manifest_digest=reader.manifest.digest,
        identity_digest=reader.manifest.identity_digest,
        split=split,
        view=view,
        captions=captions,
        rows=len(image_rows),
        images=len(images),
        captions_left_out=left_out,
        embed_dim=reader.embed_dim,
        dtype="float16",
        parts=parts,
        quarantined=len(reader.quarantined) if split is None else _of_split(reader, split),
    )
    with new_folder(Path(out)) as folder:
        _write_parts(folder, reader, image_rows, text_rows, view, rows_per_file, progress)
        (folder / EXPORT_KEY).write_text(json.dumps(result.model_dump(mode="json"), indent=2) + "\n")
    return result


def require_local_folder(out: str) -> None:
    """Check the folder of an export.

    Raises:
        UsageError: it exists or is a URL.
    """
    if "://" in out:
        raise UsageError(f"{out}: an export is written to a local folder. Choose one, and copy it from there")
    require_free(Path(out))


def _of_split(reader: EmbeddingReader, split: str) -> int:
    rows = np.array([row.row for row in reader.quarantined], np.int64)
    return int(reader.table_rows(SAMPLES, rows)["split"].to_pylist().count(split))


def _write_parts(
    folder: Path,
    reader: EmbeddingReader,
    image_rows: NDArray[np.int64],
    text_rows: NDArray[np.int64] | None,
    view: int,
    rows_per_file: int,
    progress: Progress | None,
) -> None:
    for name in ("img_emb", "text_emb", "metadata"):
        if name != "text_emb" or text_rows is not None:
            (folder / name).mkdir()
    report, total, written = stage(progress, "export"), len(image_rows), 0
    towers = 1 if text_rows is None else 2
    parts = -(-total // rows_per_file)

    def count(rows: int) -> None:
        nonlocal written
        written += rows
        report(written, towers * total)

    for part in range(parts):
        rows = slice(part * rows_per_file, (part + 1) * rows_per_file)
        number = str(part).zfill(len(str(parts)))  # as clip-retrieval pads them: int(log10(parts)) + 1
        image_part, text_part = image_rows[rows], None if text_rows is None else text_rows[rows]
        _write_npy(folder / "img_emb" / f"img_emb_{number}.npy", reader, "image", image_part, view, count)
        if text_part is not None:
            _write_npy(folder / "text_emb" / f"text_emb_{number}.npy", reader, "text", text_part, 0, count)
        table = _metadata(reader, image_part, text_part)
        pq.write_table(table, folder / "metadata" / f"metadata_{number}.parquet")


def _write_npy(
    path: Path,
    reader: EmbeddingReader,
    tower: Literal["image", "text"],
    rows: NDArray[np.int64],
    view: int,
    count: Callable[[int], None],
) -> None:
    header = {"descr": "<f2", "fortran_order": False, "shape": (len(rows), reader.embed_dim)}
    # not a memory map: on a full disk a write raises OSError, a memory map ends the process by SIGBUS
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[start : start + _ROWS_AT_ONCE]
            file.write(reader.take(tower, part, view).astype("<f2", copy=False).data)
            count(len(part))


def _metadata(reader: EmbeddingReader, image_rows: NDArray[np.int64], text_rows: NDArray[np.int64] | None) -> pa.Table:
    """Return image_path and caption, as clip-retrieval names them, its kind, and the rows of the pair in the cache."""
    samples = reader.table_rows(SAMPLES, image_rows)
    root = reader.manifest.source.image_root
    paths = [os.path.join(root, uri) for uri in samples["uri"].to_pylist()]  # noqa: PTH118  # a URL too
    captions = None if text_rows is None else reader.table_rows(CAPTIONS, text_rows)
    columns = {
        "image_path": pa.array(paths, pa.string()),
        "caption": None if captions is None else captions["text"],
        "kind": captions[KIND] if captions is not None and reader.caption_kinds else None,
        "sample_id": samples["sample_id"],
        "split": samples["split"],
        "offset": samples["offset"],  # of an image inside a tar, else -1
        "length": samples["length"],
        "image_row": pa.array(image_rows),
        "text_row": None if text_rows is None else pa.array(text_rows),
    }
    return pa.table({name: column for name, column in columns.items() if column is not None})
