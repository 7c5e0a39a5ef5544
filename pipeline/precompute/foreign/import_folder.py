"""A cache from the rows of another tool's folder: prove a sample of the rows, plan, write, seal.

The folder does not record which teacher made its rows. So a seeded random sample of the rows to import is first proven
as by ``verify --sample`` (``teacher_cache.pipeline.precompute.sample_proof`` says how many rows show what). If one row
is wrong, nothing is written. The teacher encodes the rows that the folder lacks, so the result is a complete cache. Its
manifest records that rows were imported.
"""

from __future__ import annotations

import time
from typing import get_args

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, Field

from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.datasets.spec import check_dataset
from teacher_cache.pipeline.models.teacher import LiveTeacher, load_teacher
from teacher_cache.pipeline.precompute.encode import encode_shared
from teacher_cache.pipeline.precompute.foreign.clip_retrieval_folder import (
    ForeignRows,
    ForeignSource,
    MatchCounts,
    match_rows,
)
from teacher_cache.pipeline.precompute.foreign.datacomp_dr import ReinforcedShards, open_foreign
from teacher_cache.pipeline.precompute.plan import (
    PlannedDataset,
    PlanSettings,
    Progress,
    default_batch_rows,
    plan_dataset,
    read_dataset,
)
from teacher_cache.pipeline.precompute.run import seal_and_summarize
from teacher_cache.pipeline.precompute.sample_proof import ProvableRows, SampleProof, WrongRow, draw_rows
from teacher_cache.pipeline.settings.precompute import ImportConfig
from teacher_cache.storage.errors import CacheMismatchError, UsageError
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.format.manifest import IMPORTED, IMPORTED_ROWS, CacheManifest
from teacher_cache.storage.format.tables import CAPTIONS, SAMPLES
from teacher_cache.storage.observe.logs import hint
from teacher_cache.storage.read.reader import EmbeddingReader

_ROWS_NAMED = 5


class ImportResult(BaseModel, frozen=True):
    """Result of an import, and the content of the cache."""

    cache: str
    folder: str
    manifest_digest: str
    identity_digest: str
    teacher: str
    images: int = Field(description="Rows of the image tower, quarantined ones included.")
    captions: int
    images_imported: int = Field(description="Images with the folder's row.")
    captions_imported: int
    images_encoded: int = Field(description="Images without a usable row in the folder, which the teacher encoded.")
    captions_encoded: int
    quarantined: int = Field(description="Unusable images, with or without a row in the folder.")
    images_proven: int = Field(description="Image rows of the folder compared with the live teacher's.")
    captions_proven: int
    least_cosine: float | None = Field(description="Least cosine of all compared rows.")
    matched: MatchCounts
    lost_images: int = Field(description="Images of the dataset without a row.")
    problems: dict[str, int]
    chunks: int
    chunks_written: int = Field(description="Chunks written by this run.")
    seconds: float


def import_rows(config: ImportConfig, progress: Progress | None = None) -> ImportResult:
    """Make the cache that ``config`` describes from the folder's rows, or finish an existing one.

    Safe to stop and to call again with the same settings. Several processes may share the work, as in precompute.

    Args:
        progress: called with (stage, done, total).

    Raises:
        UsageError: folder, dataset, teacher or device cannot be used, or no row in the folder belongs to this dataset.
        CacheMismatchError: a sampled row differs from the live teacher's, the rows have another width, or the existing
            cache has another identity or other imported rows. Nothing is written.
        OSError, FloatingPointError: as ``teacher_cache.pipeline.precompute.run``.
    """
    started = time.perf_counter()
    check_dataset(config.dataset)
    folder = open_foreign(config.folder, config.columns, progress)
    if isinstance(folder, ReinforcedShards):
        hint(folder.left_aside)
    teacher = load_teacher(config.teacher, config.pretrained, config.device, config.precision, config.decoder)
    planned = read_dataset(PlanSettings.of(config), teacher, progress)
    if folder.dim != planned.identity.teacher.embed_dim:
        raise CacheMismatchError(
            f"{config.folder}: rows are {folder.dim} wide, {planned.identity.teacher.embed_dim} those of "
            f"{teacher.name}. Name the teacher that made them{_ensemble(folder)}."
        )
    samples, captions = planned.tables[SAMPLES], planned.tables[CAPTIONS]
    known = match_rows(folder, samples, captions, planned.dataset.root, progress)
    if not known.counts.images + known.counts.captions:
        raise UsageError(_nothing_matched(folder, planned))
    _require_these_rows(planned.settings.have, config.cache, known)
    proof = _prove(config, teacher, planned, known, progress)
    images, texts = proof.compared["image"], proof.compared["text"]
    origin = (
        f"from {folder.form}, {known.counts.images:,} image rows and {known.counts.captions:,} caption rows, "
        f"{images:,} and {texts:,} proven to cosine {config.threshold:g}"
    )
    made_with = teacher.library_versions() | {IMPORTED: origin, IMPORTED_ROWS: known.sha256}
    manifest, pending = plan_dataset(planned, teacher.device.type, made_with)
    _require_these_rows(manifest, config.cache, known)  # another process may have planned the cache meanwhile
    written = encode_shared(config, teacher, pending, progress, known)
    made = seal_and_summarize(config.cache, written, time.perf_counter() - started)
    quarantined = np.array([row.row for row in EmbeddingReader(config.cache).quarantined], np.int64)
    lost = int((known.sources["image"][quarantined] >= 0).sum())
    return ImportResult(
        cache=config.cache,
        folder=config.folder,
        manifest_digest=made.manifest_digest,
        identity_digest=made.identity_digest,
        teacher=made.teacher,
        images=made.images,
        captions=made.captions,
        images_imported=known.counts.images - lost,
        captions_imported=known.counts.captions,
        images_encoded=made.images - len(quarantined) - (known.counts.images - lost),
        captions_encoded=made.captions - known.counts.captions,
        quarantined=len(quarantined),
        images_proven=images,
        captions_proven=texts,
        least_cosine=min((cosine for cosine, _ in proof.cosines), default=None),
        matched=known.counts,
        lost_images=made.lost_images,
        problems=made.problems,
        chunks=made.chunks,
        chunks_written=written,
        seconds=time.perf_counter() - started,
    )


def _ensemble(folder: ForeignSource) -> str:
    of_several = isinstance(folder, ReinforcedShards)
    return ", or of an ensemble's rows its part: --columns 0:768 is the first of two ViT-L/14" if of_several else ""


def _nothing_matched(folder: ForeignSource, planned: PlannedDataset) -> str:
    first = planned.tables[SAMPLES].slice(0, 1).to_pylist()[0]
    name = first["uri"] if first["offset"] < 0 else first["sample_id"]
    _, table = next(folder.columns("image_path", "caption"))
    example = next((repr(row[name]) for row in table.slice(0, 2).to_pylist() for name in row if row[name]), "nothing")
    return (
        f"{folder.location}: none of its {folder.rows:,} rows is of {planned.spec}. The folder's first is {example}, "
        f"the dataset's first image {name!r} in {planned.dataset.root}. Name both as they were then"
    )


def _require_these_rows(manifest: CacheManifest | None, cache: str, known: ForeignRows) -> None:
    """Check that the cache, if there is one, was begun with these rows.

    Raises:
        CacheMismatchError: the remedy is in the message.
    """
    if manifest is None:
        return
    if manifest.imported_sha256 is None:
        raise CacheMismatchError(
            f"{cache}: made by the teacher itself, without an import. Finish it with teacher-cache precompute, or "
            "import to a new path."
        )
    if manifest.imported_sha256 != known.sha256:
        raise CacheMismatchError(
            f"{cache}: begun with other rows ({manifest.made_with.get(IMPORTED)}; sha256 "
            f"{manifest.imported_sha256[:12]}) than this folder gives now ({known.sha256[:12]}). Name the folder and "
            "the dataset as they were, or import to a new path."
        )


def _prove(
    config: ImportConfig, teacher: LiveTeacher, planned: PlannedDataset, known: ForeignRows, progress: Progress | None
) -> SampleProof:
    """Compare a seeded random sample of the rows with the live teacher's.

    Raises:
        CacheMismatchError: a row differs from the teacher's, no sampled image can be decoded, or an image changed.
    """
    rows = ProvableRows(
        lambda numbers: planned.tables[SAMPLES].take(pa.array(numbers)),
        lambda numbers: planned.tables[CAPTIONS].take(pa.array(numbers)),
        lambda tower, numbers, _: known.of(tower, numbers)[1],
    )
    # undecodable images are quarantined later, when their chunk is written
    proof = SampleProof(rows, teacher, ImageSource(planned.dataset.root), config.threshold)
    batch_rows = config.batch_size or default_batch_rows(teacher.device.type)
    for tower in get_args(Tower):
        matched = np.flatnonzero(known.sources[tower] >= 0)
        drawn = matched[draw_rows(tower, len(matched), config.sample, config.seed)]
        proof.compare(tower, drawn, np.zeros_like(drawn), batch_rows, progress)
        if len(drawn) and not proof.compared[tower]:
            raise CacheMismatchError(
                f"{config.dataset}: not one of {len(drawn)} images that were drawn can be decoded, so that no row "
                f"of {config.folder} is proven. Repair the images, or run teacher-cache precompute."
            )
    if proof.wrong:
        raise CacheMismatchError(_refusal(config, teacher, known, proof))
    return proof


def _refusal(config: ImportConfig, teacher: LiveTeacher, known: ForeignRows, proof: SampleProof) -> str:
    def named(wrong: WrongRow) -> str:
        what = "image row" if wrong.tower == "image" else "caption row"
        source = known.sources[wrong.tower][wrong.row]
        return f"{what} {wrong.row} ({wrong.sample_id}), the folder's row {source}: {wrong.cosine:.4f}"

    worst = sorted(proof.wrong, key=lambda wrong: wrong.cosine or 0.0)[:_ROWS_NAMED]
    counts = " and ".join(
        f"{sum(wrong.tower == tower for wrong in proof.wrong):,} of {compared:,} {what}"
        for (tower, compared), what in zip(proof.compared.items(), ("image rows", "caption rows"), strict=True)
        if compared
    )
    return (
        f"{config.folder}: {counts} that were drawn are not what {teacher.name} makes of them now (cosine below "
        f"{config.threshold:g}). The worst: {'; '.join(map(named, worst))}. Another teacher, activation or precision "
        "made these rows, or they are not in the order of their metadata. Nothing was written."
    )
