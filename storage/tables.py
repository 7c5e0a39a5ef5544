"""The samples, captions and problems tables: parquet files beside the arrays, one row per array row."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from storage.errors import CacheCorruptError
from storage.files import CacheFiles, in_parallel
from storage.identity import canonical_json
from storage.manifest import CacheManifest, StaticFile

__all__ = [
    "CAPTIONS",
    "PROBLEMS",
    "SAMPLES",
    "captions_sha256",
    "chunk_rows_sha256",
    "find_row",
    "read_rows",
    "read_static",
    "read_table",
    "samples_sha256",
    "table_files",
]

# folder in the cache -> columns; the row column is written down so that a table can be read on its own
SAMPLES = "samples"
CAPTIONS = "captions"
PROBLEMS = "problems"
SCHEMAS: dict[str, pa.Schema] = {
    SAMPLES: pa.schema(
        [
            ("row", pa.int64()),
            ("sample_id", pa.string()),
            ("uri", pa.string()),
            ("offset", pa.int64()),  # first byte inside uri, -1 for the whole file
            ("length", pa.int64()),
            ("content_sha256", pa.string()),
            ("split", pa.string()),
        ]
    ),
    CAPTIONS: pa.schema([("row", pa.int64()), ("image_row", pa.int64()), ("text", pa.string())]),
    PROBLEMS: pa.schema(
        [("kind", pa.string()), ("where", pa.string()), ("detail", pa.string()), ("lost_image", pa.bool_())]
    ),
}
_ROWS_PER_FILE = 1_000_000
# what of a row its embedding is made of; where an image lies or which split it is in changes nothing
_MADE_OF = {"image": ["sample_id", "content_sha256"], "text": ["text"]}


def table_files(name: str, table: pa.Table) -> dict[str, tuple[bytes, int]]:
    """A table as parquet files of the cache: ``NAME/000000.parquet`` and on, with bytes and rows.

    At least one file, even when the table is empty.
    """
    table = table.cast(SCHEMAS[name])
    files = {}
    for number, start in enumerate(range(0, max(table.num_rows, 1), _ROWS_PER_FILE)):
        sink = io.BytesIO()
        part = table.slice(start, _ROWS_PER_FILE)
        pq.write_table(part, sink, compression="zstd")
        files[f"{name}/{number:06d}.parquet"] = (sink.getvalue(), part.num_rows)
    return files


def read_table(files: CacheFiles, manifest: CacheManifest, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A table of the cache, all rows of all columns or of some; each file proven by its digest.

    Raises:
        CacheCorruptError: a file is missing or does not have the bytes that the manifest names.
    """
    read = in_parallel(files, lambda key: read_static(files, key, manifest.files[key]), _keys(manifest, name), most=4)
    parts = [_parse(data, columns) for data in read]
    return pa.concat_tables(parts).combine_chunks()


def read_rows(files: CacheFiles, manifest: CacheManifest, name: str, rows: NDArray[np.int64]) -> pa.Table:
    """Some rows of a table, in the order asked for. Files of a large table that hold none of them are not read.

    Raises:
        IndexError: a row that the table does not have.
        CacheCorruptError: as :func:`read_table`.
    """
    rows = np.asarray(rows, np.int64)
    keys = _keys(manifest, name)
    if len(keys) == 1:
        return read_table(files, manifest, name).take(pa.array(rows))
    stops = np.cumsum([manifest.files[key].rows or 0 for key in keys])
    if len(rows) and (rows.min() < 0 or rows.max() >= stops[-1]):
        raise IndexError(
            f"{files.location}/{name}: rows are 0 to {stops[-1] - 1}, asked for {rows.min()} to {rows.max()}"
        )
    place = np.searchsorted(stops, rows, side="right")
    starts = np.concatenate([[0], stops])
    parts = []
    for number in np.unique(place):
        # one file in memory at a time: a few rows of each file are not the whole table
        part = _parse(read_static(files, keys[number], manifest.files[keys[number]]))
        parts.append(part.take(pa.array(rows[place == number] - starts[number])))
    if not parts:
        return SCHEMAS[name].empty_table()
    taken = np.empty(len(rows), np.int64)
    taken[np.argsort(place, kind="stable")] = np.arange(len(rows))
    return pa.concat_tables(parts).take(pa.array(taken))


def find_row(files: CacheFiles, manifest: CacheManifest, name: str, column: str, value: str) -> int | None:
    """The first row of a table with this value in a column; None when there is none. One file at a time."""
    for key in _keys(manifest, name):
        table = _parse(read_static(files, key, manifest.files[key]), ["row", column])
        at = pc.index(table[column], value).as_py()
        if at >= 0:
            return int(table["row"][at].as_py())
    return None


def _keys(manifest: CacheManifest, name: str) -> list[str]:
    return sorted(key for key in manifest.files if key.startswith(f"{name}/"))


def samples_sha256(samples: pa.Table) -> str:
    """``DatasetIdentity.samples_sha256``: over sample_id, split and content of each image, in row order."""
    return _digest_rows(samples.select(["sample_id", "split", "content_sha256"]))


def captions_sha256(captions: pa.Table) -> str:
    """``DatasetIdentity.captions_sha256``: over image row and text of each caption, in row order."""
    return _digest_rows(captions.select(["image_row", "text"]))


def chunk_rows_sha256(table: pa.Table, tower: Literal["image", "text"], rows: range) -> str:
    """``ChunkCommit.rows_sha256``: over what the rows of a chunk were made of, in row order.

    Args:
        table: samples for the image tower, captions for the text tower; whole.
    """
    return _digest_rows(table.select(_MADE_OF[tower]).slice(rows.start, len(rows)))


def _digest_rows(table: pa.Table) -> str:
    """sha256 over one line of canonical JSON per row."""
    total = hashlib.sha256()
    for batch in table.to_batches(max_chunksize=65_536):
        columns = [column.to_pylist() for column in batch.columns]
        for row in zip(*columns, strict=True):
            total.update(canonical_json(row) + b"\n")
    return total.hexdigest()


def _parse(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    # no pre-buffering: arrow's I/O threads would let go of these bytes after the interpreter has ended, and abort
    # the process (exit -6) now and then
    return pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(columns=columns, use_threads=False)


def read_static(files: CacheFiles, key: str, wanted: StaticFile) -> bytes:
    """The bytes of a file that the manifest names, proven.

    Raises:
        CacheCorruptError: it is missing or has other bytes.
    """
    try:
        data = files.read(key)
    except FileNotFoundError as error:
        raise CacheCorruptError(f"{files.location}/{key}: missing. {_REMEDY}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != wanted.sha256:
        raise CacheCorruptError(
            f"{files.location}/{key}: sha256 is {found[:12]}, the manifest names {wanted.sha256[:12]}. {_REMEDY}"
        )
    return data


_REMEDY = "Run teacher-cache repair CACHE, which makes it again from the dataset, or restore a copy."
