"""Columns of a table of images and captions, found by their names; and its rows. Used for text, Parquet and Arrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from teacher_cache.pipeline.data.datasets.files import IMAGE_ENDINGS
from teacher_cache.pipeline.data.datasets.records import kinds_and_places
from teacher_cache.pipeline.settings.names import did_you_mean
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.logs import hint
from teacher_cache.storage.observe.safe_text import printable

# role -> accepted column names, the most likely first
COLUMNS = {
    "path": ("path", "filepath", "file_path", "image_path", "image", "file_name", "filename", "uri", "url"),
    "caption": ("caption", "captions", "text", "title"),
    "split": ("split",),
    "id": ("sample_id", "id"),
}


@dataclass(frozen=True)
class Stored:
    """Picture inside a table.

    Attributes:
        uri: the file, or the cell of a Parquet file (:mod:`teacher_cache.pipeline.data.datasets.parquet_cells`); empty
            where a row has no picture.
        offset, length: its bytes in the file; -1 for a cell.
        name: path that the table records beside it, or an empty text.
        address: file and number of the row, as a name for a picture that nothing else names.
    """

    uri: str
    offset: int = -1
    length: int = -1
    name: str = ""
    address: str = ""


@dataclass(frozen=True)
class Row:
    """Row of a table: values by role, None if absent.

    The value of the role ``path`` is a path or URL, or the picture itself. ``detail`` says why the row cannot be used,
    ``broken`` that the rest of the file cannot. A text's row that a quote keeps open has several ``lines``.
    """

    where: str
    values: dict[str, Any]
    detail: str = ""
    broken: bool = False
    lines: int = 1


def find_columns(root: str, header: Sequence[str], options: Mapping[str, str | None]) -> dict[str, int]:
    """Return the position of each role's column.

    Args:
        options: column by role. None: the first of :data:`COLUMNS`; an empty text: no column. A role that is not in
            :data:`COLUMNS` is read if it has a column here.

    Raises:
        UsageError: a required column is missing, or there is none of the name in the options.
    """
    options = _with_kinds(root, header, options)
    columns: dict[str, int] = {}
    lowered = [column.strip().lower() for column in header]
    shown = printable(", ".join(header)) or "none"
    for role in dict.fromkeys((*COLUMNS, *options)):
        names, option = COLUMNS.get(role, ()), options.get(role)
        if option:
            if option not in header:
                hint = did_you_mean(option, header)
                raise UsageError(f"{root}: no column {option!r} for {role}=.{hint} Its columns are {shown}")
            columns[role] = header.index(option)
        elif option is None:
            index = next((lowered.index(name) for name in names if name in lowered), None)
            if index is not None:
                columns[role] = index
        if role not in columns and (role == "path" or (role == "caption" and option is None)):
            raise UsageError(
                f"{root}: no column for the {role}; looked for {', '.join(names)}; its columns are {shown}; "
                f"{_advice(role, header)}"
            )
    unread = [column for index, column in enumerate(header) if index not in columns.values()]
    if unread and "split" not in columns:
        named = ", ".join(f"{role}={header[index]}" for role, index in columns.items())
        _say_unread(root, f"{root}: read {printable(named)}; not read: {printable(', '.join(unread[:8]))}")
    return columns


def _with_kinds(root: str, header: Sequence[str], options: Mapping[str, str | None]) -> Mapping[str, str | None]:
    """Return the options with a role ``caption:KIND`` for each kind of ``?caption=KIND:COLUMN,KIND:COLUMN``."""
    caption = options.get("caption") or ""
    places = {} if caption in header else kinds_and_places(caption)
    if places and options.get("kind"):
        raise UsageError(f"{root}: kind= and caption= both name kinds of captions; leave one out")
    return {**options, "caption": "", **{f"caption:{kind}": places[kind] for kind in places}} if places else options


@lru_cache(maxsize=1)
def _say_unread(root: str, line: str) -> None:
    hint(f"{line}. A column of splits is named by ?split=COLUMN")


def _advice(role: str, header: Sequence[str]) -> str:
    picture = next((column for column in header if column.lower().endswith(IMAGE_ENDINGS)), None)
    if picture is not None:
        return (
            f"the first line names a picture ({printable(picture)}): is it a header? Add a line path,caption above it"
        )
    return f"name one with ?{role}=COLUMN" + ", or take the images alone with ?caption=" * (role == "caption")
