"""Ready pixels: a student's decoded and resized images in a local folder, for training.

    pixels.json                 record of their origin, with its own digest
    pixels.zarr/                a plain Zarr v3 group
      pixels                    (images, views, height, width, 3) uint8, RGB, before normalising
      row                       (images,) int64, ascending: the image's row in the cache
    commits/v0/000000.json      one record per finished chunk, written after it: a crc32c of each image

The folder is scratch space, not part of the cache; ``teacher-cache student pixels`` can make it again. A chunk is
``chunk_rows`` images of one view, raw bytes without a codec, so that one image is one read at an offset. Each image has
its own checksum, since such a read cannot check a digest of the chunk. A chunk without a commit is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from teacher_cache.storage.errors import (
    CacheCorruptError,
    CacheFormatError,
    CacheIncompleteError,
    CacheMismatchError,
    CacheNotFoundError,
    UsageError,
)
from teacher_cache.storage.files.checksum import crc32c
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.format.identity import Record, digest_of, with_digest, without_digest
from teacher_cache.storage.format.tables import SAMPLES
from teacher_cache.storage.read.reader import EmbeddingReader

if TYPE_CHECKING:
    from teacher_cache.pipeline.data.images.preprocess import Preprocess

RECORD, ROWS_KEY = "pixels.json", "pixels.zarr/row/c/0"
_VERSION = 1


class _Signed(Record):
    def to_bytes(self) -> bytes:
        """Return JSON with its own digest."""
        return json.dumps(with_digest(self.fields()), indent=1).encode() + b"\n"

    @classmethod
    def _parse(cls, data: bytes, where: str, remedy: str) -> Any:
        try:
            fields = without_digest(json.loads(data))
            if fields.get("format_version", _VERSION) != _VERSION:
                raise CacheFormatError(f"{where}: of format {fields['format_version']}, {_VERSION} is known. {remedy}")
            return cls.model_validate(fields)
        except (ValueError, RecursionError) as error:  # pydantic's error is a ValueError
            raise CacheCorruptError(f"{where}: cannot be used ({error}). {remedy}") from error


class PixelsRecord(_Signed):
    """Content of ``pixels.json``: the images, their regions, and the student's preprocessing."""

    format: Literal["teacher-cache-pixels"] = "teacher-cache-pixels"
    format_version: int = _VERSION
    cache: str = Field(description="Location of the cache. It may move.")
    split: str
    images: int = Field(gt=0)
    views: int = Field(gt=0)
    chunk_rows: int = Field(gt=0)
    size: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] = Field(
        description="Height and width in pixels."
    )
    interpolation: str
    resize_mode: str
    fill_color: int
    rows_sha256: str = Field(description="Digest over the rows, int64, little endian.")
    images_sha256: str = Field(description="Digest over the digests of the images' files, in the order of the rows.")
    crops_sha256: tuple[str, ...] = Field(description="Digest over the stored boxes, for each view from 1 on.")
    decoder: str = Field(
        description="Versions of the libraries that decoded and resized; others may differ by one level."
    )
    decoded_by: str | None = Field(None, description="Decoder, as the cache's identity names it. Default: Pillow.")

    @property
    def row_bytes(self) -> int:
        """Number of bytes of one view of one image."""
        return 3 * self.size[0] * self.size[1]

    @property
    def chunk_bytes(self) -> int:
        """Number of bytes of a chunk's file. The last one is padded, as in Zarr."""
        return self.chunk_rows * self.row_bytes

    @property
    def chunks(self) -> int:
        """Number of chunks of each view."""
        return -(-self.images // self.chunk_rows)

    @model_validator(mode="after")
    def _each_later_view_has_a_digest(self) -> Self:
        if len(self.crops_sha256) != self.views - 1:
            raise ValueError(f"{self.views} views and {len(self.crops_sha256)} digests of crops")
        return self

    def differences(self, wanted: dict[str, Any]) -> list[str]:
        """Describe each field that differs from the one wanted. ``crops_sha256`` may have more views."""
        mine = self.model_dump()
        mine["crops_sha256"] = self.crops_sha256[: len(wanted["crops_sha256"])]
        return [f"{name} is {mine[name]}, wanted {value}" for name, value in wanted.items() if mine[name] != value]

    def made_of(self, view: int) -> str:
        """Return the digest of everything that determines the bytes of one view. Later views do not change it."""
        fields = self.model_dump(mode="json", exclude={"cache", "split", "views", "crops_sha256"}, exclude_none=True)
        return digest_of({**fields, "crops": self.crops_sha256[view - 1] if view else None})


class PixelsCommit(_Signed):
    """Finished chunk."""

    view: int
    chunk: int
    made_of: str = Field(description="PixelsRecord.made_of, so that a commit copied from elsewhere does not fit.")
    crc32c: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(
        description="Checksum of each image's bytes, without the padding."
    )


def chunk_key(view: int, chunk: int) -> str:
    """Return Zarr's key of a chunk's bytes in the folder."""
    return f"pixels.zarr/pixels/c/{chunk}/{view}/0/0/0"


def commit_key(view: int, chunk: int) -> str:
    """Return the key of a chunk's commit."""
    return f"commits/v{view}/{chunk:06d}.json"


def rows_bytes(rows: NDArray[np.int64]) -> bytes:
    """Return rows as bytes of the array ``row``."""
    return rows.astype("<i8").tobytes()


def pixels_shown(
    reader: EmbeddingReader, rows: NDArray[np.int64], views: int, preprocess: Preprocess
) -> dict[str, Any]:
    """Return the fields of a :class:`PixelsRecord` that say what its pixels show.

    Raises:
        CacheCorruptError: as ``EmbeddingReader.take``.
    """
    boxes = (reader.take("image", rows, view, array="view") for view in range(1, views))
    return {
        **{name: getattr(preprocess, name) for name in ("size", "interpolation", "resize_mode", "fill_color")},
        "decoded_by": reader.manifest.identity.preprocess.decoder,
        "images_sha256": _images_sha256(reader, rows),
        "crops_sha256": tuple(hashlib.sha256(box.astype("<f4").tobytes()).hexdigest() for box in boxes),
    }


def _images_sha256(reader: EmbeddingReader, rows: NDArray[np.int64]) -> str:
    total, at, done = hashlib.sha256(), 0, 0
    for part in reader.column(SAMPLES, "content_sha256"):
        of_part = rows[done : np.searchsorted(rows, at + len(part))]
        digests = part.take(pa.array(of_part - at)).to_pylist()
        total.update(("\n" * bool(done and digests) + "\n".join(digests)).encode())
        at, done = at + len(part), done + len(of_part)
    return total.hexdigest()


def local_pixels(folder: str) -> LocalFiles:
    """Return the files of a folder of pixels.

    Raises:
        UsageError: the folder is a URL.
    """
    if "://" in folder:
        raise UsageError(
            f"{folder}: ready pixels are read image by image at random, which needs a disk of this machine; over a "
            "network each would be a request, slower than decoding. Name a local folder."
        )
    return LocalFiles(folder)


def read_record(files: LocalFiles) -> PixelsRecord:
    """Read the record of a folder, finished or not.

    Raises:
        CacheNotFoundError: the folder has no record.
        CacheCorruptError, CacheFormatError: the record cannot be used.
    """
    try:
        data = files.read(RECORD)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheNotFoundError(
            f"{files.location}: no ready pixels here ({RECORD} not found). "
            "Make them by teacher-cache student pixels --out."
        ) from error
    record: PixelsRecord = PixelsRecord._parse(
        data, f"{files.location}/{RECORD}", "Delete the folder and make it again by teacher-cache student pixels."
    )
    return record


def read_commit(files: LocalFiles, record: PixelsRecord, view: int, chunk: int) -> PixelsCommit | None:
    """Read a chunk's commit and check that it belongs to this chunk. None: the chunk has no commit.

    Raises:
        CacheCorruptError: it is damaged, or belongs to another chunk or other pixels.
    """
    key = commit_key(view, chunk)
    where, remedy = f"{files.location}/{key}", f"Delete it and {_AGAIN}"
    try:
        data = files.read(key)
    except FileNotFoundError:
        return None
    commit: PixelsCommit = PixelsCommit._parse(data, where, remedy)
    rows = min(record.chunk_rows, record.images - chunk * record.chunk_rows)
    expected = (view, chunk, record.made_of(view), rows)
    read = (commit.view, commit.chunk, commit.made_of, len(commit.crc32c))
    if read != expected:
        raise CacheCorruptError(
            f"{where}: is of view {read[0]}, chunk {read[1]}, {read[3]} images, made of {read[2][:12]}; wanted "
            f"view {view}, chunk {chunk}, {rows} images, made of {expected[2][:12]}. {remedy}"
        )
    return commit


class ReadyPixels:
    """Folder of ready pixels, checked against the cache and the student of a run.

    Attributes:
        files: its pixels, by :meth:`places`.
        preprocess: the student's preprocessing.

    Args:
        folder: folder that ``teacher-cache student pixels`` made.
        reader: reader of the run's cache.
        rows: the cache's rows that the run uses; the folder may have more.
        views: number of views that the run uses; the folder may have more.
        preprocess: the student's preprocessing, at its training size.

    Raises:
        UsageError: a URL, or too few views.
        CacheNotFoundError, CacheIncompleteError: the folder has no pixels, or is unfinished.
        CacheMismatchError: pixels of other images, of other crops or for another student; names the field and both
            values.
        CacheCorruptError: a record of the folder is damaged.
    """

    def __init__(
        self, folder: str, reader: EmbeddingReader, rows: NDArray[np.int64], views: int, preprocess: Preprocess
    ) -> None:
        files = local_pixels(folder)
        record = read_record(files)
        self.preprocess, self.files = preprocess, PixelFiles(Path(folder), record)
        self._folder, self._record = folder, record
        self._rows = self._read_rows(files)
        self._require_fit(reader, views, preprocess)
        missing = np.setdiff1d(rows, self._rows)
        if len(missing):
            raise CacheMismatchError(
                f"{folder}: holds {record.images:,} images of split {record.split!r}, and not {len(missing):,} of the "
                f"{len(rows):,} that this run uses, row {missing[0]} the first. {_OTHER}"
            )
        self._crc32c = self._read_commits(files, views)

    def _read_rows(self, files: LocalFiles) -> NDArray[np.int64]:
        try:
            data = files.read(ROWS_KEY)
        except FileNotFoundError as error:
            raise CacheIncompleteError(f"{files.location}: {ROWS_KEY} is missing. {_AGAIN.capitalize()}") from error
        if hashlib.sha256(data).hexdigest() != self._record.rows_sha256:
            raise CacheCorruptError(
                f"{files.location}/{ROWS_KEY}: sha256 is {hashlib.sha256(data).hexdigest()[:12]}, {RECORD} names "
                f"{self._record.rows_sha256[:12]}. Delete it and {_AGAIN}"
            )
        return np.frombuffer(data, "<i8").astype(np.int64)

    def _require_fit(self, reader: EmbeddingReader, views: int, student: Preprocess) -> None:
        record = self._record
        if record.views < views:
            raise UsageError(
                f"{self._folder}: holds {record.views} views, this run uses {views}. Add the others by "
                f"teacher-cache student pixels --views {views}, or lower --views."
            )
        rows = self._rows[self._rows < reader.manifest.layout.image_rows]
        differ = record.differences(pixels_shown(reader, rows, views, student))
        if differ:
            sizes = "Give pixels and train the same train_image_size. " if record.size != student.size else ""
            raise CacheMismatchError(
                f"{self._folder}: not what this student would see of {reader.location}: {'; '.join(differ)}. "
                f"{sizes}{_OTHER}"
            )

    def _read_commits(self, files: LocalFiles, views: int) -> NDArray[np.uint32]:
        record = self._record
        crc32c = np.zeros((views, record.images), np.uint32)
        missing = 0
        for view in range(views):
            for chunk in range(record.chunks):
                commit = read_commit(files, record, view, chunk)
                if commit is None:
                    missing += 1
                    continue
                start = chunk * record.chunk_rows
                crc32c[view, start : start + len(commit.crc32c)] = commit.crc32c
        if missing:
            raise CacheIncompleteError(
                f"{self._folder}: {missing:,} of the {views * record.chunks:,} chunks that this run uses are not "
                f"finished. {_AGAIN.capitalize()}"
            )
        return crc32c

    def places(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> list[PixelPlace]:
        """Return the position of each image's pixels, for :meth:`PixelFiles.shown`.

        Raises:
            IndexError: a row or view outside those of the run.
        """
        at = np.searchsorted(self._rows, rows)
        for place, row, view in zip(at.tolist(), rows.tolist(), views.tolist(), strict=True):
            if place == len(self._rows) or self._rows[place] != row or not 0 <= view < len(self._crc32c):
                raise IndexError(
                    f"{self._folder}: row {row}, view {view} asked for; it has {len(self._rows):,} of the rows up to "
                    f"{self._rows[-1]}, and views 0 to {len(self._crc32c) - 1} are open"
                )
        places = zip(rows.tolist(), views.tolist(), at.tolist(), self._crc32c[views, at].tolist(), strict=True)
        return [PixelPlace(*place) for place in places]

    def shown(self, row: int, view: int) -> NDArray[np.uint8]:
        """Return the pixels of one view of one image, see :meth:`PixelFiles.shown`."""
        (place,) = self.places(np.array([row]), np.array([view]))
        return self.files.shown(place)


class PixelPlace(NamedTuple):
    """View of an image in a folder of ready pixels.

    Attributes:
        row: row of the cache.
        at: position in the folder's array.
        crc32c: checksum of the bytes.
    """

    row: int
    view: int
    at: int
    crc32c: int


@dataclass(frozen=True)
class PixelFiles:
    """Reader of the pixels in worker processes: one checked read per image."""

    folder: Path
    record: PixelsRecord

    def ahead(self, places: Sequence[PixelPlace]) -> AbstractContextManager[None]:
        """Prefetch nothing: the files are local."""
        return nullcontext()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pixels."""
        return self.record.size

    def named(self, place: PixelPlace) -> str:
        """Return a view's name for messages: its file, row and number."""
        path = self.folder / chunk_key(place.view, place.at // self.record.chunk_rows)
        return f"{path}: image row {place.row}, view {place.view}"

    def shown(self, place: PixelPlace) -> NDArray[np.uint8]:
        """Return the pixels before normalising, RGB uint8 (height, width, 3). Raises as :meth:`write`."""
        pixels = np.empty((*self.size, 3), np.uint8)
        self.write(place, None, pixels)
        return pixels

    def write(self, place: PixelPlace, region: None, row: NDArray[np.uint8]) -> None:
        """Read the pixels into a row, uint8 (height, width, 3), contiguous.

        Raises:
            CacheCorruptError: the bytes differ from those written; names row and view. Unwritten pixels raise too.
        """
        record = self.record
        chunk, within = divmod(place.at, record.chunk_rows)
        path, named = self.folder / chunk_key(place.view, chunk), self.named(place)
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise CacheCorruptError(f"{named}: the file is missing, though committed. {_AGAIN.capitalize()}") from error
        try:
            length = os.preadv(file, [row.reshape(-1).data], within * record.row_bytes)
        finally:
            os.close(file)
        checksum = crc32c(row.reshape(-1)[:length])
        if length != record.row_bytes or checksum != place.crc32c:
            raise CacheCorruptError(
                f"{named}: {length:,} bytes with checksum {checksum:08x}, {record.row_bytes:,} with "
                f"{place.crc32c:08x} were written. Delete this file and {_AGAIN}"
            )


_AGAIN = "run the same teacher-cache student pixels command again; it makes what is missing and keeps the rest."
_OTHER = "Make pixels of this cache for this student by student pixels with another --out, or leave --pixels out."
