"""Tables and lists of facts on stdout. No number and no name is ever cut or broken."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from shutil import get_terminal_size

from rich.cells import cell_len

from teacher_cache.storage.observe.safe_text import shown

_NARROW = 60  # columns: below, facts have their names above them


def output_width() -> int | None:
    """Return the columns of stdout: ``COLUMNS``, else the terminal's. None: no terminal, so that nothing is wrapped."""
    return get_terminal_size().columns if os.environ.get("COLUMNS") or sys.stdout.isatty() else None


class Table:
    """Rows under headings. Where they do not fit, a paragraph per row: its first cell, then the others by heading.

    Args:
        columns: headings. The first column is aligned left, the others right.
    """

    def __init__(self, title: str = "", columns: Iterable[str] = (), caption: str | None = None) -> None:
        self.title, self.caption = title, caption or ""
        self._headings: list[str] = []
        self._right: list[bool] = []
        self._rows: list[list[str]] = []
        for number, heading in enumerate(columns):
            self.add_column(heading, right=number > 0)

    def add_column(self, heading: str = "", right: bool = False) -> None:
        """Add a column. A heading may have several lines."""
        self._headings.append(heading)
        self._right.append(right)

    def add_row(self, *cells: str) -> None:
        """Add a row; cells at its end may be left out. A cell's lines are joined where a row must be one line."""
        self._rows.append([*map(shown, cells), *[""] * (len(self._headings) - len(cells))])

    def lines(self, width: int | None) -> Iterator[str]:
        """Yield the lines for a terminal of this width. None: each row on one line."""
        if self.title:
            yield from _wrapped(shown(self.title), width)
            yield ""
        rows = self._rows if width is not None else [[_joined(cell) for cell in row] for row in self._rows]
        widths = [max(map(_cell_width, column)) for column in zip(self._headings, *rows, strict=True)]
        if width is None or sum(widths) + 2 * (len(widths) - 1) <= width:
            yield from self._grid(rows, widths)
        else:
            for row in rows:
                yield from self._paragraph(row, width)
        if self.caption:
            yield ""
            yield from _wrapped(shown(self.caption), width)

    def _grid(self, rows: Sequence[Sequence[str]], widths: Sequence[int]) -> Iterator[str]:
        if any(self._headings):
            yield from self._row(self._headings, widths, bottom=True)
            yield "─" * (sum(widths) + 2 * (len(widths) - 1))
        for row in rows:
            yield from self._row(row, widths)

    def _row(self, cells: Sequence[str], widths: Sequence[int], bottom: bool = False) -> Iterator[str]:
        """Yield the lines of a row; cells of fewer lines stand at the top or the bottom."""
        parts = [cell.split("\n") for cell in cells]
        height = max(map(len, parts))
        if bottom:
            parts = [[""] * (height - len(part)) + part for part in parts]
        for line in zip_longest(*parts, fillvalue=""):
            padded = (
                f"{' ' * (width - cell_len(cell))}{cell}" if right else f"{cell}{' ' * (width - cell_len(cell))}"
                for cell, width, right in zip(line, widths, self._right, strict=True)
            )
            yield "  ".join(padded).rstrip()

    def _paragraph(self, row: Sequence[str], width: int) -> Iterator[str]:
        first, *others = map(_joined, row)
        if first:
            yield first
        line = ""
        for heading, cell in zip(self._headings[1:], others, strict=True):
            field = f"{_joined(heading)} {cell}".strip()
            if line and cell_len(line) + 2 + cell_len(field) > width:
                yield line
                line = ""
            line = f"{line}  {field}" if cell else line
        if line:
            yield line


class Facts:
    """Names and texts; empty texts are left out. A text may have several lines, and is wrapped between words."""

    def __init__(self, facts: dict[str, str], title: str = "") -> None:
        self.title = title
        self._facts = {name: shown(text) for name, text in facts.items() if text}

    def lines(self, width: int | None) -> Iterator[str]:
        """Yield the lines for a terminal of this width. None: nothing is wrapped."""
        if self.title:
            yield shown(self.title)
        narrow = width is not None and width < _NARROW
        indent = 2 if narrow else max(map(len, self._facts), default=0) + 2
        for name, text in self._facts.items():
            lines = [part for line in text.split("\n") for part in _wrapped(line, width and width - indent)]
            if narrow:
                yield name
            for line in lines:
                yield f"{'' if narrow else name:<{indent}}{line}".rstrip()
                name = ""  # noqa: PLW2901


def _wrapped(text: str, width: int | None) -> list[str]:
    """Break a line between words; a word that is longer keeps a line of its own."""
    if width is None or cell_len(text) <= width:
        return [text]
    return textwrap.wrap(text, max(width, 1), break_long_words=False, break_on_hyphens=False)


def _joined(cell: str) -> str:
    return " ".join(cell.split("\n")).strip()


def _cell_width(cell: str) -> int:
    return max(map(cell_len, cell.split("\n")))


Part = str | Table | Facts
"""What a command prints: a line, a table or a list of facts."""
