"""The command ``compare``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from teacher_cache.pipeline.cli.options import settings_command
from teacher_cache.pipeline.cli.stopping import resumable
from teacher_cache.pipeline.settings.compare import CompareConfig
from teacher_cache.storage.cli.app import json_flag, print_result
from teacher_cache.storage.cli.tables import Part, Table
from teacher_cache.storage.observe.logs import say, suggest_next
from teacher_cache.storage.observe.progress import StageProgress
from teacher_cache.storage.observe.quantities import counted, duration

if TYPE_CHECKING:
    from teacher_cache.pipeline.train.compare.result import Comparison


@settings_command(
    "compare",
    CompareConfig,
    flags=("caches", "student", "out", "init", "split", "measure_split", "epochs", "seeds", "images", "device"),
    argument="caches",
    example="compare a.cache b.cache --student vit-ti-32 --out compared",
)
@json_flag
def compare(config: CompareConfig, as_json: bool) -> None:
    """Show each teacher's recall, its students', their differences with intervals, and the cost.

    Make the caches of a sample: precompute --dataset 'coco:data/coco?sample=5%' for each teacher.
    """
    with resumable(lambda: "finished students stay. Run the same command again to go on.", errors=False):
        from teacher_cache.pipeline.train.compare.run import compare as run

        with StageProgress() as progress:
            result = run(config, progress)
    print_result(result, as_json, lambda _: _parts(result))
    if result.seeds == 1:
        say("one seed: no difference is certain. --seeds 3 trains the others too")
    if not as_json:
        suggest_next("report", result.choice, compared=config.out)


def _parts(result: Comparison) -> Iterator[Part]:
    yield _teacher_table(result)
    if result.pairs:
        yield _pair_table(result)
    yield _neighbour_table(result)
    yield from _verdict(result)


def _teacher_table(result: Comparison) -> Table:
    title = (
        f"{counted(result.seeds, 'student')} {result.student} of each teacher, {counted(result.epochs, 'epoch')} over "
        f"{counted(result.learned_images, 'image')}; mean recall on {counted(result.images, 'image')} of "
        f"{result.measured_split}, chance {result.chance:.1f}"
    )
    heads = ("teacher", "its students", "95 % interval", "itself", "rank of images", "of captions", "to encode")
    table = Table(title, heads)
    for one in result.teachers:
        interval = f"{one.student.low:.1f} to {one.student.high:.1f}"
        cost = "-" if one.encode_seconds is None else duration(one.encode_seconds)
        ranks = f"{one.image_rank:.0f} of {one.embed_dim}", f"{one.text_rank:.0f}"
        table.add_row(one.cache, f"{one.student.value:.1f}", interval, f"{one.recall:.1f}", *ranks, cost)
    table.caption = f"to encode: {counted(result.encode_images, 'image')} with captions, on the device of each cache"
    return table


def _pair_table(result: Comparison) -> Table:
    table = Table("differences between students, in points", ("better", "worse", "points", "interval", "certain"))
    for pair in result.pairs:
        points = pair.points
        interval = f"{points.low:.1f} to {points.high:.1f}"
        table.add_row(pair.better, pair.worse, f"{points.value:.1f}", interval, "yes" if pair.certain else "no")
    table.caption = f"all intervals together hold at {result.level:.0%}, over images and seeds"
    return table


def _neighbour_table(result: Comparison) -> Table:
    table = Table("nearest neighbours that two teachers share, in percent", ("", "", "images", "captions"))
    for both in result.neighbours:
        shares = ("-" if share is None else f"{share:.0f}" for share in (both.image, both.text))
        table.add_row(both.first, both.second, *shares)
    table.caption = f"unrelated teachers: {result.neighbours_by_chance:.0f}"
    return table


def _verdict(result: Comparison) -> Iterator[str]:
    """Yield which teacher to pay for, and how certain that is."""
    if not result.rivals:
        yield f"pay for {result.choice}: its students are certainly better than all others'"
        return
    yield f"ahead: {result.choice}, but not certainly better than {', '.join(result.rivals)}"
    costs = {one.cache: one.encode_seconds for one in result.teachers}
    best, known = costs[result.choice], {cache: cost for cache, cost in costs.items() if cost is not None}
    if best is None or not known.keys() >= set(result.rivals):
        yield "what each costs is not recorded in its cache; more images, seeds or epochs decide"
    elif cheaper := [cache for cache in result.rivals if known[cache] < best]:
        yield f"cheaper: {', '.join(cheaper)}; more images, seeds or epochs decide"
    else:
        yield f"none of them is cheaper: pay for {result.choice}"
