"""Verification of several caches that are read as one: each alone, then whether they belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain

import numpy as np

from teacher_cache.storage.check.verify import Finding, IntegrityReport, verify_cache
from teacher_cache.storage.errors import CacheCorruptError, CacheIncompleteError
from teacher_cache.storage.format.tables import SAMPLES
from teacher_cache.storage.read.content_index import content_digests
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.several.parts import open_parts, part_locations


def verify_parts(location: str, progress: Callable[[int, int], None] | None = None) -> IntegrityReport:
    """Verify each cache that a pattern names, and that they can be read as one. Keys begin with the part's name.

    A picture that is in several parts is no fault, and is named: a dataset may hold a picture twice, but two parts
    that overlap do so by mistake.

    Args:
        progress: called with (parts verified, all parts).

    Raises:
        CacheMismatchError: they are not of one identity and layout.
        CacheError: as :func:`teacher_cache.storage.check.verify.verify_cache`.
    """
    names, reports = part_locations(location), list[IntegrityReport]()
    with suppress(CacheCorruptError, CacheIncompleteError):  # which the reports name
        open_parts(location)  # before hours of reading
    for name in names:
        reports.append(verify_cache(name))
        if progress is not None:
            progress(len(reports), len(names))
    findings = tuple(finding for name, report in zip(names, reports, strict=True) for finding in _named(name, report))
    reader = None if findings else EmbeddingReader(location)
    counts = IntegrityReport.model_fields.keys() - {"location", "ok", "manifest_digest", "findings", "repeated"}
    return IntegrityReport(
        location=location,
        ok=not findings,
        manifest_digest="" if reader is None else reader.manifest.digest,
        findings=findings,
        repeated=() if reader is None else _in_several_parts(reader),
        **{count: sum(getattr(report, count) for report in reports) for count in counts},
    )


def _named(name: str, report: IntegrityReport) -> Iterator[Finding]:
    for finding in report.findings:
        yield finding.model_copy(update={"key": f"{name.rpartition('/')[2]}/{finding.key}"})


def _in_several_parts(reader: EmbeddingReader) -> tuple[str, ...]:
    """Return a line for each picture that is in more than one part: its first place in each. Some 100 bytes a row."""
    shas = chain.from_iterable(part.to_pylist() for part in reader.column(SAMPLES, "content_sha256"))
    keys = content_digests(shas)
    parts = np.repeat(np.arange(len(reader.parts)), np.diff(reader.parts.first_rows("image")))
    order = np.argsort(keys, kind="stable")
    alike, same_part = keys[order][1:] == keys[order][:-1], parts[order][1:] == parts[order][:-1]
    # of a picture, the first row in each part
    rows = order[np.concatenate([[True], ~(alike & same_part)])]
    pictures = np.split(rows, np.flatnonzero(keys[rows][1:] != keys[rows][:-1]) + 1)
    several = sorted((rows for rows in pictures if len(rows) > 1), key=lambda rows: int(rows[0]))
    if not several:
        return ()
    ids = iter(reader.table_rows(SAMPLES, np.concatenate(several))["sample_id"].to_pylist())
    names = [part.files.location for part in reader.parts.members]
    return tuple(" and ".join(f"{next(ids)} of {names[part]}" for part in parts[rows]) for rows in several)
