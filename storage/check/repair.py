"""Repair without a teacher: the plan of a repair, and the restoring of what the cache itself determines.

Manifest and backup are restored from each other, Zarr metadata from the layout, and damaged notes are dropped. Tables
come from the dataset and chunks from the teacher: ``teacher_cache.pipeline.precompute.repair``. Unknown files stay.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

from teacher_cache.storage.check.verify import Finding, IntegrityReport, sound_manifest, verify_cache
from teacher_cache.storage.errors import CacheAccessError, CacheCorruptError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.format.arrays import zarr_metadata
from teacher_cache.storage.format.commits import COMMITS, ChunkRef, all_chunks, committed_chunks
from teacher_cache.storage.format.journal import JOURNAL, note_key
from teacher_cache.storage.format.manifest import BACKUP_KEY, MANIFEST_KEY, CacheManifest
from teacher_cache.storage.format.manifest_file import write_manifest
from teacher_cache.storage.format.tables import CAPTIONS, PROBLEMS, SAMPLES

_Remedy = Literal["encode", "restore", "zarr", "table", "drop", "seal", "finish", "none"]
_TABLES = (f"{SAMPLES}/", f"{CAPTIONS}/", f"{PROBLEMS}/")


@dataclass(frozen=True)
class RepairPlan:
    """The work that mends a cache.

    Attributes:
        report: the verification that the plan is made from.
        manifest: sound manifest, from ``manifest.json`` or its backup.
        root: keys of manifest and backup to write again.
        metadata: bytes of damaged Zarr files, by key.
        tables: keys of damaged parquet files, which only the dataset can bring back.
        notes: keys of damaged notes to drop.
        chunks: chunks to encode again.
        seal: whether the manifest must be sealed with the new commit records.
        left: findings that a repair does not touch.
    """

    report: IntegrityReport
    manifest: CacheManifest
    root: tuple[str, ...]
    metadata: dict[str, bytes]
    tables: tuple[str, ...]
    notes: tuple[str, ...]
    chunks: tuple[ChunkRef, ...]
    seal: bool
    left: tuple[Finding, ...]

    @property
    def empty(self) -> bool:
        """True if a repair has nothing to do."""
        return not (self.root or self.metadata or self.tables or self.notes or self.chunks or self.seal)


def plan_repair(location: str, progress: Callable[[int, int], None] | None = None) -> RepairPlan:
    """Verify a cache and return the plan of its repair. Writes nothing.

    Chunks of an unfinished cache are left to ``precompute``, which encodes damaged ones too.

    Args:
        progress: as ``verify_cache`` calls it.

    Raises:
        CacheError: as ``verify_cache``: no manifest can be used.
        CacheAccessError: an object cannot be read; its bytes may be sound.
        CacheCorruptError: Zarr's metadata is damaged, and this zarr writes other bytes than the recorded ones.
    """
    report = verify_cache(location, progress)
    files = open_files(location)
    manifest, _ = sound_manifest(files)
    _require_readable(report)
    refs = all_chunks(manifest.layout)
    chunk_of = {key: ref for ref in refs for key in (ref.commit_key, *ref.object_keys(manifest.layout).values())}
    findings: defaultdict[_Remedy, list[Finding]] = defaultdict(list)
    for finding in report.findings:
        findings[_remedy(finding, manifest, chunk_of)].append(finding)
    keys = {remedy: tuple(finding.key for finding in part) for remedy, part in findings.items()}
    damaged = {chunk_of[key] for key in keys.get("encode", ())}
    seal, untouched = "seal" in findings, findings["none"]
    if seal:
        damaged |= _suspects(files, refs, damaged, keys.get("drop", ()))
    if "finish" in findings:
        if len(committed_chunks(files, refs)) < len(refs):
            untouched, damaged = untouched + findings["finish"] + findings["encode"], set()
        else:
            seal = True
    return RepairPlan(
        report=report,
        manifest=manifest,
        root=keys.get("restore", ()),
        metadata=_metadata(location, manifest, keys.get("zarr", ())),
        tables=keys.get("table", ()),
        notes=keys.get("drop", ()),
        chunks=tuple(ref for ref in refs if ref in damaged),
        seal=seal or bool(damaged),
        left=tuple(untouched),
    )


def _require_readable(report: IntegrityReport) -> None:
    """Check that every object could be read.

    Raises:
        CacheAccessError: names the first that could not.
    """
    unreadable = [finding for finding in report.findings if finding.kind == "unreadable"]
    if unreadable:
        raise CacheAccessError(
            f"{report.location}: {len(unreadable)} objects cannot be read, the first: {unreadable[0].message}. Their "
            "bytes may be sound. Let this user read them, or delete those that are lost for good; then repair again."
        )


def _remedy(finding: Finding, manifest: CacheManifest, chunk_of: dict[str, ChunkRef]) -> _Remedy:
    """Return the remedy of one finding."""
    key = finding.key
    if finding.kind == "unknown-file":
        return "none"
    if key in chunk_of:
        return "encode"
    if key.startswith(f"{JOURNAL}/"):
        return "drop"
    if key in manifest.files:
        return "table" if key.startswith(_TABLES) else "zarr"
    if key == COMMITS:
        return "seal"
    if finding.kind == "incomplete" and not manifest.sealed:
        return "finish"
    return "restore" if key in (MANIFEST_KEY, BACKUP_KEY) and finding.kind != "counts" else "none"


def _suspects(files: CacheFiles, refs: list[ChunkRef], damaged: set[ChunkRef], notes: Collection[str]) -> set[ChunkRef]:
    """Return the chunks that an older copy may have replaced. Called when the commit records do not match the seal.

    A chunk is suspect if its note is damaged, or if it has no note and no damaged chunk explains the mismatch. If
    every note matches its record, only the seal is out of date: a repair was interrupted.
    """
    sound = set(files.list(JOURNAL)).difference(notes)
    unnoted = {ref for ref in refs if note_key(ref.name) not in sound}
    return {ref for ref in unnoted if not damaged or note_key(ref.name) in notes}


def restore(plan: RepairPlan) -> list[str]:
    """Restore what needs neither dataset nor teacher. Replaces each object atomically, so others may read meanwhile.

    Returns:
        One line per object.
    """
    files = open_files(plan.report.location)
    done = []
    if plan.root:
        manifest, wrong = sound_manifest(files)  # read again: a run may have sealed the cache meanwhile
        if wrong:
            write_manifest(files, manifest)
        for key in (finding.key for finding in wrong):
            done.append(f"{key}: restored from {BACKUP_KEY if key == MANIFEST_KEY else MANIFEST_KEY}")
    for key, data in plan.metadata.items():
        files.write(key, data)
        done.append(f"{key}: written again from the layout")
    for key in plan.notes:
        files.delete(key)
        done.append(f"{key}: damaged note dropped")
    return done


def _metadata(location: str, manifest: CacheManifest, keys: Collection[str]) -> dict[str, bytes]:
    if not keys:
        return {}
    made = zarr_metadata(manifest.layout)
    for key in keys:
        actual, recorded = hashlib.sha256(made.get(key, b"")).hexdigest(), manifest.files[key].sha256
        if actual != recorded:
            raise CacheCorruptError(
                f"{location}/{key}: damaged, and zarr {version('zarr')} writes other bytes (sha256 {actual[:12]}, "
                f"{recorded[:12]} is recorded). Repair with zarr {manifest.made_with.get('zarr', 'of that time')}, or "
                "restore a copy of the file."
            )
    return {key: made[key] for key in keys}
