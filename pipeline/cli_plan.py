"""The ``plan`` command: what a precompute will take, before it is run."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pipeline.cli_flags import RunFile, say, setting
from pipeline.config import PrecomputeConfig
from pipeline.run_file import load_config
from storage.cli import JsonFlag, app, byte_size, counted, print_json

if TYPE_CHECKING:
    from pipeline.forecast import Forecast

__all__ = ["plan"]


@app.command()
def plan(
    run_file: RunFile = None,
    dataset: Annotated[str | None, setting(PrecomputeConfig, "dataset")] = None,
    teacher: Annotated[str | None, setting(PrecomputeConfig, "teacher")] = None,
    pretrained: Annotated[str | None, setting(PrecomputeConfig, "pretrained")] = None,
    cache: Annotated[str | None, setting(PrecomputeConfig, "cache")] = None,
    reuse: Annotated[str | None, setting(PrecomputeConfig, "reuse")] = None,
    device: Annotated[str | None, setting(PrecomputeConfig, "device")] = None,
    precision: Annotated[str | None, setting(PrecomputeConfig, "precision")] = None,
    dtype: Annotated[str | None, setting(PrecomputeConfig, "dtype")] = None,
    batch_size: Annotated[int | None, setting(PrecomputeConfig, "batch_size")] = None,
    chunk_rows: Annotated[int | None, setting(PrecomputeConfig, "chunk_rows")] = None,
    decoder: Annotated[str | None, setting(PrecomputeConfig, "decoder")] = None,
    views: Annotated[int | None, setting(PrecomputeConfig, "views")] = None,
    crop_scale: Annotated[tuple[float, float] | None, setting(PrecomputeConfig, "crop_scale")] = None,
    probe: Annotated[
        int | None, typer.Option("--probe", min=2, help="Images to encode for it; eight batches if left out.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Say what precompute with the same flags will take: rows, bytes, hours, and from which epoch on it pays.

    Encodes a few images in a temporary folder; with --reuse, reads every file for its digest too. Exit 1 if there is no
    room for the cache, or another one is there.
    """
    flags = {
        "dataset": dataset,
        "teacher": teacher,
        "pretrained": pretrained,
        "cache": cache,
        "reuse": reuse,
        "device": device,
        "precision": precision,
        "dtype": dtype,
        "batch_size": batch_size,
        "chunk_rows": chunk_rows,
        "decoder": decoder,
        "views": views,
        "crop_scale": crop_scale,
    }
    config = load_config(PrecomputeConfig, "precompute", run_file, flags)
    from pipeline.forecast import forecast
    from storage.console import StageProgress

    with StageProgress() as progress:
        found = forecast(config, probe, progress)
    if json:
        print_json(found)
    else:
        for line in _lines(found):
            Console(highlight=False).print(line, markup=False, soft_wrap=True)
    if not found.fits:
        wanted, free = byte_size(found.needed_bytes), byte_size(found.free_bytes or 0)
        say(f"{found.cache}: {wanted} wanted, {free} free there. Make room, or name another --cache.")
        raise typer.Exit(1)


def _lines(found: Forecast) -> list[str]:
    seen = "" if found.views == 1 else f" in {found.views} views"
    room = "" if found.free_bytes is None else f"; {byte_size(found.free_bytes)} free"
    there = f", of which {found.committed_rows:,} rows are there" if found.committed_rows else ""
    lost = f", {counted(found.probe_lost, 'image')} of it could not be read" if found.probe_lost else ""
    image, text = found.image, found.text
    epochs = "never: the teacher took no time"
    if found.epochs_to_pay is not None:
        epochs = f"from {counted(found.epochs_to_pay, 'epoch')} on, over all students"
    rate = f"{1 / image.seconds_per_row:,.1f} images/s ({1 / image.teacher_seconds_per_row:,.1f} in the teacher)"
    if text.rows:
        rate += f", {1 / text.seconds_per_row:,.1f} captions/s"
    size = f"{byte_size(found.target_bytes)} of embeddings, about {byte_size(found.table_bytes)} of tables"
    reused = []
    if found.reuse is not None:
        copied, left = found.rows_reused, found.rows_to_encode
        reused = [
            f"reuse      {copied['image']:,} image and {copied['text']:,} caption rows are copied from {found.reuse}; "
            f"the teacher encodes {left['image']:,} and {left['text']:,}"
        ]
    return [
        f"{found.teacher} on {found.device} in {found.precision}, {found.dataset}",
        f"rows       {found.images:,} images{seen} and {found.captions:,} captions in {found.chunks:,} chunks{there}",
        *reused,
        f"bytes      {size}{room}",
        f"probe      {rate}, by {counted(image.rows, 'image')} and {counted(text.rows, 'caption')}{lost}",
        f"time       {_clock(found.encode_seconds)} to encode on {found.device} after {_clock(found.check_seconds)} to "
        f"check all files; {found.encode_seconds / 3600:,.2f} device hours",
        f"online     {_clock(found.online_epoch_seconds)} of teacher in every epoch without a cache",
        f"it pays    {epochs}",
    ]


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=math.ceil(seconds)))
