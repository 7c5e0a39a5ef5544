"""Verification of several caches that are read as one: each alone, then whether they belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.check.verify import Finding, IntegrityReport, verify_cache
from teacher_cache.storage.format.tables import SAMPLES
from teacher_cache.storage.read.parts import part_locations
from teacher_cache.storage.read.reader import EmbeddingReader

_KEY_BYTES = 16  # of a picture's sha256


def verify_parts(location: str, progress: Callable[[int, int], None] | None = None) -> IntegrityReport:
    """Verify each cache that a pattern names, and that they can be read as one. Keys begin with the part's name.

    A picture that is in several parts is no fault, and is named: a dataset may hold a picture twice, but two parts
    that overlap do so by mistake.

    Args:
        progress: called with (parts verified, all parts).

    Raises:
        CacheMismatchError: all are sound, but they are not of one identity and layout.
        CacheError: as :func:`teacher_cache.storage.check.verify.verify_cache`.
    """
    names, reports = part_locations(location), list[IntegrityReport]()
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
    """Return a line for each picture that is in more than one part, with the sample ids. 24 bytes a row in memory."""
    shas = chain.from_iterable(part.to_pylist() for part in reader.column(SAMPLES, "content_sha256"))
    keys = np.frombuffer(b"".join(bytes.fromhex(sha)[:_KEY_BYTES] for sha in shas), f"V{_KEY_BYTES}")
    _, group, counts = np.unique(keys, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(counts[group] > 1)
    rows = rows[np.argsort(group[rows], kind="stable")]
    alike = np.split(rows, np.flatnonzero(np.diff(group[rows])) + 1) if len(rows) else []
    lines = (_where(reader, picture) for picture in sorted(alike, key=lambda picture: int(picture[0])))
    return tuple(filter(None, lines))


def _where(reader: EmbeddingReader, rows: NDArray[np.int64]) -> str:
    """Return where a picture is; empty if all are in one part."""
    parts = np.searchsorted(reader.parts.first_rows("image"), rows, side="right") - 1
    if len(set(parts.tolist())) < 2:
        return ""
    ids: Sequence[str] = reader.table_rows(SAMPLES, rows)["sample_id"].to_pylist()
    names = (reader.parts.members[part].files.location for part in parts)
    return " and ".join(f"{sample} of {name}" for sample, name in zip(ids, names, strict=True))
