"""A cache from the rows of another tool's folder: plan it, prove a sample of the rows, then write them.

What made such rows is not known from the folder, so that the cache's identity is a claim until it is tried: seeded
random rows, of those that would be used, are compared with what the live teacher makes of the very images and captions
(``teacher_cache.pipeline.precompute.sample_proof`` says how many rows show what). One that is wrong, and nothing is
written. Rows that the folder lacks are encoded, so that what comes out is a whole cache like any other; its manifest
says that rows were imported.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from teacher_cache.pipeline.data.datasets.samples import DatasetSpec, ImageSource, require_content
from teacher_cache.pipeline.data.images.decode import UndecodableImageError
from teacher_cache.pipeline.data.images.scaled_jpeg import open_image
from teacher_cache.pipeline.models.device import keep_freed_memory
from teacher_cache.pipeline.models.teacher import LiveTeacher, load_teacher
from teacher_cache.pipeline.precompute.clip_retrieval_folder import ForeignFolder, ForeignRows, MatchCounts, match_rows
from teacher_cache.pipeline.precompute.encode import encode_shared
from teacher_cache.pipeline.precompute.plan import (
    PlannedDataset,
    Progress,
    default_batch_rows,
    library_versions,
    plan_dataset,
    read_dataset,
)
from teacher_cache.pipeline.precompute.run import summarize
from teacher_cache.pipeline.precompute.sample_proof import cosine, draw_rows
from teacher_cache.pipeline.settings.precompute import ImportConfig
from teacher_cache.storage.errors import CacheMismatchError, CacheNotFoundError, UsageError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.format.manifest import IMPORTED, IMPORTED_ROWS
from teacher_cache.storage.format.manifest_file import read_manifest
from teacher_cache.storage.format.tables import CAPTIONS, SAMPLES
from teacher_cache.storage.read.reader import EmbeddingReader

__all__ = ["ImportResult", "import_rows"]

_ROWS_NAMED = 5
_NEARLY = 0.5  # of the way from rows of something else to the right ones: likely the same weights, otherwise used


class ImportResult(BaseModel, frozen=True):
    """What an import did and what the cache holds now."""

    cache: str
    folder: str
    manifest_digest: str
    identity_digest: str
    teacher: str
    images: int = Field(description="Rows of the image tower, quarantined ones included.")
    captions: int
    images_imported: int = Field(description="With the folder's row.")
    captions_imported: int
    images_encoded: int = Field(description="By the teacher, since the folder has no usable row of them.")
    captions_encoded: int
    quarantined: int = Field(description="Images that cannot be used, whether or not the folder has a row of them.")
    images_proven: int = Field(description="Rows of the folder that were compared with the live teacher's.")
    captions_proven: int
    least_cosine: float | None = Field(description="Over all rows that were compared.")
    matched: MatchCounts
    lost_images: int = Field(description="Images of the dataset that got no row.")
    problems: dict[str, int]
    chunks: int
    chunks_written: int = Field(description="By this run; the others were there.")
    seconds: float


def import_rows(config: ImportConfig, progress: Progress | None = None) -> ImportResult:
    """Make the cache that ``config`` describes from the folder's rows, or finish the one that is there.

    Safe to stop and to call again with the same settings; several processes may share the work, as with precompute.

    Args:
        progress: called with (stage, done, total).

    Raises:
        UsageError: folder, dataset, teacher or device cannot be used, or nothing in the folder is of this dataset.
        CacheMismatchError: a row that was drawn is not the live teacher's, or the rows are of another width; or the
            cache there is another one, or of other rows. Nothing is written then.
        OSError, FloatingPointError: as ``teacher_cache.pipeline.precompute.run``.
    """
    started = time.perf_counter()
    DatasetSpec.parse(config.dataset)
    folder = ForeignFolder(config.folder)
    teacher = load_teacher(config.teacher, config.pretrained, config.device, config.precision, config.decoder)
    planned = read_dataset(config, teacher, progress)
    if folder.dim != planned.identity.teacher.embed_dim:
        raise CacheMismatchError(
            f"{config.folder}: rows are {folder.dim} wide, {planned.identity.teacher.embed_dim} those of "
            f"{teacher.name}. Name the teacher that made them."
        )
    samples, captions = planned.tables[SAMPLES], planned.tables[CAPTIONS]
    known = match_rows(folder, samples, captions, planned.dataset.root, progress)
    if not known.counts.images + known.counts.captions:
        raise UsageError(_nothing_matched(folder, planned))
    _require_these_rows(config.cache, known)
    proof = _prove(config, teacher, planned, known, progress)
    if proof.wrong:
        raise CacheMismatchError(_refusal(config, teacher, known, proof))
    images, texts = proof.compared["image"], proof.compared["text"]
    said = (
        f"from a clip-retrieval folder, {known.counts.images:,} image rows and {known.counts.captions:,} caption rows, "
        f"{images:,} and {texts:,} proven to cosine {config.threshold:g}"
    )
    pending = plan_dataset(
        config,
        teacher.device.type,
        planned,
        library_versions(teacher.preprocess.decoder) | {IMPORTED: said, IMPORTED_ROWS: known.sha256},
    )
    _require_these_rows(config.cache, known)  # another process may have planned it meanwhile
    written = encode_shared(config, teacher, pending, progress, known)
    made = summarize(config.cache, written, time.perf_counter() - started)
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
        least_cosine=min(proof.cosines, default=None),
        matched=known.counts,
        lost_images=made.lost_images,
        problems=made.problems,
        chunks=made.chunks,
        chunks_written=written,
        seconds=time.perf_counter() - started,
    )


def _nothing_matched(folder: ForeignFolder, planned: PlannedDataset) -> str:
    first = planned.tables[SAMPLES].slice(0, 1).to_pylist()[0]
    name = first["uri"] if first["offset"] < 0 else first["sample_id"]
    _, table = next(folder.columns("image_path", "caption"))
    found = next((repr(row[name]) for row in table.slice(0, 1).to_pylist() for name in row if row[name]), "nothing")
    return (
        f"{folder.location}: none of its {folder.rows:,} rows is of {planned.spec}. The folder's first is {found}, the "
        f"dataset's first image {name!r}; a path has to end in that. Name the dataset that it was made of"
    )


def _require_these_rows(cache: str, known: ForeignRows) -> None:
    """Refuse to go on with a cache that is not made of these rows.

    Raises:
        CacheMismatchError: the remedy is in the message.
    """
    try:
        manifest = read_manifest(open_files(cache))
    except CacheNotFoundError:
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


@dataclass(frozen=True)
class _Wrong:
    tower: Tower
    row: int
    named: str
    source: int
    cosine: float
    strange: float  # cosine of the live row with the folder's of another image or caption
    shifted: bool  # whether a row beside the folder's would be right


@dataclass
class _Proof:
    compared: dict[Tower, int] = field(default_factory=lambda: {"image": 0, "text": 0})
    cosines: list[float] = field(default_factory=list)
    wrong: list[_Wrong] = field(default_factory=list)


def _prove(
    config: ImportConfig, teacher: LiveTeacher, planned: PlannedDataset, known: ForeignRows, progress: Progress | None
) -> _Proof:
    """Compare seeded random known rows with what the teacher makes of the same images and captions now.

    An image that cannot be decoded is passed over: what becomes of it is decided when its chunk is written.

    Raises:
        CacheMismatchError: not one image that was drawn can be decoded, or one changed since it was digested.
    """
    keep_freed_memory(teacher.device)
    proof = _Proof()
    batch_rows = config.batch_size or default_batch_rows(teacher.device.type)
    with ThreadPoolExecutor(config.decode_threads or os.cpu_count() or 1) as pool:
        see = _Eye(teacher, planned)
        for tower in get_args(Tower):
            there = np.flatnonzero(known.sources[tower] >= 0)
            drawn = there[draw_rows(tower, len(there), config.sample, config.seed)]
            for start in range(0, len(drawn), batch_rows):
                rows = drawn[start : start + batch_rows]
                if tower == "image":
                    seen = list(pool.map(see.image, rows.tolist()))
                    rows = rows[[pixels is not None for pixels in seen]]
                    pixels = [pixels for pixels in seen if pixels is not None]
                    live = teacher.encode_images(torch.stack(pixels)).embedding if pixels else None
                else:
                    live = teacher.encode_texts(see.texts(rows)).embedding
                if live is not None:
                    _compare(proof, tower, rows, live, known, see, config.threshold)
                if progress is not None:
                    progress(f"prove {tower}s", min(start + batch_rows, len(drawn)), len(drawn))
            if len(drawn) and not proof.compared[tower]:
                raise CacheMismatchError(
                    f"{config.dataset}: not one of {len(drawn)} images that were drawn can be decoded, so that no row "
                    f"of {config.folder} is proven. Repair the images, or run teacher-cache precompute."
                )
    return proof


class _Eye:
    """Images and captions of a dataset by row, as the teacher takes them."""

    def __init__(self, teacher: LiveTeacher, planned: PlannedDataset) -> None:
        self._samples, self._captions = planned.tables[SAMPLES], planned.tables[CAPTIONS]
        self._source = ImageSource(planned.dataset.root)
        self._preprocess, self._tokenizer = teacher.preprocess, teacher.tokenizer
        self._transform = teacher.preprocess.transform()

    def image(self, row: int) -> torch.Tensor | None:
        sample = self._samples.slice(row, 1).to_pylist()[0]
        data = self._source.read(sample["uri"], sample["offset"], sample["length"])
        require_content(data, sample["content_sha256"], self._source.resolve(sample["uri"]))
        try:
            return self._transform(open_image(data, self._preprocess.decoder))
        except (UndecodableImageError, ValueError):
            return None

    def texts(self, rows: NDArray[np.int64]) -> torch.Tensor:
        tokens = torch.as_tensor(self._tokenizer([self._captions["text"][int(row)].as_py() for row in rows]))
        return tokens

    def named(self, tower: Tower, row: int) -> str:
        if tower == "image":
            return f"image row {row} ({self._samples['sample_id'][row].as_py()})"
        text = self._captions["text"][row].as_py()
        return f"caption row {row} ({text[:40]!r})"


def _compare(
    proof: _Proof,
    tower: Tower,
    rows: NDArray[np.int64],
    live: NDArray[Any],
    known: ForeignRows,
    see: _Eye,
    threshold: float,
) -> None:
    given = known.of(tower, rows)[1]
    mine_and_theirs = zip(live.astype(np.float32), given.astype(np.float32), strict=True)
    others = np.roll(given, 1, axis=0).astype(np.float32)
    for row, (mine, theirs), other in zip(rows.tolist(), mine_and_theirs, others, strict=True):
        found = cosine(theirs, mine)
        proof.compared[tower] += 1
        proof.cosines.append(found)
        if found >= threshold:  # NaN counts as wrong
            continue
        source = int(known.sources[tower][row])
        beside = np.array([number for number in (source - 1, source + 1) if 0 <= number < known.folder.rows], np.int64)
        values, _, usable = known.folder.take(tower, beside)
        shifted = any(cosine(value.astype(np.float32), mine) >= threshold for value in values[usable])
        named = see.named(tower, row)
        proof.wrong.append(_Wrong(tower, row, named, source, found, cosine(other, mine), shifted))


def _refusal(config: ImportConfig, teacher: LiveTeacher, known: ForeignRows, proof: _Proof) -> str:
    worst = sorted(proof.wrong, key=lambda wrong: wrong.cosine)[:_ROWS_NAMED]
    named = "; ".join(f"{wrong.named}, the folder's row {wrong.source}: {wrong.cosine:.4f}" for wrong in worst)
    counts = " and ".join(
        f"{sum(wrong.tower == tower for wrong in proof.wrong):,} of {compared:,} {what}"
        for (tower, compared), what in zip(proof.compared.items(), ("image rows", "caption rows"), strict=True)
        if compared
    )
    return (
        f"{config.folder}: {counts} that were drawn are not what {teacher.name} makes of them (cosine below "
        f"{config.threshold:g}). The worst: {named}. {_likely(proof.wrong)} Nothing was written."
    )


def _likely(wrong: Sequence[_Wrong]) -> str:
    """What such differences come from, by how they look."""
    shifted = sum(one.shifted for one in wrong)
    if 2 * shifted > len(wrong):
        return f"For {shifted:,} of them the row beside it is the right one: rows and metadata are shifted."
    pairs = [(one.cosine, one.strange) for one in wrong]
    middle, strange = (float(np.median(values)) for values in zip(*pairs, strict=True))
    said = f"Their median is {middle:.3f}, that of rows of something else {strange:.3f}"
    if middle - strange >= _NEARLY * (1 - strange):
        return (
            f"{said}: likely the same weights with another activation (QuickGELU or GELU), precision, crop or resize, "
            "mirrored images, or images that changed since."
        )
    return (
        f"{said}: likely another teacher (or other weights of it), or rows of other images and captions than the "
        "metadata says."
    )
