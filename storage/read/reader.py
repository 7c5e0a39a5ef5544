"""Reading a finished cache: rows by index, every chunk proven against its commit when it is first touched."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from teacher_cache.storage.errors import CacheCorruptError, CacheUnreachableError, UsageError
from teacher_cache.storage.files.fork_safety import renew_after_fork
from teacher_cache.storage.files.location import in_parallel, open_files, read_buffer
from teacher_cache.storage.files.once import once
from teacher_cache.storage.files.protocol import CHUNKS_AT_ONCE
from teacher_cache.storage.files.transient import read_error
from teacher_cache.storage.format.arrays import chunk_shape, decode_object, given_dtype, stored_dtype
from teacher_cache.storage.format.commit_records import CommitRecords
from teacher_cache.storage.format.commits import (
    COMMITS,
    ChunkCommit,
    ChunkRef,
    QuarantinedRow,
    generation_chunks,
    quarantined_rows,
)
from teacher_cache.storage.format.identity import CacheIdentity
from teacher_cache.storage.format.int8 import unit_dequantized
from teacher_cache.storage.format.layout import ARRAYS, SCALE, Tower
from teacher_cache.storage.format.row_rules import has_nan, is_nan
from teacher_cache.storage.format.tables import (
    CAPTIONS,
    PROBLEMS,
    ROWS_PER_GROUP,
    SAMPLES,
    column_parts,
    read_rows,
    read_table,
)
from teacher_cache.storage.read.caption_index import CaptionIndex
from teacher_cache.storage.read.opening import readable_manifest
from teacher_cache.storage.read.resident import ResidentRows, load_resident
from teacher_cache.storage.read.row_set import RowSet
from teacher_cache.storage.read.stream import Batch, MappedChunks, Prove, stream_rows

__all__ = ["EmbeddingReader"]


_DEFAULT_MEMORY_BYTES = 2 << 30


class EmbeddingReader:
    """A sealed cache, for training and evaluation. Where views are still being added, the sealed ones can be read.

    Chunks are read whole, proven and kept in memory, least recently used ones leaving first when
    ``memory_bytes`` is reached; a cache that fits is read once. Besides, streams of a local cache leave as many bytes
    of each array mapped. Threads may share a reader: they load different chunks at the same time, and each chunk once.
    A spawned worker gets a reader of its own by pickling; a forked one
    goes on with its copy, the chunks in memory included, whatever other threads of the parent were doing.

    Attributes:
        objects_read, bytes_read: chunk objects that were read so far, and their bytes.
    """

    def __init__(
        self, location: str, memory_bytes: int = _DEFAULT_MEMORY_BYTES, manifest_digest: str | None = None
    ) -> None:
        """Open the cache; reads the manifest only.

        Args:
            manifest_digest: of the manifest that is wanted; views that were added since are not there then.

        Raises:
            CacheNotFoundError, CacheFormatError, CacheCorruptError, CacheIncompleteError, CacheMismatchError: see
                :func:`teacher_cache.storage.read.opening.readable_manifest`.
        """
        self.location = location
        self.files = open_files(location)
        self.manifest = readable_manifest(self.files, manifest_digest)
        self._memory_bytes = memory_bytes
        self._held: OrderedDict[tuple[ChunkRef, str], NDArray[Any]] = OrderedDict()
        self._held_bytes = 0
        self._loading: dict[tuple[ChunkRef, str], Future[NDArray[Any]]] = {}
        self._lock = threading.Lock()
        self._commits_lock = threading.Lock()
        self._proven_commits: CommitRecords | None = None
        self._proven: set[tuple[ChunkRef, str]] = set()
        self._steps: dict[ChunkRef, NDArray[np.float32]] = {}
        self._mapped: dict[tuple[Tower, str], MappedChunks] = {}
        self.objects_read = 0
        self.bytes_read = 0
        renew_after_fork(self)

    def __getstate__(self) -> dict[str, Any]:
        digest = self.manifest.digest
        return {"location": self.location, "memory_bytes": self._memory_bytes, "manifest_digest": digest}

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

    @once
    def samples(self) -> pa.Table:
        """One row per image: row, sample_id, uri, offset, length, content_sha256, split."""
        return self._table(SAMPLES)

    @once
    def captions(self) -> pa.Table:
        """One row per caption, those of an image side by side: row, image_row, text."""
        return self._table(CAPTIONS)

    @once
    def problems(self) -> pa.Table:
        """What of the dataset got no row, and why: kind, where, detail, lost_image."""
        return self._table(PROBLEMS)

    def table_rows(self, name: str, rows: NDArray[np.int64]) -> pa.Table:
        """Some rows of a table, ``"samples"`` or ``"captions"``, in their order; no others stay in memory."""
        return self._table(name, partial(read_rows, rows=rows))

    def _table(self, name: str, read: Callable[..., pa.Table] = read_table) -> pa.Table:
        try:
            return read(self.files, self.manifest, name)
        except OSError as error:
            raise read_error(f"{self.location}/{name}", error) from error

    def _column(self, table: str, name: str) -> Iterator[pa.ChunkedArray]:
        """One column in parts of at most some ten thousands of rows; of a table that is not in memory none stays."""
        held = self.__dict__.get(table)
        try:
            for part in column_parts(self.files, self.manifest, table, name) if held is None else [held[name]]:
                for start in range(0, len(part), ROWS_PER_GROUP):
                    yield part.slice(start, ROWS_PER_GROUP)
        except OSError as error:
            raise read_error(f"{self.location}/{table}", error) from error

    @once
    def caption_offsets(self) -> NDArray[np.int64]:
        """(images + 1,): the captions of image ``i`` are rows ``offsets[i]`` to ``offsets[i + 1]``."""
        return self.caption_index.offsets()

    @once
    def caption_index(self) -> CaptionIndex:
        """Which captions are an image's, in a byte for each at most."""
        owners = (part.to_numpy() for part in self._column(CAPTIONS, "image_row"))
        return CaptionIndex(self.manifest.layout.image_rows, owners, f"{self.location}/{CAPTIONS}")

    @once
    def quarantined(self) -> tuple[QuarantinedRow, ...]:
        """Image rows that have no embedding in some view, each once, with reasons. Reads the commits once."""
        return tuple(quarantined_rows(self._commits.with_quarantined(), self.views).values())

    def quarantined_in(self, view: int) -> dict[int, QuarantinedRow]:
        """Image rows that have no embedding in one view, by row."""
        commits = [commit for commit in self._commits.with_quarantined() if commit.view == view]
        return quarantined_rows(commits, view + 1)

    def image_rows(self, split: str | None = None) -> NDArray[np.int64]:
        """:meth:`row_set` as an array, (images,) int64, ascending."""
        return self.row_set(split).numbers()

    def row_set(self, split: str | None = None) -> RowSet:
        """Rows of the images that have an embedding in every view; of one split, or of all.

        Raises:
            UsageError: no image is of this split; the message lists the splits.
        """
        total = self.manifest.layout.image_rows
        known = self.manifest.identity.dataset.splits
        if split is not None and split not in known:
            names = ", ".join(f"{name!r} ({count} images)" for name, count in known.items())
            raise UsageError(f"{self.location}: no split {split!r}; this cache has {names}")
        found, at = RowSet(total, full=split is None), 0
        if split is not None:
            for part in self._column(SAMPLES, "split"):
                found.add(at, pc.fill_null(pc.equal(part, split), False).to_numpy()[: max(total - at, 0)])
                at += len(part)
            if at != total:
                raise CacheCorruptError(f"{self.location}/{SAMPLES}: {at:,} rows, the manifest says {total:,}")
        for lost in self.quarantined:
            found.remove(lost.row)
        return found

    def caption_rows(self, image_rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All caption rows of some images, in their order, and for each the position of its image among them."""
        return self.caption_index.captions_of(image_rows)

    def require_captions(self, image_rows: NDArray[np.int64] | RowSet) -> None:
        """Refuse images without a caption, which only a cache of labelled images has: they cannot be paired.

        Raises:
            UsageError: says how many, and what the cache is for.
        """
        bare = sum(int((self.caption_index.counts(some) == 0).sum()) for some in RowSet.of(image_rows).parts())
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
            ValueError: as many views as rows are wanted; or no such array.
            CacheCorruptError: a chunk touched is damaged or missing, or a row was quarantined. Never another
                row's data, never NaN.
            CacheAccessError, CacheUnreachableError: it cannot be read.
        """
        self._require_array(tower, array)
        rows, views = self._checked(tower, rows, view)
        size, shape = self.manifest.layout.chunk_rows(tower), chunk_shape(self.manifest.layout, tower, array)
        out = np.empty((len(rows), *shape[1:]), given_dtype(self.manifest.layout, tower, array))
        damaged = False
        places = list(self._by_chunk(tower, rows, views))
        refs = [ChunkRef(tower, view_here, chunk) for view_here, chunk, _ in places]
        for ref, values, (_, chunk, here) in zip(refs, self._chunks(refs, array), places, strict=True):
            out[here] = self._given(ref, values[rows[here] - chunk * size])
            damaged = damaged or bool(self._commits.quarantined(ref))
        if damaged:
            self._require_encoded(tower, rows, views, array)
        return out

    def stream(
        self,
        tower: Tower,
        batches: Iterable[Batch],
        array: str = "embedding",
        prove: Prove = "first",
        read_ahead_bytes: int | None = None,
        threads: int | None = None,
    ) -> Iterator[NDArray[Any]]:
        """What :meth:`take` gives for each of ``batches``, in their order, with one copy a row.

        Batches are looked at ahead: threads load what they need while earlier ones are used, and each chunk is read
        once per stretch of batches that need it: once per epoch in the order of
        ``teacher_cache.storage.read.shuffle``. Memory is that of the chunks of such a stretch and of
        ``read_ahead_bytes``, however many rows there are. A local cache's files are mapped, not copied, see
        ``teacher_cache.storage.read.mapped_chunks`` for what that means when somebody cuts one short; up to
        ``memory_bytes`` of an array stay mapped for the next stream of it, in pages of the system's cache. Objects of
        a store are kept besides, as :meth:`take` keeps them. For the process that begins it: not to be gone on with by
        one that was forked meanwhile.

        Args:
            batches: rows, or (rows, views) with a view for each row; consumed ahead of what is yielded.
            prove: a mapped chunk by its checksum at its ``"first"`` read by this reader, or at ``"every"`` one.
            read_ahead_bytes: of chunks that are loaded before a batch needs them; left out 64 MiB, of a store 128 MiB.
            threads: loads at the same time; left out a few, more for an object store.

        Yields:
            Arrays of their own, as :meth:`take` returns them; their memory is used again once nothing refers to them.

        Raises:
            As :meth:`take`, some ten thousands of rows before the batch that is concerned.
            ValueError: arguments that cannot be used.
        """
        return stream_rows(self, tower, batches, array, prove, read_ahead_bytes, threads)

    def resident(self, tower: Tower, array: str = "embedding", threads: int | None = None) -> ResidentRows:
        """All rows of one array in memory, for orders that are random altogether: see
        :mod:`teacher_cache.storage.read.resident`.

        One copy, however many processes use it; it does not count against ``memory_bytes``, and no chunk is kept
        beside it.

        Args:
            threads: chunks that are read and proven at the same time; left out a few, more for an object store.

        Raises:
            CacheCorruptError, CacheAccessError, CacheUnreachableError: as :meth:`take`.
            ValueError: no such array.
            MemoryError: there is not so much memory.
        """
        return load_resident(self, tower, array, threads)

    def _checked(
        self, tower: Tower, rows: NDArray[np.int64], view: int | NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows, and one view or one for each, that there are."""
        rows, views, total = np.asarray(rows, np.int64), np.asarray(view, np.int64), self.manifest.layout.rows(tower)
        if views.shape not in ((), rows.shape):
            raise ValueError(
                f"{len(rows)} rows and views of shape {views.shape}: one view, or one for each row, wanted"
            )
        for what, values, stop in (("row", rows, total), ("view", views, self._views(tower))):
            if values.size and not 0 <= values.min() <= values.max() < stop:
                outside = values[(values < 0) | (values >= stop)].reshape(-1)[0]
                raise IndexError(f"{self.location}: {tower} {what} {outside} asked for, {what}s are 0 to {stop - 1}")
        return rows, views

    def _by_chunk(
        self, tower: Tower, rows: NDArray[np.int64], views: NDArray[np.int64]
    ) -> Iterator[tuple[int, int, NDArray[np.intp]]]:
        """View and number of each chunk that rows lie in, each once, and the positions of those rows."""
        size, number = self.manifest.layout.chunk_rows(tower), self.manifest.layout.chunks(tower)
        places = np.broadcast_to(views * number, rows.shape) + rows // size
        if not len(rows):
            return
        if places.max() < 2**16:  # numpy sorts these by counting
            places = places.astype(np.uint16)
        # one stretch of the sorted rows per chunk
        order = np.argsort(places, kind="stable")
        for here in np.split(order, np.flatnonzero(np.diff(places[order])) + 1):
            yield *divmod(int(places[here[0]]), number), here

    def _views(self, tower: Tower) -> int:
        return self.views if tower == "image" else 1

    def _require_array(self, tower: Tower, array: str) -> None:
        """Refuse an array that has no rows of this tower."""
        if array not in ARRAYS[tower]:
            raise ValueError(
                f"{self.location}: no array {array!r} of {tower} rows, there are {', '.join(ARRAYS[tower])}"
            )

    def _lost(self, ref: ChunkRef) -> NDArray[np.int64]:
        """Rows of a chunk that were quarantined, counted from its first."""
        first = ref.rows(self.manifest.layout).start
        return np.array([row.row - first for row in self._commits.quarantined(ref)], np.int64)

    def _require_encoded(self, tower: Tower, rows: NDArray[np.int64], views: NDArray[np.int64], array: str) -> None:
        """Refuse rows that were quarantined."""
        size, found = self.manifest.layout.chunk_rows(tower), []
        for view, chunk, here in self._by_chunk(tower, rows, views):
            found += here[np.isin(rows[here] - chunk * size, self._lost(ChunkRef(tower, view, chunk)))].tolist()
        if found:
            at = min(found)
            named = f"row {rows[at]}" + (f", view {np.broadcast_to(views, rows.shape)[at]}," if views.any() else "")
            raise CacheCorruptError(f"{self.location}: {tower} {named} was quarantined and has no {array}")

    def chunk(self, ref: ChunkRef, array: str = "embedding") -> NDArray[Any]:
        """All rows of one chunk, the quarantined ones NaN, of the dtype that :meth:`take` gives: proven, read-only.

        Raises:
            IndexError: no such chunk, or one that is not sealed yet.
            ValueError: no such array.
            CacheCorruptError, CacheAccessError, CacheUnreachableError: as :meth:`take`.
        """
        if ref not in self._commits:
            raise IndexError(f"{self.location}: no chunk {ref.name} that can be read")
        self._require_array(ref.tower, array)
        values = self._given(ref, self._chunk(ref, array)[: len(ref.rows(self.manifest.layout))])
        values.flags.writeable = False
        return values

    def stored_chunk(self, ref: ChunkRef) -> dict[str, NDArray[Any]]:
        """The arrays of one chunk by name as they are on disk, padding cut off: what a writer takes bit for bit.

        Raises:
            IndexError, CacheCorruptError, CacheAccessError, CacheUnreachableError: as :meth:`chunk`.
        """
        if ref not in self._commits:
            raise IndexError(f"{self.location}: no chunk {ref.name} that can be read")
        rows = len(ref.rows(self.manifest.layout))
        return {name: self._chunk(ref, name)[:rows] for name in ref.object_keys(self.manifest.layout)}

    def _given(self, ref: ChunkRef, stored: NDArray[Any]) -> NDArray[Any]:
        """Rows of a chunk as they are given out; in memory int8 stays int8."""
        return stored if stored.dtype != np.int8 else unit_dequantized(stored, self._step(ref))

    def _step(self, ref: ChunkRef) -> NDArray[np.float32]:
        """Of an int8 chunk, (1, dim): what one step of each column is. Small, and kept."""
        if ref not in self._steps:
            self._steps[ref] = self._load(ref, SCALE)
        return self._steps[ref]

    def commits(self) -> Mapping[ChunkRef, ChunkCommit]:
        """The commit records of what can be read. Reads them once; raises as :meth:`take`."""
        return self._commits

    @property
    def _commits(self) -> CommitRecords:
        """The commits of what can be read, proven to be those that it was sealed with; read once."""
        # not by teacher_cache.storage.files.once: with many chunks it takes long, and threads would each do it
        if self._proven_commits is None:
            with self._commits_lock:
                if self._proven_commits is None:
                    self._proven_commits = self._read_commits()
        return self._proven_commits

    def _read_commits(self) -> CommitRecords:
        commits = CommitRecords(self.manifest)
        for generation in self.manifest.sealed_generations:
            try:
                digest = commits.read(self.files, generation)
            except CacheCorruptError as error:
                raise CacheCorruptError(f"{error}. {_REMEDY}") from error
            except OSError as error:
                raise read_error(f"{self.location}/{COMMITS}", error) from error
            missing = [ref.commit_key for ref in generation_chunks(self.manifest, generation) if ref not in commits]
            if missing:
                raise CacheCorruptError(f"{self.location}/{missing[0]}: missing from a sealed cache. {_REMEDY}")
            if generation.seal is None or digest != generation.seal.commits_sha256:
                raise CacheCorruptError(
                    f"{self.location}: the commit records are not those that the cache was sealed with. {_REMEDY}"
                )
        return commits

    def _chunks(self, refs: Sequence[ChunkRef], array: str) -> Iterator[NDArray[Any]]:
        """These chunks, one after the other; of a store several are on their way at once, unless all are in memory."""

        def load(ref: ChunkRef) -> NDArray[Any]:
            values = self._chunk(ref, array)
            if values.dtype == np.int8:
                self._step(ref)
            return values

        if all((ref, array) in self._held for ref in refs):
            return map(load, refs)
        return in_parallel(self.files, load, refs, CHUNKS_AT_ONCE)

    def _chunk(self, ref: ChunkRef, array: str) -> NDArray[Any]:
        with self._lock:
            held = self._held.get((ref, array))
            if held is not None:
                self._held.move_to_end((ref, array))
                return held
            loading = self._loading.get((ref, array))
            if loading is None:
                mine = self._loading[ref, array] = Future()
        if loading is not None:
            return loading.result()
        # not under the lock: chunks of several threads are read and proven side by side
        try:
            values = self._load(ref, array)
            with self._lock:
                self._held[ref, array] = values
                self._held_bytes += values.nbytes
                while self._held_bytes > self._memory_bytes and len(self._held) > 1:
                    _, dropped = self._held.popitem(last=False)
                    self._held_bytes -= dropped.nbytes
        except BaseException as error:
            # an interrupt is for this thread: others that wait get an error of the cache's
            stopped = CacheUnreachableError(f"{self.location}: the thread that read {ref.name} was stopped. Try again.")
            mine.set_exception(error if isinstance(error, Exception) else stopped)
            raise
        else:
            mine.set_result(values)
        finally:
            self._loading.pop((ref, array), None)
        return values

    def _load(self, ref: ChunkRef, array: str) -> NDArray[Any]:
        """A chunk from its object, proven; padding included."""
        wanted, layout = self._commits.digest(ref, array), self.manifest.layout
        key = ref.object_keys(layout)[array]
        where = f"{self.location}/{key}"
        try:
            data = read_buffer(self.files, key)
        except FileNotFoundError as error:
            raise CacheCorruptError(f"{where}: missing, though committed. {_REMEDY}") from error
        except OSError as error:
            raise read_error(where, error) from error
        shape, dtype = chunk_shape(layout, ref.tower, array), stored_dtype(layout, ref.tower, array)
        values = decode_object(data, wanted, shape, dtype, where)
        self._count(len(data))
        if (ref, array) not in self._proven:
            self._note_proven(ref, array, values, has_nan(values))
        return values

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.objects_read += 1
            self.bytes_read += nbytes

    def _note_proven(self, ref: ChunkRef, array: str, values: NDArray[Any], some_nan: bool) -> None:
        """Refuse NaN where nothing was quarantined; looked at once, for afterwards the checksum says it."""
        if some_nan:
            key = ref.object_keys(self.manifest.layout)[array]
            if array == SCALE:
                raise CacheCorruptError(f"{self.location}/{key}: holds NaN. {_REMEDY}")
            rows = ref.rows(self.manifest.layout)
            table = values[: len(rows)].reshape(len(rows), -1)
            wrong = np.setdiff1d(np.flatnonzero(is_nan(table).any(axis=1)), self._lost(ref))
            if len(wrong):
                raise CacheCorruptError(
                    f"{self.location}/{key}: row {rows[int(wrong[0])]} is NaN and was not quarantined. {_REMEDY}"
                )
        self._proven.add((ref, array))

    def renew(self) -> None:
        """In a forked child: see :mod:`teacher_cache.storage.files.fork_safety`."""
        self._lock, self._commits_lock = threading.Lock(), threading.Lock()
        self._loading, self._mapped = {}, {}
        self._held_bytes = sum(values.nbytes for values in self._held.values())


_REMEDY = "Run teacher-cache verify to list all damage, and teacher-cache repair CACHE to mend it."
