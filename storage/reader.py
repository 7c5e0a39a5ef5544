"""Reading a finished cache: rows by index, every chunk proven against its commit when it is first touched."""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.arrays import array_dtype, chunk_shape, decode_object
from storage.commits import ChunkCommit, ChunkRef, QuarantinedRow, Tower, all_chunks, read_commits
from storage.errors import CacheCorruptError, CacheIncompleteError, UsageError
from storage.files import open_files
from storage.root import read_manifest
from storage.tables import CAPTIONS, PROBLEMS, SAMPLES, read_table
from storage.writer import incomplete_message

__all__ = ["EmbeddingReader"]

_DEFAULT_MEMORY_BYTES = 2 << 30


class EmbeddingReader:
    """A sealed cache, for training and evaluation.

    Chunks are read whole, proven and kept in memory, least recently used ones leaving first when
    ``memory_bytes`` is reached; a cache that fits is read once. Threads may share a reader. A spawned worker gets
    a reader of its own by pickling; a forked one may use its copy of a local cache.
    """

    def __init__(self, location: str, memory_bytes: int = _DEFAULT_MEMORY_BYTES) -> None:
        """Open the cache; reads the manifest only.

        Raises:
            CacheNotFoundError, CacheFormatError, CacheCorruptError: see ``storage.errors``.
            CacheIncompleteError: chunks are missing; the message says how many.
        """
        self.location = location
        self.files = open_files(location)
        self.manifest = read_manifest(self.files)
        if not self.manifest.sealed:
            refs = all_chunks(self.manifest.layout)
            done = sum(self.files.exists(ref.commit_key) for ref in refs)
            raise CacheIncompleteError(incomplete_message(location, done, len(refs)))
        self._memory_bytes = memory_bytes
        self._held: OrderedDict[tuple[ChunkRef, str], NDArray[Any]] = OrderedDict()
        self._held_bytes = 0
        self._lock = threading.Lock()
        self.objects_read = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"location": self.location, "memory_bytes": self._memory_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # a spawned worker opens the cache for itself

    @property
    def embed_dim(self) -> int:
        """Width of the teacher's embeddings."""
        return self.manifest.layout.embed_dim

    @cached_property
    def samples(self) -> pa.Table:
        """One row per image: row, sample_id, uri, offset, length, content_sha256, split."""
        return read_table(self.files, self.manifest, SAMPLES)

    @cached_property
    def captions(self) -> pa.Table:
        """One row per caption, those of an image side by side: row, image_row, text."""
        return read_table(self.files, self.manifest, CAPTIONS)

    @cached_property
    def problems(self) -> pa.Table:
        """What of the dataset got no row, and why: kind, where, detail, lost_image."""
        return read_table(self.files, self.manifest, PROBLEMS)

    @cached_property
    def caption_offsets(self) -> NDArray[np.int64]:
        """(images + 1,): the captions of image ``i`` are rows ``offsets[i]`` to ``offsets[i + 1]``."""
        image_rows = self.captions["image_row"].to_numpy()
        if len(image_rows) and (np.diff(image_rows) < 0).any():
            raise CacheCorruptError(f"{self.location}/{CAPTIONS}: not sorted by image row")
        edges = np.arange(self.manifest.layout.image_rows + 1)
        return np.searchsorted(image_rows, edges, side="left").astype(np.int64)

    @cached_property
    def quarantined(self) -> tuple[QuarantinedRow, ...]:
        """Image rows that have no embedding, with reasons. Reads the image commits once."""
        rows = {row.row: row for commit in self._commits.values() for row in commit.quarantined}
        return tuple(rows[row] for row in sorted(rows))

    def image_rows(self, split: str | None = None) -> NDArray[np.int64]:
        """Rows of the images that have an embedding, ascending; of one split, or of all.

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
            keep = np.asarray(self.samples["split"].to_numpy(zero_copy_only=False) == split, bool).copy()
        keep[[row.row for row in self.quarantined]] = False
        return np.flatnonzero(keep).astype(np.int64)

    def caption_rows(self, image_rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All caption rows of some images, in their order, and for each the position of its image among them."""
        starts, stops = self.caption_offsets[image_rows], self.caption_offsets[image_rows + 1]
        counts = stops - starts
        positions = np.repeat(np.arange(len(image_rows)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(starts, counts) + within, positions

    def take(self, tower: Tower, rows: NDArray[np.int64], view: int = 0, array: str = "embedding") -> NDArray[Any]:
        """Rows of one array, in the order asked for, as a new array of the stored dtype.

        Raises:
            IndexError: a row that the cache does not have.
            CacheCorruptError: a chunk touched is damaged or missing, or a row was quarantined. Never another
                row's data, never NaN.
        """
        layout = self.manifest.layout
        size, total = layout.chunk_rows(tower), layout.rows(tower)
        rows = np.asarray(rows, np.int64)
        outside = rows[(rows < 0) | (rows >= total)]
        if len(outside):
            raise IndexError(f"{self.location}: {tower} row {outside[0]} asked for, rows are 0 to {total - 1}")
        shape = chunk_shape(layout, tower, array)
        out = np.empty((len(rows), *shape[1:]), array_dtype(tower, array))
        chunks = rows // size
        for chunk in np.unique(chunks):
            here = chunks == chunk
            out[here] = self._chunk(ChunkRef(tower, view, int(chunk)), array)[rows[here] - chunk * size]
        if np.isnan(out).any():
            row = rows[np.isnan(out).reshape(len(rows), -1).any(axis=1)][0]
            raise CacheCorruptError(f"{self.location}: {tower} row {row} was quarantined and has no {array}")
        return out

    @cached_property
    def _commits(self) -> dict[ChunkRef, ChunkCommit]:
        """All commits, proven to be those that the cache was sealed with."""
        commits, digest = read_commits(self.files, self.manifest)
        missing = [ref.commit_key for ref in all_chunks(self.manifest.layout) if ref not in commits]
        if missing:
            raise CacheCorruptError(f"{self.location}/{missing[0]}: missing from a sealed cache")
        seal = self.manifest.generations[-1].seal
        if seal is None or digest != seal.commits_sha256:
            raise CacheCorruptError(
                f"{self.location}: the commit records are not those that the cache was sealed with. Run the same "
                "precompute command again, or restore a copy."
            )
        return commits

    def _chunk(self, ref: ChunkRef, array: str) -> NDArray[Any]:
        with self._lock:
            held = self._held.get((ref, array))
            if held is not None:
                self._held.move_to_end((ref, array))
                return held
            commit = self._commits[ref]
            key = ref.object_keys()[array]
            where = f"{self.location}/{key}"
            try:
                data = self.files.read(key)
            except FileNotFoundError as error:
                raise CacheCorruptError(
                    f"{where}: missing, though committed. Precompute again to encode it."
                ) from error
            shape = chunk_shape(self.manifest.layout, ref.tower, array)
            values = decode_object(data, commit.objects[array], shape, array_dtype(ref.tower, array), where)
            self.objects_read += 1
            self._held[ref, array] = values
            self._held_bytes += values.nbytes
            while self._held_bytes > self._memory_bytes and len(self._held) > 1:
                _, dropped = self._held.popitem(last=False)
                self._held_bytes -= dropped.nbytes
            return values
