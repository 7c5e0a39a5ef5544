"""The ``pixels`` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from pipeline.config import PixelsConfig, load_config
from storage.cli import JsonFlag, app, print_json
from storage.console import StageProgress

__all__ = ["pixels"]


def _help(name: str) -> str | None:
    return PixelsConfig.model_fields[name].description


@app.command()
def pixels(
    cache: Annotated[str | None, typer.Option("--cache", help=_help("cache"))] = None,
    student: Annotated[str | None, typer.Option("--student", help=_help("student"))] = None,
    out: Annotated[str | None, typer.Option("--out", help=_help("out"))] = None,
    split: Annotated[str | None, typer.Option("--split", help=_help("split"))] = None,
    views: Annotated[int | None, typer.Option("--views", help=_help("views"))] = None,
    image_root: Annotated[str | None, typer.Option("--image-root", help=_help("image_root"))] = None,
    threads: Annotated[int | None, typer.Option("--threads", help=_help("threads"))] = None,
    json: JsonFlag = False,
) -> None:
    """Decode a split's images once, for train --pixels. Stop it at any time; run it again to go on."""
    flags = {
        "cache": cache,
        "student": student,
        "out": out,
        "split": split,
        "views": views,
        "image_root": image_root,
        "threads": threads,
    }
    config = load_config(PixelsConfig, "pixels", None, flags)
    try:
        from pipeline.make_pixels import make_pixels, plan_pixels  # takes seconds, in which it may be stopped

        plan = plan_pixels(config)
        print(plan, file=sys.stderr)  # noqa: T201
        with StageProgress() as progress:
            result = make_pixels(plan, progress)
    except KeyboardInterrupt:
        print("stopped: finished chunks stay. Run the same command again to go on.", file=sys.stderr)  # noqa: T201
        raise typer.Exit(1) from None
    except OSError as error:  # an image that cannot be read, a full disk
        print(f"error: {str(error).rstrip('.')}. Finished chunks stay.", file=sys.stderr)  # noqa: T201
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
