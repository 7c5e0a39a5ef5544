"""The ``report`` command."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel, Field
from rich.console import Console

from teacher_cache.storage.cli.app import CacheArgument, JsonFlag, app, byte_size, print_json
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.location import LocalFiles
from teacher_cache.storage.observe.progress import StageProgress

__all__ = ["ReportResult", "report"]


class ReportResult(BaseModel, frozen=True):
    """What was written."""

    location: str = Field(description="Of the cache.")
    out: str
    bytes: int
    pictures: int
    seconds: float
    notes: tuple[str, ...] = Field(description="What is drawn, left out or missing, and what to do about it.")


@app.command()
def report(
    cache: CacheArgument,
    run: Annotated[
        list[str] | None, typer.Option("--run", help="Folder of a training run to show; may be given again.")
    ] = None,
    deployed: Annotated[
        list[str] | None, typer.Option("--deployed", help="Folder of a deployed student to show; may be given again.")
    ] = None,
    out: Annotated[str, typer.Option("--out", help="HTML file to write; what is there is replaced.")] = "report.html",
    image_root: Annotated[
        str | None, typer.Option("--image-root", help="Where the images are now, if not where the cache found them.")
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Statistics, map and pairs of one split, instead of all.")
    ] = None,
    most: Annotated[
        int, typer.Option("--most", min=2, help="Images to read at most, with their captions; of more, some are drawn.")
    ] = 20_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is drawn.")] = 0,
    data: Annotated[
        str | None, typer.Option("--data", help="JSON file to write too: all that the page shows, pictures included.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Write one HTML page of a cache and its students: coverage, statistics, a map, pairs, quarantine, training.

    The page says where the cache lies and the dataset's name, with its path: mind that before you mail it.
    """
    started = time.perf_counter()
    from teacher_cache.storage.files.new_files import out_file

    target = out_file("--out", out, "report.html")
    data_target = None if data is None else out_file("--data", data, "report.json")
    if data_target == target:
        raise UsageError(f"--out and --data both name {target}: the page and its data are two files")
    _require_packages()
    from teacher_cache.pipeline.report.collect import collect_report
    from teacher_cache.pipeline.report.data import as_utf8
    from teacher_cache.pipeline.report.page import render_report

    with StageProgress() as progress:
        found = collect_report(
            cache,
            run or (),
            deployed or (),
            image_root=image_root,
            split=split,
            most=most,
            seed=seed,
            progress=progress,
        )
        progress("draw", 0, 1)
        page = render_report(found).encode()
        progress("draw", 1, 1)
    _write(target, page)
    if data_target is not None:
        _write(data_target, found.model_dump_json().encode())
    result = ReportResult(
        location=as_utf8(cache),
        out=as_utf8(str(target)),
        bytes=len(page),
        pictures=len(found.pictures),
        seconds=time.perf_counter() - started,
        notes=found.notes,
    )
    if json:
        print_json(result)
        return
    console = Console(highlight=False)
    console.print(f"{result.out}: {byte_size(result.bytes)}, {result.seconds:.0f} s", markup=False, soft_wrap=True)
    for note in result.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def _write(path: Path, data: bytes) -> None:
    LocalFiles(str(path.parent)).write(path.name, data)


def _require_packages() -> None:
    """Before the minutes that the rest takes.

    Raises:
        UsageError: one is not installed.
    """
    for name in ("altair", "vl_convert", "sklearn", "jinja2"):
        if find_spec(name) is None:
            raise UsageError(f"report needs {name}, which is not installed: pip install 'teacher-cache[report]'")
