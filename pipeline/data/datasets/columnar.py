"""Rows of Parquet and Arrow files, with pictures at paths or inside.

A picture inside is a column of bytes, or a struct of ``bytes`` and ``path``, as Hugging Face's ``datasets`` writes it.
In an Arrow file its bytes are read in place, by their position in the file; in a Parquet file by
:mod:`teacher_cache.pipeline.data.datasets.parquet_cells`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from teacher_cache.pipeline.data.datasets.columns import Row, Stored, find_columns
from teacher_cache.pipeline.data.datasets.files import PARQUET_ENDINGS, files_below, is_columnar
from teacher_cache.pipeline.data.datasets.parquet_cells import MOST_GROUP_BYTES, cell_uri
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.transient import is_transient

_BATCH_ROWS = 8192
# pyarrow's errors for damaged files; ValueError and others come from the conversion to Python
_BROKEN = (pa.ArrowException, OSError, ValueError, OverflowError, TypeError, KeyError, IndexError)
_NOT_FOLDERS = ("http", "https")


def columnar_files(root: str) -> list[str] | None:
    """Return the Parquet and Arrow files of a table, sorted; None if it is a text.

    Args:
        root: a file, a pattern with ``*``, or a folder with such files in and below it. Each may be a URL, also
            ``hf://datasets/ORG/NAME``.

    Raises:
        FileNotFoundError: no file has such a name.
        ImportError, OSError, ValueError: a folder behind a URL cannot be listed.
    """
    if is_columnar(root) and "*" in root:
        system, pattern = fsspec.core.url_to_fs(root)
        names = sorted(map(str, system.glob(pattern)))
        if not names:
            raise FileNotFoundError("no file has such a name")
        return [system.unstrip_protocol(name) if "://" in root else name for name in names]
    if is_columnar(root):
        return [root if "://" in root else str(Path(root).parent.resolve() / Path(root).name)]
    path = Path(root)
    if "://" not in root:
        below = files_below(path.resolve()) if path.is_dir() else ()
        return [str(file) for file in below if _is_data(file.name)] or None
    if root.partition("://")[0] in _NOT_FOLDERS or path.suffix:
        return None
    system, folder = fsspec.core.url_to_fs(root)
    return sorted(system.unstrip_protocol(name) for name in system.find(folder) if _is_data(name)) or None


def _is_data(name: str) -> bool:
    # datasets keeps results of map() as cache-*.arrow beside the data
    return is_columnar(name) and not Path(name).name.startswith("cache-")


def columnar_rows(file: BinaryIO, path: str, uri: str, options: Mapping[str, str | None]) -> Iterator[Row]:
    """Yield the rows of an open file.

    Args:
        path: the file, for messages.
        uri: the file relative to the table's folder.
        options: column by role, as of :func:`find_columns`.

    Raises:
        UsageError: it is of another form, lacks a column, or its pictures cannot be read where they are.
    """
    parquet = path.lower().split("?")[0].endswith(PARQUET_ENDINGS)
    number = 0
    try:
        for values in _of_parquet(file, path, uri, options) if parquet else _of_arrow(path, uri, options):
            for index in range(len(next(iter(values.values())))):
                row = {role: cells[index] for role, cells in values.items()}
                empty = isinstance(row["path"], Stored) and not row["path"].uri
                detail = "no picture in it" if empty else ""
                yield Row(f"{uri} row {number}", row, detail)
                number += 1
    except UsageError:
        raise
    except _BROKEN as error:
        if is_transient(error):
            raise
        yield Row(uri, {}, f"row {number} cannot be read, nor what follows: {error}", broken=True)


def _of_parquet(
    file: BinaryIO, path: str, uri: str, options: Mapping[str, str | None]
) -> Iterator[dict[str, list[Any]]]:
    """Yield values by role, a batch at a time."""
    try:
        table = pq.ParquetFile(file)
        columns, kind = _columns(path, table.schema_arrow, options)
    except UsageError:
        raise
    except _BROKEN as error:
        if is_transient(error):
            raise
        raise UsageError(f"{path}: not Parquet ({error}); write it again, or name it .csv if it is text") from error
    place = columns["path"]
    in_struct = _is_picture(path, place, kind)
    if not in_struct and not (_is_binary(kind) and _holds_pictures(table, place)):
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=sorted(set(columns.values()))):
            yield {role: _cells(batch.column(column)) for role, column in columns.items()}
        return
    _require_small_groups(path, table)
    others = {role: column for role, column in columns.items() if role != "path"}
    named = in_struct and kind.get_field_index("path") >= 0
    number = 0
    # without the column of pictures itself
    for batch in table.iter_batches(
        batch_size=_BATCH_ROWS, columns=sorted({*others.values(), *([f"{place}.path"] * named)})
    ):
        names = _names(batch.column(place)) if named else [""] * batch.num_rows
        rows = range(number, number + batch.num_rows)
        column = f"{place}.bytes" if in_struct else place
        yield {
            "path": [
                Stored(cell_uri(uri, column, row), name=name, address=f"{uri}/{row}")
                for row, name in zip(rows, names, strict=True)
            ],
            **{role: _cells(batch.column(other)) for role, other in others.items()},
        }
        number = rows.stop


def _of_arrow(path: str, uri: str, options: Mapping[str, str | None]) -> Iterator[dict[str, list[Any]]]:
    """Yield values by role, a record batch at a time."""
    if "://" in path:
        raise UsageError(f"{path}: pictures in Arrow files are read from a local disk; copy the file, or write Parquet")
    whole = pa.memory_map(path).read_buffer()
    try:
        is_file = whole.slice(0, min(6, whole.size)).to_pybytes() == b"ARROW1"
        reader = pa.ipc.open_file(whole) if is_file else pa.ipc.open_stream(whole)
        columns, kind = _columns(path, reader.schema, options)
    except UsageError:
        raise
    except _BROKEN as error:
        raise UsageError(f"{path}: not an Arrow file ({error}); write it again") from error
    batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
    in_struct = _is_picture(path, columns["path"], kind)
    number = 0
    for batch in batches:
        values = {role: _cells(batch.column(column)) for role, column in columns.items() if role != "path"}
        held = batch.column(columns["path"])
        if in_struct or _is_binary(kind):
            values["path"] = _in_place(held, in_struct, whole, path, uri, number)
        else:
            values["path"] = _cells(held)
        yield values
        number += batch.num_rows


def _in_place(held: Any, in_struct: bool, whole: pa.Buffer, path: str, uri: str, first: int) -> list[Stored]:
    """Return where in the file each picture of a record batch is."""
    named = in_struct and held.type.get_field_index("path") >= 0
    names = _names(held) if named else [""] * len(held)
    pictures = held.field("bytes") if in_struct else held
    kind = np.int64 if pa.types.is_large_binary(pictures.type) else np.int32
    _, ends, data = pictures.buffers()
    start = 0 if data is None else data.address - whole.address
    if not 0 <= start <= whole.size:
        raise UsageError(
            f"{path}: is compressed, so that its pictures lie nowhere in it; write it plain, or as Parquet"
        )
    offsets = np.frombuffer(ends, kind)[pictures.offset : pictures.offset + len(pictures) + 1] + start
    places = zip(offsets[:-1].tolist(), np.diff(offsets).tolist(), names, strict=True)
    return [
        Stored(uri if length else "", offset, length, name, f"{uri}/{number}")
        for number, (offset, length, name) in enumerate(places, first)
    ]


def _columns(path: str, schema: pa.Schema, options: Mapping[str, str | None]) -> tuple[dict[str, str], pa.DataType]:
    """Return the column of each role, and the type of the column of paths or pictures."""
    header = [name.encode(errors="replace").decode() for name in schema.names]
    columns = {role: header[index] for role, index in find_columns(path, header, options).items()}
    return columns, schema.field(columns["path"]).type


def _is_picture(path: str, column: str, kind: pa.DataType) -> bool:
    """Return whether a column holds structs with the bytes of a picture.

    Raises:
        UsageError: it is nested in another way.
    """
    if not pa.types.is_nested(kind):
        return False
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type):
        return True
    raise UsageError(
        f"{path}: the column {column!r} holds {kind}; paths, bytes of pictures, or structs of bytes and path are "
        "wanted. Name another with ?path=COLUMN"
    )


def _require_small_groups(path: str, table: pq.ParquetFile) -> None:
    meta = table.metadata
    largest = max((meta.row_group(group).total_byte_size for group in range(meta.num_row_groups)), default=0)
    if largest > MOST_GROUP_BYTES:
        raise UsageError(
            f"{path}: has a row group of {largest / 1e9:.1f} GB, and one picture would read all of it; write it again "
            "with smaller ones, for example pyarrow.parquet.write_table(..., row_group_size=100)"
        )


def _names(held: Any) -> list[str]:
    """Return the path beside each picture, or an empty text."""
    return [str(name or "") for name in _cells(held.field("path"))]


def _cells(column: Any) -> list[Any]:
    """Return Python values. Invalid UTF-8 becomes lone surrogates, as in the other forms."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_text(column.type):
        column = column.cast(pa.large_binary())
    elif (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)) and _is_text(column.type.value_type):
        column = column.cast(pa.large_list(pa.large_binary()))
    return [_text(value) for value in column.to_pylist()]


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _holds_pictures(table: pq.ParquetFile, column: str) -> bool:
    """Return whether a column of bytes holds pictures: its first value has a zero byte, unlike any path."""
    with contextlib.suppress(*_BROKEN):  # raised again when the rows are read
        for batch in table.iter_batches(batch_size=1, columns=[column]):
            if value := batch.column(0)[0].as_py():
                return b"\0" in value
    return False


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _text(value: Any) -> Any:
    """Decode bytes, also within lists: a binary column may hold text."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="surrogateescape")
    return [_text(one) for one in value] if isinstance(value, list) else value
