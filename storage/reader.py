"""Reading a finished cache: rows by index, every chunk proven against its commit when it is first touched."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.arrays import chunk_shape, decode_object, given_dtype, stored_dtype
from storage.commits import (
    COMMITS,
    ChunkCommit,
    ChunkRef,
    QuarantinedRow,
    Tower,
    all_chunks,
    generation_chunks,
    quarantined_rows,
    read_commits,
)
from storage.errors import (
    CacheAccessError,
    CacheCorruptError,
    CacheError,
    CacheIncompleteError,
    CacheNotFoundError,
    CacheUnreachableError,
    UsageError,
)
from storage.files import CacheFiles, open_files
from storage.identity import CacheIdentity
from storage.manifest import BACKUP_KEY, MANIFEST_KEY, CacheManifest
from storage.quantized import unit_dequantized
from storage.root import read_backup, read_manifest
from storage.shapes import SCALE
from storage.tables import CAPTIONS, PROBLEMS, SAMPLES, read_table
from storage.transient import is_transient
from storage.writer import incomplete_message

__all__ = ["EmbeddingReader"]

_DEFAULT_MEMORY_BYTES = 2 << 30


class EmbeddingReader:
    """A sealed cache, for training and evaluation. Where views are still being added, the sealed ones can be read.

    Chunks are read whole, proven and kept in memory, least recently used ones leaving first when
    ``memory_bytes`` is reached; a cache that fits is read once. Threads may share a reader. A spawned worker gets
    a reader of its own by pickling; a forked one goes on with its copy, the chunks in memory included, whatever
    other threads of the parent were doing.
    """

    def __init__(self, location: str, memory_bytes: int = _DEFAULT_MEMORY_BYTES) -> None:
        """Open the cache; reads the manifest only.

        Raises:
            CacheNotFoundError, CacheFormatError, CacheCorruptError: see ``storage.errors``.
            CacheIncompleteError: chunks of its first generation are missing; the message says how many.
        """
        self.location = location
        self.files = open_files(location)
        try:
            self.manifest = _opened_manifest(self.files)
        except OSError as error:
            raise _read_error(f"{location}/{MANIFEST_KEY}", error) from error
        if not self.manifest.sealed_generations:
            refs = all_chunks(self.manifest.layout)
            done = sum(self.files.exists(ref.commit_key) for ref in refs)
            raise CacheIncompleteError(incomplete_message(location, done, len(refs)))
        self._memory_bytes = memory_bytes
        self._held: OrderedDict[tuple[ChunkRef, str], NDArray[Any]] = OrderedDict()
        self._held_bytes = 0
        self._lock = threading.Lock()
        self._proven_commits: dict[ChunkRef, ChunkCommit] | None = None
        self.objects_read = 0
        _READERS.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"location": self.location, "memory_bytes": self._memory_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # a spawned worker opens the cache for itself

    @property
    def embed_dim(self) -> int:
        """Width of the teacher's embeddings."""
        return self.manifest.layout.embed_dim

    @property
    def views(self) -> int:
        """Views of each image that can be read; view 0 is the evaluation crop."""
        return self.manifest.sealed_views

    @property
    def identity(self) -> CacheIdentity:
        """Of what can be read: while views are being added the manifest's names those that are only planned too."""
        whole = self.manifest.identity
        return whole.model_copy(update={"views": whole.views.first(self.views)})

    @cached_property
    def samples(self) -> pa.Table:
        """One row per image: row, sample_id, uri, offset, length, content_sha256, split."""
        return self._table(SAMPLES)

    @cached_property
    def captions(self) -> pa.Table:
        """One row per caption, those of an image side by side: row, image_row, text."""
        return self._table(CAPTIONS)

    @cached_property
    def problems(self) -> pa.Table:
        """What of the dataset got no row, and why: kind, where, detail, lost_image."""
        return self._table(PROBLEMS)

    def _table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        try:
            return read_table(self.files, self.manifest, name, columns)
        except OSError as error:
            raise _read_error(f"{self.location}/{name}", error) from error

    def _column(self, table: str, name: str) -> pa.ChunkedArray:
        """One column; of a table that is not in memory no other is decoded, and none stays there."""
        return (self.__dict__[table] if table in self.__dict__ else self._table(table, [name]))[name]

    @cached_property
    def caption_offsets(self) -> NDArray[np.int64]:
        """(images + 1,): the captions of image ``i`` are rows ``offsets[i]`` to ``offsets[i + 1]``."""
        image_rows = self._column(CAPTIONS, "image_row").to_numpy()
        if len(image_rows) and (np.diff(image_rows) < 0).any():
            raise CacheCorruptError(f"{self.location}/{CAPTIONS}: not sorted by image row")
        edges = np.arange(self.manifest.layout.image_rows + 1)
        return np.searchsorted(image_rows, edges, side="left").astype(np.int64)

    @cached_property
    def quarantined(self) -> tuple[QuarantinedRow, ...]:
        """Image rows that have no embedding in some view, each once, with reasons. Reads the commits once."""
        return tuple(quarantined_rows(self._commits.values(), self.views).values())

    def quarantined_in(self, view: int) -> dict[int, QuarantinedRow]:
        """Image rows that have no embedding in one view, by row."""
        commits = [commit for ref, commit in self._commits.items() if ref.view == view]
        return quarantined_rows(commits, view + 1)

    def image_rows(self, split: str | None = None) -> NDArray[np.int64]:
        """Rows of the images that have an embedding in every view, ascending; of one split, or of all.

        Raises:
            UsageError: no image is of this split; the message lists the splits.
        """
        if split is None:
            keep = np.ones(self.manifest.layout.image_rows, bool)
        else:
            known = self.manifest.identity.dataset.splits
            if split not in known:
                names = ", ".join(f"{name!r} ({count} images)" for name, count in known.items())
                raise UsageError(f"{self.location}: no split {split!r}; this cache has {names}")
            keep = np.asarray(self._column(SAMPLES, "split").to_numpy(zero_copy_only=False) == split, bool).copy()
        keep[[row.row for row in self.quarantined]] = False
        return np.flatnonzero(keep).astype(np.int64)

    def caption_rows(self, image_rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All caption rows of some images, in their order, and for each the position of its image among them."""
        starts, stops = self.caption_offsets[image_rows], self.caption_offsets[image_rows + 1]
        counts = stops - starts
        positions = np.repeat(np.arange(len(image_rows)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(starts, counts) + within, positions

    def require_captions(self, image_rows: NDArray[np.int64]) -> None:
        """Refuse images without a caption, which only a cache of labelled images has: they cannot be paired.

        Raises:
            UsageError: says how many, and what the cache is for.
        """
        bare = int((self.caption_offsets[image_rows + 1] == self.caption_offsets[image_rows]).sum())
        if bare:
            raise UsageError(
                f"{self.location}: {bare:,} of {len(image_rows):,} images have no caption. This cache is of labelled "
                "images and the prompts of their classes: measure it by teacher-cache zero-shot --cache, and name "
                "another one here."
            )

    def take(
        self,
        tower: Tower,
        rows: NDArray[np.int64],
        view: int | NDArray[np.int64] = 0,
        array: str = "embedding",
    ) -> NDArray[Any]:
        """Rows of one array, in the order asked for, as a new array of the stored dtype; int8 as float32 of unit norm.

        Args:
            view: of images: one for all rows, or (rows,) one for each. Each chunk touched is looked up once.

        Raises:
            IndexError: a row or view that the cache does not have, or that is not sealed yet.
            ValueError: as many views as rows are wanted.
            CacheCorruptError: a chunk touched is damaged or missing, or a row was quarantined. Never another
                row's data, never NaN.
            CacheAccessError, CacheUnreachableError: it cannot be read.
        """
        layout = self.manifest.layout
        size, total = layout.chunk_rows(tower), layout.rows(tower)
        rows = np.asarray(rows, np.int64)
        outside = rows[(rows < 0) | (rows >= total)]
        if len(outside):
            raise IndexError(f"{self.location}: {tower} row {outside[0]} asked for, rows are 0 to {total - 1}")
        views = np.asarray(view, np.int64)
        if views.shape not in ((), rows.shape):
            raise ValueError(
                f"{len(rows)} rows and views of shape {views.shape}: one view, or one for each row, wanted"
            )
        there = self.views if tower == "image" else 1
        outside = views[(views < 0) | (views >= there)].reshape(-1)
        if len(outside):
            raise IndexError(f"{self.location}: {tower} view {outside[0]} asked for, views are 0 to {there - 1}")
        shape = chunk_shape(layout, tower, array)
        out = np.empty((len(rows), *shape[1:]), given_dtype(layout, tower, array))
        # one stretch of the sorted rows per chunk
        places = np.broadcast_to(views, rows.shape) * (total // size + 1) + rows // size
        order = np.argsort(places, kind="stable")
        for here in np.split(order, np.flatnonzero(np.diff(places[order])) + 1) if len(rows) else ():
            view_here, chunk = divmod(int(places[here[0]]), total // size + 1)
            out[here] = self._rows(ChunkRef(tower, view_here, chunk), array, rows[here] - chunk * size)
        if np.isnan(out).any():
            at = int(np.flatnonzero(np.isnan(out).reshape(len(rows), -1).any(axis=1))[0])
            named = f"row {rows[at]}" + (f", view {np.broadcast_to(views, rows.shape)[at]}," if views.any() else "")
            raise CacheCorruptError(f"{self.location}: {tower} {named} was quarantined and has no {array}")
        return out

    def chunk(self, ref: ChunkRef, array: str = "embedding") -> NDArray[Any]:
        """All rows of one chunk, the quarantined ones NaN, of the dtype that :meth:`take` gives: proven, read-only.

        Raises:
            IndexError: no such chunk, or one that is not sealed yet.
            CacheCorruptError, CacheAccessError, CacheUnreachableError: as :meth:`take`.
        """
        if ref not in self._commits:
            raise IndexError(f"{self.location}: no chunk {ref.name} that can be read")
        return self._rows(ref, array, slice(len(ref.rows(self.manifest.layout))))

    def stored_chunk(self, ref: ChunkRef) -> dict[str, NDArray[Any]]:
        """The arrays of one chunk by name as they are on disk, padding cut off: what a writer takes bit for bit.

        Raises:
            IndexError, CacheCorruptError, CacheAccessError, CacheUnreachableError: as :meth:`chunk`.
        """
        if ref not in self._commits:
            raise IndexError(f"{self.location}: no chunk {ref.name} that can be read")
        rows = len(ref.rows(self.manifest.layout))
        return {name: self._chunk(ref, name)[:rows] for name in ref.object_keys(self.manifest.layout)}

    def _rows(self, ref: ChunkRef, array: str, within: NDArray[np.int64] | slice) -> NDArray[Any]:
        """Some rows of a chunk as they are given out; in memory int8 stays int8."""
        stored = self._chunk(ref, array)[within]
        return stored if stored.dtype != np.int8 else unit_dequantized(stored, self._chunk(ref, SCALE))

    def commits(self) -> dict[ChunkRef, ChunkCommit]:
        """The commit records of what can be read. Reads them once; raises as :meth:`take`."""
        return dict(self._commits)

    @property
    def _commits(self) -> dict[ChunkRef, ChunkCommit]:
        """The commits of what can be read, proven to be those that it was sealed with; read once."""
        # no cached_property: before Python 3.12 that holds a lock, which a fork in mid-read would leave locked for good
        if self._proven_commits is None:
            self._proven_commits = self._read_commits()
        return self._proven_commits

    def _read_commits(self) -> dict[ChunkRef, ChunkCommit]:
        commits: dict[ChunkRef, ChunkCommit] = {}
        for generation in self.manifest.sealed_generations:
            try:
                found, digest = read_commits(self.files, self.manifest, generation)
            except CacheCorruptError as error:
                raise CacheCorruptError(f"{error}. {_REMEDY}") from error
            except OSError as error:
                raise _read_error(f"{self.location}/{COMMITS}", error) from error
            missing = [ref.commit_key for ref in generation_chunks(self.manifest, generation) if ref not in found]
            if missing:
                raise CacheCorruptError(f"{self.location}/{missing[0]}: missing from a sealed cache. {_REMEDY}")
            if generation.seal is None or digest != generation.seal.commits_sha256:
                raise CacheCorruptError(
                    f"{self.location}: the commit records are not those that the cache was sealed with. {_REMEDY}"
                )
            commits.update(found)
        return commits

    def _chunk(self, ref: ChunkRef, array: str) -> NDArray[Any]:
        with self._lock:
            held = self._held.get((ref, array))
            if held is not None:
                self._held.move_to_end((ref, array))
                return held
            commit = self._commits[ref]
            key = ref.object_keys(self.manifest.layout)[array]
            where = f"{self.location}/{key}"
            try:
                data = self.files.read(key)
            except FileNotFoundError as error:
                raise CacheCorruptError(f"{where}: missing, though committed. {_REMEDY}") from error
            except OSError as error:
                raise _read_error(where, error) from error
            layout = self.manifest.layout
            shape, dtype = chunk_shape(layout, ref.tower, array), stored_dtype(layout, ref.tower, array)
            values = decode_object(data, commit.objects[array], shape, dtype, where)
            self.objects_read += 1
            self._held[ref, array] = values
            self._held_bytes += values.nbytes
            while self._held_bytes > self._memory_bytes and len(self._held) > 1:
                _, dropped = self._held.popitem(last=False)
                self._held_bytes -= dropped.nbytes
            return values

    def _after_fork(self) -> None:
        # a thread that is not in the child may have held the lock, and been between two of its lines
        self._lock = threading.Lock()
        self._held_bytes = sum(values.nbytes for values in self._held.values())


def _opened_manifest(files: CacheFiles) -> CacheManifest:
    """The manifest; its backup where the cache is just being planned, which writes the backup first."""
    try:
        return read_manifest(files)
    except CacheNotFoundError:
        backup = read_backup(files)
        if backup is None:
            raise
    try:
        return read_manifest(files)  # it may have come since
    except CacheNotFoundError as error:
        if not backup.sealed:
            return backup
        raise CacheCorruptError(
            f"{files.location}: manifest.json is missing, {BACKUP_KEY} is there. Run teacher-cache repair CACHE to "
            "restore it, or the same precompute command again."
        ) from error


_READERS: weakref.WeakSet[EmbeddingReader] = weakref.WeakSet()
_REMEDY = "Run teacher-cache verify to list all damage, and teacher-cache repair CACHE to mend it."


def _after_fork() -> None:
    for reader in _READERS:
        reader._after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)


def _read_error(where: str, error: OSError) -> CacheError:
    """An object that is there and cannot be read, by what the caller can do about it."""
    if isinstance(error, CacheError):
        return error
    what = f"{error.filename or where}: cannot be read: {error.strerror or error}."
    if isinstance(error, PermissionError):
        return CacheAccessError(f"{what} Let this user read it.")
    if is_transient(error):
        return CacheUnreachableError(
            f"{what} Try again; if it stays so, delete this object and run teacher-cache repair CACHE."
        )
    return CacheCorruptError(f"{what} Remove what is in its place and run teacher-cache repair CACHE.")
