"""Writing a cache: plan it once, then one whole chunk per call, commit record last, seal at the end."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.arrays import (
    ARRAYS,
    chunk_shape,
    decode_object,
    encode_object,
    stored_arrays,
    stored_dtype,
    zarr_metadata,
)
from storage.claims import PLAN, Claims, clear_claims
from storage.commit_records import CommitRecords
from storage.commits import (
    ChunkCommit,
    ChunkRef,
    QuarantinedRow,
    Tower,
    all_chunks,
    committed_chunks,
    generation_chunks,
    quarantined_rows,
    read_commit,
)
from storage.errors import CacheCorruptError, CacheIncompleteError, CacheMismatchError
from storage.files import CHUNKS_AT_ONCE, CacheFiles, in_parallel, open_files
from storage.identity import CacheIdentity, ViewsIdentity
from storage.journal import ChunkCost, write_cost
from storage.manifest import (
    BACKUP_KEY,
    MANIFEST_KEY,
    CacheManifest,
    Generation,
    Layout,
    Seal,
    Source,
    StaticFile,
    finished_by,
)
from storage.place import require_place
from storage.quantized import quantize
from storage.root import planned_manifest, read_manifest, write_manifest
from storage.rows import wrong_rows
from storage.shapes import SCALE
from storage.table_rows import TableRows
from storage.tables import CAPTIONS, PROBLEMS, SAMPLES, chunk_rows_sha256, read_static, read_table, table_files

__all__ = ["EmbeddingWriter", "incomplete_message", "plan_cache", "require_asked"]

_PLAN_POLL_SECONDS = 0.2


def plan_cache(
    location: str,
    identity: CacheIdentity,
    layout: Layout,
    source: Source,
    tables: dict[str, pa.Table],
    made_with: dict[str, str],
) -> CacheManifest:
    """Start a cache, or take up the one that is there if it is the same; with more views wanted, add them to its plan.

    A second call with the same arguments changes nothing, and a cache that has more views is taken as it is. Several
    processes may call at once: one plans, the others wait for it and compare. A crash leaves a cache without manifest,
    which the next call writes anew; or one whose manifest has the new views and whose Zarr metadata has not, which the
    next call writes again.

    Args:
        tables: samples, captions and problems (``storage.tables``).
        made_with: versions of the libraries, kept from the first call.

    Raises:
        CacheMismatchError: another cache is there; the message names each field that differs.
    """
    files = open_files(location)
    files.remove_partials()
    with Claims(files) as claims:
        while True:
            if files.exists(MANIFEST_KEY) or files.exists(BACKUP_KEY):
                manifest = _take_up(files, identity, layout, tables)
                if manifest.identity.views.holds(identity.views):
                    return manifest
            else:
                require_place(files)
            if claims.take(PLAN):
                break
            time.sleep(_PLAN_POLL_SECONDS)
        if files.exists(MANIFEST_KEY):  # of the one that has just given the claim back, or to be given more views
            manifest = _take_up(files, identity, layout, tables)
            if manifest.identity.views.holds(identity.views):
                return manifest
            return _add_views(files, manifest, identity.views, made_with)
        return _start(files, identity, layout, source, tables, made_with)


def _take_up(files: CacheFiles, identity: CacheIdentity, layout: Layout, tables: dict[str, pa.Table]) -> CacheManifest:
    """The manifest that is there, if it is of the very cache that is asked for, apart from the number of views."""
    manifest = planned_manifest(files)
    require_asked(manifest, identity, layout, files.location)
    if manifest.adds_views:
        _write_metadata(files, manifest)
    for key, wanted in manifest.files.items():
        read_static(files, key, wanted)
    places = ["uri", "offset", "length"]
    if not read_table(files, manifest, SAMPLES).select(places).equals(tables[SAMPLES].select(places)):
        raise CacheMismatchError(
            f"{files.location}: lists the same images at other places ({manifest.source.dataset}). Name the dataset "
            "in the same form; its folder may have moved."
        )
    return manifest


def require_asked(manifest: CacheManifest, identity: CacheIdentity, layout: Layout, where: str) -> None:
    """Refuse a cache that is another one than is asked for, apart from the number of views.

    Raises:
        CacheMismatchError: names what differs.
    """
    have, views = manifest.layout, manifest.identity.views
    if views.holds(identity.views) or views.count == 1:
        # the one view there is has no settings that new ones could differ from
        identity = identity.model_copy(update={"views": views})
    else:
        identity = identity.model_copy(update={"views": identity.views.model_copy(update={"count": views.count})})
    layout = layout.model_copy(update={"views": have.views})
    manifest.identity.require(identity, where)
    if have != layout:
        raise CacheMismatchError(
            f"{where}: chunks of {have.image_chunk_rows} images and {have.text_chunk_rows} captions in "
            f"batches of {have.batch_rows} in the cache, {layout.image_chunk_rows}, {layout.text_chunk_rows} and "
            f"{layout.batch_rows} asked for. Leave chunk rows and batch size out, or encode to a new path."
        )


def _add_views(
    files: CacheFiles, manifest: CacheManifest, views: ViewsIdentity, made_with: dict[str, str]
) -> CacheManifest:
    """Plan more views of a cache; what is there is not touched, but for the shapes in Zarr's metadata."""
    grown = manifest.layout.model_copy(update={"views": views.count})
    before, after = zarr_metadata(manifest.layout), zarr_metadata(grown)
    changed = {key: StaticFile(sha256=_sha256(data)) for key, data in after.items() if data != before[key]}
    planned = manifest.with_views(views, changed, made_with)
    # manifest first: from then on it says what the metadata has to be, and any precompute can write that
    write_manifest(files, planned)
    _write_metadata(files, planned)
    return planned


def _write_metadata(files: CacheFiles, manifest: CacheManifest) -> None:
    """Zarr's metadata where it is not that of the layout: of before views were planned. Only with the planned bytes."""
    for key, data in zarr_metadata(manifest.layout).items():
        if manifest.files[key].sha256 == _sha256(data):
            try:
                read_static(files, key, manifest.files[key])
            except CacheCorruptError:
                files.write(key, data)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _static_contents(layout: Layout, tables: dict[str, pa.Table]) -> dict[str, tuple[bytes, int | None]]:
    """Bytes, and rows of a parquet file, of every file that is written when a cache is planned, by key."""
    contents: dict[str, tuple[bytes, int | None]] = {key: (data, None) for key, data in zarr_metadata(layout).items()}
    for name in (SAMPLES, CAPTIONS, PROBLEMS):
        contents.update(table_files(name, tables[name]))
    return contents


def _start(
    files: CacheFiles,
    identity: CacheIdentity,
    layout: Layout,
    source: Source,
    tables: dict[str, pa.Table],
    made_with: dict[str, str],
) -> CacheManifest:
    contents = _static_contents(layout, tables)
    for _ in in_parallel(files, lambda key: files.write(key, contents[key][0]), list(contents)):
        pass
    static = {key: StaticFile(sha256=_sha256(data), rows=rows) for key, (data, rows) in contents.items()}
    problems = tables[PROBLEMS]
    counts = {item["values"]: item["counts"] for item in problems["kind"].value_counts().to_pylist()}
    generation = Generation(
        number=0,
        image_rows=(0, layout.image_rows),
        text_rows=(0, layout.text_rows),
        lost_images=sum(problems["lost_image"].to_pylist()),
        problems=dict(sorted(counts.items())),
    )
    manifest = CacheManifest(
        identity_digest=identity.digest,
        identity=identity,
        layout=layout,
        source=source,
        files=dict(sorted(static.items())),
        generations=(generation,),
        made_with=made_with,
    )
    # manifest last: whoever finds it may trust the tables and the metadata that it names
    write_manifest(files, manifest)
    return manifest


class EmbeddingWriter:
    """Writes the chunks of one planned cache. Writing a chunk again replaces it with equal bytes."""

    def __init__(self, location: str) -> None:
        self.files = open_files(location)
        self.manifest = read_manifest(self.files)
        self.samples = TableRows(self.files, self.manifest, SAMPLES)
        """One row per image, read as asked for."""
        self.captions = TableRows(self.files, self.manifest, CAPTIONS)
        """One row per caption, read as asked for."""

    def table(self, tower: Tower) -> TableRows:
        """Of what a tower's rows are made: the samples, or the captions."""
        return self.samples if tower == "image" else self.captions

    def rows_sha256(self, ref: ChunkRef) -> str:
        """``ChunkCommit.rows_sha256`` of a chunk, by the tables.

        Raises:
            CacheCorruptError: a table is missing or damaged.
        """
        return chunk_rows_sha256(self.table(ref.tower).read(ref.rows(self.manifest.layout)), ref.tower)

    def pending(self) -> list[ChunkRef]:
        """Chunks that are not done. Done means: committed, and every byte has the committed checksum.

        Reads all committed chunks once; a damaged one counts as pending, so running again repairs it.
        """
        refs = all_chunks(self.manifest.layout)
        committed = self.committed(refs)
        sound = in_parallel(self.files, self.is_sound, [ref for ref in refs if ref in committed], CHUNKS_AT_ONCE)
        return [ref for ref in refs if ref not in committed or not next(sound)]

    def committed(self, refs: Sequence[ChunkRef]) -> set[ChunkRef]:
        """Those of some chunks that have a commit record, in whatever state."""
        return committed_chunks(self.files, refs)

    def is_committed(self, ref: ChunkRef) -> bool:
        """Whether the chunk has a commit record, in whatever state."""
        return self.files.exists(ref.commit_key)

    def is_sound(self, ref: ChunkRef) -> bool:
        """Whether the chunk is committed, of these very rows, and every byte has the committed checksum."""
        layout = self.manifest.layout
        try:
            commit = read_commit(self.files, self.manifest, ref)
            if commit is None or commit.rows_sha256 != self.rows_sha256(ref):
                return False
            for name, key in ref.object_keys(layout).items():
                shape, dtype = chunk_shape(layout, ref.tower, name), stored_dtype(layout, ref.tower, name)
                decode_object(self.files.read(key), commit.objects[name], shape, dtype, key)
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

        A crash in between leaves at most objects without commit, which the next write of the chunk replaces.

        Args:
            arrays: ``embedding`` (rows, dim) float16 of unit norm, ``norm`` (rows,) float32, and for images
                ``view`` (rows, 5) float32: crop box in source pixels and flip. Rows of the chunk in order. A cache of
                int8 rounds the embeddings here; it takes them rounded too, of another cache, bit for bit:
                ``embedding`` (rows, dim) int8 with ``scale`` (1, dim) float32.
            quarantined: rows without embedding; theirs must be NaN, all others must not be.
            cost: noted in the journal.

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
            name: encode_object(
                arrays[name], chunk_shape(layout, ref.tower, name), stored_dtype(layout, ref.tower, name)
            )
            for name in stored
        }
        started = time.perf_counter()
        # all of them before the commit, in whatever order
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
        # commit record last: whoever finds it may trust the chunk before it
        self.files.write(ref.commit_key, commit.to_bytes())
        if cost is not None:
            spent = time.perf_counter() - started
            write_cost(
                self.files,
                ref,
                cost.model_copy(update={"write_seconds": spent, "seconds": cost.seconds + spent}),
                commit,
            )
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
        """Fix the finished cache: the manifest then vouches for every commit. Sealing again changes nothing.

        Raises:
            CacheIncompleteError: chunks without commit record.
        """
        self._seal(everything=True)
        # of those who were killed beside this process
        clear_claims(self.files)
        self.files.remove_partials()
        return self.manifest

    def seal_again(self) -> CacheManifest:
        """Bring the seals that there are up to the commits as they are after a repair; views in the making stay open.

        Raises:
            CacheIncompleteError: chunks of a sealed generation have no commit record.
        """
        self._seal(everything=False)
        return self.manifest

    def _seal(self, everything: bool) -> None:
        if self._sealed(everything) == self.manifest:
            return
        with Claims(self.files) as claims:
            # views that somebody plans at this moment must not be lost
            claims.wait_for(PLAN)
            self.manifest = read_manifest(self.files)
            sealed = self._sealed(everything)
            if sealed != self.manifest:
                write_manifest(self.files, sealed)
            self.manifest = sealed

    def _sealed(self, everything: bool) -> CacheManifest:
        """The manifest with the seals that its commits give now, of all generations or of those that have one."""
        manifest, layout = self.manifest, self.manifest.layout
        generations: list[Generation] = []
        records = CommitRecords(manifest)
        for generation in manifest.generations if everything else manifest.sealed_generations:
            digest = records.read(self.files, generation)
            if any(ref not in records for ref in generation_chunks(manifest, generation)):
                done = len(self.committed(all_chunks(layout)))
                raise CacheIncompleteError(incomplete_message(self.files.location, manifest, done, layout.num_chunks))
            lost = len(quarantined_rows(records.with_quarantined(), manifest.views_of(generation)[1]))
            seal = Seal(
                commits_sha256=digest,
                images_encoded=layout.image_rows - lost,
                images_quarantined=lost,
                captions_encoded=layout.text_rows,
            )
            generations.append(generation.model_copy(update={"seal": seal}))
        generations += manifest.generations[len(generations) :]
        return manifest.model_copy(update={"generations": tuple(generations)})


def incomplete_message(location: str, manifest: CacheManifest, done: int, wanted: int) -> str:
    """How an unfinished cache is reported, wherever it is met."""
    command = finished_by(manifest.made_with, len(manifest.sealed_generations))
    return f"{location}: {done} of {wanted} chunks are there. Run the same {command} command again to finish it."
