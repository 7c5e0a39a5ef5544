"""Table of images and captions: CSV, TSV or Parquet, one row per caption.

    pairs.csv                       path,caption,split
                                    images/one.jpg,A dog runs.,train
                                    images/one.jpg,"A dog, running.",train

Text is separated by tabs, commas or semicolons: by the first of them that sets the column of paths apart in the header.
It is UTF-8, with or without a byte-order mark, unless ``?encoding=`` names another encoding. With
``?encoding=utf-8`` broken characters become U+FFFD and are counted; without it they are refused.

A path is relative to the table's folder and below it, absolute, or a URL without a password or a signature (a cache
would keep them). Rows with the same path are one image. Images come in the order of their first rows, captions in the
order of the rows. A ``sample_id`` comes from the column of ids, else it is the path. A Parquet column may hold lists of
captions.

Columns are found by name, ignoring case. An option names another column, or ignores an optional one if empty
(``?id=``).
"""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from teacher_cache.pipeline.data.datasets.files import (
    IMAGE_ENDINGS,
    as_text,
    open_regular,
    require_there,
    require_utf8,
    uri_below,
)
from teacher_cache.pipeline.data.datasets.records import Problem, Record, sample_or_problem
from teacher_cache.pipeline.settings.names import did_you_mean
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.transient import is_transient
from teacher_cache.storage.observe.safe_text import printable

# role -> accepted column names, the most likely first
_COLUMNS = {
    "path": ("path", "filepath", "file_path", "image_path", "image", "file_name", "filename", "uri", "url"),
    "caption": ("caption", "captions", "text", "title"),
    "split": ("split",),
    "id": ("sample_id", "id"),
}
_DELIMITERS = "\t,;"
_BATCH_ROWS = 8192
# pyarrow's errors for damaged files; ValueError and others come from the conversion to Python
_BROKEN_PARQUET = (pa.ArrowException, OSError, ValueError, OverflowError, TypeError, KeyError, IndexError)


@dataclass
class _Image:
    """Image, from all rows with its path."""

    sample_id: str
    split: str
    captions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Row:
    """Row of the table: values by role, None if absent. ``detail`` says why it cannot be used."""

    where: str
    values: dict[str, Any]
    detail: str = ""


def read(
    root: str,
    *,
    path: str | None = None,
    caption: str | None = None,
    split: str | None = None,
    id: str | None = None,
    encoding: str = "",
) -> Iterator[Record]:
    """Read the samples of one table.

    Args:
        root: the table, a local file or a URL. ``.parquet`` is Parquet; other files are text with a header.
        path: column of paths or URLs.
        caption: column of captions. Empty (``?caption=``): the images are to have none.
        split: column of splits. Without it every split is ``""``.
        id: column of sample ids, the same in all rows of an image.
        encoding: encoding of a text, for example ``cp1252``. Default: UTF-8 without broken characters.

    Raises:
        UsageError: the table is missing or unreadable, has no such column, or holds text of another encoding.
    """
    options = {"path": path, "caption": caption, "split": split, "id": id}
    images: dict[str, _Image] = {}
    unusable: list[tuple[str, str, str]] = []  # where, detail, path
    with _open(root) as file:
        for row in _rows(file, root, options, encoding):
            image_path = row.values.get("path")
            uri = "" if image_path is None else str(image_path).strip()
            detail = row.detail or ("" if uri else "no path in it")
            if not detail and "://" not in uri and not Path(uri).is_absolute() and uri_below("", uri) is None:
                detail = f"{printable(uri)!r} leaves the folder of the table; write an absolute path"
            if detail:
                unusable.append((row.where, detail, uri))
                continue
            own_id = row.values.get("id")
            sample_id = uri if own_id in (None, "") else str(own_id)
            row_split = str(row.values.get("split") or "")
            image = images.setdefault(uri, _Image(sample_id, row_split))
            differs = _difference(image, sample_id, row_split)
            if differs:
                detail = f"{printable(uri)} has {differs}; the caption of this row is left out"
                yield Problem("bad-record", row.where, detail, lost_image=False)
            else:
                image.captions.extend(_captions(row.values.get("caption")))

    # after the last row: the image of a bad row may have good rows too
    counted = {"", *images}
    for where, detail, uri in unusable:
        yield Problem("bad-record", where, detail, lost_image=uri not in counted)
        counted.add(uri)
    for uri, image in images.items():
        captions = None if caption == "" else image.captions
        yield from sample_or_problem(image.sample_id, uri, image.split, captions)


def check(root: str, *, encoding: str = "", **options: str | None) -> None:
    """Check that a local table has the columns."""
    if "://" not in root:
        with _open(root) as file:
            if next(_rows(file, root, options, encoding), None) is None:
                raise UsageError(f"{root}: has a header and no row below it; write one row for each caption")


def _rows(file: BinaryIO, root: str, options: Mapping[str, str | None], encoding: str) -> Iterator[_Row]:
    name = root.rstrip("/").rpartition("/")[2]
    if root.lower().endswith((".parquet", ".pq")):
        return _parquet_rows(file, root, name, options)
    rows = _text_rows(as_text(file, encoding or "utf-8"), root, name, options)
    return rows if encoding else _in_utf8(rows, root)


def _in_utf8(rows: Iterator[_Row], root: str) -> Iterator[_Row]:
    for row in rows:
        require_utf8(" ".join(map(str, row.values.values())), f"{root} {row.where.partition(' ')[2]}")
        yield row


def _open(root: str) -> Any:
    """Open the table's bytes; the caller closes them."""
    try:
        return fsspec.open(root, "rb").open() if "://" in root else open_regular(require_there(root))
    except IsADirectoryError:
        raise UsageError(f"{root} is a folder; name the table in it, for example table:{root}/pairs.csv") from None
    except Exception as error:  # each library behind a URL has its own errors
        if is_transient(error) or isinstance(error, UsageError):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"{root}: no table there that can be read ({reason}); write table:FILE") from error


def _difference(image: _Image, sample_id: str, split: str) -> str:
    if split != image.split:
        return f"split {printable(split)!r} here and {printable(image.split)!r} in an earlier row"
    if sample_id != image.sample_id:
        return (
            f"the id {printable(sample_id)!r} here and {printable(image.sample_id)!r} in an earlier row "
            "(?id= leaves the ids out)"
        )
    return ""


def _captions(value: Any) -> list[str]:
    """Return a cell's captions. An empty cell counts as one empty caption."""
    values = value if isinstance(value, list) else [value]
    return ["" if caption is None else str(caption) for caption in values]


def _find_columns(root: str, header: Sequence[str], options: Mapping[str, str | None]) -> dict[str, int]:
    """Find each role's column."""
    columns: dict[str, int] = {}
    lowered = [column.strip().lower() for column in header]
    shown = printable(", ".join(header)) or "none"
    for role, names in _COLUMNS.items():
        option = options.get(role)
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
    return columns


def _advice(role: str, header: Sequence[str]) -> str:
    picture = next((column for column in header if column.lower().endswith(IMAGE_ENDINGS)), None)
    if picture is not None:
        return (
            f"the first line names a picture ({printable(picture)}): is it a header? Add a line path,caption above it"
        )
    return f"name one with ?{role}=COLUMN" + ", or take the images alone with ?caption=" * (role == "caption")


def _delimiter(first: str, path: str | None) -> str:
    """Return the first delimiter that sets the column of paths apart, else the first in the line."""
    names = (path.lower(),) if path else _COLUMNS["path"]
    for delimiter in _DELIMITERS:
        if {column.strip(' "').lower() for column in first.rstrip("\r\n").split(delimiter)}.intersection(names):
            return delimiter
    return next((delimiter for delimiter in _DELIMITERS if delimiter in first), ",")


def _first_line(text: io.TextIOWrapper, root: str) -> str:
    try:
        first = text.readline()
    except UnicodeError as error:
        raise UsageError(f"{root}: not {text.encoding} ({error}); is ?encoding= right?") from error
    if not first:
        raise UsageError(f"{root}: is empty; write a header, path,caption, and one row for each caption")
    if "\0" in first:
        raise UsageError(f"{root}: not {text.encoding}; if a spreadsheet wrote it, add ?encoding=utf-16")
    return first


def _text_rows(file: io.TextIOWrapper, root: str, name: str, options: Mapping[str, str | None]) -> Iterator[_Row]:
    with file as text:
        first = _first_line(text, root)
        delimiter = _delimiter(first, options.get("path"))
        try:
            header = next(csv.reader([first], delimiter=delimiter), [])
        except csv.Error as error:
            raise UsageError(f"{root}: the first line is no header ({error}); name the columns in it") from error
        columns = _find_columns(root, header, options)
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        begin = 2
        while True:
            detail = ""
            fields: list[str] = []
            try:
                fields = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                detail = f"not CSV ({error})"
            end = rows.line_num + 1  # the csv reader has not read the header
            where = f"{name} line {begin}" if end == begin else f"{name} lines {begin}-{end}"
            begin = end + 1
            if not fields and not detail:
                continue
            if not detail and len(fields) != len(header):
                detail = f"{len(fields)} fields where the header has {len(header)}"
            values = {role: fields[index] for role, index in columns.items() if index < len(fields)}
            yield _Row(where, values, detail)


def _parquet_rows(file: BinaryIO, root: str, name: str, options: Mapping[str, str | None]) -> Iterator[_Row]:
    try:
        table = pq.ParquetFile(file)
        header = [name.encode(errors="replace").decode() for name in table.schema_arrow.names]
    except _BROKEN_PARQUET as error:
        if is_transient(error):
            raise
        raise UsageError(f"{root}: not Parquet ({error}); write it again, or name it .csv if it is text") from error
    columns = {role: header[index] for role, index in _find_columns(root, header, options).items()}
    kind = table.schema_arrow.field(columns["path"]).type
    if pa.types.is_nested(kind) or (_is_binary(kind) and _holds_pictures(table, columns["path"])):
        raise UsageError(
            f"{root}: the column {columns['path']!r} holds pictures ({kind}), not paths. Write them to files, or to "
            "tars for webdataset:, or name a column of paths or URLs with ?path=COLUMN"
        )
    number = 0
    try:
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=sorted(set(columns.values()))):
            cells = {role: _cells(batch.column(column)) for role, column in columns.items()}
            for index in range(batch.num_rows):
                values = {role: several[index] for role, several in cells.items()}
                yield _Row(f"{name} row {number}", values)
                number += 1
    except _BROKEN_PARQUET as error:
        if is_transient(error):
            raise
        yield _Row(f"{name} row {number}", {}, f"cannot be read, nor what follows ({error})")


def _cells(column: Any) -> list[Any]:
    """Return Python values. Invalid UTF-8 becomes lone surrogates, as in the other forms."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_text(column.type):
        column = column.cast(pa.large_binary())
    elif (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)) and _is_text(column.type.value_type):
        column = column.cast(pa.large_list(pa.large_binary()))
    return [_text(value) for value in column.to_pylist()]


def _is_binary(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _holds_pictures(table: pq.ParquetFile, column: str) -> bool:
    """Return whether a column of bytes holds pictures: its first value has a zero byte, unlike any path."""
    with contextlib.suppress(*_BROKEN_PARQUET):  # raised again when the rows are read
        for batch in table.iter_batches(batch_size=1, columns=[column]):
            if value := batch.column(0)[0].as_py():
                return b"\0" in value
    return False


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _text(value: Any) -> Any:
    """Decode bytes, also within lists: a binary column may hold text."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="surrogateescape")
    return [_text(one) for one in value] if isinstance(value, list) else value
