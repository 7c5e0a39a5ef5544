"""The ``zero-shot`` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.config import ZeroShotConfig, load_config
from storage.cli import JsonFlag, app, print_json
from storage.console import StageProgress

__all__ = ["zero_shot"]


@app.command("zero-shot")
def zero_shot(
    dataset: Annotated[
        str, typer.Argument(metavar="KIND:PATH", help=ZeroShotConfig.model_fields["dataset"].description)
    ],
    run: Annotated[str | None, typer.Option("--run", help=ZeroShotConfig.model_fields["run"].description)] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help=ZeroShotConfig.model_fields["teacher"].description)
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option("--pretrained", help=ZeroShotConfig.model_fields["pretrained"].description)
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help=ZeroShotConfig.model_fields["device"].description)
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Zero-shot accuracy of a student, a teacher or both: top-1, top-5 and the mean over classes."""
    flags = {"dataset": dataset, "run": run, "teacher": teacher, "pretrained": pretrained, "device": device}
    config = load_config(ZeroShotConfig, "zero-shot", None, flags)
    from pipeline.zero_shot import zero_shot as measure

    with StageProgress() as progress:
        result = measure(config, progress)
    for line in result.undecodable:
        print(f"left out: {line}", file=sys.stderr)  # noqa: T201
    if json:
        print_json(result)
        return
    table = Table(
        title=escape(
            f"{result.dataset}: {result.images:,} images, {result.classes} classes, "
            f"{len(result.prompts)} prompts a class"
        ),
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    found = {label: values for label, values in (("teacher", result.teacher), ("student", result.student)) if values}
    table.add_column("")
    for name in next(iter(found.values())):
        table.add_column(name, justify="right")
    for label, values in found.items():
        table.add_row(label, *(f"{value:.1f}" for value in values.values()))
    Console().print(table)
