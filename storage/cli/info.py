"""The command that looks at caches without reading embeddings: ``info``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

import click

from teacher_cache.storage.cli.app import cache_argument, command, json_flag, option, print_result, refuse_unused
from teacher_cache.storage.cli.tables import Facts, Part, Table
from teacher_cache.storage.errors import CacheNotFoundError
from teacher_cache.storage.files.location import is_several
from teacher_cache.storage.observe.quantities import byte_size, counted, duration, rates

if TYPE_CHECKING:
    from teacher_cache.storage.format.identity import ViewsIdentity
    from teacher_cache.storage.look.info import CacheInfo, CacheProblems, Coverage
    from teacher_cache.storage.look.listing import CacheListing, ListedCache

_BAR = 24  # characters
_COLUMNS = ("cache", "teacher", "dataset", "images", "captions", "coverage", "size", "age")


def _listing_parts(listing: CacheListing, depth: int) -> Iterator[Part]:
    if usable := [cache for cache in listing.caches if not cache.problem]:
        table = Table()
        for name in _COLUMNS:
            table.add_column(name, right=name not in ("cache", "teacher", "dataset"))
        for cache in usable:
            table.add_row(*_listed(cache))
        yield table
    yield from (f"{cache.location}: {cache.problem}" for cache in listing.caches if cache.problem)
    if not listing.caches:
        yield f"no cache in {listing.location} ({counted(listing.folders, 'folder')} searched)"
    if listing.not_entered:
        yield f"{counted(listing.not_entered, 'deeper folder')} not searched; --depth {depth + 1} does"


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


@command("info", example="info caches/coco.cache")
@cache_argument(
    "place", "Folder or URL of a cache, or above caches. Default: the current folder.", metavar="[PLACE]", default="."
)
@click.option(
    "--problems", is_flag=True, help="List every image or line of the dataset that has no embedding, and why."
)
@option("--depth", "Levels of folders to search for caches.", 4, least=0)
@json_flag
def info(place: str, problems: bool, depth: int, as_json: bool) -> None:
    """List the caches in and below PLACE if it is no cache. Exit 1 if one of them cannot be used.

    Read no embeddings.
    """
    describe, listed = _about(place)
    if problems:
        print_result(listed(place), as_json, _problem_lines)
        return
    try:
        about = describe(place)
    except CacheNotFoundError:
        if not _list(place, depth, as_json):
            raise
    else:
        refuse_unused(("depth",), f"on the cache {place}")
        print_result(about, as_json, lambda about: [_info_table(about)])


def _list(place: str, depth: int, as_json: bool) -> bool:
    """Print the caches below a folder or URL; return False if it holds none."""
    from teacher_cache.storage.look.listing import list_caches

    listing = list_caches(place, depth)
    if not listing.caches and not listing.not_entered:
        return False
    print_result(listing, as_json, partial(_listing_parts, depth=depth))
    if any(cache.problem for cache in listing.caches):
        sys.exit(1)
    return True


def _about(cache: str) -> tuple[Callable[[str], CacheInfo], Callable[[str], CacheProblems]]:
    """Return what describes a cache, or the parts that a pattern names, and what lists the problems."""
    if is_several(cache):
        from teacher_cache.storage.look.parts import describe_parts, list_problems_of_parts  # numpy

        return describe_parts, list_problems_of_parts
    from teacher_cache.storage.look.info import describe_cache, list_problems

    return describe_cache, list_problems


def _problem_lines(result: CacheProblems) -> list[str]:
    return [str(problem) for problem in result.problems] or [
        f"{result.location}: no problem in the dataset, no image quarantined"
    ]


def _info_table(cache_info: CacheInfo) -> Facts:
    from teacher_cache.storage.format.manifest import (  # pydantic: not for --help
        IMPORTED,
        IMPORTED_ROWS,
    )

    identity, layout = cache_info.identity, cache_info.layout
    state = f"not complete. {cache_info.unfinished}" if cache_info.unfinished else "complete"
    splits = ", ".join(f"{name or '(none)'} {count:,}" for name, count in identity.dataset.splits.items())
    teacher, compressed = identity.teacher, layout.compressor is not None
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted((identity.dataset.caption_kinds or {}).items()))
    unpacked = " before compression" if compressed and cache_info.seal is None else ""
    rows = {
        "parts": f"{cache_info.parts} caches, read as one" if cache_info.parts > 1 else "",
        "state": f"{cache_info.chunks_committed:,} of {cache_info.chunks:,} chunks, {state}",
        "coverage": "\n".join(_coverage(part, layout.views) for part in cache_info.coverage),
        "remaining": remaining_time(cache_info),
        "teacher": f"{teacher.name}{' ' + teacher.pretrained if teacher.pretrained else ''}, {teacher.precision}, "
        f"weights {teacher.weights_sha256[:12]}, logit scale {teacher.logit_scale:.2f}",
        "dataset": cache_info.dataset,
        "read from": "" if cache_info.dataset.endswith(f":{cache_info.image_root}") else cache_info.image_root,
        "rows": f"{layout.image_rows:,} images, {layout.text_rows:,} captions ({splits})",
        "captions of": kinds,
        "embeddings": f"{layout.embed_dim} wide, {identity.targets.dtype}{', compressed' * compressed}",
        "views": _views(identity.views),
        "seal": f"commits {cache_info.seal.commits_sha256[:12]}" if cache_info.seal else "",
        "chunks of": f"{layout.image_chunk_rows:,} images, {layout.text_chunk_rows:,} captions",
        "size": f"{byte_size(cache_info.target_bytes)} of embeddings{unpacked}",
        "images in": _accounts(cache_info),
        "quarantine": _quarantine(cache_info),
        "problems": _problems(cache_info),
        "imported": cache_info.made_with.get(IMPORTED, ""),
        "cost": encoding_cost(cache_info),
        "preprocessing": f"{identity.preprocess.image_size[0]} x {identity.preprocess.image_size[1]}, "
        f"{identity.preprocess.interpolation}, {identity.preprocess.resize_mode}",
        "identity": cache_info.identity_digest[:12],
        "manifest": cache_info.manifest_digest[:12],
        "made with": ", ".join(
            f"{name} {version}"
            for name, version in cache_info.made_with.items()
            if name not in (IMPORTED, IMPORTED_ROWS)
        ),
    }
    return Facts(rows, cache_info.location)


def _coverage(part: Coverage, views: int) -> str:
    share = part.rows_committed / part.rows if part.rows else 1.0
    # rounded down: 99.9 % must not look complete
    bar = "█" * int(share * _BAR)
    name = "captions" if part.tower == "text" else "images" if views == 1 else f"view {part.view}"
    return f"{name:<8} {bar:░<{_BAR}} {int(1000 * share) / 10:g} %, {part.rows_committed:,} of {part.rows:,}"


def remaining_time(cache_info: CacheInfo) -> str:
    """Return the estimated time until the cache is complete; empty if it is."""
    if cache_info.chunks_committed == cache_info.chunks:
        return ""
    if cache_info.remaining_seconds is None:
        return "not known: no rate yet"
    return f"about {duration(cache_info.remaining_seconds)} for one process, at the rates so far"


def _quarantine(cache_info: CacheInfo) -> str:
    if cache_info.quarantine is None:
        count = (
            f"{cache_info.images_quarantined:,} images" if cache_info.images_quarantined is not None else "not counted"
        )
        return f"{count}; too many records to read for the reasons, which are in commits/image"
    if not cache_info.quarantine:
        return "none"
    shown = ", ".join(f"{row.sample_id} (row {row.row})" for row in cache_info.quarantined_rows[:3])
    more = ", ..." if sum(cache_info.quarantine.values()) > 3 else ""
    return f"{', '.join(f'{kind} {count:,}' for kind, count in cache_info.quarantine.items())}: {shown}{more}"


def _problems(cache_info: CacheInfo) -> str:
    if not cache_info.problems:
        return "none in the dataset"
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in cache_info.problems.items())
    return f"{kinds}; teacher-cache info {cache_info.location} --problems lists them"


def _views(views: ViewsIdentity) -> str:
    if views.scale is None or views.ratio is None:
        return f"{views.count} (the evaluation crop)"
    return (
        f"{views.count}: the evaluation crop and {views.count - 1} random crops of {views.scale[0]:g} to "
        f"{views.scale[1]:g} of the area, width / height {views.ratio[0]:.3g} to {views.ratio[1]:.3g}, mirrored with "
        f"probability {views.flip:g}, seed {views.seed}"
    )


def _accounts(cache_info: CacheInfo) -> str:
    """Return the images of the dataset as a sum: encoded, quarantined, without a row."""
    total = cache_info.layout.image_rows + cache_info.lost_images
    rows = f"{cache_info.layout.image_rows:,} with a row (encoded or quarantined: known when complete)"
    if cache_info.images_encoded is not None:
        rows = f"{cache_info.images_encoded:,} encoded + {cache_info.images_quarantined:,} quarantined"
    return f"{total:,} = {rows} + {cache_info.lost_images:,} without a row"


def encoding_cost(cache_info: CacheInfo) -> str:
    """Return the time that the teacher took, with its rates."""
    if not cache_info.encode_seconds:
        return "nothing encoded yet"
    speed = rates(cache_info.images_per_second, cache_info.captions_per_second)
    about = "about " if cache_info.notes_read < cache_info.notes else ""
    basis = f", from {cache_info.notes_read:,} of {cache_info.notes:,} notes" if about else ""
    return f"{about}{duration(cache_info.encode_seconds)} ({speed}){basis}"
