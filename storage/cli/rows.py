"""The commands that look at embeddings: ``stats``, ``look``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from teacher_cache.storage.cli.app import (
    Argument,
    cache_argument,
    command,
    json_flag,
    option,
    others_argument,
    print_result,
    refuse_unused,
    seed_option,
    unmatched_option,
    view_option,
)
from teacher_cache.storage.cli.tables import Facts, Part, Table
from teacher_cache.storage.observe.logs import command_line
from teacher_cache.storage.observe.quantities import counted

if TYPE_CHECKING:
    from teacher_cache.storage.look.rows import CaptionRow, ImageRow, Neighbours, RowSample
    from teacher_cache.storage.look.side_by_side import SideBySide
    from teacher_cache.storage.look.stats import CacheStats, Distribution

_QUANTILES = ("1 %", "50 %", "99 %")
_COSINES = ("cosine: true", "random", "two images", "two captions")
_RANKS = ("rank: images", "captions")
_BLOCKS = " ▁▂▃▄▅▆▇█"


@command("stats", example="stats caches/coco.cache --split test")
@cache_argument()
@others_argument
@option("--split", "Split to read. Default: all.")
@view_option
@option("--rows", "Maximum number of images to read, with their captions. More are sampled.", 20_000, least=2)
@option("--near", "Minimum cosine of near-duplicates.", 0.99, type=click.FloatRange(0, 1), metavar="X")
@unmatched_option
@seed_option
@json_flag
def stats(cache: str, others: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Compare true pairs of image and caption with random pairs."""
    from teacher_cache.storage.look.side_by_side import stats_side_by_side
    from teacher_cache.storage.look.stats import cache_stats
    from teacher_cache.storage.observe.progress import StageProgress

    split, rows, near, seed = (options[name] for name in ("split", "rows", "near", "seed"))
    with StageProgress() as progress:
        if not others:
            refuse_unused(("unmatched",), "on one cache")
            result = cache_stats(cache, split, options["view"], rows, near, seed, progress)
            show = partial(print_result, result, as_json, _stats_parts)
        else:
            refuse_unused(("view",), "on several caches, of which view 0 is read")
            drop = options["unmatched"] == "drop"
            beside = stats_side_by_side((cache, *others), split, rows, near, seed, drop, progress)
            show = partial(print_result, beside, as_json, _side_by_side_parts)
    show()


@command("look", example="look caches/coco.cache 17")
@cache_argument()
@click.argument(
    "image",
    cls=Argument,
    metavar="[ROW|SAMPLE_ID]",
    required=False,
    described="Image whose neighbours to show. Write id: before a sample_id that is a number. Default: random images.",
)
@option("--text-row", "Row of a caption whose neighbours to show.", least=0)
@option("--count", "Number of images to show.", 5, least=1)
@option("--rows", "Maximum number of rows to compare with. Default: 200,000, or 1,000,000 for one row.", least=1)
@view_option
@option("--split", "Split of the random images. Default: all.")
@option("--nearest", "Number of nearest captions of each random image.", 3, least=1)
@seed_option
@json_flag
def look(cache: str, image: str | None, text_row: int | None, as_json: bool, **options: Any) -> None:
    """Show captions with their cosine to the image."""
    from teacher_cache.storage.look.rows import find_neighbours, sample_images
    from teacher_cache.storage.observe.progress import StageProgress

    count, rows = options["count"], options["rows"]
    with StageProgress() as progress:
        if image is None and text_row is None:
            refuse_unused(("view",), "when look shows random images")
            chosen = (options["split"], options["nearest"], rows or 200_000, options["seed"])
            sample = sample_images(cache, count, *chosen, progress)
            show = partial(print_result, sample, as_json, _sample_lines)
        else:
            refuse_unused(("split", "nearest", "seed"), "when look shows one image or caption")
            near = find_neighbours(cache, image, text_row, count, options["view"], rows or 1_000_000, progress=progress)
            show = partial(print_result, near, as_json, _neighbour_lines)
    show()


def _sample_lines(sample: RowSample) -> list[str]:
    lines = []
    for image in sample.images:
        own = {caption.row for caption in image.captions}
        lines += [*_image_lines(image), *["  nearest captions:"] * bool(image.nearest_captions)]
        lines += [_caption_line(caption, named=caption.row not in own) for caption in image.nearest_captions]
    return [*lines, f"nearest among {counted(sample.captions_compared, 'caption')}; drawn with seed {sample.seed}"]


def _neighbour_lines(near: Neighbours) -> list[str]:
    lines = [] if near.image is None else _image_lines(near.image)
    if near.caption is not None:
        lines.append(f"caption {near.caption.row} of {near.caption.sample_id}: {_text(near.caption)}")
    view = f", view {near.view}" if near.view else ""
    return [
        *lines,
        f"nearest of {counted(near.images_compared, 'image')}{view}:",
        *(f"  {image.cosine:.3f}  row {image.row}  {'  '.join(_names(image))}" for image in near.images),
        f"nearest of {counted(near.captions_compared, 'caption')}:",
        *(_caption_line(caption, named=True) for caption in near.captions),
    ]


def _image_lines(image: ImageRow) -> list[str]:
    split = f", {image.split}" if image.split else ""
    uri = "".join(f", {name}" for name in _names(image)[1:])
    first = f"{image.sample_id}  row {image.row}{split}, norm {image.norm:.3f}{uri}"
    return [first, *(_caption_line(caption) for caption in image.captions)]


def _names(image: ImageRow) -> tuple[str, ...]:
    """Return sample_id and uri, or one of them if they are the same."""
    return tuple(dict.fromkeys((image.sample_id, image.uri)))


def _caption_line(caption: CaptionRow, named: bool = False) -> str:
    owner = f"  (of {caption.sample_id})" if named else ""
    return f"  {caption.cosine:.3f}  row {caption.row}  {_text(caption)}{owner}"


def _text(caption: CaptionRow) -> str:
    return f"{caption.kind}: {caption.text}" if caption.kind else caption.text


def _stats_parts(result: CacheStats) -> Iterator[Part]:
    rows = f"all {result.image.rows:,} images"
    if result.sampled:
        rows = f"{result.image.rows_read:,} of {result.image.rows:,} images, drawn with seed {result.seed}; "
        rows += "--rows reads more"
    part = f", split {result.split}" if result.split is not None else ""
    part += f", view {result.view}" if result.view else ""
    yield f"{result.location}{part}: {rows}"
    yield _distributions(result)
    yield Facts(_facts(result))


def _side_by_side_parts(result: SideBySide) -> Iterator[Part]:
    first = result.caches[0]
    part = f", split {first.split}" if first.split is not None else ""
    drawn = f", {first.image.rows_read:,} of them drawn with seed {first.seed}" if first.sampled else ""
    yield f"{first.location}{part}: {counted(result.images, 'image')} that all caches have{drawn}"
    if result.dropped_images:
        yield f"left out: {counted(result.dropped_images, 'image')} that a cache lacks, or lacks a caption of"
    table = Table(columns=("cache", "true above random", *_COSINES, *_RANKS, "near-duplicates"))
    for one in result.caches:
        cosines = (one.true_pairs, one.random_pairs, one.image.cosine, one.text.cosine)
        ranks = (one.image.effective_rank, one.text.effective_rank)
        table.add_row(
            one.location,
            "-" if one.separation is None else f"{100 * one.separation:.2f} %",
            *("-" if values is None else f"{values.mean:.3f}" for values in cosines),
            *("-" if rank is None else f"{rank:.1f}" for rank in ranks),
            f"{one.near_images:,}",
        )
    yield table
    caches = [word for one in result.caches for word in ("--cache", one.location)]
    yield Facts({"recall": command_line("evaluate", *caches, split=first.split)})


def _distributions(result: CacheStats) -> Table:
    table = Table(columns=("", "mean", *_QUANTILES))
    table.add_column("least to greatest")
    for name, values in (
        ("norm of images", result.image.norm),
        ("norm of captions", result.text.norm),
        ("cosine of true pairs", result.true_pairs),
        *((f"  of {kind} captions", values) for kind, values in result.true_pairs_of.items()),
        ("cosine of random pairs", result.random_pairs),
        ("cosine of two images", result.image.cosine),
        ("cosine of two captions", result.text.cosine),
    ):
        if values is not None:
            table.add_row(name, *_numbers(values), _bars(values.histogram))
    return table


def _facts(result: CacheStats) -> dict[str, str]:
    facts = {
        "true above random": "" if result.separation is None else f"{100 * result.separation:.2f} % of pairs",
        "captions read": ", ".join(f"{kind} {values.count:,}" for kind, values in result.true_pairs_of.items()),
        "effective rank": ", ".join(
            f"{name} {tower.effective_rank:.1f}"
            for name, tower in (("images", result.image), ("captions", result.text))
            if tower.effective_rank is not None
        ),
        "dead dimensions": f"images {_dimensions(result.image.dead_dimensions)}, "
        f"captions {_dimensions(result.text.dead_dimensions)}",
        "quarantined": f"{counted(result.image.missing, 'image')}, {counted(result.text.missing, 'caption')}; "
        f"zero: {counted(result.image.zero, 'image')}, {counted(result.text.zero, 'caption')}",
        "equal embeddings": f"{counted(result.image.equal_rows, 'image')}, "
        f"{counted(result.text.equal_rows, 'caption')}",
        "near-duplicates": f"{counted(result.near_images, 'image')} in {counted(result.near_pairs, 'pair')} "
        f"of cosine {result.near_cosine:g} or more",
    }
    if result.without_caption:
        bare = counted(result.without_caption, "image")
        facts["pairs"] = f"none: {bare} without a caption"
    for pair in result.nearest_pairs[:5]:
        same = ", the same file" if pair.same_bytes else ""
        facts["near-duplicates"] += f"\n{pair.cosine:.4f}  {pair.sample_ids[0]}  {pair.sample_ids[1]}{same}"
    if not result.without_caption:
        facts["recall"] = command_line("evaluate", cache=result.location, split=result.split or None)
    return facts


def _numbers(values: Distribution) -> tuple[str, ...]:
    return tuple(f"{value:.3f}" for value in (values.mean, *(values.quantiles[name] for name in _QUANTILES)))


def _bars(histogram: tuple[int, ...]) -> str:
    most = max(histogram)
    return "".join(_BLOCKS[-(-(len(_BLOCKS) - 1) * count // most)] for count in histogram)


def _dimensions(dimensions: tuple[int, ...]) -> str:
    if not dimensions:
        return "none"
    shown = ", ".join(str(dim) for dim in dimensions[:5])
    return f"{len(dimensions)} ({shown}{', ...' if len(dimensions) > 5 else ''})"
