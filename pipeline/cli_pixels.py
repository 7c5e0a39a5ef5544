"""The ``pixels`` command."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from pipeline.cli_flags import say, setting
from pipeline.config import PixelsConfig
from pipeline.run_file import load_config
from storage.cli import JsonFlag, app, print_json
from storage.console import StageProgress

__all__ = ["pixels"]


@app.command()
def pixels(
    cache: Annotated[str | None, setting(PixelsConfig, "cache")] = None,
    student: Annotated[str | None, setting(PixelsConfig, "student")] = None,
    out: Annotated[str | None, setting(PixelsConfig, "out")] = None,
    train_image_size: Annotated[int | None, setting(PixelsConfig, "train_image_size")] = None,
    split: Annotated[str | None, setting(PixelsConfig, "split")] = None,
    views: Annotated[int | None, setting(PixelsConfig, "views")] = None,
    image_root: Annotated[str | None, setting(PixelsConfig, "image_root")] = None,
    threads: Annotated[int | None, setting(PixelsConfig, "threads")] = None,
    json: JsonFlag = False,
) -> None:
    """Decode a split's images once, for train --pixels. Stop it at any time; run it again to go on."""
    flags = {
        "cache": cache,
        "student": student,
        "out": out,
        "train_image_size": train_image_size,
        "split": split,
        "views": views,
        "image_root": image_root,
        "threads": threads,
    }
    config = load_config(PixelsConfig, "pixels", None, flags)
    try:
        from pipeline.make_pixels import make_pixels, plan_pixels  # takes seconds, in which it may be stopped

        plan = plan_pixels(config)
        say(str(plan))
        with StageProgress() as progress:
            result = make_pixels(plan, progress)
    except KeyboardInterrupt:
        say("stopped: finished chunks stay. Run the same command again to go on.")
        raise typer.Exit(1) from None
    except OSError as error:  # an image that cannot be read, a full disk
        say(f"error: {str(error).rstrip('.')}. Finished chunks stay.")
        raise typer.Exit(1) from None
    if json:
        print_json(result)
        return
    height, width = result.size
    Console().print(
        f"{result.out}: {result.images:,} images in {result.views} views at {height} x {width}, "
        f"{result.nbytes / 1e9:,.2f} GB\n{result.chunks_made:,} of {result.chunks:,} chunks made by this run",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
