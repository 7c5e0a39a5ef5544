"""A finished cache, or several read as one: rows by number, tables, and the captions of images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from teacher_cache.storage.errors import CacheCorruptError, UsageError
from teacher_cache.storage.files.transient import read_error
from teacher_cache.storage.format.commit_records import CommitRecords
from teacher_cache.storage.format.commits import (
    ChunkCommit,
    ChunkRef,
    QuarantinedRow,
    quarantined_rows,
)
from teacher_cache.storage.format.identity import CacheIdentity
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.format.table_rows import TableRows
from teacher_cache.storage.format.tables import CAPTIONS, KIND, PROBLEMS, ROWS_PER_GROUP, SAMPLES, read_table
from teacher_cache.storage.read.caption_index import CaptionIndex
from teacher_cache.storage.read.chunks import ChunkSource
from teacher_cache.storage.read.content_index import ContentIndex, ContentRows
from teacher_cache.storage.read.resident import ResidentRows, load_resident
from teacher_cache.storage.read.rows import RowSet
from teacher_cache.storage.read.several.part_tables import PartTables
from teacher_cache.storage.read.several.parts import Parts, open_parts
from teacher_cache.storage.read.stream import Batch, Prove, stream_rows

_DEFAULT_MEMORY_BYTES = 2 << 30
_NO_ENTRY = -(1 << 62)  # a caption of a kind that the manifest does not name: refused as unsorted


class EmbeddingReader:
    """A sealed cache, or several of one teacher that are read as one, for training and evaluation.

    Chunks are read whole, proven, and kept in memory up to ``memory_bytes`` (LRU), so a cache that fits is read once.
    Streams of a local cache also keep up to ``memory_bytes`` of each array memory-mapped. Threads may share a reader:
    they load different chunks at the same time, and each chunk once. A pickled reader is opened again in the worker
    process.

    Attributes:
        parts: The cache, or the caches that are read as one.
        manifest: Manifest of the cache; of several one that stands for all.
        chunks: Chunks of the cache, for code that reads whole chunks.
    """

    def __init__(
        self,
        location: str,
        memory_bytes: int = _DEFAULT_MEMORY_BYTES,
        manifest_digest: str | None = None,
        parts: Parts | None = None,
        commits: Sequence[CommitRecords] | None = None,
    ) -> None:
        """Open the cache; reads the manifest only.

        Args:
            location: Folder or URL of the cache. A ``*`` in its last name stands for parts that are read as one:
                ``parts/*.cache``. Their rows follow each other in the order of the names, 9 before 10.
            memory_bytes: Budget of the chunks that stay in memory.
            manifest_digest: Digest that the manifest must have.
            parts: The cache, if the caller has opened it.
            commits: Commit records of each part, if the caller has read them.

        Raises:
            CacheNotFoundError, CacheFormatError, CacheCorruptError: There is no cache, or it cannot be read.
            CacheIncompleteError: The cache is not sealed; the message says how many chunks are committed.
            CacheMismatchError: The manifest has another digest, or parts are not of one identity and layout.
        """
        self.location = location
        self.parts = parts or open_parts(location, manifest_digest)
        self.manifest = self.parts.manifest
        self.chunks = ChunkSource(self.parts, memory_bytes, commits)

    def __reduce__(self) -> tuple[Any, ...]:
        # a spawned worker opens the files for itself; manifests and records come with the pickle
        return _reopened, (self.parts, self.chunks.memory_bytes, self.chunks.commits_read)

    def __len__(self) -> int:
        return self.manifest.layout.image_rows

    def __repr__(self) -> str:
        layout, dtype = self.manifest.layout, self.manifest.identity.targets.dtype
        return (
            f"<{type(self).__name__} {self.location}: {layout.image_rows:,} images in {self.views} view(s), "
            f"{layout.text_rows:,} captions, {layout.embed_dim} x {dtype}>"
        )

    @property
    def objects_read(self) -> int:
        """Number of chunk objects that were read so far."""
        return self.chunks.objects_read

    @property
    def bytes_read(self) -> int:
        """Bytes of the chunk objects that were read so far."""
        return self.chunks.bytes_read

    @property
    def embed_dim(self) -> int:
        """Width of the teacher's embeddings."""
        return self.manifest.layout.embed_dim

    @property
    def views(self) -> int:
        """Number of views of each image; view 0 is the evaluation crop."""
        return self.manifest.layout.views

    @property
    def identity(self) -> CacheIdentity:
        """Identity of the cache: how its rows were made and from what."""
        return self.manifest.identity

    @cached_property
    def samples(self) -> pa.Table:
        """Table of one row per image - row, sample_id, uri, offset, length, content_sha256, split."""
        return self._table(SAMPLES)

    @cached_property
    def captions(self) -> pa.Table:
        """Table of one row per caption, grouped by image - row, image_row, text, and kind where captions have kinds."""
        return self._table(CAPTIONS)

    @cached_property
    def problems(self) -> pa.Table:
        """Table of the dataset's parts that got no row, and why - kind, where, detail, lost_image."""
        return self._table(PROBLEMS)

    def table_rows(self, name: str, rows: NDArray[np.int64]) -> pa.Table:
        """Return rows of a table, ``"samples"`` or ``"captions"``, in the order given, without loading all of it."""
        with self._named(name):
            return self.table(name).take(rows)

    def table(self, name: str, open_files: int = 2, columns: Sequence[str] | None = None) -> TableRows | PartTables:
        """Return a table to read rows of by number. It is not in memory; for the arguments see ``TableRows``."""
        if len(self.parts) > 1:
            return PartTables(self.parts, name, open_files, columns)
        (only,) = self.parts.members
        return TableRows(only.files, only.manifest, name, open_files, columns)

    def _table(self, name: str) -> pa.Table:
        with self._named(name):
            if len(self.parts) > 1:
                return pa.concat_tables(self.table(name).parts()).combine_chunks()
            (only,) = self.parts.members
            return read_table(only.files, only.manifest, name)

    def column(self, table: str, name: str) -> Iterator[pa.ChunkedArray]:
        """Yield a column of a table in parts of at most 65,536 rows. Parts do not stay in memory."""
        return (part[name] for part in self._columns(table, [name]))

    def _columns(self, table: str, names: list[str]) -> Iterator[pa.Table]:
        """Yield columns of a table as :meth:`column` does. Each file is read once."""
        with self._named(table):
            whole = self.__dict__.get(table)
            parts = self.table(table, columns=names).parts() if whole is None else [whole]
            for part in parts:
                for start in range(0, len(part), ROWS_PER_GROUP):
                    yield part.select(names).slice(start, ROWS_PER_GROUP)

    @contextmanager
    def _named(self, table: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise read_error(f"{self.location}/{table}", error) from error

    @cached_property
    def caption_offsets(self) -> NDArray[np.int64]:
        """Offsets of captions, (images + 1,) - image ``i`` has rows ``offsets[i]`` to ``offsets[i + 1]``."""
        return self.caption_index.offsets()

    @cached_property
    def caption_index(self) -> CaptionIndex:
        """Index from images to their captions, at most one byte per image."""
        owners = (part.to_numpy() for part in self.column(CAPTIONS, "image_row"))
        return CaptionIndex(self.manifest.layout.image_rows, owners, f"{self.location}/{CAPTIONS}")

    @property
    def caption_kinds(self) -> tuple[str, ...]:
        """Kinds of the captions, sorted; none where the dataset names no kinds."""
        return tuple(sorted(self.identity.dataset.caption_kinds or ()))

    @cached_property
    def kind_index(self) -> CaptionIndex:
        """Index from images and kinds to captions, at most one byte per image and kind.

        With K kinds, the captions of image ``i`` and kind number ``k`` of :attr:`caption_kinds` have entry K * i + k.
        """
        kinds = pa.array(self.caption_kinds, pa.string())
        owners = (
            part["image_row"].to_numpy() * len(kinds)
            + pc.fill_null(pc.index_in(part[KIND], value_set=kinds).cast(pa.int64()), _NO_ENTRY).to_numpy()
            for part in self._columns(CAPTIONS, ["image_row", KIND])
        )
        return CaptionIndex(len(self) * len(kinds), owners, f"{self.location}/{CAPTIONS}, {len(kinds)} kinds an image")

    def kind_entries(self, image_rows: NDArray[np.int64], kinds: Sequence[str]) -> NDArray[np.int64]:
        """Return the entries of images and kinds in :attr:`kind_index`, (images, kinds) int64.

        Raises:
            UsageError: The captions have no such kind; the message lists the kinds.
        """
        if unknown := [kind for kind in kinds if kind not in self.caption_kinds]:
            known = f"there are {', '.join(self.caption_kinds)}"
            if not self.caption_kinds:
                known = (
                    "its dataset names no kinds. A dataset with ?caption=KIND:PLACE,... makes a cache that has them, "
                    f"and all rows are copied: precompute --reuse {self.location} --cache NEW"
                )
            raise UsageError(f"{self.location}: no caption is of kind {unknown[0]!r}; {known}")
        numbers = np.array([self.caption_kinds.index(kind) for kind in kinds], np.int64)
        return image_rows[:, None] * len(self.caption_kinds) + numbers

    @cached_property
    def quarantined(self) -> tuple[QuarantinedRow, ...]:
        """Image rows without an embedding in some view, each once, with reasons. Reads the commits once."""
        return tuple(quarantined_rows(self.chunks.commits.with_quarantined()).values())

    def quarantined_in(self, view: int) -> dict[int, QuarantinedRow]:
        """Return the image rows without an embedding in one view, by row."""
        commits = [commit for commit in self.chunks.commits.with_quarantined() if commit.view == view]
        return quarantined_rows(commits)

    def image_rows(self, split: str | None = None) -> NDArray[np.int64]:
        """Return :meth:`row_set` as an array, (images,) int64, ascending."""
        return self.row_set(split).numbers()

    def row_set(self, split: str | None = None) -> RowSet:
        """Return the images that have an embedding in every view.

        Args:
            split: Split of the images. Default: all images.

        Raises:
            UsageError: No image is of this split; the message lists the splits.
        """
        total = self.manifest.layout.image_rows
        rows = RowSet(total, full=True) if split is None else self._rows_of_split(split)
        for row in self.quarantined:
            rows.remove(row.row)
        return rows

    def _rows_of_split(self, split: str) -> RowSet:
        self.manifest.require_split(split, self.location)
        total = self.manifest.layout.image_rows
        rows, at = RowSet(total), 0
        for part in self.column(SAMPLES, "split"):
            rows.add(at, pc.fill_null(pc.equal(part, split), False).to_numpy()[: max(total - at, 0)])
            at += len(part)
        if at != total:
            raise CacheCorruptError(f"{self.location}/{SAMPLES}: {at:,} rows, the manifest says {total:,}")
        return rows

    def rows_of(self, sample_ids: Iterable[str]) -> NDArray[np.int64]:
        """Return the image rows of some sample ids, in their order, (ids,) int64. Reads one column by parts.

        Raises:
            UsageError: The cache has no image of some id; the message names the first.
        """
        ids = pa.array(sample_ids, pa.string())
        rows, first = np.full(len(ids), -1, np.int64), 0
        for part in self.column(SAMPLES, "sample_id"):
            at = pc.fill_null(pc.index_in(ids, value_set=part.combine_chunks()), -1).to_numpy().astype(np.int64)
            rows = np.where((rows < 0) & (at >= 0), at + first, rows)
            first += len(part)
        if (rows < 0).any():
            missing = np.flatnonzero(rows < 0)
            others = f", nor {len(missing) - 1:,} others" if len(missing) > 1 else ""
            raise UsageError(
                f"{self.location}: no image has the sample_id {ids[int(missing[0])].as_py()!r}{others}. teacher-cache "
                "look shows some"
            )
        return rows

    def lookup(
        self, image_sha256: str | Sequence[str] | None = None, caption: str | Sequence[str] | None = None
    ) -> ContentRows:
        """Return the rows of some content, in the order given, of all splits.

        The first call of each kind reads columns of the tables; later ones take some microseconds per row.

        Args:
            image_sha256: sha256 of each image's stored bytes (``hashlib.sha256(data).hexdigest()``), not of its pixels.
            caption: text of each caption, without regard to white space at its ends. With ``image_sha256``: a caption
                of this very image. One string stands for a list of one.

        Returns:
            Image rows, caption rows, or both, (n,) int64. Equal content has equal embeddings; its first row counts.

        Raises:
            UsageError: The cache has no such image or caption; the message names the first.
            ValueError: Nothing was given, or the numbers of images and captions differ.
        """
        images, captions = ([one] if isinstance(one, str) else one for one in (image_sha256, caption))
        return self._content_index.rows(images, captions)

    @cached_property
    def _content_index(self) -> ContentIndex:
        return ContentIndex(self.column, self.location)

    def caption_rows(
        self, image_rows: NDArray[np.int64], kind: str | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the caption rows of images, in their order, and the position of each caption's image.

        Args:
            kind: Kind of the captions. Default: all captions.

        Raises:
            UsageError: As :meth:`kind_entries`.
        """
        if kind is None:
            return self.caption_index.captions_of(image_rows)
        return self.kind_index.captions_of(self.kind_entries(image_rows, [kind])[:, 0])

    def require_captions(self, image_rows: NDArray[np.int64] | RowSet, way_out: str, kinds: Sequence[str] = ()) -> None:
        """Check that every image has a caption.

        Args:
            way_out: advice for the error, unless the captions are prompts of classes.
            kinds: kinds of captions, of which each image must have one. Default: any caption.

        Raises:
            UsageError: Images have no caption, the message says how many; or there is no such kind.
        """
        bare = 0
        for part in RowSet.of(image_rows).parts():
            entries = self.kind_entries(part, kinds) if kinds else part
            index = self.kind_index if kinds else self.caption_index
            counts = index.counts(entries.ravel()).reshape(len(part), -1)
            bare += int((counts.sum(axis=1) == 0).sum())
        if bare and kinds:
            raise UsageError(
                f"{self.location}: {bare:,} of {len(image_rows):,} images have no caption of kind "
                f"{' or '.join(kinds)}; the kinds are {', '.join(self.caption_kinds)}. {way_out}"
            )
        if bare:
            if self.identity.dataset.kind == "labelled":
                way_out = (
                    "This cache is of labelled images and the prompts of their classes. Measure it by teacher-cache "
                    "zero-shot --cache, or name a cache of images with captions."
                )
            elif bare < len(image_rows):
                way_out += " ?uncaptioned=drop behind the dataset leaves such images out of a new cache."
            raise UsageError(f"{self.location}: {bare:,} of {len(image_rows):,} images have no caption. {way_out}")

    def take(
        self,
        tower: Tower,
        rows: NDArray[np.int64],
        view: int | NDArray[np.int64] = 0,
        array: str = "embedding",
    ) -> NDArray[Any]:
        """Return rows of one array, in the order given, as a new array of the stored dtype; int8 as float32.

        Args:
            tower: ``"image"`` or ``"text"``.
            rows: Row numbers, (rows,); each chunk is looked up once.
            view: View of the images, one for all rows or (rows,) one for each.
            array: ``"embedding"`` (unit norm), ``"norm"`` (before normalizing), or of images ``"view"`` (crop box).

        Raises:
            IndexError: The cache does not have a row or view.
            ValueError: The number of views is not that of the rows, or there is no such array.
            CacheCorruptError: A chunk is damaged or missing, or a row was quarantined. Never another row's data,
                never NaN.
            CacheAccessError, CacheUnreachableError: A chunk cannot be read.
        """
        return self.chunks.take(tower, rows, view, array)

    def stream(
        self,
        tower: Tower,
        batches: Iterable[Batch],
        array: str = "embedding",
        prove: Prove = "first",
        read_ahead_bytes: int | None = None,
        threads: int | None = None,
    ) -> Iterator[NDArray[Any]]:
        """Yield the rows of each of ``batches``, in order, as :meth:`take` returns them, with one copy per row.

        Threads prefetch the chunks of later batches while earlier ones are used. In the order of
        ``teacher_cache.storage.read.shuffle`` each chunk is read once per epoch. Memory is bounded by the chunks of
        some batches and ``read_ahead_bytes``, for any size of the cache. Files of a local cache are memory-mapped,
        not copied (see ``teacher_cache.storage.read.chunk_region`` for a file that is cut short); up to
        ``memory_bytes`` of an array stay mapped for the next stream, in the system's page cache. Objects of a store
        stay in memory as with :meth:`take`. A forked process cannot continue a stream of its parent.

        Args:
            tower: ``"image"`` or ``"text"``.
            batches: Rows, or (rows, views) with a view for each row; consumed ahead of the results.
            array: As in :meth:`take`.
            prove: Which reads of a mapped chunk to check: the ``"first"`` by this reader, or ``"every"``.
            read_ahead_bytes: Maximum bytes of prefetched chunks. Default: 64 MiB; 128 MiB for a store.
            threads: Number of parallel loads. Default: 2; more for a store.

        Yields:
            New arrays, as :meth:`take` returns them; their memory is reused once nothing refers to them.

        Raises:
            Exception: As :meth:`take`; up to some ten thousand rows before the batch with the error.
        """
        return stream_rows(self.chunks, tower, batches, array, prove, read_ahead_bytes, threads)

    def resident(self, tower: Tower, array: str = "embedding") -> ResidentRows:
        """Load all rows of one array into memory, for fully random orders.

        Processes that use it share one copy; it does not count against ``memory_bytes``. See
        :mod:`teacher_cache.storage.read.resident`.

        Args:
            tower: ``"image"`` or ``"text"``.
            array: As in :meth:`take`.

        Raises:
            CacheCorruptError, CacheAccessError, CacheUnreachableError: As :meth:`take`.
            ValueError: There is no such array.
            MemoryError: The rows do not fit in memory.
        """
        return load_resident(self.chunks, tower, array)

    def chunk(self, ref: ChunkRef, array: str = "embedding") -> NDArray[Any]:
        """Return all rows of one chunk, read-only, of the dtype of :meth:`take`; quarantined rows are NaN.

        Raises:
            IndexError: There is no such chunk.
            ValueError: There is no such array.
            CacheCorruptError, CacheAccessError, CacheUnreachableError: As :meth:`take`.
        """
        self.chunks.require_chunk(ref)
        self.chunks.require_array(ref.tower, array)
        rows = len(self.parts.rows(ref))
        values = self.chunks.dequantized(ref, self.chunks.chunk(ref, array)[:rows])
        values.flags.writeable = False
        return values

    def stored_chunk(self, ref: ChunkRef) -> dict[str, NDArray[Any]]:
        """Return the stored arrays of one chunk by name, without padding, for an exact copy.

        Raises:
            IndexError, CacheCorruptError, CacheAccessError, CacheUnreachableError: As :meth:`chunk`.
        """
        self.chunks.require_chunk(ref)
        rows = len(self.parts.rows(ref))
        return {name: self.chunks.chunk(ref, name)[:rows] for name in ref.object_keys(self.manifest.layout)}

    def commits(self) -> Mapping[ChunkRef, ChunkCommit]:
        """Return the commit records of all chunks. Reads them once.

        Raises:
            CacheCorruptError, CacheAccessError, CacheUnreachableError: As :meth:`take`.
        """
        return self.chunks.commits


def _reopened(parts: Parts, memory_bytes: int, commits: Sequence[CommitRecords] | None) -> EmbeddingReader:
    return EmbeddingReader(parts.location, memory_bytes, parts=parts, commits=commits)
