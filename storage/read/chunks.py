"""Chunks of a sealed cache: each proven against its commit record before its rows are used."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.errors import CacheCorruptError
from teacher_cache.storage.files.location import in_parallel
from teacher_cache.storage.files.protocol import CHUNKS_AT_ONCE, CacheFiles
from teacher_cache.storage.files.transient import read_error
from teacher_cache.storage.format.arrays import decode_object, given_dtype, prove_body, stored_form
from teacher_cache.storage.format.commit_records import CommitRecords
from teacher_cache.storage.format.commits import COMMITS, ChunkRef, ObjectDigest, all_chunks
from teacher_cache.storage.format.int8 import unit_dequantized
from teacher_cache.storage.format.layout import ARRAYS, SCALE, Tower, chunk_shape
from teacher_cache.storage.format.row_rules import has_nan, is_nan
from teacher_cache.storage.read.chunk_cache import ChunkMemory
from teacher_cache.storage.read.rows import RowPlaces
from teacher_cache.storage.read.several.part_commits import PartCommits
from teacher_cache.storage.read.several.parts import Part, Parts

if TYPE_CHECKING:
    from teacher_cache.storage.read.stream_chunks import MappedArray

_REMEDY = "Run teacher-cache verify to list all damage, and teacher-cache repair CACHE to mend it."


class ChunkSource:
    """Chunks of one sealed cache: loaded, proven, dequantized, and their quarantined rows named.

    Threads may share it.

    Args:
        parts: The cache, or several that are read as one.
        memory_bytes: Budget of the chunks that :meth:`chunk` keeps in memory.
        commits: Commit records of each part, if the caller has read them. Default: read at first use.

    Attributes:
        location, layout: Of the parts.
        files: Files of the first part, which tell where all are: in folders, or in a store.
        objects_read, bytes_read: Number of chunk objects read so far, and their bytes.
        mapped: Files of each array that stay mapped after a stream, for the next one.
    """

    def __init__(self, parts: Parts, memory_bytes: int, commits: Sequence[CommitRecords] | None = None) -> None:
        self.parts, self.location, self.layout = parts, parts.location, parts.layout
        self.files = parts.members[0].files
        self.memory_bytes = memory_bytes
        self.objects_read = self.bytes_read = 0
        self.mapped: dict[tuple[Tower, str], MappedArray] = {}
        self._memory = ChunkMemory(memory_bytes, self.location)
        self._commits = None if commits is None else self._as_one(commits)
        self._proven: set[tuple[ChunkRef, str]] = set()
        self._scales: dict[ChunkRef, NDArray[np.float32]] = {}
        self._lock, self._commits_lock = threading.Lock(), threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Bytes of the chunks in memory."""
        return self._memory.nbytes

    @property
    def commits_read(self) -> Sequence[CommitRecords] | None:
        """Commit records of each part; None if they were not read yet."""
        commits = self._commits
        return commits.records if isinstance(commits, PartCommits) else None if commits is None else [commits]

    @property
    def commits(self) -> CommitRecords | PartCommits:
        """Commit records, proven against the seal. Read once, by one thread.

        Raises:
            CacheCorruptError: A record is missing, damaged, or not the sealed one.
            CacheAccessError, CacheUnreachableError: A record cannot be read.
        """
        if self._commits is None:
            with self._commits_lock:
                if self._commits is None:
                    self._commits = self._read_commits()
        return self._commits

    def _read_commits(self) -> CommitRecords | PartCommits:
        return self._as_one([*in_parallel(self.files, _read_commits, self.parts.members, CHUNKS_AT_ONCE)])

    def _as_one(self, records: Sequence[CommitRecords]) -> CommitRecords | PartCommits:
        return records[0] if len(records) == 1 else PartCommits(self.parts, records)

    def places(self, tower: Tower) -> RowPlaces:
        """Return the places of a tower's rows."""
        return self.parts.places(tower)

    def require_array(self, tower: Tower, array: str) -> None:
        """Check that a tower has an array.

        Raises:
            ValueError: There is no such array; the message lists the arrays.
        """
        if array not in ARRAYS[tower]:
            names = ", ".join(ARRAYS[tower])
            raise ValueError(f"{self.location}: no array {array!r} of {tower} rows, there are {names}")

    def require_chunk(self, ref: ChunkRef) -> None:
        """Check that the cache has a chunk.

        Raises:
            IndexError: There is no such chunk.
        """
        if ref not in self.commits:
            raise IndexError(f"{self.location}: no chunk {ref.name} that can be read")

    def object(self, ref: ChunkRef, array: str) -> tuple[CacheFiles, str]:
        """Return the files and the key of a chunk's object."""
        number, own = self.parts.local(ref)
        return self.parts.members[number].files, own.object_keys(self.layout)[array]

    def _where(self, ref: ChunkRef, array: str) -> str:
        files, key = self.object(ref, array)
        return f"{files.location}/{key}"

    def digest(self, ref: ChunkRef, array: str) -> ObjectDigest:
        """Return the digests of a chunk's object, from its commit record."""
        return self.commits.digest(ref, array)

    def load(self, ref: ChunkRef, array: str) -> NDArray[Any]:
        """Read and prove a chunk, without caching it. Return the stored values, padding included.

        Raises:
            CacheCorruptError: The chunk is missing or damaged, or holds NaN where no row was quarantined.
            CacheAccessError, CacheUnreachableError: It cannot be read.
        """
        files, key = self.object(ref, array)
        where = f"{files.location}/{key}"
        try:
            data = files.read_buffer(key)
        except FileNotFoundError as error:
            raise CacheCorruptError(f"{where}: missing, though committed. {_REMEDY}") from error
        except OSError as error:
            raise read_error(where, error) from error
        shape, dtype = stored_form(self.layout, ref.tower, array)
        values = decode_object(data, self.digest(ref, array), shape, dtype, where, self.layout.compressor)
        self.count(len(data))
        if (ref, array) not in self._proven:
            self._note_proven(ref, array, values, has_nan(values))
        return values

    def chunk(self, ref: ChunkRef, array: str) -> NDArray[Any]:
        """Return a chunk as :meth:`load` does, through the LRU cache."""
        return self._memory.get((ref, array), lambda: self.load(ref, array))

    def chunks(self, refs: Sequence[ChunkRef], array: str) -> Iterator[NDArray[Any]]:
        """Yield :meth:`chunk` of each. Unless all are in memory, several are requested from a store in parallel."""

        def load(ref: ChunkRef) -> NDArray[Any]:
            values = self.chunk(ref, array)
            if values.dtype == np.int8:
                self.scale(ref)
            return values

        if all((ref, array) in self._memory for ref in refs):
            return map(load, refs)
        return in_parallel(self.files, load, refs, CHUNKS_AT_ONCE)

    def prove(self, ref: ChunkRef, array: str, body: NDArray[Any], checksum: bytes, prove_again: bool = False) -> None:
        """Prove the bytes of a chunk that are in memory, the first time only or every time.

        Args:
            body: The stored values, padding included.
            checksum: Last four bytes of the object. Always compared with the commit record, to detect a replaced file.
            prove_again: Also prove bytes that were proven before.

        Raises:
            CacheCorruptError: As :meth:`load`.
        """
        digest, first_time = self.digest(ref, array), (ref, array) not in self._proven
        if not first_time and not prove_again and int.from_bytes(checksum, "little") == digest.crc32c:
            return
        where = self._where(ref, array)
        any_nan = prove_body(body, checksum, digest, where, look_for_nan=first_time)
        if first_time:
            self._note_proven(ref, array, body, any_nan)

    def _note_proven(self, ref: ChunkRef, array: str, values: NDArray[Any], any_nan: bool) -> None:
        """Check that only quarantined rows are NaN, and remember that the chunk was proven."""
        if any_nan:
            where, rows = self._where(ref, array), self.parts.rows(ref)
            if array == SCALE:
                raise CacheCorruptError(f"{where}: holds NaN. {_REMEDY}")
            table = values[: len(rows)].reshape(len(rows), -1)
            wrong = np.setdiff1d(np.flatnonzero(is_nan(table).any(axis=1)), self.quarantined_rows(ref))
            if len(wrong):
                raise CacheCorruptError(f"{where}: row {rows[int(wrong[0])]} is NaN and was not quarantined. {_REMEDY}")
        self._proven.add((ref, array))

    def count(self, nbytes: int) -> None:
        """Count one object that was read."""
        with self._lock:
            self.objects_read += 1
            self.bytes_read += nbytes

    def scale(self, ref: ChunkRef) -> NDArray[np.float32]:
        """Return the step of each column of an int8 chunk, (1, dim). Small, and kept in memory."""
        if ref not in self._scales:
            self._scales[ref] = self.load(ref, SCALE)
        return self._scales[ref]

    def dequantized(self, ref: ChunkRef, stored: NDArray[Any]) -> NDArray[Any]:
        """Return rows of a chunk as readers see them: int8 as float32 of unit norm, others unchanged."""
        return stored if stored.dtype != np.int8 else unit_dequantized(stored, self.scale(ref))

    def quarantined_rows(self, ref: ChunkRef) -> NDArray[np.int64]:
        """Return the quarantined rows of a chunk, counted from its first row."""
        first = self.parts.rows(ref).start
        return np.array([row.row - first for row in self.commits.quarantined(ref)], np.int64)

    def quarantined_chunks(self, tower: Tower) -> set[ChunkRef]:
        """Return the chunks of a tower that have a quarantined row."""
        return {commit.ref for commit in self.commits.with_quarantined() if commit.tower == tower}

    def require_encoded(self, tower: Tower, rows: NDArray[np.int64], views: NDArray[np.int64], array: str) -> None:
        """Check that no row was quarantined.

        Raises:
            CacheCorruptError: A row was; the message names the first.
        """
        bad: list[int] = []
        places = self.places(tower)
        at = places.at(rows, views)
        for ref, positions in places.by_chunk(at):
            within = at[positions] % places.chunk_rows
            bad += positions[np.isin(within, self.quarantined_rows(ref))].tolist()
        if bad:
            first = min(bad)
            view = f", view {np.broadcast_to(views, rows.shape)[first]}," if views.any() else ""
            raise CacheCorruptError(
                f"{self.location}: {tower} row {rows[first]}{view} was quarantined and has no {array}"
            )

    def take(
        self, tower: Tower, rows: NDArray[np.int64], view: int | NDArray[np.int64] = 0, array: str = "embedding"
    ) -> NDArray[Any]:
        """See :meth:`teacher_cache.storage.read.reader.EmbeddingReader.take`."""
        self.require_array(tower, array)
        places = self.places(tower)
        rows, views = places.check(rows, view)
        at = places.at(rows, views)
        by_chunk = list(places.by_chunk(at))
        out = self._gathered(tower, at, by_chunk, array)
        if any(self.commits.quarantined(ref) for ref, _ in by_chunk):
            self.require_encoded(tower, rows, views, array)
        return out

    def take_places(self, tower: Tower, at: NDArray[np.int64], array: str) -> NDArray[Any]:
        """Return rows by their places, as :meth:`take` does, but quarantined ones too."""
        return self._gathered(tower, at, list(self.places(tower).by_chunk(at)), array)

    def _gathered(
        self, tower: Tower, at: NDArray[np.int64], by_chunk: list[tuple[ChunkRef, NDArray[np.intp]]], array: str
    ) -> NDArray[Any]:
        size, shape = self.places(tower).chunk_rows, chunk_shape(self.layout, tower, array)
        out = np.empty((len(at), *shape[1:]), given_dtype(self.layout, tower, array))
        for values, (ref, positions) in zip(self.chunks([ref for ref, _ in by_chunk], array), by_chunk, strict=True):
            out[positions] = self.dequantized(ref, values[at[positions] % size])
        return out


def _read_commits(part: Part) -> CommitRecords:
    """Read the commit records of a part, and prove them against its seal."""
    files, manifest = part.files, part.manifest
    commits = CommitRecords(manifest)
    try:
        digest = commits.read(files)
    except CacheCorruptError as error:
        raise CacheCorruptError(f"{error}. {_REMEDY}") from error
    except OSError as error:
        raise read_error(f"{files.location}/{COMMITS}", error) from error
    missing = [ref.commit_key for ref in all_chunks(manifest.layout) if ref not in commits]
    if missing:
        raise CacheCorruptError(f"{files.location}/{missing[0]}: missing from a sealed cache. {_REMEDY}")
    if manifest.seal is None or digest != manifest.seal.commits_sha256:
        raise CacheCorruptError(
            f"{files.location}: the commit records are not those that the cache was sealed with. {_REMEDY}"
        )
    return commits
