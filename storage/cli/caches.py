"""The commands about caches as a whole: ``diff``, ``export``; and what ``verify`` and ``repair`` print."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import click

from teacher_cache.storage.cli.app import (
    cache_argument,
    command,
    json_flag,
    option,
    print_lines,
    print_result,
    refuse_unused,
    seed_option,
    view_option,
)
from teacher_cache.storage.observe.quantities import byte_size, counted

if TYPE_CHECKING:
    from teacher_cache.storage.check.garbage import GarbageReport
    from teacher_cache.storage.check.verify import Finding, IntegrityReport
    from teacher_cache.storage.look.diff import CacheDiff, Drift
    from teacher_cache.storage.look.export import ExportResult
    from teacher_cache.storage.look.sidecar import SidecarResult

_SHOWN = 5


@command("diff", example="diff caches/old.cache caches/new.cache")
@cache_argument("a")
@cache_argument("b", "Folder or URL of the other cache.", metavar="OTHER")
@view_option
@option("--rows", "Maximum number of images whose embeddings are compared. More are sampled.", 20_000, least=1)
@seed_option
@json_flag
def diff(a: str, b: str, view: int, rows: int, seed: int, as_json: bool) -> None:
    """Show differences of identity, images and captions, and the drift of embeddings. Exit 1 unless they are equal."""
    from teacher_cache.storage.look.diff import diff_caches
    from teacher_cache.storage.observe.progress import StageProgress

    with StageProgress() as progress:
        result = diff_caches(a, b, view, rows, seed, progress)
    print_result(result, as_json, _diff_lines)
    if not result.same:
        sys.exit(1)


@command("export", example="export caches/coco.cache --out exported --split train")
@cache_argument()
@option("--out", "New local folder.", required=True)
@option("--split", "Split to export. Default: all.")
@option(
    "--captions",
    "Captions of each image. all repeats the image; none leaves captions out.",
    "first",
    type=click.Choice(["first", "all", "none"]),
)
@view_option
@option("--rows-per-file", "Number of rows of each npy file.", 1_000_000, least=1)
@option(
    "--sidecar",
    "Write WebDataset tars instead: KEY.npz for each image, one tar beside each of the dataset, of the same name.",
    is_flag=True,
)
@json_flag
def export(
    cache: str,
    out: str,
    split: str | None,
    captions: Literal["first", "all", "none"],
    view: int,
    rows_per_file: int,
    sidecar: bool,
    as_json: bool,
) -> None:
    """Leave quarantined rows out."""
    from teacher_cache.storage.look.export import export_rows
    from teacher_cache.storage.look.sidecar import export_sidecar
    from teacher_cache.storage.observe.progress import StageProgress

    if sidecar:
        refuse_unused(("captions", "rows_per_file"), "with --sidecar")
        with StageProgress() as progress:
            tars = export_sidecar(cache, out, split, view, progress)
        print_result(tars, as_json, _sidecar_lines)
        return
    with StageProgress() as progress:
        result = export_rows(cache, out, split, captions, view, rows_per_file, progress)
    print_result(result, as_json, _export_lines)


def _sidecar_lines(result: SidecarResult) -> list[str]:
    return [
        f"{result.out}: {counted(result.tars, 'tar')} with the targets of {counted(result.images, 'image')} and "
        f"{counted(result.captions, 'caption')}, {result.embed_dim} wide, float16; {result.quarantined:,} quarantined "
        "left out"
    ]


def _export_lines(result: ExportResult) -> list[str]:
    pairs = "" if result.captions == "none" else f"{counted(result.rows, 'pair')} of "
    line = (
        f"{result.out}: {pairs}{counted(result.images, 'image')}, {result.embed_dim} wide, "
        f"{result.dtype}, in {counted(result.parts, 'part')}; {result.quarantined:,} quarantined left out"
    )
    if not result.captions_left_out:
        return [line]
    more = counted(result.captions_left_out, "further caption")
    return [line, f"only the first caption of each image: {more} left out; --captions all writes them too"]


def _diff_lines(result: CacheDiff) -> list[str]:
    from teacher_cache.storage.format.identity import short_digests

    lines = [f"{result.a} -> {result.b}: {_diff_answer(result)}", *_named_images(result)]
    for name, drift in (("image", result.images), ("caption", result.captions)):
        if drift is not None and drift.equal < drift.compared:
            lines += _drift_lines(name, drift)
    if result.images_in_one:
        lines.append(f"{counted(result.images_in_one, 'image')} with an embedding in only one of the two caches")
    if result.other_chunks:
        lines.append(f"{counted(result.other_chunks, 'chunk')} with different bytes, over all views, norms and crops")
    if result.sampled:
        lines.append("only a sample of the embeddings was compared; --rows sets its size")
    if result.not_compared:
        lines.append(f"embeddings not compared: {result.not_compared}")
    for title, fields in (("identity", result.identity), ("layout", result.layout), ("only names", result.names)):
        lines += [short_digests(f"{title}: {field.field}: {field.a} -> {field.b}") for field in fields]
    return [*lines, f"manifests: {result.manifest_a[:12]} -> {result.manifest_b[:12]}"]


def _diff_answer(result: CacheDiff) -> str:
    """Return the differences in one line: images, then embeddings."""
    if result.same:
        return "the same"
    numbers = {
        "added": result.images_added,
        "removed": result.images_removed,
        "renamed": result.images_renamed,
        "changed": result.images_changed,
        "in another row": result.images_moved,
    }
    answers = [", ".join(f"{counted(number, 'image')} {what}" for what, number in numbers.items() if number)]
    drifts = [(name, drift) for name, drift in (("image", result.images), ("caption", result.captions)) if drift]
    if drifts:
        whole = "" if result.sampled else "the other " if any(numbers.values()) else "all "
        rows = " and ".join(counted(drift.compared, name) for name, drift in drifts)
        equal = all(drift.equal == drift.compared for _, drift in drifts)
        answers.append(f"embeddings of {whole}{rows} {'are equal' if equal else 'differ'}")
    if not result.differs:
        answers.append("nothing that was compared differs")
    return "; ".join(filter(None, answers)) or "they differ"


def _named_images(result: CacheDiff) -> list[str]:
    return [
        *(f"  + {sample_id}" for sample_id in result.added[:_SHOWN]),
        *(f"  - {sample_id}" for sample_id in result.removed[:_SHOWN]),
        *(f"  {before} -> {now}" for before, now in result.renamed[:_SHOWN]),
        *(f"  ~ {change.sample_id}: {', '.join(change.what)}" for change in result.changed[:_SHOWN]),
    ]


def _drift_lines(name: str, drift: Drift) -> list[str]:
    line = f"embeddings of {counted(drift.compared, name)}: {drift.equal:,} equal bit for bit"
    if drift.cosine is None:
        return [line]
    cosine = drift.cosine
    worst = [f"  {row.cosine:.6f}  {row.sample_id}, rows {row.row_a} and {row.row_b}" for row in drift.worst[:_SHOWN]]
    return [
        f"{line}; cosine mean {cosine.mean:.6f}, 1 % {cosine.quantiles['1 %']:.6f}, least {cosine.least:.6f}",
        *worst,
    ]


_FINDINGS_SHOWN = 20


def leftover_lines(report: GarbageReport) -> list[str]:
    """Return a line for each file that belongs to nothing, and what became of them."""
    if not report.found:
        lines = [f"{report.location}: nothing to collect"]
    else:
        total = f"{counted(len(report.found), 'file')}, {byte_size(report.nbytes)}"
        state = "deleted" if report.deleted else "found; --delete removes them, unknown files with --unknown"
        lines = [f"{file.kind}: {file.key} ({byte_size(file.nbytes)})" for file in report.found]
        lines.append(f"{report.location}: {total} {state}")
    if report.left:
        lines.append(f"{counted(report.left, 'unknown file')} kept; look at them, --delete --unknown removes them too")
    return lines


def print_report(report: IntegrityReport) -> None:
    """Print the first findings and the verdict."""
    print_findings(report.findings)
    counts = (
        f"{report.chunks_sound} of {report.chunks} chunks sound, {report.images:,} images "
        f"({report.quarantined} quarantined), {report.captions:,} captions, {byte_size(report.bytes_read)} read"
    )
    print_lines(*(f"in several caches: {picture}" for picture in report.repeated[:_FINDINGS_SHOWN]))
    if len(report.repeated) > _FINDINGS_SHOWN:
        print_lines(f"... and {len(report.repeated) - _FINDINGS_SHOWN} more pictures; --json lists all")
    verdict = "sound" if report.ok else counted(len(report.findings), "finding")
    print_lines(f"{report.location}: {verdict}: {counts}")


def print_findings(findings: Sequence[Finding]) -> None:
    """Print one line for each of the first findings."""
    print_lines(*(f"{finding.kind}: {finding.message}" for finding in findings[:_FINDINGS_SHOWN]))
    if len(findings) > _FINDINGS_SHOWN:
        print_lines(f"... and {len(findings) - _FINDINGS_SHOWN} more; --json lists all")
