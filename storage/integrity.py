"""Verifying a cache: every digest, every value, every count; each finding names the object it is about."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, Field

from storage.arrays import array_dtype, chunk_shape, decode_object
from storage.claims import CLAIMS
from storage.commits import COMMITS, ChunkCommit, ChunkRef, Tower, all_chunks, read_commit, read_commits
from storage.errors import CacheCorruptError, CacheFormatError
from storage.files import CacheFiles, open_files
from storage.journal import JOURNAL
from storage.manifest import BACKUP_KEY, MANIFEST_KEY, CacheManifest
from storage.root import read_backup, read_manifest
from storage.rows import wrong_rows
from storage.tables import (
    CAPTIONS,
    SAMPLES,
    captions_sha256,
    chunk_rows_sha256,
    read_static,
    read_table,
    samples_sha256,
)
from storage.writer import incomplete_message

__all__ = ["Finding", "IntegrityReport", "verify_cache"]


class Finding(BaseModel, frozen=True):
    """One thing that is wrong."""

    kind: str = Field(description="incomplete, missing, damaged, not-finite, not-unit-norm, counts or unknown-file.")
    key: str = Field(description="The object concerned, relative to the cache.")
    message: str


class IntegrityReport(BaseModel, frozen=True):
    """What ``verify`` saw. ``ok`` only when the cache is complete and nothing at all is wrong."""

    location: str
    ok: bool
    manifest_digest: str
    images: int
    captions: int
    quarantined: int
    lost_images: int = Field(description="Images of the dataset that never got a row, for a named reason.")
    chunks: int
    chunks_sound: int
    objects_read: int
    bytes_read: int
    findings: tuple[Finding, ...]


def verify_cache(location: str, progress: Callable[[int, int], None] | None = None) -> IntegrityReport:
    """Read all of a cache and prove it.

    Checked: the manifest's own digest, tables and Zarr metadata, every commit record, every byte of every
    chunk (sha256), finite values, unit norm, quarantined rows NaN and no others, row counts of the tables, the
    seal, and that there is no object that nobody accounts for.

    Args:
        progress: called with (chunks checked, chunks in all).

    Raises:
        CacheNotFoundError, CacheFormatError, CacheCorruptError: no manifest that could be checked against.
    """
    files = open_files(location)
    manifest = read_manifest(files)
    findings: list[Finding] = []
    objects = nbytes = 0

    for key, wanted in manifest.files.items():
        try:
            nbytes += len(read_static(files, key, wanted))
            objects += 1
        except CacheCorruptError as error:
            findings.append(Finding(kind="damaged" if files.exists(key) else "missing", key=key, message=str(error)))
    tables: dict[Tower, pa.Table] = {}
    if not findings:
        tables = {"image": read_table(files, manifest, SAMPLES), "text": read_table(files, manifest, CAPTIONS)}
        findings += _check_tables(manifest, tables)
    findings += _check_backup(files, manifest)

    refs = all_chunks(manifest.layout)
    sound = uncommitted = quarantined = 0
    for number, ref in enumerate(refs):
        if progress is not None:
            progress(number + 1, len(refs))
        try:
            commit = read_commit(files, manifest, ref)
        except CacheCorruptError as error:
            findings.append(Finding(kind="damaged", key=ref.commit_key, message=str(error)))
            continue
        if commit is None:
            uncommitted += 1
            if manifest.sealed:
                findings.append(
                    Finding(kind="missing", key=ref.commit_key, message=f"{ref.name}: commit record of a sealed cache")
                )
            continue
        found, read = _check_chunk(files, manifest, ref, commit)
        if tables and commit.rows_sha256 != chunk_rows_sha256(tables[ref.tower], ref.tower, ref.rows(manifest.layout)):
            message = f"{ref.commit_key}: its rows were made of other images or captions than the tables list"
            found.append(Finding(kind="damaged", key=ref.commit_key, message=message))
        findings += found
        objects += len(commit.objects)
        nbytes += read
        sound += not found
        quarantined += len(commit.quarantined) if ref.view == 0 else 0

    if not manifest.sealed:
        message = incomplete_message(location, len(refs) - uncommitted, len(refs))
        findings.append(Finding(kind="incomplete", key=MANIFEST_KEY, message=message))
    else:
        findings += _check_seal(files, manifest, quarantined)
    findings += _unknown_files(files, manifest, refs)
    return IntegrityReport(
        location=location,
        ok=not findings,
        manifest_digest=manifest.digest,
        images=manifest.layout.image_rows,
        captions=manifest.layout.text_rows,
        quarantined=quarantined,
        lost_images=sum(generation.lost_images for generation in manifest.generations),
        chunks=len(refs),
        chunks_sound=sound,
        objects_read=objects,
        bytes_read=nbytes,
        findings=tuple(findings),
    )


def _check_chunk(
    files: CacheFiles, manifest: CacheManifest, ref: ChunkRef, commit: ChunkCommit
) -> tuple[list[Finding], int]:
    findings: list[Finding] = []
    arrays: dict[str, Any] = {}
    read = 0
    for name, key in ref.object_keys().items():
        try:
            data = files.read(key)
        except FileNotFoundError:
            findings.append(Finding(kind="missing", key=key, message=f"{key}: committed, but not there"))
            continue
        read += len(data)
        if hashlib.sha256(data).hexdigest() != commit.objects[name].sha256:
            message = f"{key}: sha256 of its {len(data)} bytes is not the committed {commit.objects[name].sha256[:12]}"
            findings.append(Finding(kind="damaged", key=key, message=message))
            continue
        shape, dtype = chunk_shape(manifest.layout, ref.tower, name), array_dtype(ref.tower, name)
        try:
            arrays[name] = decode_object(data, commit.objects[name], shape, dtype, key)
        except CacheCorruptError as error:
            findings.append(Finding(kind="damaged", key=key, message=str(error)))
    if findings:
        return findings, read

    rows = ref.rows(manifest.layout)
    held = {name: values[: len(rows)] for name, values in arrays.items()}
    for name, kind, what in wrong_rows(rows, held, {row.row for row in commit.quarantined}):
        key = ref.object_keys()[name]
        findings.append(Finding(kind=kind, key=key, message=f"{key}: {what}"))
    return findings, read


def _check_tables(manifest: CacheManifest, tables: dict[Tower, pa.Table]) -> list[Finding]:
    findings = []
    dataset = manifest.identity.dataset
    checks: tuple[tuple[Tower, str, str, str], ...] = (
        ("image", SAMPLES, samples_sha256(tables["image"]), dataset.samples_sha256),
        ("text", CAPTIONS, captions_sha256(tables["text"]), dataset.captions_sha256),
    )
    for tower, name, found, recorded in checks:
        rows, wanted = tables[tower]["row"].to_numpy(), manifest.layout.rows(tower)
        if not np.array_equal(rows, np.arange(wanted)):
            message = f"{name}: {len(rows)} rows in the table, rows 0 to {wanted - 1} wanted in order"
            findings.append(Finding(kind="counts", key=name, message=message))
        if found != recorded:
            message = f"{name}: rows have sha256 {found[:12]}, the identity names {recorded[:12]}"
            findings.append(Finding(kind="damaged", key=name, message=message))
    return findings


def _check_backup(files: CacheFiles, manifest: CacheManifest) -> list[Finding]:
    try:
        backup = read_backup(files)
    except (CacheCorruptError, CacheFormatError) as error:
        return [Finding(kind="damaged", key=BACKUP_KEY, message=str(error))]
    if backup is None:
        return [Finding(kind="missing", key=BACKUP_KEY, message=f"{BACKUP_KEY}: the manifest's backup is not there")]
    if not manifest.sealed and backup.unsealed() == manifest:
        return []  # sealed but for the manifest itself, which is written after it: incomplete, as is said anyway
    if backup != manifest:
        message = f"{BACKUP_KEY}: digest {backup.digest[:12]}, the manifest has {manifest.digest[:12]}"
        return [Finding(kind="damaged", key=BACKUP_KEY, message=message)]
    return []


def _check_seal(files: CacheFiles, manifest: CacheManifest, quarantined: int) -> list[Finding]:
    seal = manifest.generations[-1].seal
    assert seal is not None  # only called on a sealed manifest
    findings = []
    try:
        as_sealed = read_commits(files, manifest)[1] == seal.commits_sha256
    except CacheCorruptError:
        as_sealed = False  # the record itself is named above
    if not as_sealed:
        message = f"{COMMITS}: the commit records are not those that the manifest was sealed with"
        findings.append(Finding(kind="damaged", key=COMMITS, message=message))
    if quarantined != seal.images_quarantined:
        message = f"{quarantined} images quarantined in the commits, {seal.images_quarantined} in the seal"
        findings.append(Finding(kind="counts", key=MANIFEST_KEY, message=message))
    return findings


def _unknown_files(files: CacheFiles, manifest: CacheManifest, refs: list[ChunkRef]) -> list[Finding]:
    """Objects that no commit, manifest or journal accounts for; those of chunks in the making are known."""
    known = {MANIFEST_KEY, BACKUP_KEY, *manifest.files}
    for ref in refs:
        known.update((ref.commit_key, *ref.object_keys().values()))
    return [
        Finding(kind="unknown-file", key=key, message=f"{key}: nothing in the cache accounts for this file")
        for key in files.list()
        if key not in known and not key.startswith((f"{JOURNAL}/", f"{CLAIMS}/"))
    ]
