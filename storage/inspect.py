"""What a cache is and how far it is, from its manifest, commit names and journal; embeddings are never read."""

from __future__ import annotations

from pydantic import BaseModel, Field

from storage.arrays import ARRAYS, array_dtype, chunk_shape
from storage.commits import COMMITS, ChunkRef, all_chunks
from storage.files import open_files
from storage.identity import CacheIdentity
from storage.journal import read_journal
from storage.manifest import Layout
from storage.root import read_manifest

__all__ = ["CacheInfo", "count_committed", "describe_cache"]


class CacheInfo(BaseModel, frozen=True):
    """The answer of ``teacher-cache info``."""

    location: str
    format_version: int
    sealed: bool = Field(description="Complete, and its bytes fixed.")
    manifest_digest: str
    identity_digest: str
    identity: CacheIdentity
    layout: Layout
    dataset: str
    image_root: str
    chunks: int
    chunks_committed: int
    views_sealed: int = Field(description="Views that can be read; fewer than the layout's while some are added.")
    images_encoded: int | None = Field(description="With an embedding in each sealed view; known once one is sealed.")
    images_quarantined: int | None = Field(description="Without one in some sealed view; counted once.")
    lost_images: int
    problems: dict[str, int] = Field(description="Of the dataset, met while it was read, by kind.")
    target_bytes: int = Field(description="Of all chunk objects when complete.")
    encode_seconds: float = Field(description="Sum over the committed chunks' journal notes.")
    images_per_second: float | None
    captions_per_second: float | None
    made_with: dict[str, str]


def describe_cache(location: str) -> CacheInfo:
    """Read what a cache says of itself.

    Raises:
        CacheNotFoundError, CacheFormatError, CacheCorruptError: see ``storage.errors``.
    """
    files = open_files(location)
    manifest = read_manifest(files)
    refs = all_chunks(manifest.layout)
    wanted = {ref.commit_key for ref in refs}
    committed = sum(key in wanted for key in files.list(COMMITS))
    costs = read_journal(files)
    seconds = {"image": 0.0, "text": 0.0}
    rows = {"image": 0, "text": 0}
    for name, cost in costs.items():
        tower = name.partition("/")[0]
        if tower in seconds:
            # the teacher is what chunks share one after the other; wall clocks of neighbours overlap
            seconds[tower] += cost.teacher_seconds + cost.decode_wait_seconds
            rows[tower] += cost.rows
    sealed = manifest.sealed_generations
    seal = sealed[-1].seal if sealed else None
    return CacheInfo(
        location=location,
        format_version=manifest.format_version,
        sealed=manifest.sealed,
        manifest_digest=manifest.digest,
        identity_digest=manifest.identity_digest,
        identity=manifest.identity,
        layout=manifest.layout,
        dataset=manifest.source.dataset,
        image_root=manifest.source.image_root,
        chunks=len(refs),
        chunks_committed=committed,
        views_sealed=manifest.sealed_views,
        images_encoded=seal.images_encoded if seal else None,
        images_quarantined=seal.images_quarantined if seal else None,
        lost_images=manifest.lost_images,
        problems=manifest.problems,
        target_bytes=sum(_chunk_bytes(manifest.layout, ref) for ref in refs),
        encode_seconds=sum(seconds.values()),
        images_per_second=rows["image"] / seconds["image"] if seconds["image"] else None,
        captions_per_second=rows["text"] / seconds["text"] if seconds["text"] else None,
        made_with=manifest.made_with,
    )


def count_committed(location: str) -> tuple[int, int]:
    """(committed chunks, all chunks) of a cache, by its commit records alone.

    Raises:
        CacheNotFoundError, CacheFormatError, CacheCorruptError: see ``storage.errors``.
    """
    files = open_files(location)
    refs = all_chunks(read_manifest(files).layout)
    return sum(files.exists(ref.commit_key) for ref in refs), len(refs)


def _chunk_bytes(layout: Layout, ref: ChunkRef) -> int:
    total = 0
    for name in ARRAYS[ref.tower]:
        size = array_dtype(ref.tower, name).itemsize
        for length in chunk_shape(layout, ref.tower, name):
            size *= length
        total += size + 4  # the checksum
    return total
