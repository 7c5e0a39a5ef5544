"""Folders of embeddings that clip-retrieval wrote, matched to the images and captions of a dataset. No torch.

    FOLDER/
      img_emb/img_emb_N.npy             float16 or float32 (rows, dim); N with or without leading zeros
      text_emb/text_emb_N.npy           the same rows' captions, if texts were encoded
      metadata/metadata_N.parquet       image_path, caption, and sample_id where ``teacher-cache export`` wrote it

``image_path`` is the path of the file, or the key of a member of a tar. Nothing in such a folder says what made it:
:mod:`teacher_cache.pipeline.precompute.import_folder` proves that before a row is used.

How rows find their images and captions:

- An image by ``sample_id``, where there is one and the dataset has it; else by its whole path, or key; else by a tail
  of the path that is the image's ``uri`` (``/old/place/images/7.jpg`` for ``images/7.jpg``), if the path has the tail
  of one image only and no other path has this image's. What is ambiguous is no match.
- A path that is there again (an image is repeated for each of its captions) must have the same row each time: keys of
  tars repeat too, for other images.
- A caption by its text alone, white space around it left out, since a text is all that a teacher sees of a caption.
- Rows with NaN or infinity, or all zeros, count as not there.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from teacher_cache.pipeline.data.datasets.records import contents
from teacher_cache.storage.errors import CacheMismatchError, UsageError
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.format.tables import long_texts
from teacher_cache.storage.observe.safe_text import printable

__all__ = ["ForeignFolder", "ForeignRows", "MatchCounts", "match_rows", "path_tails"]

Progress = Callable[[str, int, int], None]

_FILES: dict[Tower, str] = {"image": "img_emb", "text": "text_emb"}
_ROWS_AT_ONCE = 65_536
# twice what rounding a unit vector to float16 moves its norm by, and half of what a cache allows
_ROUNDING = 2**-10
_AMBIGUOUS = -2
_BY_TAIL, _BY_PATH, _BY_ID = 1, 2, 3


class MatchCounts(BaseModel, frozen=True):
    """How the rows of a folder and those of a dataset found each other."""

    folder_rows: int = Field(description="Of all parts.")
    images: int = Field(description="Images of the dataset with a usable row in the folder.")
    captions: int = Field(description="Captions of the dataset with one.")
    strange: int = Field(description="Rows of the folder whose image the dataset does not have.")
    ambiguous: int = Field(
        description="Rows of the folder that could be of several images, or of one that others name."
    )
    unusable: int = Field(description="Images and captions whose row is NaN, infinite or zero.")


@dataclass(frozen=True)
class _Part:
    metadata: Path
    rows: int
    arrays: dict[Tower, NDArray[Any]]


class ForeignFolder:
    """The rows of such a folder by number, over all parts in their order; read from disk when they are asked for.

    Attributes:
        towers: which it has.
        dim: width of its embeddings.
        rows: of all parts.

    Raises:
        UsageError: it does not have the published form, or its parts do not fit each other; the message names the file.
    """

    def __init__(self, location: str) -> None:
        if "://" in location:
            raise UsageError(f"{printable(location)}: such a folder is read from a local disk. Download it first")
        self.location = location
        root = Path(location)
        if not root.is_dir():
            raise UsageError(f"{location} is no folder; give the one that holds img_emb, text_emb and metadata")
        metadata = _numbered(root, "metadata", "parquet")
        found = {tower: _numbered(root, name, "npy") for tower, name in _FILES.items()}
        self.towers: tuple[Tower, ...] = tuple(tower for tower, files in found.items() if files)
        if not metadata or not self.towers:
            raise UsageError(
                f"{location}: metadata/metadata_N.parquet and img_emb/img_emb_N.npy or text_emb/text_emb_N.npy are "
                f"wanted, as clip-retrieval and teacher-cache export write them; found {contents(root)}"
            )
        for tower in self.towers:
            if odd := sorted(set(metadata) ^ set(found[tower])):
                raise UsageError(
                    f"{location}: part {odd[0]} has only one of metadata and {_FILES[tower]} ({len(odd)} such parts). "
                    "Was the run that wrote it stopped? Delete what is half there: the teacher encodes those rows"
                )
        self._parts = [self._part(metadata[number], {t: found[t][number] for t in self.towers}) for number in metadata]
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
        wanted = {"image": "image_path", "text": "caption"}
        for tower in files:
            if wanted[tower] not in schema.names:
                raise UsageError(
                    f"{metadata}: no column {wanted[tower]!r}, which says what the rows of {_FILES[tower]} are of; "
                    f"its columns are {printable(', '.join(schema.names))}"
                )
        arrays = {tower: _mapped(path) for tower, path in files.items()}
        for tower, values in arrays.items():
            if len(values) != rows:
                raise UsageError(f"{files[tower]}: {len(values):,} rows, {metadata.name} has {rows:,}. Copy both again")
        return _Part(metadata, rows, arrays)

    def columns(self, *names: str) -> Iterator[tuple[int, pa.Table]]:
        """(number of its first row, these columns as strings) of each part; a column that is not there is all null.

        Raises:
            UsageError: a file cannot be read, or a column holds no text.
        """
        first = 0
        for part in self._parts:
            try:
                with pq.ParquetFile(part.metadata) as file:
                    there = [name for name in names if name in file.schema_arrow.names]
                    table = file.read(columns=there)
                columns = {name: pc.cast(table[name], pa.string()) for name in there}
            except (pa.ArrowException, OSError) as error:
                raise UsageError(f"{part.metadata}: cannot be read: {printable(str(error))}") from error
            missing = {name: pa.nulls(part.rows, pa.string()) for name in names if name not in columns}
            yield first, pa.table({**columns, **missing})
            first += part.rows

    def take(
        self, tower: Tower, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float16], NDArray[np.float32], NDArray[np.bool_]]:
        """Rows as a cache holds them.

        Returns:
            Embedding, (rows, dim) float16 of unit norm: float16 rows that are so already keep their bits, others are
            normalised in float32. Norm, (rows,) float32, of the folder's row: 1 where it was normalised. And (rows,)
            bool, False where a row is not finite or zero: the other two mean nothing there.
        """
        embedding = np.empty((len(rows), self.dim), np.float16)
        norm, usable = np.empty(len(rows), np.float32), np.empty(len(rows), np.bool_)
        part_of = np.searchsorted(self._stops, rows, side="right")
        for number in np.unique(part_of):
            part, here = self._parts[number], part_of == number
            local = rows[here] - (self._stops[number] - part.rows)
            embedding[here], norm[here], usable[here] = _normalised(np.asarray(part.arrays[tower][local]))
        return embedding, norm, usable


def _numbered(root: Path, name: str, ending: str) -> dict[int, Path]:
    """Files ``name/name_N.ending`` by number, in its order.

    Raises:
        UsageError: two of them have the same number.
    """
    pattern = re.compile(rf"{name}_(\d{{1,18}})\.{ending}")
    found: dict[int, Path] = {}
    for path in sorted((root / name).glob(f"{name}_*.{ending}")):
        number = pattern.fullmatch(path.name)
        if number is None or not path.is_file():
            continue
        if int(number[1]) in found:
            raise UsageError(f"{path}: {found[int(number[1])].name} has this number too. Keep the files of one run")
        found[int(number[1])] = path
    return dict(sorted(found.items()))


def _mapped(path: Path) -> NDArray[Any]:
    try:
        values = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as npy: {printable(str(error))}") from error
    kind = np.dtype(values.dtype).newbyteorder("=")
    if values.ndim != 2 or kind not in (np.float16, np.float32):
        raise UsageError(f"{path}: {values.dtype} of shape {values.shape}; float16 or float32 (rows, dim) is wanted")
    return values


def _normalised(rows: NDArray[Any]) -> tuple[NDArray[np.float16], NDArray[np.float32], NDArray[np.bool_]]:
    """See :meth:`ForeignFolder.take`."""
    values = rows.astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        norm = np.sqrt(np.einsum("ij,ij->i", values, values, dtype=np.float64)).astype(np.float32)
        # a norm below the least normal float32 has lost its digits
        usable = np.isfinite(norm) & (norm >= np.finfo(np.float32).tiny)
        unit = (values / norm[:, None]).astype(np.float16)
        kept = (np.abs(norm - 1) <= _ROUNDING) & (rows.dtype.itemsize == 2)
    unit[kept] = rows[kept]
    norm[kept] = 1
    return unit, norm, usable


@dataclass(frozen=True)
class ForeignRows:
    """Rows of a dataset that a folder has.

    Attributes:
        sources: by tower, for each row of the dataset the number of the folder's row, or -1.
        sha256: of all that :meth:`take` gives: two imports with the same one write the same bytes.
    """

    folder: ForeignFolder
    sources: dict[Tower, NDArray[np.int64]]
    counts: MatchCounts
    sha256: str

    def take(self, ref: ChunkRef, rows: range) -> tuple[NDArray[np.bool_], dict[str, NDArray[Any]]]:
        """As :class:`teacher_cache.pipeline.precompute.reuse.KnownRows`: embedding and norm of view 0, as
        :meth:`of`."""
        if ref.view > 0:
            return np.zeros(len(rows), np.bool_), {}
        known, embedding, norm = self.of(ref.tower, np.arange(rows.start, rows.stop))
        return known, {"embedding": embedding, "norm": norm}

    def of(
        self, tower: Tower, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.float16], NDArray[np.float32]]:
        """Which of the dataset's rows are known; embedding and norm of these, as :meth:`ForeignFolder.take`.

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
    folder: ForeignFolder, samples: pa.Table, captions: pa.Table, image_root: str, progress: Progress | None = None
) -> ForeignRows:
    """Find the folder's row of each image and caption of a dataset; the module says how.

    Reads the metadata, and every row that is matched, once; none is held.

    Args:
        samples, captions: tables as a cache lists them (``teacher_cache.storage.format.tables``).
        image_root: where relative uris start from.
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
        sources["image"], strange, ambiguous = _match_images(folder, _Names(samples, image_root), progress)
    if "text" in folder.towers:
        sources["text"] = _match_captions(folder, captions["text"])
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


def path_tails(path: str) -> Iterator[str]:
    """The path, and what follows each of its slashes."""
    if "/" not in path:
        path = path.replace("\\", "/")  # written on Windows
    yield path
    at = path.find("/")
    while at >= 0:
        yield path[at + 1 :]
        at = path.find("/", at + 1)


class _Names:
    """The images of a dataset by what a folder may call them."""

    def __init__(self, samples: pa.Table, image_root: str) -> None:
        self._root = f"{image_root.rstrip('/')}/"
        self.ids: dict[str, int] = {}
        self._tails: dict[str, int] = {}
        columns = (samples[name].to_pylist() for name in ("sample_id", "uri", "offset"))
        for row, (sample_id, uri, offset) in enumerate(zip(*columns, strict=True)):
            self.ids[sample_id] = row
            # of a member of a tar the key counts; its uri is the tar
            name = uri if offset < 0 else sample_id.removeprefix(f"{uri}/")
            self._tails[name] = _AMBIGUOUS if name in self._tails else row

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, path: str) -> tuple[int, int] | None:
        """(row, or that it is ambiguous; how it was found), or None."""
        for whole in (path.removeprefix(self._root), path):
            if self._tails.get(whole, _AMBIGUOUS) != _AMBIGUOUS:
                return self._tails[whole], _BY_PATH
        hits = {row for tail in path_tails(path) if (row := self._tails.get(tail)) is not None}
        if not hits:
            return None
        return (hits.pop() if len(hits) == 1 else _AMBIGUOUS), _BY_TAIL


def _match_images(
    folder: ForeignFolder, names: _Names, progress: Progress | None
) -> tuple[NDArray[np.int64], int, int]:
    """Folder's rows by image, rows of no image, rows that are ambiguous."""
    found, how = array("q", [-1]) * len(names), bytearray(len(names))
    named: list[str | None] = [None] * len(names)
    repeats = array("q"), array("q"), bytearray()  # image, the folder's row, how it was found
    strange = ambiguous = 0
    for first, table in folder.columns("sample_id", "image_path"):
        pairs = zip(table["sample_id"].to_pylist(), table["image_path"].to_pylist(), strict=True)
        for number, (sample_id, path) in enumerate(pairs, first):
            hit, name = None, path
            if sample_id is not None and (row := names.ids.get(sample_id)) is not None:
                hit, name = (row, _BY_ID), sample_id
            elif path is not None:
                hit = names.find(path)
            if hit is None:
                strange += 1
                continue
            row, rank = hit
            if row == _AMBIGUOUS or rank < how[row]:
                ambiguous += 1
            elif rank > how[row]:
                found[row], how[row], named[row] = number, rank, name
            elif name == named[row]:
                for column, value in zip(repeats, (row, number, rank), strict=True):
                    column.append(value)
            else:
                found[row] = _AMBIGUOUS
                ambiguous += 1
        if progress is not None:
            progress("match rows", first + table.num_rows, folder.rows)
    sources = np.array(found, np.int64)
    rows, numbers = np.array(repeats[0], np.int64), np.array(repeats[1], np.int64)
    current = np.frombuffer(bytes(how), np.uint8)[rows] == np.frombuffer(bytes(repeats[2]), np.uint8)
    rows, numbers = rows[current], numbers[current]
    differ = np.zeros(len(rows), np.bool_)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        here = slice(start, start + _ROWS_AT_ONCE)
        firsts = sources[rows[here]]
        one, other = folder.take("image", np.maximum(firsts, 0))[0], folder.take("image", numbers[here])[0]
        differ[here] = (firsts >= 0) & (one.view(np.uint16) != other.view(np.uint16)).any(axis=1)
    sources[rows[differ]] = _AMBIGUOUS
    return np.maximum(sources, -1), strange, ambiguous + int(differ.sum())


def _match_captions(folder: ForeignFolder, texts: pa.ChunkedArray) -> NDArray[np.int64]:
    sources, texts = np.full(len(texts), -1, np.int64), long_texts(texts)
    for first, table in folder.columns("caption"):
        left = np.flatnonzero(sources < 0)
        there = pc.utf8_trim_whitespace(long_texts(table["caption"]))
        at = pc.index_in(texts.take(pa.array(left)), value_set=there, skip_nulls=True)
        found = at.to_numpy(zero_copy_only=False) if isinstance(at, pa.Array) else at.to_numpy()
        hit = ~np.isnan(found.astype(np.float64))
        sources[left[hit]] = first + found[hit].astype(np.int64)
    return sources


def _check(
    folder: ForeignFolder, sources: dict[Tower, NDArray[np.int64]], progress: Progress | None
) -> tuple[int, str]:
    """Take matches whose rows cannot be used out of ``sources``; how many, and a digest of all others."""
    total = hashlib.sha256()
    wanted, done, unusable = sum(int((numbers >= 0).sum()) for numbers in sources.values()), 0, 0
    for tower, numbers in sources.items():
        matched = np.flatnonzero(numbers >= 0)
        for start in range(0, len(matched), _ROWS_AT_ONCE):
            rows = matched[start : start + _ROWS_AT_ONCE]
            embedding, norm, usable = folder.take(tower, numbers[rows])
            numbers[rows[~usable]] = -1
            unusable += int((~usable).sum())
            total.update(tower.encode())
            for values in (rows[usable].astype("<i8"), embedding[usable].astype("<f2"), norm[usable].astype("<f4")):
                total.update(values.tobytes())
            done += len(rows)
            if progress is not None:
                progress("check rows", done, wanted)
    return unusable, total.hexdigest()
