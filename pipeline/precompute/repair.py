"""Repair of a damaged cache from its backup, its dataset and its teacher. Sound objects stay unchanged.

It builds on ``teacher_cache.storage.check.repair``. torch and the teacher are loaded only if a chunk must be encoded
again. Another teacher, another dataset or a missing image is refused before anything is written. Only the import can
make chunks of imported rows again: the teacher would write other bytes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

import pyarrow as pa
from pydantic import BaseModel, Field

from teacher_cache.pipeline.data.datasets.files import data_folder
from teacher_cache.pipeline.data.datasets.samples import ImageSource, load_samples, require_content
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec
from teacher_cache.pipeline.settings.names import without_path
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.check.repair import RepairPlan, plan_repair, restore
from teacher_cache.storage.check.verify import Finding, verify_cache
from teacher_cache.storage.errors import CacheMismatchError, UsageError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.manifest import CacheManifest
from teacher_cache.storage.format.table_rows import TableRows
from teacher_cache.storage.format.tables import SAMPLES, table_files
from teacher_cache.storage.write.writer import EmbeddingWriter

if TYPE_CHECKING:
    from teacher_cache.pipeline.models.teacher import LiveTeacher

Progress = Callable[[str, int, int], None]


class RepairResult(BaseModel, frozen=True):
    """Result of a repair, and the state of the cache."""

    cache: str
    ok: bool = Field(description="State of the cache: complete and sound.")
    done: tuple[str, ...] = Field(description="Lines, one per repaired object or chunk.")
    chunks_encoded: int
    manifest_digest: str
    replaced_manifest_digest: str | None = Field(
        description="Digest of the previously sealed cache, if encoded chunks have other bytes."
    )
    left: tuple[str, ...] = Field(
        (), description="Damaged chunks of imported rows, which only the import can make again."
    )
    findings: tuple[Finding, ...] = Field(description="Remaining findings: unknown files, or an unfinished cache.")
    seconds: float


def repair(
    cache: str,
    dataset: str | None = None,
    teacher: str | None = None,
    pretrained: str | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> RepairResult:
    """Verify a cache, repair the damaged parts, and verify it again. A sound cache is not changed.

    Safe to stop and to call again, and while other processes read or repair the cache. Unknown files are kept.

    Args:
        dataset: dataset as KIND:PATH, read for damaged tables and damaged image chunks. Default: the one recorded in
            the manifest.
        teacher, pretrained: as for precompute. Default: the teacher recorded in the manifest.
        device: device of the teacher.
        progress: called with (stage, done, total).

    Raises:
        UsageError: the teacher is unknown or cannot be loaded; nothing is written.
        CacheMismatchError: another teacher or dataset than the cache's, or a table cannot be made again with the
            recorded bytes; nothing is written.
        CacheError: as ``teacher_cache.storage.check.repair.plan_repair``.
    """
    started = time.perf_counter()

    def checked(done: int, total: int) -> None:
        if progress is not None:
            progress("verify chunks", done, total)

    plan, imported = _without_imported(plan_repair(cache, checked))
    report, done, replaced = plan.report, list[str](), None
    if not plan.empty:
        done = _mend(plan, dataset, teacher, pretrained, device, progress)
        if plan.seal:
            sealed = EmbeddingWriter(cache).seal()
            if sealed != plan.manifest:
                done.append("manifest.json: sealed with the commit records as they are now")
            replaced = plan.manifest.digest if plan.manifest.seal not in (None, sealed.seal) else None
        report = verify_cache(cache, checked)
    return RepairResult(
        cache=cache,
        ok=report.ok,
        done=tuple(done),
        chunks_encoded=len(plan.chunks),
        manifest_digest=report.manifest_digest,
        replaced_manifest_digest=replaced,
        left=imported,
        findings=report.findings,
        seconds=time.perf_counter() - started,
    )


def _without_imported(plan: RepairPlan) -> tuple[RepairPlan, tuple[str, ...]]:
    """Return the plan without chunks of imported rows, and the names of those chunks."""
    if not plan.manifest.imported_sha256:
        return plan, ()
    imported = tuple(ref.name for ref in plan.chunks if ref.view == 0)
    chunks = tuple(ref for ref in plan.chunks if ref.view > 0)
    # a cache without these chunks cannot be sealed
    return replace(plan, chunks=chunks, seal=plan.seal and not imported), imported


def _mend(
    plan: RepairPlan,
    dataset: str | None,
    teacher: str | None,
    pretrained: str | None,
    device: str,
    progress: Progress | None,
) -> list[str]:
    """Check every source of a repair, then write. Return a line per object and chunk. Raises as :func:`repair`."""
    cache, manifest = plan.report.location, plan.manifest
    spec = DatasetSpec.parse(dataset or manifest.source.dataset)
    tables, contents = _tables(plan, spec, progress) if plan.tables else ({}, {})
    live = _teacher(plan, teacher, pretrained, device) if plan.chunks else None
    if any(ref.tower == "image" for ref in plan.chunks):
        _require_images(plan, spec, tables.get(SAMPLES))

    done, files = restore(plan), open_files(cache)
    for key, data in contents.items():
        files.write(key, data)
        done.append(f"{key}: made again from {spec}")
    if live is not None:
        from teacher_cache.pipeline.precompute.encode import encode_chunks

        # not encode_shared: it skips sound chunks, and an old chunk copied back is sound by itself
        config = PrecomputeConfig(dataset=str(spec), teacher=live.name, cache=cache, device=device)
        encode_chunks(config, live, plan.chunks, progress)
        done += [f"{ref.name}: encoded again" for ref in plan.chunks]
    return done


def teacher_of(
    manifest: CacheManifest, cache: str, teacher: str | None, pretrained: str | None
) -> tuple[str, str | None]:
    """Return name and pretrained tag of a cache's teacher: from the arguments, else from the manifest.

    Raises:
        UsageError: the manifest has the name of a model folder, but not its path.
    """
    recorded = manifest.identity.teacher
    if teacher is not None:
        return teacher, pretrained
    if without_path(recorded.name):
        raise UsageError(
            f"{cache}: its teacher is {recorded.name!r}, and the manifest does not say where that folder lies. Give "
            f"--teacher {recorded.name.partition(':')[0]}:PATH."
        )
    return recorded.name, pretrained or recorded.pretrained


def _tables(
    plan: RepairPlan, spec: DatasetSpec, progress: Progress | None
) -> tuple[dict[str, pa.Table], dict[str, bytes]]:
    """Return the dataset's tables, and the bytes of the damaged parquet files.

    Raises:
        CacheMismatchError: it is another dataset, or the new bytes differ from the recorded ones.
    """
    from teacher_cache.pipeline.precompute.plan import dataset_identity, dataset_tables

    def count(done: int, total: int) -> None:
        if progress is not None:
            progress("check files", done, total)

    cache, manifest = plan.report.location, plan.manifest
    tables = dataset_tables(*load_samples(spec, count))
    identity = manifest.identity.model_copy(update={"dataset": dataset_identity(spec, tables)})
    manifest.identity.require(identity, cache)
    made = {name: table_files(name, table) for name, table in tables.items()}
    contents = {}
    for key in plan.tables:
        name, recorded = key.partition("/")[0], manifest.files[key].sha256
        data = made[name].get(key, (b"", 0))[0]
        if hashlib.sha256(data).hexdigest() != recorded:
            # earlier versions wrote one row group
            data = table_files(name, tables[name], one_group=True).get(key, (data, 0))[0]
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 != recorded:
            written = manifest.made_with.get("pyarrow", "another version")
            raise CacheMismatchError(
                f"{cache}/{key}: damaged, and {spec} gives other bytes (sha256 {sha256[:12]}, {recorded[:12]} is "
                f"recorded; written by pyarrow {written}, {version('pyarrow')} is here). Name the dataset where and "
                f"as it was ({manifest.source.dataset}), use that pyarrow, or restore a copy of the file."
            )
        contents[key] = data
    return tables, contents


def _teacher(plan: RepairPlan, teacher: str | None, pretrained: str | None, device: str) -> LiveTeacher:
    """Load the teacher and prove that it is the cache's.

    Raises:
        UsageError, CacheMismatchError: see :func:`repair`.
    """
    cache, identity = plan.report.location, plan.manifest.identity
    name, tag = teacher_of(plan.manifest, cache, teacher, pretrained)
    from teacher_cache.pipeline.models.teacher import load_teacher

    live = load_teacher(name, tag, device, identity.teacher.precision, identity.preprocess.decoder)
    live.require(identity, cache)
    return live


def _require_images(plan: RepairPlan, spec: DatasetSpec, samples: pa.Table | None) -> None:
    """Check that the dataset holds the images of the damaged chunks.

    Args:
        samples: new samples table, if the cache's own is damaged.

    Raises:
        CacheMismatchError: an image is missing or has changed.
    """
    cache, manifest = plan.report.location, plan.manifest
    table = TableRows(open_files(cache), manifest, SAMPLES)
    source = ImageSource(data_folder(spec.root))
    for row in sorted({row for ref in plan.chunks if ref.tower == "image" for row in ref.rows(manifest.layout)}):
        of_row = table.read(range(row, row + 1)) if samples is None else samples.slice(row, 1)
        sample = of_row.to_pylist()[0]
        where = source.resolve(sample["uri"])
        try:
            data = source.read(sample["uri"], sample["offset"], sample["length"])
        except FileNotFoundError as error:
            raise CacheMismatchError(
                f"{where}: not there, and image row {row} of {cache} has to be encoded again. Name the dataset where "
                f"it is now with --dataset KIND:PATH (it was {manifest.source.dataset})."
            ) from error
        require_content(data, sample["content_sha256"], where)
