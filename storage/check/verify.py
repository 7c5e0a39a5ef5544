"""Verification of a cache: every digest, value and count. Each finding names its object.

Verification continues after a damaged object, and uses the backup of a damaged manifest. An object that cannot be read
is reported as unreadable, not as damaged: its bytes may be sound.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, Field

from teacher_cache.storage.check.garbage import known_keys
from teacher_cache.storage.errors import (
    CacheAccessError,
    CacheCorruptError,
    CacheError,
    CacheFormatError,
    CacheUnreachableError,
    UsageError,
)
from teacher_cache.storage.files.claim_records import CLAIMS
from teacher_cache.storage.files.location import in_parallel, open_files
from teacher_cache.storage.files.protocol import CHUNKS_AT_ONCE, CacheFiles
from teacher_cache.storage.format.arrays import decode_object, stored_form
from teacher_cache.storage.format.commit_records import CommitRecords
from teacher_cache.storage.format.commits import (
    COMMITS,
    ChunkCommit,
    ChunkRef,
    all_chunks,
    commits_sha256,
    committed_chunks,
    proven_commit,
    quarantined_rows,
)
from teacher_cache.storage.format.journal import JOURNAL, note_key, read_note
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.format.manifest import BACKUP_KEY, MANIFEST_KEY, CacheManifest, Seal
from teacher_cache.storage.format.manifest_file import incomplete_message, no_cache
from teacher_cache.storage.format.row_rules import wrong_rows
from teacher_cache.storage.format.tables import (
    CAPTIONS,
    SAMPLES,
    captions_sha256,
    chunk_rows_sha256,
    read_static,
    read_table,
    samples_sha256,
)
from teacher_cache.storage.observe.logs import event, logger

_LOG = logger("verify")

# errors about a single object; a store that does not answer ends the verification instead
_FAULTS = (OSError, CacheCorruptError, CacheFormatError, CacheAccessError)


class Finding(BaseModel, frozen=True):
    """A fault of one object."""

    kind: str = Field(
        description="Kind: incomplete, missing, damaged, unreadable, not-finite, not-unit-norm, counts or unknown-file."
    )
    key: str = Field(description="Key of the object, relative to the cache.")
    message: str


class IntegrityReport(BaseModel, frozen=True):
    """The result of ``verify``. ``ok`` means that the cache is complete and has no finding."""

    location: str
    ok: bool
    manifest_digest: str
    images: int
    captions: int
    quarantined: int
    lost_images: int = Field(description="Images of the dataset without a row, each for a named reason.")
    chunks: int
    chunks_sound: int
    objects_read: int
    bytes_read: int
    findings: tuple[Finding, ...]
    repeated: tuple[str, ...] = Field((), description="Pictures that are in several of the caches read as one.")


def verify_cache(location: str, progress: Callable[[int, int], None] | None = None) -> IntegrityReport:
    """Read and check all of a cache.

    Checks the digests of manifest, backup, tables and Zarr metadata, every commit record, every byte of every chunk
    (sha256), finite values, unit norms, the row counts of the tables, the seal, and the journal. Only quarantined rows
    may be NaN (int8: -128). Unknown files are findings too.

    Args:
        progress: called with (chunks checked, all chunks).

    Raises:
        CacheNotFoundError, CacheFormatError, CacheCorruptError: neither manifest nor backup can be used.
        CacheUnreachableError: the store does not answer.
    """
    files = open_files(location)
    manifest, findings = sound_manifest(files)
    sizes, faults = _check_static(files, manifest)
    findings += faults
    tables = _sound_tables(files, manifest, findings)
    findings += _check_tables(manifest, tables)
    refs = all_chunks(manifest.layout)
    chunks = _check_chunks(files, manifest, tables, progress)
    later = []
    if manifest.seal is None:
        message = incomplete_message(files, manifest, len(refs) - chunks.pending, len(refs))
        later.append(Finding(kind="incomplete", key=MANIFEST_KEY, message=message))
    else:
        later += _check_seal(files, manifest.seal, chunks.commits)
    later += _check_journal(files, refs)
    later += _unknown_files(files, manifest)
    _log_findings(location, findings + later)
    findings += chunks.findings + later
    counts = {"chunks": len(refs), "sound": chunks.sound, "findings": len(findings)}
    event(_LOG, logging.INFO, "cache verified", cache=location, **counts)
    return IntegrityReport(
        location=location,
        ok=not findings,
        manifest_digest=manifest.digest,
        images=manifest.layout.image_rows,
        captions=manifest.layout.text_rows,
        quarantined=len(quarantined_rows(chunks.commits.values())),
        lost_images=manifest.lost_images,
        chunks=len(refs),
        chunks_sound=chunks.sound,
        objects_read=len(sizes) + sum(len(commit.objects) for commit in chunks.commits.values()),
        bytes_read=sum(sizes) + chunks.nbytes,
        findings=tuple(findings),
    )


def _check_static(files: CacheFiles, manifest: CacheManifest) -> tuple[list[int], list[Finding]]:
    """Return the sizes of the sound files that the manifest names, and findings about the others."""
    sizes, findings = list[int](), list[Finding]()
    for key, recorded in manifest.files.items():
        try:
            sizes.append(len(read_static(files, key, recorded)))
        except _FAULTS as error:
            findings.append(_fault(key, error))
    return sizes, findings


def _sound_tables(files: CacheFiles, manifest: CacheManifest, findings: list[Finding]) -> dict[Tower, pa.Table]:
    """Return the tables without a finding."""
    damaged = {finding.key.partition("/")[0] for finding in findings}
    names: dict[Tower, str] = {"image": SAMPLES, "text": CAPTIONS}
    return {tower: read_table(files, manifest, name) for tower, name in names.items() if name not in damaged}


@dataclass
class _Chunks:
    """Result of proving all chunks: sound commit records in order, findings, and counts."""

    commits: dict[ChunkRef, ChunkCommit] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    pending: int = 0
    nbytes: int = 0
    sound: int = 0

    def add(self, ref: ChunkRef, proof: _Proof) -> None:
        """Count one chunk."""
        self.findings += proof.findings
        self.nbytes += proof.nbytes
        if proof.commit is not None:
            self.commits[ref] = proof.commit
            self.sound += not proof.findings
        self.pending += proof.commit is None and not proof.findings


def _check_chunks(
    files: CacheFiles,
    manifest: CacheManifest,
    tables: dict[Tower, pa.Table],
    progress: Callable[[int, int], None] | None,
) -> _Chunks:
    """Prove every chunk and log each result at once."""
    refs, chunks = all_chunks(manifest.layout), _Chunks()
    proofs = in_parallel(files, lambda ref: _prove(files, manifest, ref, tables.get(ref.tower)), refs, CHUNKS_AT_ONCE)
    for number, (ref, proof) in enumerate(zip(refs, proofs, strict=True), 1):
        if progress is not None:
            progress(number, len(refs))
        chunks.add(ref, proof)
        rows = ref.rows(manifest.layout)
        where = {"chunk": ref.name, "rows": [rows.start, rows.stop]}
        _log_findings(files.location, proof.findings, **where)
        if proof.commit is not None and not proof.findings:
            event(_LOG, logging.INFO, "chunk sound", cache=files.location, **where)
    return chunks


def _log_findings(location: str, findings: Sequence[Finding], **where: Any) -> None:
    for finding in findings:
        about = finding.model_dump(exclude={"message"})
        event(_LOG, logging.ERROR, finding.message, cache=location, **where, **about)


def sound_manifest(files: CacheFiles) -> tuple[CacheManifest, list[Finding]]:
    """Return the manifest to verify against, and findings about ``manifest.json`` and its backup.

    One of the two is enough. If both can be read and differ, the one that matches the commit records is used, else
    ``manifest.json``.

    Raises:
        CacheNotFoundError: neither exists.
        CacheFormatError: both are of another format.
        CacheCorruptError: neither can be used.
    """
    manifests: dict[str, CacheManifest] = {}
    faults: dict[str, Exception] = {}
    findings: list[Finding] = []
    for key in (MANIFEST_KEY, BACKUP_KEY):
        try:
            data = files.read(key)
            manifests[key] = CacheManifest.from_bytes(data, files.location, key)
        except _FAULTS as error:
            faults[key] = error
            findings.append(_fault(key, error))
            continue
        if data != manifests[key].to_bytes():
            findings.append(_other_bytes(key))
    main, backup = manifests.get(MANIFEST_KEY), manifests.get(BACKUP_KEY)
    if main is None and backup is None:
        raise _rootless(files.location, faults)
    if main is None or backup is None:
        return next(iter(manifests.values())), findings
    if main == backup:
        return main, findings
    if main == backup.model_copy(update={"seal": None}):
        done, total = _committed(files, backup), backup.layout.num_chunks
        message = f"{incomplete_message(files, backup, done, total)} Its backup is sealed, {MANIFEST_KEY} is not."
        return backup, [*findings, Finding(kind="incomplete", key=MANIFEST_KEY, message=message)]
    newer = _is_sealed_with(files, backup) and not _is_sealed_with(files, main)
    wrong, right = (MANIFEST_KEY, BACKUP_KEY) if newer else (BACKUP_KEY, MANIFEST_KEY)
    what = f"digest {manifests[wrong].digest[:12]}, {right} has {manifests[right].digest[:12]}"
    return manifests[right], [*findings, _finding("damaged", wrong, what)]


def _rootless(location: str, faults: dict[str, Exception]) -> CacheError | UsageError:
    main, backup = faults[MANIFEST_KEY], faults[BACKUP_KEY]
    if isinstance(main, (FileNotFoundError, NotADirectoryError)) and isinstance(backup, type(main)):
        return no_cache(location)
    gone = isinstance(backup, FileNotFoundError)
    if isinstance(main, CacheFormatError) and (gone or isinstance(backup, CacheFormatError)):
        return main
    what = "; ".join(_fault(key, error).message for key, error in faults.items())
    return CacheCorruptError(
        f"{location}: neither {MANIFEST_KEY} nor {BACKUP_KEY} can be used: {what} Restore one of them from a copy of "
        "the cache."
    )


def _committed(files: CacheFiles, manifest: CacheManifest) -> int:
    return len(committed_chunks(files, all_chunks(manifest.layout)))


def _is_sealed_with(files: CacheFiles, manifest: CacheManifest) -> bool:
    """Return whether the manifest has a seal that matches the commit records."""
    if manifest.seal is None:
        return False
    try:
        return CommitRecords(manifest).read(files) == manifest.seal.commits_sha256
    except CacheUnreachableError:
        raise
    except _FAULTS:
        return False  # proving the chunks reports the damaged record


def _fault(key: str, error: Exception) -> Finding:
    """Convert the error of one object to a finding.

    Raises:
        CacheUnreachableError: the error is about the store, not about this object.
    """
    if isinstance(error, CacheUnreachableError):
        raise error
    missing = (FileNotFoundError, NotADirectoryError)
    if isinstance(error, missing) or isinstance(error.__cause__, missing):
        return _finding("missing", key, "missing")
    if isinstance(error, (CacheCorruptError, CacheFormatError)):
        return Finding(kind="damaged", key=key, message=str(error))
    what = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    return _finding("unreadable", key, f"cannot be read: {what}")


def _finding(kind: str, key: str, what: str) -> Finding:
    return Finding(kind=kind, key=key, message=f"{key}: {what}")


def _other_bytes(key: str) -> Finding:
    return _finding("damaged", key, "the content has its digest, but these are not the bytes that were written")


def _check_rows(manifest: CacheManifest, ref: ChunkRef, commit: ChunkCommit, table: pa.Table | None) -> list[Finding]:
    rows = ref.rows(manifest.layout)
    if table is None or commit.rows_sha256 == chunk_rows_sha256(table.slice(rows.start, len(rows)), ref.tower):
        return []
    return [_finding("damaged", ref.commit_key, "its rows were made of other images or captions than the tables list")]


class _Proof(NamedTuple):
    """Result of proving one chunk. A chunk that is not encoded yet has neither commit nor findings."""

    commit: ChunkCommit | None
    findings: list[Finding]
    nbytes: int = 0


def _prove(files: CacheFiles, manifest: CacheManifest, ref: ChunkRef, table: pa.Table | None) -> _Proof:
    try:
        data = files.read(ref.commit_key)
        commit = proven_commit(data, files.location, manifest, ref)
    except FileNotFoundError:
        lost = _finding("missing", ref.commit_key, f"the commit record of {ref.name} is missing from a sealed cache")
        return _Proof(None, [lost] if manifest.sealed else [])
    except _FAULTS as error:
        return _Proof(None, [_fault(ref.commit_key, error)])
    findings, nbytes = _check_chunk(files, manifest, ref, commit)
    findings += _check_rows(manifest, ref, commit, table)
    if data != commit.to_bytes():
        findings.append(_other_bytes(ref.commit_key))
    return _Proof(commit, findings, nbytes)


def _check_chunk(
    files: CacheFiles, manifest: CacheManifest, ref: ChunkRef, commit: ChunkCommit
) -> tuple[list[Finding], int]:
    findings: list[Finding] = []
    arrays: dict[str, Any] = {}
    read = 0
    for name, key in ref.object_keys(manifest.layout).items():
        try:
            data = files.read(key)
        except _FAULTS as error:
            findings.append(_fault(key, error))
            continue
        read += len(data)
        if hashlib.sha256(data).hexdigest() != commit.objects[name].sha256:
            what = f"sha256 of its {len(data)} bytes is not the committed {commit.objects[name].sha256[:12]}"
            findings.append(_finding("damaged", key, what))
            continue
        shape, dtype = stored_form(manifest.layout, ref.tower, name)
        try:
            compressor = manifest.layout.compressor
            arrays[name] = decode_object(data, commit.objects[name], shape, dtype, key, compressor)
        except CacheCorruptError as error:
            findings.append(_fault(key, error))
    if findings:
        return findings, read

    rows = ref.rows(manifest.layout)
    held = {name: values[: len(rows)] for name, values in arrays.items()}
    for name, kind, what in wrong_rows(rows, held, {row.row for row in commit.quarantined}):
        findings.append(_finding(kind, ref.object_keys(manifest.layout)[name], what))
    return findings, read


def _check_tables(manifest: CacheManifest, tables: dict[Tower, pa.Table]) -> list[Finding]:
    findings = []
    dataset = manifest.identity.dataset
    checks: dict[Tower, tuple[str, Callable[[pa.Table], str], str]] = {
        "image": (SAMPLES, samples_sha256, dataset.samples_sha256),
        "text": (CAPTIONS, captions_sha256, dataset.captions_sha256),
    }
    for tower, table in tables.items():
        name, digest, recorded = checks[tower]
        rows, planned, actual = table["row"].to_numpy(), manifest.layout.rows(tower), digest(table)
        if not np.array_equal(rows, np.arange(planned)):
            what = f"{len(rows)} rows in the table, rows 0 to {planned - 1} wanted in order"
            findings.append(_finding("counts", name, what))
        if actual != recorded:
            what = f"rows have sha256 {actual[:12]}, the identity names {recorded[:12]}"
            findings.append(_finding("damaged", name, what))
    return findings


def _check_seal(files: CacheFiles, seal: Seal, commits: dict[ChunkRef, ChunkCommit]) -> list[Finding]:
    """Return findings about the seal, given all sound commit records in order."""
    if commits_sha256(commits.values()) == seal.commits_sha256:
        lost = len(quarantined_rows(commits.values()))
        if lost == seal.images_quarantined:
            return []
        message = f"{lost} images quarantined in the commits, {seal.images_quarantined} in the seal"
        return [Finding(kind="counts", key=MANIFEST_KEY, message=message)]
    findings = [_finding("damaged", COMMITS, "the commit records are not those that the manifest was sealed with")]
    # the seal covers all records together; if each is sound by itself, only the notes tell which one is wrong
    for ref, commit in commits.items():
        try:
            note = read_note(files, ref.name)
        except CacheUnreachableError:
            raise
        except _FAULTS:
            continue
        if not note.is_of(commit):
            what = f"not the record that the journal notes for {ref.name}; an older one, put back?"
            findings.append(_finding("damaged", ref.commit_key, what))
    return findings


def _check_journal(files: CacheFiles, refs: list[ChunkRef]) -> list[Finding]:
    """Return findings about damaged notes. A missing note is ignored: nothing depends on it."""
    existing = set(files.list(JOURNAL))

    def fault_of(ref: ChunkRef) -> Finding | None:
        try:
            read_note(files, ref.name)
        except _FAULTS as error:
            return _fault(note_key(ref.name), error)
        return None

    faults = in_parallel(files, fault_of, [ref for ref in refs if note_key(ref.name) in existing])
    return [finding for finding in faults if finding is not None]


def _unknown_files(files: CacheFiles, manifest: CacheManifest) -> list[Finding]:
    """Return findings about objects that no commit, manifest or journal names. Uncommitted chunks are known."""
    known = known_keys(manifest)
    return [
        _finding("unknown-file", key, "nothing in the cache accounts for this file")
        for key in files.list()
        if key not in known and not key.startswith(f"{CLAIMS}/")
    ]
