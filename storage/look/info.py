"""State of a cache, from its manifest, commit names and journal. No embedding is read.

Reads are bounded: beyond :data:`NOTES_READ` notes the cost is an estimate, and beyond :data:`COMMITS_READ` commit
records the quarantined rows are not named. The result says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, Field

from teacher_cache.storage.errors import CacheCorruptError
from teacher_cache.storage.files.location import in_parallel, open_files
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.format.commits import (
    ChunkCommit,
    ChunkRef,
    QuarantinedRow,
    all_chunks,
    committed_chunks,
    quarantined_rows,
    read_commit,
    target_bytes,
)
from teacher_cache.storage.format.identity import CacheIdentity
from teacher_cache.storage.format.journal import JOURNAL, ChunkCost, read_cost
from teacher_cache.storage.format.layout import ARRAYS, Layout, Tower
from teacher_cache.storage.format.manifest import CacheManifest, Seal
from teacher_cache.storage.format.manifest_file import finished_how, read_manifest

NOTES_READ = 1000
"""Maximum number of journal notes read per tower. If there are more, evenly spaced ones are read."""

COMMITS_READ = 1000
"""Maximum number of commit records of images read for the reasons of quarantine."""

_ROWS_NAMED = 20


class Coverage(BaseModel, frozen=True):
    """Progress of one view of the images, or of the captions."""

    tower: Literal["image", "text"]
    view: int
    chunks: int
    chunks_committed: int
    rows: int
    rows_committed: int


class CacheProblem(BaseModel, frozen=True):
    """Part of a dataset without an embedding, and why."""

    kind: str
    where: str = Field(description="The sample_id, file, line or row concerned.")
    detail: str
    lost_image: bool = Field(description="True if an image has no row because of it.")

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.detail.removeprefix(f'{self.where}: ')}"


class CacheProblems(BaseModel, frozen=True):
    """Result of ``teacher-cache info --problems``: problems of the dataset, then quarantined images."""

    location: str
    problems: tuple[CacheProblem, ...]


class ChunkState(NamedTuple):
    """State of a chunk, from its commit record."""

    ref: ChunkRef
    committed: bool
    quarantined: tuple[QuarantinedRow, ...] | None
    """None if too many records would have to be read."""


class CacheInfo(BaseModel, frozen=True):
    """Result of ``teacher-cache info``."""

    location: str
    parts: int = Field(1, description="Number of caches that are read as one.")
    format_version: int
    sealed: bool = Field(description="True if the cache is complete and its bytes are fixed.")
    unfinished: str | None = Field(description="Processes that work on the cache, or the command that finishes it.")
    manifest_digest: str
    identity_digest: str
    identity: CacheIdentity
    layout: Layout
    seal: Seal | None
    dataset: str
    image_root: str
    chunks: int
    chunks_committed: int
    coverage: tuple[Coverage, ...] = Field(description="Views of the images in order, then captions.")
    images_encoded: int | None = Field(description="Images with an embedding in every view; None until sealed.")
    images_quarantined: int | None = Field(description="Images without an embedding in some view; None until sealed.")
    quarantine: dict[str, int] | None = Field(
        description="Images without an embedding in some committed chunk, by reason; None if too many records would "
        "have to be read."
    )
    quarantined_rows: tuple[QuarantinedRow, ...] = Field(description="First quarantined rows.")
    lost_images: int
    problems: dict[str, int] = Field(description="Problems met while the dataset was read, by kind.")
    target_bytes: int = Field(
        description="Bytes of all chunk objects when complete; before compression, if that is not known yet."
    )
    encode_seconds: float = Field(description="Sum over the committed chunks' journal notes.")
    notes: int = Field(description="Notes in the journal.")
    notes_read: int = Field(description="Notes that were read; the seconds are scaled up from them.")
    images_per_second: float | None
    captions_per_second: float | None
    remaining_seconds: float | None = Field(
        description="Estimated seconds until complete, by one process at these rates; None if a rate is not known."
    )
    made_with: dict[str, str]


def describe_cache(location: str) -> CacheInfo:
    """Return the state of a cache.

    Raises:
        CacheNotFoundError, CacheFormatError, CacheCorruptError: see ``teacher_cache.storage.errors``.
    """
    files, manifest, refs, committed = _chunks_of(location)
    coverage = _coverage(manifest.layout, refs, committed)
    costs = {tower: _tower_cost(files, tower) for tower in ARRAYS}
    seal = manifest.seal
    commits = _image_commits(files, manifest, committed)
    rows = None if commits is None else quarantined_rows(commits.values())
    return CacheInfo(
        location=location,
        format_version=manifest.format_version,
        sealed=manifest.sealed,
        unfinished=None if manifest.sealed else finished_how(files, manifest),
        manifest_digest=manifest.digest,
        identity_digest=manifest.identity_digest,
        identity=manifest.identity,
        layout=manifest.layout,
        seal=seal,
        dataset=manifest.source.dataset,
        image_root=manifest.source.image_root,
        chunks=len(refs),
        chunks_committed=len(committed),
        coverage=coverage,
        images_encoded=seal.images_encoded if seal else None,
        images_quarantined=seal.images_quarantined if seal else None,
        quarantine=None if rows is None else dict(sorted(Counter(row.reason for row in rows.values()).items())),
        quarantined_rows=tuple((rows or {}).values())[:_ROWS_NAMED],
        lost_images=manifest.lost_images,
        problems=manifest.problems,
        target_bytes=manifest.stored_bytes or target_bytes(manifest.layout, refs),
        encode_seconds=sum(cost.seconds for cost in costs.values()),
        notes=sum(cost.notes for cost in costs.values()),
        notes_read=sum(cost.notes_read for cost in costs.values()),
        images_per_second=costs["image"].rows_per_second,
        captions_per_second=costs["text"].rows_per_second,
        remaining_seconds=_remaining(coverage, {tower: cost.rows_per_second for tower, cost in costs.items()}),
        made_with=manifest.made_with,
    )


def list_problems(location: str) -> CacheProblems:
    """Return all problems of a cache, by its table of them and the commit records of images. No limit.

    Raises:
        CacheNotFoundError, CacheFormatError, CacheCorruptError: see ``teacher_cache.storage.errors``.
    """
    files, manifest, refs, committed = _chunks_of(location)
    commits = _image_commits(files, manifest, committed, most=len(refs)) or {}
    problems = all_problems(files, manifest, quarantined_rows(commits.values()).values())
    return CacheProblems(location=location, problems=problems)


def all_problems(
    files: CacheFiles, manifest: CacheManifest, quarantined: Iterable[QuarantinedRow]
) -> tuple[CacheProblem, ...]:
    """Return the problems of the dataset, by the cache's table of them, then the quarantined rows."""
    from teacher_cache.storage.format.tables import PROBLEMS, read_table  # pyarrow

    problems = [CacheProblem(**fields) for fields in read_table(files, manifest, PROBLEMS).to_pylist()]
    lost = (
        CacheProblem(kind=row.reason, where=row.sample_id, detail=row.detail, lost_image=False) for row in quarantined
    )
    return (*problems, *lost)


def encode_rates(files: CacheFiles) -> dict[Tower, float | None]:
    """Return the rows per second that the teacher encoded, by tower; None without journal notes."""
    return {tower: _tower_cost(files, tower).rows_per_second for tower in ARRAYS}


def count_committed(location: str) -> tuple[int, int]:
    """Count committed chunks and all chunks of a cache, by its commit records alone.

    Raises:
        CacheNotFoundError, CacheFormatError, CacheCorruptError: see ``teacher_cache.storage.errors``.
    """
    _, _, refs, committed = _chunks_of(location)
    return len(committed), len(refs)


def chunk_states(location: str) -> tuple[ChunkState, ...]:
    """Return the state of every chunk: images view by view, then captions.

    Reads the same commit records as :func:`describe_cache`, and no embedding.

    Raises:
        CacheNotFoundError, CacheFormatError, CacheCorruptError: see ``teacher_cache.storage.errors``.
    """
    files, manifest, refs, committed = _chunks_of(location)
    commits = _image_commits(files, manifest, committed)

    def quarantined(ref: ChunkRef) -> tuple[QuarantinedRow, ...] | None:
        if ref.tower == "text":
            return ()
        if commits is None:
            return None
        return commits[ref].quarantined if ref in commits else ()

    is_committed = set(committed)
    return tuple(ChunkState(ref, ref in is_committed, quarantined(ref)) for ref in refs)


def _chunks_of(location: str) -> tuple[CacheFiles, CacheManifest, list[ChunkRef], list[ChunkRef]]:
    """Open a cache; return its files and manifest, all chunks, and those that are committed."""
    files = open_files(location)
    manifest = read_manifest(files)
    refs = all_chunks(manifest.layout)
    committed = committed_chunks(files, refs)
    return files, manifest, refs, [ref for ref in refs if ref in committed]


def _coverage(layout: Layout, refs: Sequence[ChunkRef], committed: Sequence[ChunkRef]) -> tuple[Coverage, ...]:
    parts = dict.fromkeys((ref.tower, ref.view) for ref in refs)
    chunks, done = Counter(ref[:2] for ref in refs), Counter(ref[:2] for ref in committed)
    rows: Counter[tuple[Tower, int]] = Counter()
    for ref in committed:
        rows[ref.tower, ref.view] += len(ref.rows(layout))
    return tuple(
        Coverage(
            tower=tower,
            view=view,
            chunks=chunks[tower, view],
            chunks_committed=done[tower, view],
            rows=layout.rows(tower),
            rows_committed=rows[tower, view],
        )
        for tower, view in parts
    )


class _Cost(BaseModel, frozen=True):
    seconds: float
    rows_per_second: float | None
    notes: int
    notes_read: int


def _tower_cost(files: CacheFiles, tower: Tower) -> _Cost:
    keys = files.list(f"{JOURNAL}/{tower}")
    read = keys
    if len(keys) > NOTES_READ:
        read = [keys[number * len(keys) // NOTES_READ] for number in range(NOTES_READ)]

    def cost_of(key: str) -> ChunkCost | None:
        return read_cost(files, key.removeprefix(f"{JOURNAL}/").removesuffix(".json"))

    costs = [cost for cost in in_parallel(files, cost_of, read) if cost is not None]
    # not wall clock: chunks overlap, but take turns at the teacher
    seconds = sum(cost.teacher_seconds + cost.decode_wait_seconds for cost in costs)
    rows = sum(cost.rows if cost.encoded_rows is None else cost.encoded_rows for cost in costs)
    return _Cost(
        seconds=seconds * len(keys) / len(read) if read else 0.0,
        rows_per_second=rows / seconds if rows and seconds else None,
        notes=len(keys),
        notes_read=len(read),
    )


def _image_commits(
    files: CacheFiles, manifest: CacheManifest, committed: Sequence[ChunkRef], most: int | None = None
) -> dict[ChunkRef, ChunkCommit] | None:
    """Return the commit records of images that may name quarantined rows, without damaged ones; None if too many."""
    # a sealed cache without quarantined rows says so in its manifest
    if manifest.seal is not None and not manifest.seal.images_quarantined:
        return {}
    images = [ref for ref in committed if ref.tower == "image"]
    if len(images) > (COMMITS_READ if most is None else most):
        return None

    def commit_of(ref: ChunkRef) -> ChunkCommit | None:
        try:
            return read_commit(files, manifest, ref)
        except CacheCorruptError:
            return None  # verify names it

    commits = zip(images, in_parallel(files, commit_of, images), strict=True)
    return {ref: commit for ref, commit in commits if commit is not None}


def _remaining(coverage: Sequence[Coverage], rates: dict[Tower, float | None]) -> float | None:
    total = 0.0
    for part in coverage:
        pending, rate = part.rows - part.rows_committed, rates[part.tower]
        if pending and rate is None:
            return None
        total += pending / rate if rate else 0.0
    return total
