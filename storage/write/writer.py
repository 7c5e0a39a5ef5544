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
from teacher_cache.storage.format.arrays import decode_object, encode_object, object_digest, stored_form
from teacher_cache.storage.format.commit_records import CommitRecords
from teacher_cache.storage.format.commits import (
    ChunkCommit,
    ChunkRef,
    ObjectDigest,
    QuarantinedRow,
    all_chunks,
    committed_chunks,
    proven_commit,
    quarantined_rows,
    read_commit,
)
from teacher_cache.storage.format.int8 import quantize
from teacher_cache.storage.format.journal import ChunkCost, write_cost
from teacher_cache.storage.format.layout import ARRAYS, SCALE, Tower, stored_arrays
from teacher_cache.storage.format.manifest import MANIFEST_KEY, CacheManifest, Seal
from teacher_cache.storage.format.manifest_file import incomplete_message, read_manifest, write_manifest
from teacher_cache.storage.format.row_rules import wrong_rows
from teacher_cache.storage.format.table_rows import TableRows
from teacher_cache.storage.format.tables import CAPTIONS, SAMPLES, chunk_rows_sha256
from teacher_cache.storage.write.claims import clear_claims


class EmbeddingWriter:
    """Writer of the chunks of one planned cache.

    Objects and commit records are created, never replaced, except damaged ones. So a writer that was paused for any
    time can change nothing that another one has committed (``docs/design/025-late-writers.md``).
    """

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
        self.replaces: set[ChunkRef] = set()
        """Chunks whose objects and commit record :meth:`write` replaces: they were committed, and are damaged."""
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
        sound = self.sound(refs)
        return [ref for ref in refs if ref not in sound]

    def sound(self, refs: Sequence[ChunkRef]) -> set[ChunkRef]:
        """Return the chunks that are committed with sound bytes. Adds the damaged ones to ``replaces``."""
        recorded = sorted(self.committed(refs))
        proofs = in_parallel(self.files, self.is_sound, recorded, CHUNKS_AT_ONCE)
        sound = {ref for ref, is_sound in zip(recorded, proofs, strict=True) if is_sound}
        self.replaces.update(set(recorded) - sound)
        return sound

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
        """Write one whole chunk, its commit record last, and return the record that stands.

        A crash leaves at most objects without a commit record. The next write of the chunk keeps those, whose rows may
        differ from its own in the last bits, and adds what is missing. If another process commits the chunk first, its
        record stands, and ``written`` does not get the chunk.

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
            CacheCorruptError: an object without a commit record is damaged.
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
        keys, place = ref.object_keys(layout), self.files.write if ref in self.replaces else self.files.place
        # in any order, but all of them before the commit
        present = in_parallel(self.files, lambda name: place(keys[name], encoded[name][0]), list(keys))
        others = {name: data for name, data in zip(keys, present, strict=True) if data not in (None, encoded[name][0])}
        if others and (standing := read_commit(self.files, self.manifest, ref)) is not None:
            return standing
        commit = ChunkCommit(
            tower=ref.tower,
            view=ref.view,
            chunk=ref.chunk,
            rows=(rows.start, rows.stop),
            encoder_digest=self.manifest.identity.encoder_digest,
            rows_sha256=self.rows_sha256(ref),
            objects=self._placed(ref, encoded, others, quarantined),
            quarantined=tuple(quarantined),
        )
        # commit record last: once it exists, the chunk can be trusted
        if (earlier := place(ref.commit_key, commit.to_bytes())) is not None:
            return proven_commit(earlier, self.files.location, self.manifest, ref)
        self.written.add(ref)
        if cost is not None:
            spent = time.perf_counter() - started
            noted = cost.model_copy(update={"write_seconds": spent, "seconds": cost.seconds + spent})
            write_cost(self.files, ref, noted, commit)
        return commit

    def _placed(
        self,
        ref: ChunkRef,
        encoded: dict[str, tuple[bytes, ObjectDigest]],
        others: dict[str, bytes],
        quarantined: Sequence[QuarantinedRow],
    ) -> dict[str, ObjectDigest]:
        """Return the digests of the objects that are in place, of this writer or an earlier one.

        An earlier writer of the cache had the same teacher and images, so its rows are as right as these.

        Args:
            encoded: bytes and digest of each object as this writer has made it.
            others: bytes of each object that was in place already and differs.

        Raises:
            CacheCorruptError: an object is damaged, or has other quarantined rows.
        """
        layout, rows, keys = self.manifest.layout, ref.rows(self.manifest.layout), ref.object_keys(self.manifest.layout)
        digests, arrays = {name: digest for name, (_, digest) in encoded.items()}, {}
        if not others:
            return digests
        try:
            for name, (own, _) in encoded.items():
                data, (shape, dtype) = others.get(name) or own, stored_form(layout, ref.tower, name)
                digests[name] = object_digest(data)
                stored = decode_object(data, digests[name], shape, dtype, keys[name], layout.compressor)
                arrays[name] = stored[: len(rows)]
            wrong = [f"{name}: {what}" for name, _, what in wrong_rows(rows, arrays, {row.row for row in quarantined})]
        except CacheCorruptError as error:
            wrong = [str(error)]
        if wrong:
            raise CacheCorruptError(
                f"{self.files.location}: {' and '.join(keys[name] for name in others)} of an interrupted run cannot be "
                f"used for {ref.name} ({wrong[0]}). Delete this while no process writes to the cache, and run the same "
                "command again."
            )
        return digests

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
        # another process may have been killed between a commit record, or the seal, and its sync
        self.files.settle([MANIFEST_KEY, *(ref.commit_key for ref in all_chunks(self.manifest.layout))])
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
