"""The commands that need storage alone, and how findings are shown. No torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from storage.identity import ViewsIdentity
from storage.inspect import CacheInfo, describe_cache
from storage.integrity import Finding, IntegrityReport

__all__ = ["CacheArgument", "JsonFlag", "app", "counted", "print_findings", "print_json", "print_report"]

app = typer.Typer(
    name="teacher-cache",
    help="Run a CLIP teacher once, keep its embeddings, distil every student from the cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

CacheArgument = Annotated[str, typer.Argument(metavar="CACHE", help="Folder or URL of the cache.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]

_FINDINGS_SHOWN = 20


def counted(number: int, what: str) -> str:
    """The number and the word, in the plural but for one."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def print_json(result: BaseModel) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(result.model_dump_json(indent=2) + "\n")


@app.command()
def info(cache: CacheArgument, json: JsonFlag = False) -> None:
    """Show what a cache is of and how far it is. Reads no embeddings."""
    found = describe_cache(cache)
    if json:
        print_json(found)
    else:
        Console().print(_info_table(found))


def _info_table(found: CacheInfo) -> Table:
    identity, layout = found.identity, found.layout
    table = Table(title=escape(found.location), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    state = "complete" if found.sealed else "not complete: run the same precompute command again to finish it"
    if not found.sealed and found.views_sealed:
        state += f"; {found.views_sealed} of {layout.views} views can be read"
    splits = ", ".join(f"{name or '(none)'} {count:,}" for name, count in identity.dataset.splits.items())
    teacher = identity.teacher
    rows = {
        "state": f"{found.chunks_committed:,} of {found.chunks:,} chunks, {state}",
        "teacher": f"{teacher.name}{' ' + teacher.pretrained if teacher.pretrained else ''}, {teacher.precision}, "
        f"weights {teacher.weights_sha256[:12]}, logit scale {teacher.logit_scale:.2f}",
        "dataset": f"{found.dataset}",
        "rows": f"{layout.image_rows:,} images, {layout.text_rows:,} captions ({splits})",
        "embeddings": f"{layout.embed_dim} wide, {identity.targets.dtype}",
        "views": _views(identity.views),
        "chunks of": f"{layout.image_chunk_rows:,} images, {layout.text_chunk_rows:,} captions",
        "size": f"{found.target_bytes / 1e6:,.1f} MB of targets",
        "images in": _accounts(found),
        "problems": ", ".join(f"{kind} {count:,}" for kind, count in found.problems.items()) or "none in the dataset",
        "cost": _cost(found),
        "preprocessing": f"{identity.preprocess.image_size[0]} x {identity.preprocess.image_size[1]}, "
        f"{identity.preprocess.interpolation}, {identity.preprocess.resize_mode}",
        "identity": found.identity_digest,
        "manifest": found.manifest_digest,
        "made with": ", ".join(f"{name} {version}" for name, version in found.made_with.items()),
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def _views(views: ViewsIdentity) -> str:
    if views.scale is None or views.ratio is None:
        return f"{views.count} (the evaluation crop)"
    return (
        f"{views.count}: the evaluation crop and {views.count - 1} random crops of {views.scale[0]:g} to "
        f"{views.scale[1]:g} of the area, width / height {views.ratio[0]:.3g} to {views.ratio[1]:.3g}, mirrored with "
        f"probability {views.flip:g}, seed {views.seed}"
    )


def _accounts(found: CacheInfo) -> str:
    """What became of each image of the dataset; both sides add up."""
    total = found.layout.image_rows + found.lost_images
    rows = f"{found.layout.image_rows:,} with a row (encoded or quarantined: known when complete)"
    if found.images_encoded is not None:
        rows = f"{found.images_encoded:,} encoded + {found.images_quarantined:,} quarantined"
    return f"{total:,} = {rows} + {found.lost_images:,} without a row"


def _cost(found: CacheInfo) -> str:
    if not found.encode_seconds:
        return "nothing encoded yet"
    rates = [
        f"{rate:,.0f} {what}/s"
        for rate, what in ((found.images_per_second, "images"), (found.captions_per_second, "captions"))
        if rate is not None
    ]
    return f"{found.encode_seconds:,.1f} s ({', '.join(rates)})"


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
