"""The commands that look at caches without reading embeddings: ``ls``, ``info``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from storage.cli import CacheArgument, JsonFlag, app, print_json

if TYPE_CHECKING:
    from storage.identity import ViewsIdentity
    from storage.inspect import CacheInfo

__all__ = ["info"]


@app.command()
def info(cache: CacheArgument, json: JsonFlag = False) -> None:
    """Show what a cache is of and how far it is. Reads no embeddings."""
    from storage.inspect import describe_cache

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
