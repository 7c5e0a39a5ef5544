"""How the findings of a cache are shown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from storage.cli import counted
from storage.integrity import Finding, IntegrityReport

__all__ = ["print_findings", "print_report"]

_FINDINGS_SHOWN = 20


def print_report(report: IntegrityReport) -> None:
    """The first findings and the verdict."""
    console = Console()
    print_findings(report.findings)
    counts = (
        f"{report.chunks_sound} of {report.chunks} chunks sound, {report.images:,} images "
        f"({report.quarantined} quarantined), {report.captions:,} captions, {report.bytes_read / 1e6:,.1f} MB read"
    )
    verdict = "sound" if report.ok else counted(len(report.findings), "finding")
    console.print(f"{report.location}: {verdict}: {counts}", markup=False, soft_wrap=True)


def print_findings(findings: Sequence[Finding]) -> None:
    """One line for each of the first findings."""
    console = Console()
    for finding in findings[:_FINDINGS_SHOWN]:
        console.print(f"{finding.kind}: {finding.message}", markup=False, soft_wrap=True)
    if len(findings) > _FINDINGS_SHOWN:
        console.print(f"... and {len(findings) - _FINDINGS_SHOWN} more; --json lists all")
