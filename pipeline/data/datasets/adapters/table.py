"""Table of images and captions: CSV, TSV, Parquet or Arrow, one row per caption.

    pairs.csv                       path,caption,split
                                    images/one.jpg,A dog runs.,train
                                    images/one.jpg,"A dog, running.",train

Text is separated by tabs, commas, semicolons or bars: by the first of them that sets the column of paths apart in the
header. It is UTF-8, with or without a byte-order mark, unless ``?encoding=`` names another encoding. With
``?encoding=utf-8`` broken characters become U+FFFD and are counted; without it they are refused.

A path is relative to the table's folder and below it, absolute, or a URL without a password or a signature (a cache
would keep them). Rows with the same path are one image. Images come in the order of their first rows, captions in the
order of the rows. A ``sample_id`` comes from the column of ids, else it is the path. A Parquet or Arrow column may hold
lists of captions.

Parquet and Arrow may also hold the pictures themselves, and be a folder of such files: what Hugging Face's ``datasets``
writes, see :mod:`teacher_cache.pipeline.data.datasets.columnar`. Then each row is an image of its own, unless a column
of ids says otherwise; its ``sample_id`` is the id, else the path beside the picture, else file and row.

Captions of several kinds stand in a column each, ``?caption=real:alt,synthetic:blip``, or have their kind in a column,
``?kind=source``. An empty cell of the former is no caption; a row without a kind in the latter is left out. Captions
of an image are sorted by kind.

Columns are found by name, ignoring case. An option names another column, or ignores an optional one if empty
(``?id=``).
"""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fsspec

from teacher_cache.pipeline.data.datasets.columnar import columnar_files, columnar_rows
from teacher_cache.pipeline.data.datasets.columns import COLUMNS, Row, Stored, find_columns
from teacher_cache.pipeline.data.datasets.files import (
    as_text,
    data_folder,
    is_columnar,
    is_pattern,
    open_regular,
    require_there,
    require_utf8,
    split_in_name,
    uri_below,
)
from teacher_cache.pipeline.data.datasets.records import (
    Problem,
    Record,
    require_few_kinds,
    require_kind_of_captions,
    sample_or_problem,
)
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.places import SPREADSHEET, TAR, kind_of
from teacher_cache.storage.files.transient import is_transient
from teacher_cache.storage.observe.safe_text import printable

_SEPARATED = {"\t": "a tab", ",": "a comma", ";": "a semicolon", "|": "a bar"}


@dataclass
class _Image:
    """Image, from all of its rows."""

    sample_id: str
    split: str
    place: Stored
    captions: dict[str, list[str]] = field(default_factory=dict)  # by kind, or all under ""


def read(
    root: str,
    *,
    path: str | None = None,
    caption: str | None = None,
    split: str | None = None,
    id: str | None = None,
    encoding: str = "",
    kind: str | None = None,
) -> Iterator[Record]:
    """Read the samples of one table.

    Args:
        root: the table, a local file or a URL; or Parquet and Arrow files, by a folder or a pattern with ``*``. Other
            files are text with a header.
        path: column of paths, URLs or pictures.
        caption: column of captions, or ``KIND:COLUMN,KIND:COLUMN``. Empty (``?caption=``): the images are to have none.
        split: column of splits; an empty cell takes the image's split from another row. Without the column a split is
            ``""``, or the one that names a file or folder below ``root``.
        id: column of sample ids, the same in all rows of an image.
        encoding: encoding of a text, for example ``cp1252``. Default: UTF-8 without broken characters.
        kind: column of the captions' kinds.

    Raises:
        UsageError: the table is missing or unreadable, has no such column, or holds text of another encoding.
    """
    options = {"path": path, "caption": caption, "split": split, "id": id}
    options |= {"kind": kind} if kind else {}
    kinds: set[str] = set()
    images: dict[str, _Image] = {}
    ids: set[str] = set()
    unusable: list[tuple[Row, str, str]] = []  # row, detail, path
    for row in _rows(root, options, encoding):
        if row.broken:
            yield Problem("broken-file", row.where, row.detail, lost_image=False)
            continue
        key, place, detail = _placed(row)
        if detail:
            unusable.append((row, detail, key))
            continue
        own_id = row.values.get("id")
        sample_id = str(own_id) if own_id not in (None, "") else key
        if sample_id == key and place.name and place.name not in ids and key not in images:
            sample_id = place.name
        row_split = str(row.values.get("split") or "")
        image = images.setdefault(key, _Image(sample_id, row_split, place))
        image.split = image.split or row_split
        ids.add(image.sample_id)
        differs, own = _difference(image, sample_id, row_split), _captions_by_kind(row.values)
        if differs:
            detail = f"{printable(key)} has {differs}; the caption of this row is left out"
            yield Problem("bad-record", row.where, detail, lost_image=False, lost_captions=sum(map(len, own.values())))
            continue
        kinds.update(own)
        require_few_kinds(f"{root}, {f'column {kind!r}' if kind else 'caption='}", kinds)
        for its_kind, texts in own.items():
            image.captions.setdefault(its_kind, []).extend(texts)

    # after the last row: the image of a bad row may have good rows too
    counted = {"", *images}
    for row, detail, key in unusable:
        lost_image = key not in counted
        yield Problem("bad-record", row.where, detail, lost_image, lost_captions=row.lines)
        counted.add(key)
    for image in images.values():
        captions, place = None if caption == "" else image.captions, image.place
        yield from sample_or_problem(image.sample_id, place.uri, image.split, captions, place.offset, place.length)


def _placed(row: Row) -> tuple[str, Stored, str]:
    """Return what tells a row's image from others, where it is, and why it cannot be used."""
    picture = row.values.get("path")
    if isinstance(picture, Stored):
        # one picture in several rows has one id; where nothing names it, its place does
        own_id = row.values.get("id")
        key = str(own_id) if own_id not in (None, "") else picture.address
        return key, picture, row.detail or _wrong_kind(row.values)
    uri = "" if picture is None else str(picture).strip()
    detail = row.detail or ("" if uri else "no path in it")
    if not detail and "://" not in uri and not Path(uri).is_absolute() and uri_below("", uri) is None:
        detail = f"{printable(uri)!r} leaves the folder of the table; write an absolute path"
    return uri, Stored(uri), detail or _wrong_kind(row.values)


def _wrong_kind(values: Mapping[str, Any]) -> str:
    """Return why the kind of a row's captions cannot be used, or an empty text."""
    if "kind" in values:
        try:
            require_kind_of_captions(_cell(values["kind"]))
        except UsageError as error:
            return str(error)
    return ""


def check(root: str, *, encoding: str = "", **options: str | None) -> None:
    """Check that a local table has the columns."""
    if "://" not in root and next(_rows(root, options, encoding), None) is None:
        raise UsageError(f"{root}: has a header and no row below it; write one row for each caption")


def _rows(root: str, options: Mapping[str, str | None], encoding: str) -> Iterator[Row]:
    with _readable(root):
        files = columnar_files(root)
    if files is None:
        if kind_of(root) == TAR:
            raise UsageError(f"{root} is a tar of images: write webdataset:{root}")
        if kind_of(root) == SPREADSHEET:
            raise UsageError(f"{root} is a spreadsheet: save it as CSV (UTF-8) with the columns path and caption")
        if root.lower().endswith((".jsonl", ".ndjson", ".json")):
            raise UsageError(
                f"{root}: JSON is no table here: save it as CSV or Parquet with the columns path and caption"
            )
        name = root.rstrip("/").rpartition("/")[2]
        with _open(root) as file:
            rows = _text_rows(as_text(file, encoding or "utf-8"), root, name, options)
            yield from rows if encoding else _in_utf8(rows, root)
        return
    folder = data_folder(root)
    for path in files:
        uri = path.removeprefix(f"{folder.rstrip('/')}/")
        its_split = "" if is_columnar(root) and not is_pattern(root) else split_in_name(uri, folder)
        with _open(path) as file:
            for row in columnar_rows(file, path, uri, options):
                yield replace(row, values={"split": its_split, **row.values}) if its_split else row


def _in_utf8(rows: Iterator[Row], root: str) -> Iterator[Row]:
    for row in rows:
        require_utf8(" ".join(map(str, row.values.values())), f"{root} {row.where.partition(' ')[2]}")
        yield row


def _open(root: str) -> Any:
    """Open the table's bytes; the caller closes them."""
    with _readable(root):
        return fsspec.open(root, "rb").open() if "://" in root else open_regular(require_there(root))


@contextlib.contextmanager
def _readable(root: str) -> Iterator[None]:
    """Name the table in errors of the block."""
    try:
        yield
    except IsADirectoryError:
        raise UsageError(
            f"{root} is a folder without Parquet or Arrow files; name the table in it, for example "
            f"table:{root}/pairs.csv"
        ) from None
    except Exception as error:  # each library behind a URL has its own errors
        if is_transient(error) or isinstance(error, UsageError):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"{root}: no table there that can be read ({reason}); write table:FILE") from error


def _difference(image: _Image, sample_id: str, split: str) -> str:
    if split and split != image.split:
        return f"split {printable(split)!r} here and {printable(image.split)!r} in an earlier row"
    if sample_id != image.sample_id:
        return (
            f"the id {printable(sample_id)!r} here and {printable(image.sample_id)!r} in an earlier row "
            "(?id= leaves the ids out)"
        )
    return ""


def _captions_by_kind(values: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return a row's captions by kind, all under an empty text if there are no kinds."""
    of_kinds = {role.partition(":")[2]: value for role, value in values.items() if role.startswith("caption:")}
    if of_kinds:
        return {kind: _captions(value) for kind, value in of_kinds.items() if value not in (None, "")}
    return {_cell(values.get("kind")): _captions(values.get("caption"))}


def _cell(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _captions(value: Any) -> list[str]:
    """Return a cell's captions. An empty cell counts as one empty caption."""
    values = value if isinstance(value, list) else [value]
    return ["" if caption is None else str(caption) for caption in values]


def _delimiter(first: str, path: str | None) -> str:
    """Return the first delimiter that sets the column of paths apart, else the first in the line."""
    names = (path.lower(),) if path else COLUMNS["path"]
    for delimiter in _SEPARATED:
        if {column.strip(' "').lower() for column in first.rstrip("\r\n").split(delimiter)}.intersection(names):
            return delimiter
    return next((delimiter for delimiter in _SEPARATED if delimiter in first), ",")


def _first_line(text: io.TextIOWrapper, root: str) -> str:
    try:
        first = text.readline()
    except UnicodeError as error:
        raise UsageError(f"{root}: not {text.encoding} ({error}); is ?encoding= right?") from error
    if not first:
        raise UsageError(f"{root}: is empty; write a header, path,caption, and one row for each caption")
    if "\0" in first:
        # without a byte-order mark "utf-16" is refused; ASCII has its zeros in the odd or in the even bytes
        marked, little = first.startswith(("\ufeff", "\udcff", "\udcfe")), first.find("\0") % 2 == 1
        guess = "utf-16" if marked else "utf-16-le" if little else "utf-16-be"
        raise UsageError(f"{root}: not UTF-8; if a spreadsheet wrote it, add ?encoding={guess}")
    return first


def _text_rows(file: io.TextIOWrapper, root: str, name: str, options: Mapping[str, str | None]) -> Iterator[Row]:
    with file as text:
        first = _first_line(text, root)
        delimiter = _delimiter(first, options.get("path"))
        try:
            header = next(csv.reader([first], delimiter=delimiter, skipinitialspace=True), [])
        except csv.Error as error:
            raise UsageError(f"{root}: the first line is no header ({error}); name the columns in it") from error
        columns = find_columns(root, header, options)
        rows = csv.reader(text, delimiter=delimiter, strict=True, skipinitialspace=True)
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
            lines, where = end + 1 - begin, f"{name} line {begin}" if end == begin else f"{name} lines {begin}-{end}"
            if detail and lines > 1:
                detail += f"; is a quote in line {begin} not closed?"
            begin = end + 1
            if not fields and not detail:
                continue
            if not detail and len(fields) != len(header):
                detail = f"{len(fields)} fields where the header has {len(header)}"
                detail += f"; a caption with {_SEPARATED[delimiter]} stands in quotes" * (len(fields) > len(header))
            values = {role: fields[index] for role, index in columns.items() if index < len(fields)}
            yield Row(where, values, detail, lines=lines)
