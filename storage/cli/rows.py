"""The commands that look at embeddings: ``stats``, ``sample``, ``neighbours``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from teacher_cache.storage.cli.app import CacheArgument, JsonFlag, app, counted, print_json

if TYPE_CHECKING:
    from teacher_cache.storage.look.rows import CaptionRow, ImageRow, Neighbours, RowSample
    from teacher_cache.storage.look.stats import CacheStats, Distribution

__all__ = ["neighbours", "sample", "stats"]

_QUANTILES = ("1 %", "50 %", "99 %")
_BLOCKS = " ▁▂▃▄▅▆▇█"


@app.command()
def stats(
    cache: CacheArgument,
    split: Annotated[str | None, typer.Option("--split", help="Images of one split, instead of all.")] = None,
    view: Annotated[int, typer.Option("--view", min=0, help="View of the images; 0 is the evaluation crop.")] = 0,
    rows: Annotated[
        int, typer.Option("--rows", min=2, help="Images to read at most, with their captions; of more, some are drawn.")
    ] = 20_000,
    near: Annotated[
        float, typer.Option("--near", min=0, max=1, help="Cosine from which on two images are near-duplicates.")
    ] = 0.99,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is drawn.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Sum up embeddings: norms, cosines of true and random pairs, duplicates, rank, the teacher's own recall."""
    from teacher_cache.storage.look.stats import cache_stats
    from teacher_cache.storage.observe.progress import StageProgress

    with StageProgress() as progress:
        found = cache_stats(cache, split, view, rows, near, seed, progress)
    if json:
        print_json(found)
    else:
        _print_stats(found)


@app.command()
def sample(
    cache: CacheArgument,
    count: Annotated[int, typer.Option("--count", min=1, help="Images to show.")] = 5,
    split: Annotated[str | None, typer.Option("--split", help="Images of one split, instead of all.")] = None,
    nearest: Annotated[int, typer.Option("--nearest", min=1, help="Nearest captions of each.")] = 3,
    rows: Annotated[
        int, typer.Option("--rows", min=1, help="Captions to compare with; of more, whole chunks are drawn.")
    ] = 200_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is drawn.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Show random images: row, sample_id, file, captions with their cosines, and the nearest captions of all."""
    from teacher_cache.storage.look.rows import sample_images
    from teacher_cache.storage.observe.progress import StageProgress

    with StageProgress() as progress:
        found = sample_images(cache, count, split, nearest, rows, seed, progress)
    if json:
        print_json(found)
    else:
        _print_sample(found)


@app.command()
def neighbours(
    cache: CacheArgument,
    image: Annotated[
        str | None,
        typer.Argument(metavar="[ROW|SAMPLE_ID]", help="Image; write id: before a sample_id that is a number."),
    ] = None,
    text_row: Annotated[int | None, typer.Option("--text-row", help="Row of a caption, instead of an image.")] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Nearest images, and captions, to show.")] = 5,
    view: Annotated[int, typer.Option("--view", min=0, help="View of the images; 0 is the evaluation crop.")] = 0,
    rows: Annotated[
        int, typer.Option("--rows", min=1, help="Images, and captions, to compare with; of more, chunks are drawn.")
    ] = 1_000_000,
    json: JsonFlag = False,
) -> None:
    """Show the images and captions that are nearest to an image, or to a caption."""
    from teacher_cache.storage.look.rows import find_neighbours
    from teacher_cache.storage.observe.progress import StageProgress

    with StageProgress() as progress:
        found = find_neighbours(cache, image, text_row, count, view, rows, progress=progress)
    if json:
        print_json(found)
    else:
        _print_neighbours(found)


def _print_sample(found: RowSample) -> None:
    for shown in found.images:
        own = {caption.row for caption in shown.captions}
        _say(*_image_lines(shown), "  nearest captions:")
        for caption in shown.nearest_captions:
            _say(f"{_caption_line(caption)}{'' if caption.row in own else f'  (of {caption.sample_id})'}")
    _say(f"nearest among {counted(found.captions_compared, 'caption')}; drawn with seed {found.seed}")


def _print_neighbours(found: Neighbours) -> None:
    if found.image is not None:
        _say(*_image_lines(found.image))
    if found.caption is not None:
        _say(f"caption {found.caption.row} of {found.caption.sample_id}: {found.caption.text}")
    view = f", view {found.view}" if found.view else ""
    _say(f"nearest of {counted(found.images_compared, 'image')}{view}:")
    _say(*(f"  {image.cosine:.3f}  row {image.row}  {image.sample_id}  {image.uri}" for image in found.images))
    _say(f"nearest of {counted(found.captions_compared, 'caption')}:")
    _say(*(f"{_caption_line(caption)}  (of {caption.sample_id})" for caption in found.captions))


def _image_lines(image: ImageRow) -> list[str]:
    split = f", {image.split}" if image.split else ""
    first = f"{image.sample_id}  row {image.row}{split}, norm {image.norm:.3f}, {image.uri}"
    return [first, *(_caption_line(caption) for caption in image.captions)]


def _caption_line(caption: CaptionRow) -> str:
    return f"  {caption.cosine:.3f}  row {caption.row}  {caption.text}"


def _say(*lines: str) -> None:
    console = Console(highlight=False)
    for line in lines:
        # a caption may hold anything, a terminal's commands too
        shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line)
        console.print(shown, markup=False, soft_wrap=True)


def _print_stats(found: CacheStats) -> None:
    console = Console(highlight=False)
    read = f"all {found.image.rows:,} images"
    if found.sampled:
        read = (
            f"{found.image.rows_read:,} of {found.image.rows:,} images, drawn with seed {found.seed}; --rows reads more"
        )
    where = f", split {found.split}" if found.split is not None else ""
    where += f", view {found.view}" if found.view else ""
    console.print(f"{found.location}{where}: {read}", markup=False, soft_wrap=True)

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("mean", *_QUANTILES):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("least to greatest", no_wrap=True)
    for name, values in (
        ("norm of images", found.image.norm),
        ("norm of captions", found.text.norm),
        ("cosine of true pairs", found.true_pairs),
        ("cosine of random pairs", found.random_pairs),
        ("cosine of two images", found.image.cosine),
        ("cosine of two captions", found.text.cosine),
    ):
        if values is not None:
            table.add_row(name, *_numbers(values), _bars(values.histogram))
    console.print(table)

    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, text in _facts(found).items():
        facts.add_row(name, escape(text))
    console.print(facts)


def _facts(found: CacheStats) -> dict[str, str]:
    facts = {
        "true above random": "" if found.separation is None else f"{100 * found.separation:.2f} % of pairs",
        "effective rank": ", ".join(
            f"{name} {tower.effective_rank:.1f}"
            for name, tower in (("images", found.image), ("captions", found.text))
            if tower.effective_rank is not None
        ),
        "dead dimensions": f"images {_dimensions(found.image.dead_dimensions)}, "
        f"captions {_dimensions(found.text.dead_dimensions)}",
        "quarantined": f"{counted(found.image.missing, 'image')}, {counted(found.text.missing, 'caption')}; "
        f"zero: {counted(found.image.zero, 'image')}, {counted(found.text.zero, 'caption')}",
        "equal embeddings": f"{counted(found.image.equal_rows, 'image')}, {counted(found.text.equal_rows, 'caption')}",
        "near-duplicates": f"{counted(found.near_images, 'image')} in {counted(found.near_pairs, 'pair')} "
        f"of cosine {found.near_cosine:g} or more",
    }
    if found.without_caption:
        bare = counted(found.without_caption, "image")
        facts["pairs"] = f"none: {bare} without a caption, so that the captions are prompts of classes"
    for pair in found.nearest_pairs[:5]:
        same = ", the same file" if pair.same_bytes else ""
        facts["near-duplicates"] += f"\n{pair.cosine:.4f}  {pair.sample_ids[0]}  {pair.sample_ids[1]}{same}"
    if found.recall is not None:
        recall = found.recall
        for name, values in (("image to text", recall.i2t), ("text to image", recall.t2i)):
            facts[name] = ", ".join(f"{k} {value:.1f} %" for k, value in values.items())
        facts["recall among"] = (
            f"{counted(recall.images, 'image')} and {counted(recall.captions, 'caption')}; "
            f"chance R@1 of text to image is {100 / recall.images:.2f} %"
        )
    return {name: text for name, text in facts.items() if text}


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
