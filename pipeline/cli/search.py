"""The command ``index``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from teacher_cache.storage.cli.app import cache_argument, command, json_flag, option, print_result
from teacher_cache.storage.cli.tables import Part, Table
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.progress import StageProgress
from teacher_cache.storage.observe.quantities import byte_size

if TYPE_CHECKING:
    from teacher_cache.pipeline.search.record import IndexRecord


def _points(ctx: click.Context, param: click.Parameter, typed: str) -> float:
    """Return the points in ``1pt``, ``0.5pt`` or ``0.5``."""
    number = re.fullmatch(r"(\d{1,2}(?:\.\d+)?)(?:pt)?", typed)
    if number is None:
        raise UsageError(f"--within {typed}: points of R@10 are wanted, from 0 to below 100, such as 1pt or 0.5pt")
    return float(number[1])


@command("index", example="index coco.cache --within 1pt --out coco.index")
@cache_argument()
@option("--within", "Points of R@10 that each direction may lose to exact search.", "1pt", callback=_points)
@option("--out", "Folder to write the index to.", required=True)
@option("--factory", "FAISS's factory string of the index, such as IVF1024,Flat.", "HNSW32")
@json_flag
def index(cache: str, within: float, out: str, factory: str, as_json: bool) -> None:
    """One index of the images, one of their captions, each measured in the direction that it answers.

    More effort is tried until the loss is certain. An index that loses more is refused, and nothing is written.
    """
    from teacher_cache.pipeline.search.build import build_index

    with StageProgress() as progress:
        record = build_index(cache, out, within, factory, progress)
    print_result(record, as_json, lambda _: _certificate(record, out))


def _certificate(record: IndexRecord, out: str) -> Iterator[Part]:
    table = Table(f"{out}: {record.factory} over {record.cache}")
    table.add_column("")
    for name in ("rows", "queries", "exact\nR@10", "index\nR@10", "lost at\nmost", "products\na query", "times\nfewer"):
        table.add_column(name, right=True)
    for direction, tower in (("image to text", record.text), ("text to image", record.image)):
        numbers = f"{tower.rows:,}", f"{tower.queries:,}", f"{tower.exact:.2f}", f"{tower.found:.2f}"
        cost = f"{tower.lost_at_most:.2f}", f"{tower.products:,.0f}", f"{tower.times_fewer:.1f}"
        table.add_row(direction, *numbers, *cost)
    yield table
    sampled = [tower for tower in (record.image, record.text) if tower.sampled]
    basis = f"upper bounds at {record.level:.0%} confidence" if sampled else "exact, since all queries were measured"
    if len(sampled) == 1:
        basis += "; exact where all queries were measured"
    yield f"points of R@10 lost: {basis}"
    yield f"{byte_size(record.image.bytes + record.text.bytes)}, {record.seconds:.0f} s, {record.made_with}"
