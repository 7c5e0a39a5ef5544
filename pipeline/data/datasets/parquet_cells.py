"""Pictures in cells of Parquet files, read by ``FILE.parquet#COLUMN/ROW``.

Parquet compresses whole pages, so that a picture's bytes lie nowhere in the file. The row group around it is read and
kept for the rows after it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from weakref import finalize

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from teacher_cache.pipeline.data.datasets.files import open_regular
from teacher_cache.storage.format.tables import parquet_file

_CELL = re.compile(r"(.+\.(?:parquet|pq))#([^#]+)/(\d+)", re.IGNORECASE | re.DOTALL)
MOST_GROUP_BYTES = 1024 * 1024 * 1024
"""Largest row group whose pictures are read: it is in memory as a whole."""
_reading = Lock()


def cell_uri(file: str, column: str, row: int) -> str:
    """Return the uri of a cell."""
    return f"{file}#{column}/{row}"


def in_cell(uri: str) -> bool:
    """Return whether a uri names a cell."""
    return _CELL.fullmatch(uri) is not None


def read_cell(uri: str) -> bytes:
    """Read the picture in a cell. Safe to call from threads.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: it cannot be read, or has no such row, or nothing in it.
    """
    match = _CELL.fullmatch(uri)
    assert match is not None
    file, column, row = match[1], match[2], int(match[3])
    try:
        with _reading:  # threads that want neighbours wait for one read of their group
            opened, starts = _open(file, None if "://" in file else Path(file).stat().st_mtime_ns)
            group = bisect_right(starts, row) - 1
            value = _pictures(opened, column, group)[row - starts[group]].as_py()
    except (pa.ArrowException, KeyError, IndexError, ValueError) as error:
        raise OSError(f"{file}: row {row} of column {column} cannot be read ({error})") from error
    if not isinstance(value, bytes):
        raise OSError(f"{file}: row {row} has no picture in its column {column}")
    return value


@lru_cache(maxsize=16)
def _open(file: str, changed: int | None) -> tuple[pq.ParquetFile, list[int]]:
    """Return an open file with the first row of each row group; ``changed`` tells versions of it apart."""
    source = fsspec.open(file, "rb").open() if "://" in file else open_regular(file)
    opened = parquet_file(source)
    finalize(opened, source.close)  # when it leaves this cache
    counts = [opened.metadata.row_group(group).num_rows for group in range(opened.metadata.num_row_groups)]
    return opened, [0, *accumulate(counts[:-1])]


@lru_cache(maxsize=2)
def _pictures(opened: pq.ParquetFile, column: str, group: int) -> pa.ChunkedArray:
    names = column.split(".")
    values = opened.read_row_group(group, columns=[column]).column(names[0])
    for name in names[1:]:
        values = pa.chunked_array([chunk.field(name) for chunk in values.chunks])
    return values
