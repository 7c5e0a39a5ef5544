"""The ``zero-shot`` command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.cli_flags import say, setting, which_checkpoint
from pipeline.config import ZeroShotConfig
from pipeline.run_file import load_config
from storage.cli import JsonFlag, app, counted, print_json
from storage.console import StageProgress

if TYPE_CHECKING:
    from pipeline.zero_shot import ZeroShotResult

__all__ = ["accuracy_table", "zero_shot"]


@app.command("zero-shot")
def zero_shot(
    dataset: Annotated[
        str, typer.Argument(metavar="KIND:PATH", help=ZeroShotConfig.model_fields["dataset"].description)
    ],
    prompts: Annotated[str | None, setting(ZeroShotConfig, "prompts")] = None,
    templates: Annotated[str | None, setting(ZeroShotConfig, "templates")] = None,
    class_names: Annotated[str | None, setting(ZeroShotConfig, "class_names")] = None,
    split: Annotated[str | None, setting(ZeroShotConfig, "split")] = None,
    run: Annotated[str | None, setting(ZeroShotConfig, "run")] = None,
    checkpoint: Annotated[str | None, setting(ZeroShotConfig, "checkpoint")] = None,
    teacher: Annotated[str | None, setting(ZeroShotConfig, "teacher")] = None,
    pretrained: Annotated[str | None, setting(ZeroShotConfig, "pretrained")] = None,
    cache: Annotated[str | None, setting(ZeroShotConfig, "cache")] = None,
    batch_size: Annotated[int | None, setting(ZeroShotConfig, "batch_size")] = None,
    device: Annotated[str | None, setting(ZeroShotConfig, "device")] = None,
    json: JsonFlag = False,
) -> None:
    """Zero-shot accuracy of a student, a teacher or both: top-1, top-5 and the mean over classes."""
    flags = {
        "dataset": dataset,
        "prompts": prompts,
        "templates": templates,
        "class_names": class_names,
        "split": split,
        "run": run,
        "checkpoint": checkpoint,
        "teacher": teacher,
        "pretrained": pretrained,
        "cache": cache,
        "batch_size": batch_size,
        "device": device,
    }
    config = load_config(ZeroShotConfig, "zero-shot", None, flags)
    from pipeline.zero_shot import zero_shot as measure

    with StageProgress() as progress:
        result = measure(config, progress)
    for line in result.undecodable:
        say(f"left out: {line}")
    if json:
        print_json(result)
    else:
        Console().print(accuracy_table(result))


def accuracy_table(result: ZeroShotResult) -> Table:
    """Accuracies of teacher and student side by side, in percent."""
    title = (
        f"{result.dataset}{f', {result.split}' if result.split else ''}: {result.images:,} images, "
        f"{result.classes:,} classes by {result.matched_by}, {counted(len(result.prompts), 'prompt')} a class"
    )
    title += which_checkpoint(result.checkpoint, result.chosen_on)
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD)
    table.add_column("")
    found = {label: values for label, values in (("teacher", result.teacher), ("student", result.student)) if values}
    for name in next(iter(found.values())):
        table.add_column(name, justify="right")
    for label, values in found.items():
        table.add_row(label, *(f"{value:.1f}" for value in values.values()))
    return table
