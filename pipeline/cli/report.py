"""The ``report`` command."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from teacher_cache.storage.cli.app import cache_argument, command, json_flag, of_kind, option, print_result, seed_option
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.files.places import DEPLOYED, RUN
from teacher_cache.storage.observe.progress import StageProgress
from teacher_cache.storage.observe.quantities import byte_size


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
@option("--run", "Folder of a training run to show. May be repeated.", multiple=True, callback=of_kind(RUN))
@option(
    "--deployed", "Folder of a deployed student to show. May be repeated.", multiple=True, callback=of_kind(DEPLOYED)
)
@option("--out", "HTML file to write or replace.", "report.html")
@option("--image-root", "Folder or URL of the images, if they moved. Default: the recorded place.")
@option("--split", "Split of statistics, map and pairs. Default: all.")
@option("--most", "Maximum number of images to read, with their captions. More are sampled.", 20_000, least=2)
@seed_option
@option("--data", "JSON file to write with everything that the page shows, pictures included.")
@json_flag
def report(cache: str, out: str, data: str | None, as_json: bool, **options: Any) -> None:
    """Show results, statistics, a map, pairs, quarantine and training.

    The page names the location of the cache and of the dataset: mind that before you mail it.
    """
    started = time.perf_counter()
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
    from teacher_cache.storage.files.new_files import out_file

    target = out_file("--out", out, "report.html")
    data_target = None if data is None else out_file("--data", data, "report.json")
    if data_target == target:
        raise UsageError(f"--out and --data both name {target}: the page and its data are two files")
    return target, data_target


def _write(path: Path, data: bytes) -> None:
    LocalFiles(str(path.parent)).write(path.name, data)
