"""The samples, captions and problems tables: parquet files beside the arrays, one row per array row."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from teacher_cache.storage.errors import CacheCorruptError, name_file
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.files.location import in_parallel
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.format.identity import canonical_json
from teacher_cache.storage.format.manifest import CacheManifest, StaticFile

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
KIND = "kind"
"""Last column of the captions of a dataset that names kinds of them; other caches do not have it."""
_ROWS_PER_FILE = 1_000_000
FILES_AT_ONCE = 4
"""Files of a table that are requested from a store at once; each is in memory while it is proven."""
ROWS_PER_GROUP = 65_536
"""Rows per row group of a parquet file, the smallest unit that can be read."""
_BLOCK_BYTES = 1 << 20
# columns that an embedding depends on; location and split of an image do not matter
_MADE_OF = {"image": ["sample_id", "content_sha256"], "text": ["text"]}


def table_files(name: str, table: pa.Table, one_group: bool = False) -> dict[str, tuple[bytes, int]]:
    """Return a table as parquet files of the cache, ``NAME/000000.parquet`` and on, with bytes and rows.

    At least one file, even when the table is empty.

    Args:
        one_group: write one row group per file, as earlier versions did.
    """
    table = table.cast(table_schema(name, KIND in table.column_names))
    files, group = {}, _ROWS_PER_FILE if one_group else ROWS_PER_GROUP
    for number, start in enumerate(range(0, max(table.num_rows, 1), _ROWS_PER_FILE)):
        sink = io.BytesIO()
        part = table.slice(start, _ROWS_PER_FILE)
        pq.write_table(part, sink, row_group_size=group, compression="zstd")
        files[f"{name}/{number:06d}.parquet"] = (sink.getvalue(), part.num_rows)
    return files


def table_schema(name: str, caption_kinds: bool) -> pa.Schema:
    """Return the columns of a table.

    Args:
        caption_kinds: whether the captions of the cache have kinds.
    """
    return SCHEMAS[name].append(pa.field(KIND, pa.string())) if name == CAPTIONS and caption_kinds else SCHEMAS[name]


def read_table(files: CacheFiles, manifest: CacheManifest, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read all rows of a table of the cache, and check the digest of each file.

    Raises:
        CacheCorruptError: a file is missing or does not have the bytes that the manifest names.
    """
    keys = table_keys(manifest, name)
    read = in_parallel(files, lambda key: read_static(files, key, manifest.files[key]), keys, most=FILES_AT_ONCE)
    parts = [parquet_file(pa.BufferReader(data)).read(columns=columns, use_threads=False) for data in read]
    return pa.concat_tables(parts).combine_chunks()


def long_texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cast to large_string: ``take`` and ``combine_chunks`` overflow on string columns above 2 GiB."""
    return column.cast(pa.large_string())


def table_keys(manifest: CacheManifest, name: str) -> list[str]:
    """Return the parquet files of a table, in the order of their rows."""
    return sorted(key for key in manifest.files if key.startswith(f"{name}/"))


def samples_sha256(samples: pa.Table) -> str:
    """Return ``DatasetIdentity.samples_sha256``: over sample_id, split and content of each image, in row order."""
    return _digest_rows(samples.select(["sample_id", "split", "content_sha256"]))


def captions_sha256(captions: pa.Table) -> str:
    """Return ``DatasetIdentity.captions_sha256``: over image row, text and any kind of each caption, in row order."""
    return _digest_rows(captions.select(["image_row", "text", *([KIND] if KIND in captions.column_names else [])]))


def chunk_rows_sha256(rows: pa.Table, tower: Literal["image", "text"]) -> str:
    """Return ``ChunkCommit.rows_sha256``: over what the rows of a chunk were made from, in row order.

    Args:
        rows: rows of the chunk; samples for the image tower, captions for the text tower.
    """
    return _digest_rows(rows.select(_MADE_OF[tower]))


def _digest_rows(table: pa.Table) -> str:
    """Return the sha256 over one line of canonical JSON per row."""
    total = hashlib.sha256()
    for batch in table.to_batches(max_chunksize=65_536):
        columns = [column.to_pylist() for column in batch.columns]
        for row in zip(*columns, strict=True):
            total.update(canonical_json(row) + b"\n")
    return total.hexdigest()


def parquet_file(source: pa.NativeFile) -> pq.ParquetFile:
    """Open a parquet file that this thread reads."""
    # no pre-buffering: arrow's I/O threads may release the bytes after the interpreter has ended, which aborts the
    # process (exit -6)
    return pq.ParquetFile(source, pre_buffer=False)


def read_static(files: CacheFiles, key: str, wanted: StaticFile) -> bytes:
    """Read a file that the manifest names, and prove its bytes.

    Raises:
        CacheCorruptError: it is missing or has other bytes.
    """
    try:
        data = files.read(key)
    except FileNotFoundError as error:
        raise _missing(files, key) from error
    _require_digest(files, key, hashlib.sha256(data).hexdigest(), wanted)
    return data


def open_static(files: CacheFiles, key: str, wanted: StaticFile) -> pa.NativeFile:
    """Open a file that the manifest names, and prove its bytes. A local file is read in blocks, not into memory.

    Raises:
        CacheCorruptError: it is missing or has other bytes.
    """
    if not isinstance(files, LocalFiles):
        with named_errors(files, key):
            return pa.BufferReader(read_static(files, key, wanted))
    digest = hashlib.sha256()
    try:
        with named_errors(files, key):
            file = pa.OSFile(os.fsencode(files.path(key)))  # bytes: a folder's name need not be UTF-8
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    except FileNotFoundError as error:
        raise _missing(files, key) from error
    _require_digest(files, key, digest.hexdigest(), wanted)
    file.seek(0)
    return file


@contextmanager
def named_errors(files: CacheFiles, key: str) -> Iterator[None]:
    """Add the file's name to errors of arrow, which have none."""
    try:
        yield
    except OSError as error:
        name_file(error, f"{files.location}/{key}")
        raise


def _missing(files: CacheFiles, key: str) -> CacheCorruptError:
    return CacheCorruptError(f"{files.location}/{key}: missing. {_REMEDY}")


def _require_digest(files: CacheFiles, key: str, actual: str, wanted: StaticFile) -> None:
    if actual != wanted.sha256:
        raise CacheCorruptError(
            f"{files.location}/{key}: sha256 is {actual[:12]}, the manifest names {wanted.sha256[:12]}. {_REMEDY}"
        )


_REMEDY = "Run teacher-cache repair CACHE, which makes it again from the dataset, or restore a copy."
