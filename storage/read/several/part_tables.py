"""Rows of a table of several parts, as if one cache had it."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from teacher_cache.storage.files.location import absolute_location
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.format.table_rows import HELD_ROWS, TableRows
from teacher_cache.storage.format.tables import CAPTIONS, PROBLEMS, SAMPLES
from teacher_cache.storage.read.several.parts import Parts

_NUMBERS: dict[str, dict[str, Tower]] = {
    SAMPLES: {"row": "image"},
    CAPTIONS: {"row": "text", "image_row": "image"},
    PROBLEMS: {},
}


class PartTables:
    """Rows of the samples, captions or problems table of several parts, by number, in bounded memory.

    It has the methods of :class:`teacher_cache.storage.format.table_rows.TableRows`, and takes the same arguments.
    Numbers are those of all parts. Uris are as they are in the parts; absolute if these have several image roots.

    Threads may share it.
    """

    def __init__(self, parts: Parts, name: str, open_files: int = 2, columns: Sequence[str] | None = None) -> None:
        self._parts, self._name, self._most_open, self._columns = parts, name, open_files, columns
        tower: Tower = "text" if name == CAPTIONS else "image"
        self._starts = parts.first_rows(tower)
        self._tables: OrderedDict[int, TableRows] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return PartTables, (self._parts, self._name, self._most_open, self._columns)

    @property
    def held_rows(self) -> int:
        """Number of rows in memory."""
        return sum(table.held_rows for table in self._tables.values())

    def read(self, rows: range) -> pa.Table:
        """See :meth:`teacher_cache.storage.format.table_rows.TableRows.read`."""
        return self.take(np.arange(rows.start, rows.stop))

    def take(self, rows: NDArray[np.int64]) -> pa.Table:
        """See :meth:`teacher_cache.storage.format.table_rows.TableRows.take`."""
        rows = np.asarray(rows, np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self._starts[-1]:
            where = f"{self._parts.location}/{self._name}"
            raise IndexError(f"{where}: rows are 0 to {self._starts[-1] - 1}, asked for {rows.min()} to {rows.max()}")
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        with self._lock:
            used = np.unique(numbers).tolist() or [0]  # an empty request still needs the columns
            pieces = [self._taken(number, rows[order[numbers[order] == number]]) for number in used]
        table = pa.concat_tables(pieces)
        return table if (np.diff(order) == 1).all() else table.combine_chunks().take(pa.array(np.argsort(order)))

    def _taken(self, number: int, rows: NDArray[np.int64]) -> pa.Table:
        return self._as_one(number, self._table(number).take(rows - self._starts[number]))

    def parts(self) -> Iterator[pa.Table]:
        """See :meth:`teacher_cache.storage.format.table_rows.TableRows.parts`."""
        for number in range(len(self._parts)):
            for table in self._opened(number).parts():
                yield self._as_one(number, table)

    def _table(self, number: int) -> TableRows:
        """Return a part's table, and drop what others hold in memory."""
        if number not in self._tables:
            while len(self._tables) >= self._most_open:
                self._tables.popitem(last=False)
            self._tables[number] = self._opened(number)
        self._tables.move_to_end(number)
        others = iter(self._tables)
        while self.held_rows > HELD_ROWS and (other := next(others)) != number:
            self._tables[other].drop_rows()
        return self._tables[number]

    def _opened(self, number: int) -> TableRows:
        part = self._parts.members[number]
        most = max(2, self._most_open // len(self._parts))
        return TableRows(part.files, part.manifest, self._name, most, self._columns)

    def _as_one(self, number: int, table: pa.Table) -> pa.Table:
        """Return a part's rows with the numbers of all parts."""
        for column, tower in _NUMBERS[self._name].items():
            if column in table.column_names:
                first = int(self._parts.first_rows(tower)[number])
                table = _with_column(table, column, table[column].to_numpy() + first)
        if "uri" in table.column_names and not self._parts.manifest.source.image_root:
            root = absolute_location(self._parts.members[number].manifest.source.image_root)
            table = _with_column(table, "uri", [_absolute(root, uri) for uri in table["uri"].to_pylist()])
        return table


def _with_column(table: pa.Table, name: str, values: Sequence[str] | NDArray[np.int64]) -> pa.Table:
    at = table.schema.get_field_index(name)
    field = table.schema.field(at)
    return table.set_column(at, field, pa.array(values, field.type))


def _absolute(root: str, uri: str) -> str:
    return uri if "://" in uri else os.path.join(root, uri)  # noqa: PTH118  # a root may be a URL
