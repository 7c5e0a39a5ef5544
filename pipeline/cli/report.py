"""The commands that show pictures: ``report`` and ``twins``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import BaseModel, Field

from teacher_cache.pipeline.settings.names import next_run
from teacher_cache.storage.cli.app import (
    cache_argument,
    command,
    complete_cache,
    json_flag,
    of_kind,
    option,
    others_argument,
    print_result,
    refuse_unused,
    seed_option,
    unmatched_option,
)
from teacher_cache.storage.cli.tables import Part, Table
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.files.new_files import out_file
from teacher_cache.storage.files.places import CACHE, DEPLOYED, RUN
from teacher_cache.storage.observe.logs import suggest_next
from teacher_cache.storage.observe.progress import StageProgress
from teacher_cache.storage.observe.quantities import byte_size, counted

if TYPE_CHECKING:
    from teacher_cache.pipeline.evaluate.twins.find import Twins

_SHOWN = 10


class ReportResult(BaseModel, frozen=True):
    """Result of ``report``."""

    location: str = Field(description="Location of the cache.")
    out: str
    bytes: int
    pictures: int
    seconds: float
    notes: tuple[str, ...] = Field(description="Notes on what is sampled, left out or missing, and the remedy.")


@command("report", example="report coco.cache --run runs/a --deployed deployed/a --out report.html")
@cache_argument()
@others_argument
@option("--run", "Folder of a training run to show. May be repeated.", multiple=True, callback=of_kind(RUN))
@option(
    "--deployed", "Folder of a deployed student to show. May be repeated.", multiple=True, callback=of_kind(DEPLOYED)
)
@option("--compared", "Folder of compare --out to show: which teacher teaches best.")
@option("--out", "HTML file to write or replace.", "report.html")
@option("--image-root", "Folder or URL of the images, if they moved. Default: the recorded place.")
@option("--split", "Split of statistics, map and pairs. Default: all.")
@option("--most", "Maximum number of images to read, with their captions. More are sampled.", 20_000, least=2)
@unmatched_option
@seed_option
@option("--data", "JSON file to write with everything that the page shows, pictures included.")
@json_flag
def report(cache: str, out: str, data: str | None, as_json: bool, **options: Any) -> None:
    """Show results, statistics, a map, pairs, quarantine and training.

    The page names the location of the cache and of the dataset: mind that before you mail it.
    """
    started = time.perf_counter()
    if not options["others"]:
        refuse_unused(("unmatched",), "on one cache")
    target, data_target = _targets(out, data)
    import altair  # noqa: F401 - a missing extra is told before the work begins

    from teacher_cache.pipeline.report.collect import collect_report
    from teacher_cache.pipeline.report.data import as_utf8
    from teacher_cache.pipeline.report.page import render_report

    with StageProgress() as progress:
        runs, deployed = options.pop("run"), options.pop("deployed")
        collected = collect_report(cache, runs, deployed, **options, progress=progress)
        progress("draw", 0, 1)
        page = render_report(collected).encode()
        progress("draw", 1, 1)
    _write(target, page)
    if data_target is not None:
        _write(data_target, collected.model_dump_json().encode())
    result = ReportResult(
        location=as_utf8(cache),
        out=as_utf8(str(target)),
        bytes=len(page),
        pictures=len(collected.pictures),
        seconds=time.perf_counter() - started,
        notes=collected.notes,
    )
    lines = [f"{result.out}: {byte_size(result.bytes)}, {result.seconds:.0f} s"]
    print_result(result, as_json, lambda _: [*lines, *(f"note: {note}" for note in result.notes)])


def _targets(out: str, data: str | None) -> tuple[Path, Path | None]:
    """Return the paths of page and data, checked to be different files that can be written."""
    target = out_file("--out", out, "report.html")
    data_target = None if data is None else out_file("--data", data, "report.json")
    if data_target == target:
        raise UsageError(f"--out and --data both name {target}: the page and its data are two files")
    return target, data_target


def _write(path: Path, data: bytes) -> None:
    LocalFiles(str(path.parent)).write(path.name, data)


@command("twins", example="twins coco.cache --split train --out twins.json")
@cache_argument()
@option(
    "--against",
    "Cache of the measured images, by the same teacher. Default: this one.",
    metavar="OTHER",
    callback=of_kind(CACHE),
    shell_complete=complete_cache,
)
@option("--split", "Split to learn from. Default: train, or the cache's only one.")
@option("--against-split", "Split of the measured images. Default: all others; of OTHER all.")
@option(
    "--least",
    "Minimum cosine of pairs whose pictures are compared. Default: four times as near as measured images usually are.",
    type=click.FloatRange(-1, 1),
    metavar="X",
)
@option("--out", "JSON file to write or replace: the list that train --exclude takes.")
@option("--html", "HTML file to write or replace: the pairs with their pictures.")
@option("--image-root", "Folder or URL of the images, if they moved. Default: the recorded place.")
@option("--against-root", "The same for the images of OTHER.")
@json_flag
def twins(cache: str, out: str | None, html: str | None, as_json: bool, **options: Any) -> None:
    """Pictures count as the same if one is recompressed, resized, cropped a little or mirrored.

    Nothing of a cache is written.
    """
    if options["against"] is None:
        refuse_unused(("against_root",), "without --against")
    target = None if out is None else out_file("--out", out, "twins.json")
    page_target = None if html is None else out_file("--html", html, "twins.html")
    if page_target is not None:
        import altair  # noqa: F401 - a missing extra is told before the work begins
    from teacher_cache.pipeline.evaluate.twins.find import find_twins

    with StageProgress() as progress:
        result = find_twins(cache, progress=progress, **options)
    if target is not None:
        _write(target, result.model_dump_json(indent=1, exclude={"seconds"}).encode())  # the same twins, the same bytes
    if page_target is not None:
        from teacher_cache.pipeline.report.twins_page import render_twins

        _write(page_target, render_twins(result, options["image_root"], options["against_root"]).encode())
    print_result(result, as_json, lambda _: _twins_parts(result))
    if result.excluded and not as_json:
        if target is None:
            suggest_next("twins", cache, **options, out="twins.json")
        else:
            suggest_next("train", cache=cache, split=options["split"], exclude=out, student="STUDENT", out=next_run())


def _twins_parts(result: Twins) -> Iterator[Part]:
    yield result.summary
    if result.twins:
        table = Table(columns=("to learn from", "its twin", "split", "kind", "cosine", "likeness"))
        for twin in result.twins[:_SHOWN]:
            numbers = f"{twin.cosine:.3f}", f"{twin.likeness:.3f}"
            table.add_row(twin.sample_id, twin.twin, twin.twin_split or "-", twin.kind, *numbers)
        yield table
        if len(result.twins) > _SHOWN:
            yield f"and {counted(len(result.twins) - _SHOWN, 'pair')} more: --out or --html names them all"
    yield f"candidates: {counted(result.near, 'pair')} of cosine {result.least_cosine:.3f} or more"
    yield f"twins: a likeness of pixels of {result.least_likeness:g} or more, or the same bytes; {result.seconds:.0f} s"
    if result.quarantined:
        yield f"not compared: {counted(result.quarantined, 'image')} without an embedding"
    if result.cut:
        have = "has" if result.cut == 1 else "have"
        others = counted(result.cut, "other image")
        yield f"{others} {have} 16 twins or more, of which 16 are listed: delete the copies from the dataset"
    if result.unread:
        yield f"not compared: {counted(result.unread, 'image')}, the first: {result.unread_first}"
