"""Rows of a table by number, without the table in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from teacher_cache.storage.files.location import in_parallel
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.format.manifest import CacheManifest
from teacher_cache.storage.format.tables import (
    FILES_AT_ONCE,
    ROWS_PER_GROUP,
    named_errors,
    open_static,
    parquet_file,
    table_keys,
    table_schema,
)

HELD_ROWS = 2 * ROWS_PER_GROUP
"""Rows that stay in memory: on both sides of a border, as some chunks are prepared while earlier ones are written."""


@dataclass(frozen=True)
class _Part:
    """One parquet file, open and proven.

    Attributes:
        starts: First row of each row group, and the end of the last one.
    """

    file: pq.ParquetFile
    starts: NDArray[np.int64]


class TableRows:
    """Rows of the samples, captions or problems table of a cache, by number, in bounded memory.

    Reads only the parquet files and row groups that hold the rows. The row groups read last stay in memory: at most
    131,072 rows, or one larger group (a million rows, in files of earlier versions). ``open_files`` files stay open.
    Each time a file is opened, its digest is checked. A local file then stays open, so later reads are from the
    checked file even if it is replaced. A file of an object store is fetched whole and stays in memory, compressed.

    Threads may share it: they read one after another.

    Args:
        files, manifest: The cache.
        name: The table.
        open_files: Maximum number of open files. Two are enough for rows in order; other orders need more, or open and
            check files again and again.
        columns: Columns to read. Default: all.
    """

    def __init__(
        self,
        files: CacheFiles,
        manifest: CacheManifest,
        name: str,
        open_files: int = 2,
        columns: Sequence[str] | None = None,
    ) -> None:
        self._files, self._manifest, self._name, self._most_open = files, manifest, name, open_files
        self._schema = table_schema(name, manifest.identity.dataset.caption_kinds is not None)
        self._columns = list(self._schema.names if columns is None else columns)
        self._keys = table_keys(manifest, name)
        self._starts = np.cumsum([0, *(manifest.files[key].rows or 0 for key in self._keys)])
        self._parts: OrderedDict[int, _Part] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[TableRows], tuple[CacheFiles, CacheManifest, str, int, list[str]]]:
        # a spawned process opens the files for itself
        return TableRows, (self._files, self._manifest, self._name, self._most_open, self._columns)

    @property
    def held_rows(self) -> int:
        """Number of rows in memory."""
        return sum(group.num_rows for group in self._groups.values())

    def drop_rows(self) -> None:
        """Drop the rows in memory. Files stay open."""
        with self._lock:
            self._groups.clear()

    def read(self, rows: range) -> pa.Table:
        """Return a range of rows.

        Raises:
            IndexError: The table does not have a row.
            CacheCorruptError: A file is missing or does not have the bytes that the manifest names.
        """
        if not 0 <= rows.start <= rows.stop <= self._starts[-1] or rows.step != 1:
            raise IndexError(f"{self._where}: rows are 0 to {self._starts[-1] - 1}, asked for {rows}")
        with self._lock:
            pieces = [
                self._group(number, group).slice(*_overlap(rows, first, stop))
                for number in _covering(self._starts, rows)
                for group, first, stop in self._groups_of(number, rows)
            ]
        return self._joined(pieces)

    def take(self, rows: NDArray[np.int64]) -> pa.Table:
        """Return rows in the order given.

        Raises:
            IndexError, CacheCorruptError: As :meth:`read`.
        """
        rows = np.asarray(rows, np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self._starts[-1]:
            message = f"rows are 0 to {self._starts[-1] - 1}, asked for {rows.min()} to {rows.max()}"
            raise IndexError(f"{self._where}: {message}")
        order = np.argsort(rows, kind="stable")
        ascending, done, pieces = rows[order], 0, []
        with self._lock:
            for number in np.unique(np.searchsorted(self._starts, ascending, side="right") - 1).tolist():
                for group, first, stop in self._groups_of(number, range(*self._starts[number : number + 2])):
                    end = int(np.searchsorted(ascending, stop))
                    if end > done:
                        pieces.append(_picked(self._group(number, group), ascending[done:end] - first))
                    done = end
        table = self._joined(pieces)
        return table if (np.diff(order) == 1).all() else table.combine_chunks().take(pa.array(np.argsort(order)))

    def parts(self) -> Iterator[pa.Table]:
        """Yield all rows, one row group after another; none stays in memory. Files of a store are fetched ahead.

        Raises:
            CacheCorruptError: As :meth:`read`, when the file's turn comes.
        """
        opened = in_parallel(self._files, self._open, range(len(self._keys)), most=FILES_AT_ONCE)
        for number, part in enumerate(opened):
            for group in range(part.file.num_row_groups):
                table = self._read(number, part, group)
                yield table
                del table
                # arrow's allocator otherwise keeps what was freed
                pa.default_memory_pool().release_unused()
            part.file.close(force=True)

    @property
    def _where(self) -> str:
        return f"{self._files.location}/{self._name}"

    def _joined(self, pieces: list[pa.Table]) -> pa.Table:
        return pa.concat_tables(pieces) if pieces else self._schema.empty_table().select(self._columns)

    def _groups_of(self, number: int, rows: range) -> list[tuple[int, int, int]]:
        """Return the row groups of a file that hold some of the rows: number, first row, and one past the last."""
        starts = self._part(number).starts + self._starts[number]
        return [(group, int(starts[group]), int(starts[group + 1])) for group in _covering(starts, rows)]

    def _group(self, number: int, group: int) -> pa.Table:
        at = (number, group)
        if at not in self._groups:
            part = self._part(number)
            coming = int(np.diff(part.starts)[group])
            while self._groups and self.held_rows + coming > HELD_ROWS:
                self._groups.popitem(last=False)
            self._groups[at] = self._read(number, part, group)
            # arrow's allocator otherwise keeps what was freed, and ever more of it
            pa.default_memory_pool().release_unused()
        self._groups.move_to_end(at)
        return self._groups[at]

    def _part(self, number: int) -> _Part:
        if number not in self._parts:
            while len(self._parts) >= self._most_open:
                self._parts.popitem(last=False)[1].file.close(force=True)
            self._parts[number] = self._open(number)
        self._parts.move_to_end(number)
        return self._parts[number]

    def _open(self, number: int) -> _Part:
        key = self._keys[number]
        source = open_static(self._files, key, self._manifest.files[key])
        with named_errors(self._files, key):
            file = parquet_file(source)
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        return _Part(file, np.cumsum([0, *rows]))

    def _read(self, number: int, part: _Part, group: int) -> pa.Table:
        with named_errors(self._files, self._keys[number]):
            return part.file.read_row_group(group, columns=self._columns, use_threads=False)


def _picked(group: pa.Table, rows: NDArray[np.int64]) -> pa.Table:
    """Return rows of a row group, ascending; without a copy if they are all of its rows."""
    if np.array_equal(rows, np.arange(len(group))):
        return group
    return group.take(pa.array(rows))


def _covering(starts: NDArray[np.int64], rows: range) -> list[int]:
    """Return the indices of the ranges between neighbouring ``starts`` that hold any of the rows."""
    return [at for at, (first, stop) in enumerate(pairwise(starts)) if first < rows.stop and rows.start < stop]


def _overlap(rows: range, first: int, stop: int) -> tuple[int, int]:
    """Return offset and length of the rows that lie in the range [first, stop)."""
    start = max(rows.start, first)
    return start - first, min(rows.stop, stop) - start
