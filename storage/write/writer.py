"""Writer of a cache: one whole chunk per call, its commit record last, and a seal at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.errors import CacheCorruptError, CacheIncompleteError
from teacher_cache.storage.files.location import in_parallel, open_files
from teacher_cache.storage.files.protocol import CHUNKS_AT_ONCE
from teacher_cache.storage.format.arrays import decode_object, encode_object, stored_form
from teacher_cache.storage.format.commit_records import CommitRecords
from teacher_cache.storage.format.commits import (
    ChunkCommit,
    ChunkRef,
    QuarantinedRow,
    all_chunks,
    committed_chunks,
    quarantined_rows,
    read_commit,
)
from teacher_cache.storage.format.int8 import quantize
from teacher_cache.storage.format.journal import ChunkCost, write_cost
from teacher_cache.storage.format.layout import ARRAYS, SCALE, Tower, stored_arrays
from teacher_cache.storage.format.manifest import CacheManifest, Seal
from teacher_cache.storage.format.manifest_file import incomplete_message, read_manifest, write_manifest
from teacher_cache.storage.format.row_rules import wrong_rows
from teacher_cache.storage.format.table_rows import TableRows
from teacher_cache.storage.format.tables import CAPTIONS, SAMPLES, chunk_rows_sha256
from teacher_cache.storage.write.claims import clear_claims


class EmbeddingWriter:
    """Writer of the chunks of one planned cache. Writing a chunk again replaces it with equal bytes."""

    def __init__(self, location: str, manifest: CacheManifest | None = None) -> None:
        """Open a planned cache.

        Args:
            manifest: manifest of this cache, where the caller has read it.
        """
        self.files = open_files(location)
        self.manifest = manifest or read_manifest(self.files)
        self.commits: CommitRecords | None = None
        """Commit records of all chunks, once the cache is sealed by this writer."""
        self.written: set[ChunkRef] = set()
        """Chunks that this writer has committed."""
        self.samples = TableRows(self.files, self.manifest, SAMPLES)
        """Samples table, read by rows."""
        self.captions = TableRows(self.files, self.manifest, CAPTIONS)
        """Captions table, read by rows."""

    def table(self, tower: Tower) -> TableRows:
        """Return the table that a tower's rows are made from: samples or captions."""
        return self.samples if tower == "image" else self.captions

    def rows_sha256(self, ref: ChunkRef) -> str:
        """Return ``ChunkCommit.rows_sha256`` of a chunk, from the tables.

        Raises:
            CacheCorruptError: a table is missing or damaged.
        """
        return chunk_rows_sha256(self.table(ref.tower).read(ref.rows(self.manifest.layout)), ref.tower)

    def pending(self) -> list[ChunkRef]:
        """Return the chunks that are not committed with sound bytes.

        Reads all committed chunks once. A damaged chunk is pending, so running again repairs it.
        """
        refs = all_chunks(self.manifest.layout)
        committed = self.committed(refs)
        sound = in_parallel(self.files, self.is_sound, [ref for ref in refs if ref in committed], CHUNKS_AT_ONCE)
        return [ref for ref in refs if ref not in committed or not next(sound)]

    def committed(self, refs: Sequence[ChunkRef]) -> set[ChunkRef]:
        """Return the chunks that have a commit record, damaged ones included."""
        return committed_chunks(self.files, refs)

    def is_committed(self, ref: ChunkRef) -> bool:
        """Return whether the chunk has a commit record, sound or damaged."""
        return self.files.exists(ref.commit_key)

    def is_sound(self, ref: ChunkRef) -> bool:
        """Return whether the chunk is committed for the tables' rows, and its bytes have the committed checksums."""
        layout = self.manifest.layout
        try:
            commit = read_commit(self.files, self.manifest, ref)
            if commit is None or commit.rows_sha256 != self.rows_sha256(ref):
                return False
            for name, key in ref.object_keys(layout).items():
                data, (shape, dtype) = self.files.read(key), stored_form(layout, ref.tower, name)
                decode_object(data, commit.objects[name], shape, dtype, key, layout.compressor)
        except (CacheCorruptError, FileNotFoundError):
            return False
        return True

    def write(
        self,
        ref: ChunkRef,
        arrays: dict[str, NDArray[Any]],
        quarantined: Sequence[QuarantinedRow] = (),
        cost: ChunkCost | None = None,
    ) -> ChunkCommit:
        """Write one whole chunk, its commit record last.

        A crash leaves at most objects without a commit record, which the next write of the chunk replaces.

        Args:
            arrays: ``embedding`` (rows, dim) float16 of unit norm, ``norm`` (rows,) float32, and for images
                ``view`` (rows, 5) float32: crop box in source pixels and flip. Rows of the chunk in order. An int8
                cache quantizes the embeddings here, or takes those of another cache bit for bit: ``embedding``
                (rows, dim) int8 with ``scale`` (1, dim) float32.
            quarantined: rows without embedding. They must be NaN, and no other row may be.
            cost: cost to write to the journal.

        Raises:
            ValueError: wrong arrays, shapes, dtypes or number of rows; a row that is not finite or not of
                unit norm. Nothing is written then.
        """
        layout = self.manifest.layout
        rows = ref.rows(layout)
        self._check(ref, rows, arrays, {row.row for row in quarantined})
        stored = stored_arrays(layout, ref.tower)
        if SCALE in stored and SCALE not in arrays:
            embedding, scale = quantize(arrays["embedding"])
            arrays = {**arrays, "embedding": embedding, SCALE: scale}
        encoded = {
            name: encode_object(arrays[name], *stored_form(layout, ref.tower, name), layout.compressor)
            for name in stored
        }
        started = time.perf_counter()
        # in any order, but all of them before the commit
        keys = ref.object_keys(layout)
        for _ in in_parallel(self.files, lambda name: self.files.write(keys[name], encoded[name][0]), list(keys)):
            pass
        commit = ChunkCommit(
            tower=ref.tower,
            view=ref.view,
            chunk=ref.chunk,
            rows=(rows.start, rows.stop),
            encoder_digest=self.manifest.identity.encoder_digest,
            rows_sha256=self.rows_sha256(ref),
            objects={name: digest for name, (_, digest) in encoded.items()},
            quarantined=tuple(quarantined),
        )
        # commit record last: once it exists, the chunk can be trusted
        self.files.write(ref.commit_key, commit.to_bytes())
        self.written.add(ref)
        if cost is not None:
            spent = time.perf_counter() - started
            noted = cost.model_copy(update={"write_seconds": spent, "seconds": cost.seconds + spent})
            write_cost(self.files, ref, noted, commit)
        return commit

    def _check(self, ref: ChunkRef, rows: range, arrays: dict[str, NDArray[Any]], quarantined: set[int]) -> None:
        stored = set(stored_arrays(self.manifest.layout, ref.tower))
        if set(arrays) not in (set(ARRAYS[ref.tower]), stored):
            raise ValueError(f"{ref.name}: arrays {sorted(arrays)}, {sorted(ARRAYS[ref.tower])} wanted")
        if SCALE in stored and SCALE not in arrays and arrays["embedding"].dtype != np.float16:
            raise ValueError(f"{ref.name}/embedding: {arrays['embedding'].dtype}, float16 wanted")
        for name, values in arrays.items():
            if name != SCALE and len(values) != len(rows):
                raise ValueError(f"{ref.name}/{name}: {len(values)} rows, {len(rows)} wanted")
        if not quarantined <= set(rows):
            raise ValueError(f"{ref.name}: quarantined rows {sorted(quarantined - set(rows))} are not of this chunk")
        for name, _, what in wrong_rows(rows, arrays, quarantined):
            raise ValueError(f"{ref.name}/{name}: {what}. Does the teacher overflow in this precision?")

    def seal(self) -> CacheManifest:
        """Seal the finished cache: add the digest of all commit records to the manifest. May be called again.

        Raises:
            CacheIncompleteError: chunks without a commit record.
        """
        sealed = self._sealed()
        if sealed != self.manifest:
            write_manifest(self.files, sealed)
            self.manifest = sealed
        clear_claims(self.files)
        self.files.remove_partials()
        return self.manifest

    def _sealed(self) -> CacheManifest:
        """Return the manifest with a seal over the current commit records. Keeps the records in ``commits``."""
        layout, records = self.manifest.layout, CommitRecords(self.manifest)
        digest = records.read(self.files)
        if len(records) < layout.num_chunks:
            raise CacheIncompleteError(incomplete_message(self.files, self.manifest, len(records), layout.num_chunks))
        self.commits, lost = records, len(quarantined_rows(records.with_quarantined()))
        seal = Seal(
            commits_sha256=digest,
            images_encoded=layout.image_rows - lost,
            images_quarantined=lost,
            captions_encoded=layout.text_rows,
            stored_bytes=None if layout.compressor is None else records.stored_bytes,
        )
        return self.manifest.model_copy(update={"seal": seal})
