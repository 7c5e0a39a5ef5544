"""The commands about caches as a whole: ``diff``, ``gc``, ``export``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from teacher_cache.storage.cli.app import (
    CacheArgument,
    JsonFlag,
    app,
    byte_size,
    complete_location,
    counted,
    print_json,
)
from teacher_cache.storage.errors import UsageError

if TYPE_CHECKING:
    from teacher_cache.storage.check.garbage import GarbageReport
    from teacher_cache.storage.look.diff import CacheDiff, Drift
from collections.abc import Sequence

from teacher_cache.storage.check.verify import Finding, IntegrityReport

__all__ = ["diff", "export", "gc", "print_findings", "print_report"]

_SHOWN = 5


@app.command()
def diff(
    a: CacheArgument,
    b: Annotated[
        str, typer.Argument(metavar="OTHER", help="The cache to compare with.", autocompletion=complete_location)
    ],
    view: Annotated[int, typer.Option("--view", min=0, help="View of the images whose embeddings to compare.")] = 0,
    rows: Annotated[
        int, typer.Option("--rows", min=1, help="Images whose embeddings to compare at most; of more, some are drawn.")
    ] = 20_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is drawn.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Compare two caches: identity, images added, removed, changed, drift of embeddings. Exit 1 unless the same."""
    from teacher_cache.storage.look.diff import diff_caches
    from teacher_cache.storage.observe.progress import StageProgress

    with StageProgress() as progress:
        found = diff_caches(a, b, view, rows, seed, progress)
    if json:
        print_json(found)
    else:
        _say(*_diff_lines(found))
    if not found.same:
        raise typer.Exit(1)


@app.command()
def gc(
    cache: CacheArgument,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete what writes and processes left; without it nothing is touched.")
    ] = False,
    unknown: Annotated[
        bool, typer.Option("--unknown", help="With --delete: unknown files too. They may be somebody's: look first.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """List what belongs to nothing: cut-off writes, claims of ended processes, unknown files. --delete removes it."""
    from teacher_cache.storage.check.garbage import collect_garbage

    found = collect_garbage(cache, delete, unknown)
    if json:
        print_json(found)
    else:
        _say(*_garbage_lines(found))


@app.command()
def export(
    cache: CacheArgument,
    out: Annotated[str, typer.Option("--out", help="New local folder.")],
    split: Annotated[str | None, typer.Option("--split", help="Images of one split, instead of all.")] = None,
    captions: Annotated[
        str, typer.Option("--captions", help="first of each image, or all of them, the image repeated for each.")
    ] = "first",
    view: Annotated[int, typer.Option("--view", min=0, help="View of the images; 0 is the evaluation crop.")] = 0,
    rows_per_file: Annotated[int, typer.Option("--rows-per-file", min=1, help="Rows of each npy file.")] = 1_000_000,
    json: JsonFlag = False,
) -> None:
    """Write embeddings as npy and parquet, in the folders that clip-retrieval and autofaiss read."""
    from teacher_cache.storage.look.export import export_rows
    from teacher_cache.storage.observe.progress import StageProgress

    if captions not in ("first", "all"):
        raise UsageError(f"--captions {captions}: first or all is wanted")
    with StageProgress() as progress:
        which: Literal["first", "all"] = "all" if captions == "all" else "first"
        found = export_rows(cache, out, split, which, view, rows_per_file, progress)
    if json:
        print_json(found)
        return
    _say(
        f"{found.out}: {counted(found.rows, 'pair')} of {counted(found.images, 'image')}, {found.embed_dim} wide, "
        f"{found.dtype}, in {counted(found.parts, 'part')}; {found.quarantined:,} quarantined left out"
    )


def _garbage_lines(found: GarbageReport) -> list[str]:
    lines = [f"{each.kind}: {each.key} ({byte_size(each.nbytes)})" for each in found.found]
    what = f"{counted(len(found.found), 'file')}, {byte_size(found.nbytes)}"
    if not found.found:
        lines = [f"{found.location}: nothing to collect"]
    elif found.deleted:
        lines.append(f"{found.location}: {what} deleted")
    else:
        lines.append(
            f"{found.location}: {what}; nothing was touched, --delete removes them, unknown files with --unknown"
        )
    if found.left:
        lines.append(f"{counted(found.left, 'unknown file')} left; look at them, --delete --unknown removes them too")
    return lines


def _diff_lines(found: CacheDiff) -> list[str]:
    lines = [f"{found.a}: manifest {found.manifest_a[:12]}", f"{found.b}: manifest {found.manifest_b[:12]}"]
    for title, fields in (("identity", found.identity), ("layout", found.layout), ("only names", found.names)):
        lines += [f"{title}: {each.field}: {each.a} -> {each.b}" for each in fields]
    lines.append(
        f"images: {found.images_added:,} added, {found.images_removed:,} removed, {found.images_changed:,} changed, "
        f"{found.images_moved:,} in another row"
    )
    lines += [f"  + {sample_id}" for sample_id in found.added[:_SHOWN]]
    lines += [f"  - {sample_id}" for sample_id in found.removed[:_SHOWN]]
    lines += [f"  ~ {change.sample_id}: {', '.join(change.what)}" for change in found.changed[:_SHOWN]]
    for name, drift in (("image", found.images), ("caption", found.captions)):
        if drift is not None:
            lines += _drift_lines(name, drift)
    if found.images_in_one:
        lines.append(f"{counted(found.images_in_one, 'image')} with an embedding in one of the two only")
    if found.other_chunks:
        lines.append(f"{counted(found.other_chunks, 'chunk')} of other bytes, of all views, norms and crops")
    if found.sampled:
        lines.append("some of the rows that both have were compared; --rows compares more")
    if found.not_compared:
        lines.append(f"embeddings not compared: {found.not_compared}")
    if found.same or found.differs:
        return [*lines, "the same" if found.same else "they differ"]
    return [*lines, "nothing that was compared differs"]


def _drift_lines(name: str, drift: Drift) -> list[str]:
    line = f"embeddings of {counted(drift.compared, name)}: {drift.equal:,} equal bit for bit"
    if drift.cosine is None or drift.equal == drift.compared:
        return [line]
    cosine = drift.cosine
    worst = [f"  {row.cosine:.6f}  {row.sample_id}, rows {row.row_a} and {row.row_b}" for row in drift.worst[:_SHOWN]]
    return [
        f"{line}; cosine mean {cosine.mean:.6f}, 1 % {cosine.quantiles['1 %']:.6f}, least {cosine.least:.6f}",
        *worst,
    ]


def _say(*lines: str) -> None:
    console = Console(highlight=False)
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


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
