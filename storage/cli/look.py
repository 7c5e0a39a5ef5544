"""The commands that look at caches without reading embeddings: ``ls``, ``info``."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from teacher_cache.storage.cli.app import (
    CacheArgument,
    JsonFlag,
    app,
    byte_size,
    complete_location,
    counted,
    print_json,
    rates,
)

if TYPE_CHECKING:
    from teacher_cache.storage.format.identity import ViewsIdentity
    from teacher_cache.storage.look.info import CacheInfo, Coverage
    from teacher_cache.storage.look.listing import CacheListing, ListedCache

__all__ = ["info", "ls"]

_BAR = 24  # characters
_WIDE = 110


@app.command()
def ls(
    location: Annotated[
        str, typer.Argument(metavar="[PATH]", help="Folder or URL to look below.", autocompletion=complete_location)
    ] = ".",
    depth: Annotated[int, typer.Option("--depth", min=0, help="Levels of folders below it to look into.")] = 4,
    json: JsonFlag = False,
) -> None:
    """List the caches below a path or URL. Reads their manifests only; exit 1 if one of them cannot be used."""
    from teacher_cache.storage.look.listing import list_caches

    found = list_caches(location, depth)
    if json:
        print_json(found)
    else:
        _print_listing(found, depth)
    if any(cache.problem for cache in found.caches):
        raise typer.Exit(1)


def _print_listing(found: CacheListing, depth: int) -> None:
    console = Console(highlight=False)
    usable = [cache for cache in found.caches if not cache.problem]
    if usable:
        table = Table(box=None, pad_edge=False)
        names = ["cache", "teacher", "dataset", "images", "captions", "coverage", "size", "age"]
        left_out = ["dataset"] if console.width < _WIDE else []
        for name in names:
            if name not in left_out:
                texts = name in ("cache", "teacher", "dataset")
                table.add_column(name, justify="left" if texts else "right", no_wrap=not texts, overflow="fold")
        for cache in usable:
            shown = dict(zip(names, _listed(cache), strict=True))
            table.add_row(*(escape(shown[name]) for name in names if name not in left_out))
        console.print(table)
    for cache in found.caches:
        if cache.problem:
            console.print(f"{cache.location}: {cache.problem}", markup=False, soft_wrap=True)
    if not found.caches:
        console.print(f"no cache in {found.location} ({counted(found.folders, 'folder')} looked into)", markup=False)
    if found.not_entered:
        what = counted(found.not_entered, "folder")
        console.print(f"{what} deeper down not looked into; --depth {depth + 1} does", markup=False)


def _listed(cache: ListedCache) -> tuple[str, ...]:
    done, chunks = cache.chunks_committed or 0, cache.chunks or 0
    age = datetime.now(UTC) - cache.modified if cache.modified else None
    views = f" x {cache.views} views" if (cache.views or 1) > 1 else ""
    return (
        cache.location,
        cache.teacher or "",
        cache.dataset or "",
        f"{cache.images:,}{views}",
        f"{cache.captions:,}",
        "complete" if cache.sealed else f"{100 * done // max(chunks, 1)} %",
        byte_size(cache.committed_bytes or 0),
        "" if age is None else _age(age),
    )


def _age(age: timedelta) -> str:
    seconds = max(age.total_seconds(), 0)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:,.0f} s"


@app.command()
def info(cache: CacheArgument, json: JsonFlag = False) -> None:
    """Show what a cache is of and how far it is. Reads no embeddings."""
    from teacher_cache.storage.look.info import describe_cache

    found = describe_cache(cache)
    if json:
        print_json(found)
    else:
        Console().print(_info_table(found))


def _info_table(found: CacheInfo) -> Table:
    from teacher_cache.storage.format.manifest import (  # pydantic: not for ls and --help
        IMPORTED,
        IMPORTED_ROWS,
        finished_by,
    )

    identity, layout = found.identity, found.layout
    table = Table(title=escape(found.location), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    verb = finished_by(found.made_with)
    state = "complete" if found.sealed else f"not complete: run the same {verb} command again to finish it"
    splits = ", ".join(f"{name or '(none)'} {count:,}" for name, count in identity.dataset.splits.items())
    teacher = identity.teacher
    rows = {
        "state": f"{found.chunks_committed:,} of {found.chunks:,} chunks, {state}",
        "coverage": "\n".join(_coverage(part, layout.views) for part in found.coverage),
        "remaining": _remaining(found),
        "teacher": f"{teacher.name}{' ' + teacher.pretrained if teacher.pretrained else ''}, {teacher.precision}, "
        f"weights {teacher.weights_sha256[:12]}, logit scale {teacher.logit_scale:.2f}",
        "dataset": f"{found.dataset}",
        "rows": f"{layout.image_rows:,} images, {layout.text_rows:,} captions ({splits})",
        "embeddings": f"{layout.embed_dim} wide, {identity.targets.dtype}",
        "views": _views(identity.views),
        "seal": f"commits {found.seal.commits_sha256[:12]}" if found.seal else "",
        "chunks of": f"{layout.image_chunk_rows:,} images, {layout.text_chunk_rows:,} captions",
        "size": f"{found.target_bytes / 1e6:,.1f} MB of targets",
        "images in": _accounts(found),
        "quarantine": _quarantine(found),
        "problems": ", ".join(f"{kind} {count:,}" for kind, count in found.problems.items()) or "none in the dataset",
        "imported": found.made_with.get(IMPORTED, ""),
        "cost": _cost(found),
        "preprocessing": f"{identity.preprocess.image_size[0]} x {identity.preprocess.image_size[1]}, "
        f"{identity.preprocess.interpolation}, {identity.preprocess.resize_mode}",
        "identity": found.identity_digest,
        "manifest": found.manifest_digest,
        "made with": ", ".join(
            f"{name} {version}" for name, version in found.made_with.items() if name not in (IMPORTED, IMPORTED_ROWS)
        ),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, escape(value))
    return table


def _coverage(part: Coverage, views: int) -> str:
    share = part.rows_committed / part.rows if part.rows else 1.0
    # the last block is for all of it: 99.9 % must not look like the whole
    bar = "█" * int(share * _BAR)
    name = "captions" if part.tower == "text" else "images" if views == 1 else f"view {part.view}"
    return f"{name:<8} {bar:░<{_BAR}} {int(1000 * share) / 10:g} %, {part.rows_committed:,} of {part.rows:,}"


def _remaining(found: CacheInfo) -> str:
    if found.chunks_committed == found.chunks:
        return ""
    if found.remaining_seconds is None:
        return "not known: no rate yet"
    return f"about {timedelta(seconds=round(found.remaining_seconds))} for one process, at the rates below"


def _quarantine(found: CacheInfo) -> str:
    if found.quarantine is None:
        count = f"{found.images_quarantined:,} images" if found.images_quarantined is not None else "not counted"
        return f"{count}; too many records to read for the reasons, which are in commits/image"
    if not found.quarantine:
        return "none"
    shown = ", ".join(f"{row.sample_id} (row {row.row})" for row in found.quarantined_rows[:3])
    more = ", ..." if sum(found.quarantine.values()) > 3 else ""
    return f"{', '.join(f'{kind} {count:,}' for kind, count in found.quarantine.items())}: {shown}{more}"


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
    speed = rates(found.images_per_second, found.captions_per_second)
    about = "about " if found.notes_read < found.notes else ""
    basis = f", from {found.notes_read:,} of {found.notes:,} notes" if about else ""
    return f"{about}{found.encode_seconds:,.1f} s ({speed}){basis}"
