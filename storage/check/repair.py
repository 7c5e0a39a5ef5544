"""Mending a cache, the part that needs no teacher: what is wrong, what each finding needs, and what can be restored.

Manifest and backup come from each other, Zarr metadata from the layout; notes of the journal are dropped. Tables are
made again from the dataset and chunks by the teacher: ``teacher_cache.pipeline.precompute.repair``. Nothing unknown is
ever deleted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

from teacher_cache.storage.check.verify import Finding, IntegrityReport, sound_manifest, verify_cache
from teacher_cache.storage.errors import CacheAccessError, CacheCorruptError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.arrays import zarr_metadata
from teacher_cache.storage.format.commits import COMMITS, ChunkRef, all_chunks, committed_chunks, generation_chunks
from teacher_cache.storage.format.journal import JOURNAL, note_key
from teacher_cache.storage.format.manifest import BACKUP_KEY, MANIFEST_KEY, CacheManifest
from teacher_cache.storage.format.manifest_file import write_manifest
from teacher_cache.storage.format.tables import CAPTIONS, PROBLEMS, SAMPLES
from teacher_cache.storage.write.claims import PLAN, Claims

__all__ = ["RepairPlan", "plan_repair", "restore"]


@dataclass(frozen=True)
class RepairPlan:
    """What a cache needs.

    Attributes:
        manifest: the sound one, of ``manifest.json`` and its backup.
        root: manifest, backup or both, to be written anew.
        metadata: Zarr's files, with the bytes that they should have.
        tables: parquet files, which only the dataset can bring back.
        notes: damaged notes of the journal, to be dropped.
        chunks: to be encoded again.
        seal: the manifest has to be sealed with the commit records that there will be.
        unfinished: chunks of its last generations are missing, which ``precompute`` makes and seals.
        left: what a repair does not touch.
    """

    report: IntegrityReport
    manifest: CacheManifest
    root: tuple[str, ...]
    metadata: dict[str, bytes]
    tables: tuple[str, ...]
    notes: tuple[str, ...]
    chunks: tuple[ChunkRef, ...]
    seal: bool
    unfinished: bool
    left: tuple[Finding, ...]

    @property
    def empty(self) -> bool:
        """Whether there is nothing that a repair could do."""
        return not (self.root or self.metadata or self.tables or self.notes or self.chunks or self.seal)


def plan_repair(location: str, progress: Callable[[int, int], None] | None = None) -> RepairPlan:
    """Verify a cache and say what mends it. Writes nothing.

    The chunks of a generation that was never finished are left to ``precompute``, which encodes damaged ones too.

    Args:
        progress: as ``verify_cache`` calls it.

    Raises:
        CacheError: as ``verify_cache`` raises it: no manifest that could be used.
        CacheAccessError: an object cannot be read, so that nobody knows whether it is damaged.
        CacheCorruptError: Zarr's metadata is damaged, and this zarr writes other bytes than the recorded ones.
    """
    report = verify_cache(location, progress)
    files = open_files(location)
    manifest, _ = sound_manifest(files)
    closed = [finding for finding in report.findings if finding.kind == "unreadable"]
    if closed:
        raise CacheAccessError(
            f"{location}: {len(closed)} objects cannot be read, the first: {closed[0].message}. Their bytes may be "
            "sound. Let this user read them; or delete what is lost for good, and repair again."
        )
    sealed = {ref for generation in manifest.sealed_generations for ref in generation_chunks(manifest, generation)}
    owner = {
        key: ref
        for ref in all_chunks(manifest.layout)
        for key in (ref.commit_key, *ref.object_keys(manifest.layout).values())
    }
    root, static, notes, left = list[str](), list[str](), list[str](), list[Finding]()
    chunks = set[ChunkRef]()
    unsealed = seal = broken = False
    for finding in report.findings:
        key = finding.key
        if finding.kind == "unknown-file":
            left.append(finding)
        elif key in owner:
            chunks.add(owner[key])
        elif key.startswith(f"{JOURNAL}/"):
            notes.append(key)
        elif key in manifest.files:
            static.append(key)
        elif key == COMMITS:
            seal = broken = True
        elif finding.kind == "incomplete" and not manifest.sealed:
            unsealed = True
        elif key in (MANIFEST_KEY, BACKUP_KEY) and finding.kind != "counts":
            root.append(key)
        else:
            left.append(finding)
    if unsealed and report.chunks == len(committed_chunks(files, all_chunks(manifest.layout))):
        unsealed, seal = False, True
    if unsealed:
        for finding in report.findings:
            unfinished = finding.kind == "incomplete" and finding.key not in manifest.files
            if unfinished or (finding.key in owner and owner[finding.key] not in sealed):
                left.append(finding)
        chunks &= sealed
    if broken:
        # Records that are not those of the seal, though most are sound by themselves. A chunk whose note is damaged may
        # be an older one, put back; so may one without a note, if nothing else explains it. Where every note speaks
        # for its record, it is the seal that is behind: a repair was interrupted.
        there = set(files.list(JOURNAL)).difference(notes)
        suspects = {ref for ref in sealed if note_key(ref.name) not in there}
        chunks |= {ref for ref in suspects if not chunks or note_key(ref.name) in notes}
    return RepairPlan(
        report=report,
        manifest=manifest,
        root=tuple(root),
        metadata=_metadata(location, manifest, [key for key in static if _table_of(key) is None]),
        tables=tuple(key for key in static if _table_of(key) is not None),
        notes=tuple(notes),
        chunks=tuple(ref for ref in all_chunks(manifest.layout) if ref in chunks),
        seal=seal or bool(chunks),
        unfinished=unsealed,
        left=tuple(left),
    )


def restore(plan: RepairPlan) -> list[str]:
    """Do what needs neither dataset nor teacher; each object is replaced atomically, beside readers too.

    Returns:
        One line per object.
    """
    files = open_files(plan.report.location)
    done = []
    if plan.root:
        with Claims(files) as claims:
            # what is right now: views may have been planned since the cache was looked at, and must not be lost
            claims.wait_for(PLAN)
            manifest, wrong = sound_manifest(files)
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


def _table_of(key: str) -> str | None:
    folder = key.partition("/")[0]
    return folder if folder in (SAMPLES, CAPTIONS, PROBLEMS) else None


def _metadata(location: str, manifest: CacheManifest, keys: list[str]) -> dict[str, bytes]:
    if not keys:
        return {}
    made = zarr_metadata(manifest.layout)
    for key in keys:
        found, wanted = hashlib.sha256(made.get(key, b"")).hexdigest(), manifest.files[key].sha256
        if found != wanted:
            raise CacheCorruptError(
                f"{location}/{key}: damaged, and zarr {version('zarr')} writes other bytes (sha256 {found[:12]}, "
                f"{wanted[:12]} is recorded). Repair with zarr {manifest.made_with.get('zarr', 'of that time')}, or "
                "restore a copy of the file."
            )
    return {key: made[key] for key in keys}
