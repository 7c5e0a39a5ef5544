"""Precompute from start to end: plan the cache (``plan``), encode the pending chunks (``encode``), seal."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from pydantic import BaseModel, Field

from teacher_cache.pipeline.data.datasets.spec import check_dataset
from teacher_cache.pipeline.precompute.executors import open_executor
from teacher_cache.pipeline.precompute.plan import Progress, ReadDataset
from teacher_cache.pipeline.precompute.reuse import count_known, known_rows
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.commits import ChunkRef, quarantined_rows
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.look.info import all_problems, encode_rates
from teacher_cache.storage.observe.telemetry import observed
from teacher_cache.storage.write.plan import require_place
from teacher_cache.storage.write.writer import EmbeddingWriter

_PROBLEMS_SHOWN = 20


class PrecomputeResult(BaseModel, frozen=True):
    """Result of a precompute run, and the content of the cache."""

    cache: str
    manifest_digest: str
    replaced_manifest_digest: str | None = Field(
        description="Digest that the cache was sealed with before, if damaged chunks were encoded again to other bytes."
    )
    identity_digest: str
    teacher: str
    images: int = Field(description="Rows of the image tower, quarantined ones included.")
    captions: int
    views: int = Field(description="Views of each image.")
    splits: dict[str, int]
    chunks: int
    chunks_encoded: int = Field(description="Chunks encoded by this run.")
    rows_reused: dict[Tower, int] = Field(
        description="Rows copied from the reused cache since this run began, by tower. Each view of an image is a row."
    )
    quarantined: int = Field(description="Images without an embedding in some view, each counted once.")
    lost_images: int = Field(description="Images of the dataset without a row.")
    problems: dict[str, int] = Field(description="Problems of the dataset and of encoding, counted by kind.")
    problem_details: tuple[str, ...] = Field(description="First 20 problems, by name.")
    seconds: float
    images_per_second: float | None = Field(description="Speed of the teacher over all chunks.")
    captions_per_second: float | None


def precompute(
    config: PrecomputeConfig, progress: Progress | None = None, read: ReadDataset | None = None
) -> PrecomputeResult:
    """Make the cache that ``config`` describes, or finish an existing one.

    Safe to stop at any moment and to call again: only chunks without a sound commit are encoded. Several processes may
    share one cache; each returns when all chunks are done.

    Args:
        progress: called with (stage, done, total): ``check files``, ``images`` and ``captions``.
        read: the dataset's files as read just now. Default: they are read here.

    Raises:
        UsageError: dataset, teacher, device or metrics port cannot be used; nothing is written.
        CacheMismatchError: the path holds a cache of another teacher, dataset or preprocessing; or an image changed
            during the run.
        OSError: an image could not be read, or a chunk could not be written. Committed chunks stay.
        FloatingPointError: the teacher overflows in this precision.
        ChildProcessError: the executor's workers died repeatedly, or the cluster has no room for one.
    """
    started = time.perf_counter()
    # fail on a typing error before loading the teacher or reading the dataset
    check_dataset(config.dataset)
    require_place(open_files(config.cache))
    with observed(cache=config.cache):
        with open_executor(config) as executor:
            pending = executor.plan(config, progress, read)
            encoded = executor.encode(config, pending, progress)
        return seal_and_summarize(config.cache, encoded, time.perf_counter() - started, config.reuse, pending)


def seal_and_summarize(
    cache: str, chunks_encoded: int, seconds: float, reuse: str | None = None, pending: Sequence[ChunkRef] = ()
) -> PrecomputeResult:
    """Seal a finished cache and return its content.

    Args:
        chunks_encoded, seconds: work and time of this run.
        reuse: cache that rows were copied from.
        pending: chunks that were missing when this run began.

    Raises:
        CacheIncompleteError: chunks are missing.
    """
    writer = EmbeddingWriter(cache)
    before = writer.manifest
    manifest = writer.seal()
    assert writer.commits is not None  # it has just sealed them
    quarantined = quarantined_rows(writer.commits.with_quarantined()).values()
    met = all_problems(writer.files, manifest, quarantined)
    rates = encode_rates(writer.files)
    return PrecomputeResult(
        cache=cache,
        manifest_digest=manifest.digest,
        replaced_manifest_digest=before.digest if before.seal not in (None, manifest.seal) else None,
        identity_digest=manifest.identity_digest,
        teacher=manifest.identity.teacher.name,
        images=manifest.layout.image_rows,
        captions=manifest.layout.text_rows,
        views=manifest.layout.views,
        splits=manifest.identity.dataset.splits,
        chunks=manifest.layout.num_chunks,
        chunks_encoded=chunks_encoded,
        rows_reused=_rows_reused(reuse if pending else None, writer, pending),
        quarantined=len(quarantined),
        lost_images=manifest.lost_images,
        problems=dict(sorted(Counter(problem.kind for problem in met).items())),
        problem_details=tuple(str(problem) for problem in met[:_PROBLEMS_SHOWN]),
        seconds=seconds,
        images_per_second=rates["image"],
        captions_per_second=rates["text"],
    )


def _rows_reused(reuse: str | None, writer: EmbeddingWriter, refs: Sequence[ChunkRef]) -> dict[Tower, int]:
    """Count the rows of some chunks that the cache ``reuse`` has too."""
    known = known_rows(reuse, writer)
    return {"image": 0, "text": 0} if known is None else count_known(known, writer.manifest.layout, refs)
