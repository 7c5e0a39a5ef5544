"""Rows of a table of a cache by range, without the table in memory: what encoding knows of the dataset."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from teacher_cache.storage.files.fork_safety import renew_after_fork
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.format.manifest import CacheManifest
from teacher_cache.storage.format.tables import (
    ROWS_PER_GROUP,
    SCHEMAS,
    named_errors,
    open_static,
    parquet_file,
    table_keys,
)

__all__ = ["TableRows"]

_HELD_ROWS = 2 * ROWS_PER_GROUP  # on either side of a border: chunks are prepared ahead of those that are written


@dataclass(frozen=True)
class _Part:
    """One parquet file, open and proven."""

    file: pq.ParquetFile
    starts: NDArray[np.int64]  # of its row groups among its rows, and where the last one ends


class TableRows:
    """Rows of the samples, captions or problems of a cache, in order.

    Of the table's parquet files those are read that hold the rows, and of these the row groups that do. Kept are the
    groups that were read last, at most 131,072 rows of them or a single larger one (a million rows, in files that
    earlier versions wrote), and ``open_files`` open files; so memory does not grow with the table. A file is proven by
    its digest whenever it is opened, once in a run that goes through the rows in order. In a folder it then stays open,
    so that what is read later is of the very file that was proven, also where another one took its place; what a disk
    makes of it in between is not noticed here, but by ``verify``, which compares each chunk's record with the tables.
    Of an object store the file is fetched as a whole, since it has to be proven as a whole, and kept as it is,
    compressed.

    Safe for several threads, which read one after another; a process that is forked begins with nothing held.

    Args:
        open_files: two are enough for who goes through the rows in order; in another order each file would be opened,
            and proven, again and again.
    """

    def __init__(self, files: CacheFiles, manifest: CacheManifest, name: str, open_files: int = 2) -> None:
        self._files, self._manifest, self._name, self._most_open = files, manifest, name, open_files
        self._keys = table_keys(manifest, name)
        self._starts = np.cumsum([0, *(manifest.files[key].rows or 0 for key in self._keys)])
        self._parts: OrderedDict[int, _Part] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._lock = threading.Lock()
        renew_after_fork(self)

    def __reduce__(self) -> tuple[type[TableRows], tuple[CacheFiles, CacheManifest, str, int]]:
        # a spawned process opens the files for itself
        return TableRows, (self._files, self._manifest, self._name, self._most_open)

    @property
    def held_rows(self) -> int:
        """Rows that are in memory."""
        return sum(group.num_rows for group in self._groups.values())

    def read(self, rows: range) -> pa.Table:
        """These rows, all columns, as ``teacher_cache.storage.format.tables.read_table`` has them; one after another,
        without gaps.

        Raises:
            IndexError: a row that the table does not have.
            CacheCorruptError: a file is missing or does not have the bytes that the manifest names.
        """
        if not 0 <= rows.start <= rows.stop <= self._starts[-1] or rows.step != 1:
            raise IndexError(
                f"{self._files.location}/{self._name}: rows are 0 to {self._starts[-1] - 1}, asked for {rows}"
            )
        with self._lock:
            pieces = [
                self._group(number, group).slice(*_overlap(rows, first, stop))
                for number in _covering(self._starts, rows)
                for group, first, stop in self._groups_of(number, rows)
            ]
        return pa.concat_tables(pieces) if pieces else SCHEMAS[self._name].empty_table()

    def renew(self) -> None:
        """In a forked child: see :mod:`teacher_cache.storage.files.fork_safety`."""
        self._lock, self._parts, self._groups = threading.Lock(), OrderedDict(), OrderedDict()

    def _groups_of(self, number: int, rows: range) -> list[tuple[int, int, int]]:
        """The row groups of a file that hold some of the rows, with their first row and the one after their last."""
        starts = self._part(number).starts + self._starts[number]
        return [(group, int(starts[group]), int(starts[group + 1])) for group in _covering(starts, rows)]

    def _group(self, number: int, group: int) -> pa.Table:
        at = (number, group)
        if at not in self._groups:
            part = self._part(number)
            coming = int(np.diff(part.starts)[group])
            while self._groups and self.held_rows + coming > _HELD_ROWS:
                self._groups.popitem(last=False)
            with named_errors(self._files, self._keys[number]):
                self._groups[at] = part.file.read_row_group(group, use_threads=False)
            # arrow's allocator otherwise keeps what was freed, and ever more of it
            pa.default_memory_pool().release_unused()
        self._groups.move_to_end(at)
        return self._groups[at]

    def _part(self, number: int) -> _Part:
        if number not in self._parts:
            while len(self._parts) >= self._most_open:
                self._parts.popitem(last=False)[1].file.close(force=True)
            key = self._keys[number]
            source = open_static(self._files, key, self._manifest.files[key])
            with named_errors(self._files, key):
                file = parquet_file(source)
            of_groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self._parts[number] = _Part(file, np.cumsum([0, *of_groups]))
        self._parts.move_to_end(number)
        return self._parts[number]


def _covering(starts: NDArray[np.int64], rows: range) -> list[int]:
    """Which of the ranges between neighbouring ``starts`` hold some of the rows."""
    return [at for at, (first, stop) in enumerate(pairwise(starts)) if first < rows.stop and rows.start < stop]


def _overlap(rows: range, first: int, stop: int) -> tuple[int, int]:
    """Offset and length, in the range [first, stop), of the rows that lie in it."""
    start = max(rows.start, first)
    return start - first, min(rows.stop, stop) - start
