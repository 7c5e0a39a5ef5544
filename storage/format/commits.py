"""Commit records: one small file per finished chunk, written last.

A chunk with a commit may be trusted once its bytes have the recorded checksum. Records hold nothing that two equal runs
would write differently: seconds and host go to the journal (``teacher_cache.storage.format.journal``).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from teacher_cache.storage.errors import CacheCorruptError
from teacher_cache.storage.files.location import in_parallel
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.format.identity import canonical_json, with_digest, without_digest
from teacher_cache.storage.format.layout import CRC_BYTES, SCALE, Layout, Tower, chunk_shape, stored_arrays
from teacher_cache.storage.format.manifest import CacheManifest

_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
COMMITS = "commits"
_FEW_CHUNKS = 16  # up to this number, one request per chunk; a listing is a request per 1,000 commits of the cache


class ChunkRef(NamedTuple):
    """One chunk: the unit of work, of write, of commit, of retry and of read."""

    tower: Tower
    view: int
    chunk: int

    @property
    def commit_key(self) -> str:
        """Key of its commit record."""
        return f"{COMMITS}/{self.name}.json"

    @property
    def name(self) -> str:
        """``image/v0/000012`` or ``text/000012``."""
        middle = f"v{self.view}/" if self.tower == "image" else ""
        return f"{self.tower}/{middle}{self.chunk:06d}"

    def rows(self, layout: Layout) -> range:
        """Return the rows that it holds. The last chunk of a tower may be short."""
        size, total = layout.chunk_rows(self.tower), layout.rows(self.tower)
        return range(self.chunk * size, min((self.chunk + 1) * size, total))

    def object_keys(self, layout: Layout | None = None) -> dict[str, str]:
        """Return the key of each Zarr object of this chunk, by array name.

        Args:
            layout: layout of the cache. Default: the objects that a chunk has in every cache.
        """
        if self.tower == "image":
            parts = {"embedding": f"{self.chunk}/{self.view}/0", "norm": f"{self.chunk}/{self.view}"}
            parts["view"] = f"{self.chunk}/{self.view}/0"
        else:
            parts = {"embedding": f"{self.chunk}/0", "norm": f"{self.chunk}"}
        if layout is not None and SCALE in stored_arrays(layout, self.tower):
            parts[SCALE] = parts["embedding"]
        return {name: f"targets.zarr/{self.tower}/{name}/c/{place}" for name, place in parts.items()}


def all_chunks(layout: Layout) -> list[ChunkRef]:
    """Return every chunk of a cache: images view by view, then captions."""
    images = [ChunkRef("image", view, chunk) for view in range(layout.views) for chunk in range(layout.chunks("image"))]
    return images + [ChunkRef("text", 0, chunk) for chunk in range(layout.chunks("text"))]


def stretches_of(refs: Iterable[ChunkRef]) -> list[list[ChunkRef]]:
    """Group chunks that hold the same rows (views of the same images), in order of first appearance."""
    stretches: dict[tuple[str, int], list[ChunkRef]] = {}
    for ref in refs:
        stretches.setdefault((ref.tower, ref.chunk), []).append(ref)
    return list(stretches.values())


class ObjectDigest(BaseModel, frozen=True, extra="forbid"):
    """Size and digests of one Zarr object."""

    nbytes: int = Field(gt=0, lt=2**63)
    crc32c: int = Field(ge=0, lt=2**32, description="Checksum of all but the object's last four bytes, which are it.")
    sha256: _Sha256 = Field(description="Digest of the whole object.")


class QuarantinedRow(BaseModel, frozen=True, extra="forbid"):
    """A row without an embedding: it is NaN, and no reader returns it."""

    row: int
    sample_id: str
    reason: str = Field(description="Kind of failure, for counting.")
    detail: str


class ChunkCommit(BaseModel):
    """A finished chunk."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tower: Tower
    view: int = Field(ge=0)
    chunk: int = Field(ge=0)
    rows: tuple[int, int] = Field(description="First row and one past the last.")
    generation: Literal[0] = Field(0, description="Always 0. Part of the records' bytes since the first version.")
    encoder_digest: str = Field(description="Digest of how its rows were made: CacheIdentity.encoder_digest.")
    rows_sha256: _Sha256 = Field(description="Digest of what its rows were made from: tables.chunk_rows_sha256.")
    objects: dict[str, ObjectDigest] = Field(description="Objects by array name: embedding, norm, view, scale.")
    quarantined: tuple[QuarantinedRow, ...] = ()

    @property
    def ref(self) -> ChunkRef:
        """Chunk of this record."""
        return ChunkRef(self.tower, self.view, self.chunk)

    def to_bytes(self) -> bytes:
        """Return one line of JSON with its own digest."""
        fields = self.model_dump(mode="json", exclude_none=True)
        return canonical_json(with_digest(fields)) + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> ChunkCommit:
        """Parse and prove a record.

        Raises:
            CacheCorruptError: not a commit record, or its content does not match its digest.
        """
        try:
            return cls.model_validate(without_digest(json.loads(data)))
        except (ValueError, RecursionError) as error:  # pydantic's error is a ValueError
            raise CacheCorruptError(f"{where}: not a commit record ({error})") from error


def read_commit(files: CacheFiles, manifest: CacheManifest, ref: ChunkRef) -> ChunkCommit | None:
    """Return the commit record of a chunk, proven to belong to this chunk and cache; None if there is none.

    Raises:
        CacheCorruptError: the record is damaged or belongs elsewhere.
    """
    try:
        data = files.read(ref.commit_key)
    except FileNotFoundError:
        return None
    return proven_commit(data, files.location, manifest, ref)


def proven_commit(data: bytes, location: str, manifest: CacheManifest, ref: ChunkRef) -> ChunkCommit:
    """Parse a commit record, and prove that it belongs to this chunk and cache.

    Raises:
        CacheCorruptError: the bytes are damaged or belong elsewhere.
    """
    where = f"{location}/{ref.commit_key}"
    commit = ChunkCommit.from_bytes(data, where)
    rows = ref.rows(manifest.layout)
    if commit.ref != ref or commit.rows != (rows.start, rows.stop):
        raise CacheCorruptError(f"{where}: holds the record of {commit.ref.name} rows {commit.rows}, not of {ref.name}")
    encoder = manifest.identity.encoder_digest
    if commit.encoder_digest != encoder:
        raise CacheCorruptError(
            f"{where}: made by encoder {commit.encoder_digest[:12]} (teacher, preprocessing, tokenizer and dtype), "
            f"this cache is of {encoder[:12]}"
        )
    expected = set(ref.object_keys(manifest.layout))
    if set(commit.objects) != expected:
        raise CacheCorruptError(f"{where}: names objects {sorted(commit.objects)}, {sorted(expected)} wanted")
    return commit


def committed_chunks(files: CacheFiles, refs: Sequence[ChunkRef]) -> set[ChunkRef]:
    """Return the chunks that have a commit record, sound or damaged."""
    if len(refs) <= _FEW_CHUNKS:
        exist = in_parallel(files, lambda ref: files.exists(ref.commit_key), refs)
        return {ref for ref, exists in zip(refs, exist, strict=True) if exists}
    listed = set(files.list(COMMITS))
    return {ref for ref in refs if ref.commit_key in listed}


def quarantined_rows(commits: Iterable[ChunkCommit]) -> dict[int, QuarantinedRow]:
    """Return the image rows without an embedding in some view, by row, with the reason in the first such view."""
    rows: dict[int, QuarantinedRow] = {}
    for commit in sorted(commits, key=lambda commit: commit.ref):
        if commit.tower == "image":
            for row in commit.quarantined:
                rows.setdefault(row.row, row)
    return dict(sorted(rows.items()))


def commits_sha256(commits: Iterable[ChunkCommit]) -> str:
    """Return the digest for the seal: sha256 over key and bytes of each commit record, in the order of the chunks."""
    total = hashlib.sha256()
    for commit in commits:
        total.update(commit.ref.commit_key.encode() + b"\0" + commit.to_bytes())
    return total.hexdigest()


def target_bytes(layout: Layout, refs: Iterable[ChunkRef]) -> int:
    """Return the total bytes of the objects of chunks, before compression.

    All chunks of a tower have one size: the last one is padded.
    """
    counts = Counter(ref.tower for ref in refs)
    return sum(count * _chunk_bytes(layout, tower) for tower, count in counts.items())


def _chunk_bytes(layout: Layout, tower: Tower) -> int:
    return sum(
        math.prod(chunk_shape(layout, tower, name)) * int(dtype[2:]) + CRC_BYTES
        for name, dtype in stored_arrays(layout, tower).items()
    )
