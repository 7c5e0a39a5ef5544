"""Folders of embeddings that clip-retrieval wrote, matched to the images and captions of a dataset. No torch.

    FOLDER/
      img_emb/img_emb_N.npy             float16 or float32 (rows, dim); N with or without leading zeros
      text_emb/text_emb_N.npy           the same rows' captions, if texts were encoded
      metadata/metadata_N.parquet       image_path, caption, and sample_id where ``teacher-cache export`` wrote it

``image_path`` is the path of the file, or the key of a member of a tar. Such a folder does not record its teacher:
:mod:`teacher_cache.pipeline.precompute.foreign.import_folder` proves it before a row is used.

How rows are matched to images and captions, without a guess:

- Images are matched by ``sample_id`` if the folder has it; else by path, relative to the dataset's folder or with it in
  front; members of a tar by key. A name that two images of the dataset share matches neither.
- A repeated path (an image once per caption) must have the same row each time.
- Captions are matched by text, stripped of white space: the teacher sees nothing else of a caption.
- Rows with NaN or infinity, or all zeros, count as missing.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from teacher_cache.pipeline.data.datasets.files import contents
from teacher_cache.storage.errors import CacheMismatchError, UsageError
from teacher_cache.storage.files.places import similar_names
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.format.tables import long_texts
from teacher_cache.storage.observe.safe_text import printable

Progress = Callable[[str, int, int], None]

_FILES: dict[Tower, str] = {"image": "img_emb", "text": "text_emb"}
_ROWS_AT_ONCE = 65_536
# twice the change of a unit vector's norm by rounding to float16, and half the tolerance of a cache
_ROUNDING = 2**-10


class MatchCounts(BaseModel, frozen=True):
    """Counts of a folder's rows with and without an image or caption in the dataset."""

    folder_rows: int = Field(description="Number of rows in all parts.")
    images: int = Field(description="Images of the dataset with a usable row in the folder.")
    captions: int = Field(description="Captions of the dataset with a usable row in the folder.")
    strange: int = Field(description="Rows of the folder whose image the dataset does not have.")
    ambiguous: int = Field(description="Images of the dataset that several different rows of the folder name.")
    unusable: int = Field(description="Images and captions whose row is NaN, infinite or zero.")


class ForeignSource(Protocol):
    """Rows of another tool, numbered from 0, with the names of their images and captions.

    Attributes:
        form: what it is, for messages.
        towers: towers that it has.
    """

    form: str
    location: str
    towers: tuple[Tower, ...]

    @property
    def dim(self) -> int:
        """Width of its embeddings."""

    @property
    def rows(self) -> int:
        """Number of rows."""

    def columns(self, *names: str) -> Iterator[tuple[int, pa.Table]]:
        """Yield each part's first row number and its columns as strings; a missing column is all null.

        Raises:
            UsageError: a file cannot be read, or a column holds no text.
        """

    def take(
        self, tower: Tower, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float16], NDArray[np.float32], NDArray[np.bool_]]:
        """Return rows as a cache holds them.

        Returns:
            Embedding, (rows, dim) float16 of unit norm: float16 rows of unit norm keep their bits, others are
            normalised in float32. Norm, (rows,) float32, of the source's row: 1 where it was normalised. Usable,
            (rows,) bool: False for a row that is zero or not finite, whose other two values mean nothing.
        """


@dataclass(frozen=True)
class _Part:
    metadata: Path
    rows: int
    arrays: dict[Tower, NDArray[Any]]


class ForeignFolder:
    """Rows of such a folder, numbered through all parts in order and memory-mapped: a :class:`ForeignSource`.

    Raises:
        UsageError: it does not have the published form, or its parts disagree; the message names the file.
    """

    form = "a clip-retrieval folder"

    def __init__(self, location: str) -> None:
        if "://" in location:
            raise UsageError(f"{printable(location)}: such a folder is read from a local disk. Download it first")
        self.location = location
        root = Path(location)
        if not root.is_dir():
            hint = similar_names(location)
            raise UsageError(f"{location} is no folder; give the one that holds img_emb, text_emb and metadata.{hint}")
        metadata = _numbered(root, "metadata", "parquet")
        files = {tower: _numbered(root, name, "npy") for tower, name in _FILES.items()}
        self.towers: tuple[Tower, ...] = tuple(tower for tower, numbered in files.items() if numbered)
        if not metadata or not self.towers:
            raise UsageError(
                f"{location}: metadata/metadata_N.parquet and img_emb/img_emb_N.npy or text_emb/text_emb_N.npy are "
                f"wanted, as clip-retrieval and teacher-cache export write them; {_found(root, bool(metadata))}"
            )
        for tower in self.towers:
            if odd := sorted(set(metadata) ^ set(files[tower])):
                raise UsageError(
                    f"{location}: part {odd[0]} has only one of metadata and {_FILES[tower]} ({len(odd)} such parts). "
                    "Was the run that wrote it stopped? Delete what is half there: the teacher encodes those rows"
                )
        self._parts = [self._part(metadata[number], {t: files[t][number] for t in self.towers}) for number in metadata]
        self._stops = np.cumsum([part.rows for part in self._parts])
        self.rows = int(self._stops[-1])
        widths = {array.shape[1] for part in self._parts for array in part.arrays.values()}
        if len(widths) > 1:
            raise UsageError(f"{location}: rows of several widths, {sorted(widths)}. Are these folders of two runs?")
        self.dim = widths.pop()

    def _part(self, metadata: Path, files: dict[Tower, Path]) -> _Part:
        try:
            with pq.ParquetFile(metadata) as file:
                schema, rows = file.schema_arrow, file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"{metadata}: cannot be read as parquet: {printable(str(error))}") from error
        columns = {"image": "image_path", "text": "caption"}
        for tower in files:
            if columns[tower] not in schema.names:
                raise UsageError(
                    f"{metadata}: no column {columns[tower]!r}, which says what the rows of {_FILES[tower]} are of; "
                    f"its columns are {printable(', '.join(schema.names))}"
                )
        arrays = {tower: _mapped(path) for tower, path in files.items()}
        for tower, values in arrays.items():
            if len(values) != rows:
                raise UsageError(f"{files[tower]}: {len(values):,} rows, {metadata.name} has {rows:,}. Copy both again")
        return _Part(metadata, rows, arrays)

    def columns(self, *names: str) -> Iterator[tuple[int, pa.Table]]:
        """See :meth:`ForeignSource.columns`."""
        first = 0
        for part in self._parts:
            try:
                with pq.ParquetFile(part.metadata) as file:
                    present = [name for name in names if name in file.schema_arrow.names]
                    table = file.read(columns=present)
                columns = {name: pc.cast(table[name], pa.string()) for name in present}
            except (pa.ArrowException, OSError) as error:
                raise UsageError(f"{part.metadata}: cannot be read: {printable(str(error))}") from error
            missing = {name: pa.nulls(part.rows, pa.string()) for name in names if name not in columns}
            yield first, pa.table({**columns, **missing})
            first += part.rows

    def take(
        self, tower: Tower, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float16], NDArray[np.float32], NDArray[np.bool_]]:
        """See :meth:`ForeignSource.take`."""
        embedding = np.empty((len(rows), self.dim), np.float16)
        norm, usable = np.empty(len(rows), np.float32), np.empty(len(rows), np.bool_)
        part_of = np.searchsorted(self._stops, rows, side="right")
        for number in np.unique(part_of):
            part, of_part = self._parts[number], part_of == number
            local = rows[of_part] - (self._stops[number] - part.rows)
            embedding[of_part], norm[of_part], usable[of_part] = normalised(np.asarray(part.arrays[tower][local]))
        return embedding, norm, usable


def _found(root: Path, named: bool) -> str:
    """Return what a folder of another form is, or holds.

    Args:
        named: whether it has metadata.
    """
    if (root.parent / "metadata").is_dir():
        return f"name the folder above: {root.parent}"
    if not named and (any(root.glob("*.npy")) or (root / "metadata").is_dir()):
        return (
            "without metadata/metadata_N.parquet, whose column image_path names the image of each row, none is matched"
        )
    return f"found {contents(root)}"


def _numbered(root: Path, name: str, ending: str) -> dict[int, Path]:
    """Find the files ``name/name_N.ending`` by number, ascending.

    Raises:
        UsageError: two files have the same number.
    """
    pattern = re.compile(rf"{name}_(\d{{1,18}})\.{ending}")
    by_number: dict[int, Path] = {}
    for path in sorted((root / name).glob(f"{name}_*.{ending}")):
        number = pattern.fullmatch(path.name)
        if number is None or not path.is_file():
            continue
        if int(number[1]) in by_number:
            raise UsageError(f"{path}: {by_number[int(number[1])].name} has this number too. Keep the files of one run")
        by_number[int(number[1])] = path
    return dict(sorted(by_number.items()))


def _mapped(path: Path) -> NDArray[Any]:
    try:
        values = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as npy: {printable(str(error))}") from error
    kind = np.dtype(values.dtype).newbyteorder("=")
    if values.ndim != 2 or kind not in (np.float16, np.float32):
        raise UsageError(f"{path}: {values.dtype} of shape {values.shape}; float16 or float32 (rows, dim) is wanted")
    return values


def normalised(rows: NDArray[Any]) -> tuple[NDArray[np.float16], NDArray[np.float32], NDArray[np.bool_]]:
    """Return rows (rows, dim) as :meth:`ForeignSource.take` does."""
    values = rows.astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        norm = np.sqrt(np.einsum("ij,ij->i", values, values, dtype=np.float64)).astype(np.float32)
        # a subnormal float32 norm has lost digits
        usable = np.isfinite(norm) & (norm >= np.finfo(np.float32).tiny)
        unit = (values / norm[:, None]).astype(np.float16)
        is_unit = (np.abs(norm - 1) <= _ROUNDING) & (rows.dtype.itemsize == 2)
    unit[is_unit] = rows[is_unit]
    norm[is_unit] = 1
    return unit, norm, usable


@dataclass(frozen=True)
class ForeignRows:
    """Rows of a dataset that a folder has.

    Attributes:
        sources: by tower, the folder's row of each row of the dataset, or -1.
        sha256: digest of everything that :meth:`take` returns. Imports with the same digest write the same bytes.
    """

    folder: ForeignSource
    sources: dict[Tower, NDArray[np.int64]]
    counts: MatchCounts
    sha256: str

    def take(self, ref: ChunkRef, rows: range) -> tuple[NDArray[np.bool_], dict[str, NDArray[Any]]]:
        """Return embedding and norm of view 0, as :class:`teacher_cache.pipeline.precompute.reuse.KnownRows` does."""
        if ref.view > 0:
            return np.zeros(len(rows), np.bool_), {}
        known, embedding, norm = self.of(ref.tower, np.arange(rows.start, rows.stop))
        return known, {"embedding": embedding, "norm": norm}

    def of(
        self, tower: Tower, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.float16], NDArray[np.float32]]:
        """Return which of the dataset's rows are known, and their embedding and norm as :meth:`ForeignSource.take`.

        Raises:
            CacheMismatchError: the folder has changed since it was matched.
        """
        sources = self.sources[tower][rows]
        known = sources >= 0
        embedding, norm, usable = self.folder.take(tower, sources[known])
        if not usable.all():
            raise CacheMismatchError(
                f"{self.folder.location}: its rows change. Wait until it is whole, and import then."
            )
        return known, embedding, norm


def match_rows(
    folder: ForeignSource, samples: pa.Table, captions: pa.Table, image_root: str, progress: Progress | None = None
) -> ForeignRows:
    """Find the folder's row of each image and caption of a dataset, by the module's rules.

    Reads the metadata and each matched row once, and keeps no row in memory.

    Args:
        samples, captions: tables as a cache lists them (``teacher_cache.storage.format.tables``).
        image_root: folder that relative uris start from.
        progress: called with (stage, done, total): ``match rows`` and ``check rows``.

    Raises:
        UsageError: see :class:`ForeignFolder`.
    """
    strange = ambiguous = 0
    sources: dict[Tower, NDArray[np.int64]] = {
        "image": np.full(samples.num_rows, -1, np.int64),
        "text": np.full(captions.num_rows, -1, np.int64),
    }
    if "image" in folder.towers:
        strange, ambiguous = _match_images(folder, sources["image"], _Names(samples, image_root), progress)
    if "text" in folder.towers:
        _match_captions(folder, sources["text"], long_texts(captions["text"]))
    unusable, sha256 = _check(folder, sources, progress)
    counts = MatchCounts(
        folder_rows=folder.rows,
        images=int((sources["image"] >= 0).sum()),
        captions=int((sources["text"] >= 0).sum()),
        strange=strange,
        ambiguous=ambiguous,
        unusable=unusable,
    )
    return ForeignRows(folder, sources, counts, sha256)


class _Names:
    """Images of a dataset by the names that a folder may use for them."""

    def __init__(self, samples: pa.Table, image_root: str) -> None:
        ids, uris, offsets = (samples[name].to_pylist() for name in ("sample_id", "uri", "offset"))
        # a member of a tar is matched by key: its uri is the tar
        paths = [
            uri if offset < 0 else sample_id.removeprefix(f"{uri}/")
            for sample_id, uri, offset in zip(ids, uris, offsets, strict=True)
        ]
        root = f"{image_root.rstrip('/')}/"
        self._ids, self._paths = _unique(ids), _unique(paths)
        self._whole = _unique(
            [f"{root}{path}" if offset < 0 else None for path, offset in zip(paths, offsets, strict=True)]
        )

    def rows(self, table: pa.Table) -> NDArray[np.int64]:
        """Return the image of each row of a part, by ``sample_id`` and ``image_path``; -1 for none."""
        rows = _index(table["sample_id"], self._ids)
        for names in (self._paths, self._whole):
            rows = np.where(rows >= 0, rows, _index(table["image_path"], names))
        return rows


def _unique(names: Sequence[str | None]) -> pa.Array:
    """Return the names, with null for each that is not unique."""
    counts = Counter(names)
    return pa.array([name if counts[name] == 1 else None for name in names], pa.large_string())


def _index(values: pa.ChunkedArray, names: pa.Array) -> NDArray[np.int64]:
    """Return the index of each value in ``names``; -1 for none."""
    at = pc.fill_null(pc.index_in(long_texts(values), value_set=names, skip_nulls=True), -1)
    return np.asarray(at.to_numpy(), np.int64)


def _match_images(
    folder: ForeignSource, sources: NDArray[np.int64], names: _Names, progress: Progress | None
) -> tuple[int, int]:
    """Fill in the folder's row of each image. Return the numbers of unmatched rows and of ambiguous images."""
    strange, different = 0, set[int]()
    for first, table in folder.columns("sample_id", "image_path"):
        rows = names.rows(table)
        strange += int((rows < 0).sum())
        numbers = first + np.flatnonzero(rows >= 0)
        rows = rows[rows >= 0]
        fresh, at = np.unique(rows, return_index=True)
        fresh, at = fresh[sources[fresh] < 0], at[sources[fresh] < 0]
        sources[fresh] = numbers[at]
        repeated = sources[rows] != numbers
        rows, numbers = rows[repeated], numbers[repeated]
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            one, other = (folder.take("image", at)[0].view(np.uint16) for at in (sources[rows[part]], numbers[part]))
            different.update(rows[part][(one != other).any(axis=1)].tolist())
        if progress is not None:
            progress("match rows", first + table.num_rows, folder.rows)
    sources[list(different)] = -1
    return strange, len(different)


def _match_captions(folder: ForeignSource, sources: NDArray[np.int64], texts: pa.ChunkedArray) -> None:
    for first, table in folder.columns("caption"):
        pending = np.flatnonzero(sources < 0)
        captions = pc.utf8_trim_whitespace(long_texts(table["caption"])).combine_chunks()
        at = _index(texts.take(pa.array(pending)), captions)
        sources[pending[at >= 0]] = first + at[at >= 0]


def _check(
    folder: ForeignSource, sources: dict[Tower, NDArray[np.int64]], progress: Progress | None
) -> tuple[int, str]:
    """Remove matches with unusable rows from ``sources``. Return their number, and a digest of the others."""
    digest = hashlib.sha256()
    total, done, unusable = sum(int((numbers >= 0).sum()) for numbers in sources.values()), 0, 0
    for tower, numbers in sources.items():
        matched = np.flatnonzero(numbers >= 0)
        for start in range(0, len(matched), _ROWS_AT_ONCE):
            rows = matched[start : start + _ROWS_AT_ONCE]
            embedding, norm, usable = folder.take(tower, numbers[rows])
            numbers[rows[~usable]] = -1
            unusable += int((~usable).sum())
            digest.update(tower.encode())
            for values in (rows[usable].astype("<i8"), embedding[usable].astype("<f2"), norm[usable].astype("<f4")):
                digest.update(values.tobytes())
            done += len(rows)
            if progress is not None:
                progress("check rows", done, total)
    return unusable, digest.hexdigest()
