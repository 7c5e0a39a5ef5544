"""The ``evaluate`` command."""

from __future__ import annotations

from typing import Annotated, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.cli_flags import RunFile, setting
from pipeline.config import EvaluateConfig, load_config
from storage.cli import JsonFlag, app, print_json
from storage.console import StageProgress

__all__ = ["evaluate", "recall_table"]


@app.command()
def evaluate(
    run_file: RunFile = None,
    cache: Annotated[str | None, setting(EvaluateConfig, "cache")] = None,
    run: Annotated[str | None, setting(EvaluateConfig, "run")] = None,
    checkpoint: Annotated[str | None, setting(EvaluateConfig, "checkpoint")] = None,
    split: Annotated[str | None, setting(EvaluateConfig, "split")] = None,
    image_root: Annotated[str | None, setting(EvaluateConfig, "image_root")] = None,
    accept_mismatch: Annotated[list[str] | None, setting(EvaluateConfig, "accept_mismatch")] = None,
    device: Annotated[str | None, setting(EvaluateConfig, "device")] = None,
    json: JsonFlag = False,
) -> None:
    """Recall of the cached teacher on a split; with --run that of a student too, and what it retains."""
    flags = {
        "cache": cache,
        "run": run,
        "checkpoint": checkpoint,
        "split": split,
        "image_root": image_root,
        "accept_mismatch": accept_mismatch or None,
        "device": device,
    }
    config = load_config(EvaluateConfig, "evaluate", run_file, flags)
    from pipeline.evaluate import evaluate as run_evaluate

    with StageProgress() as progress:
        result = run_evaluate(config, progress)
    if json:
        print_json(result)
    else:
        title = f"{result.cache}, {result.split}: {result.images:,} images, {result.captions:,} captions"
        title += _chosen(result.chosen_on)
        Console().print(recall_table(title, result.teacher, result.student, result.retention))


def _chosen(split: str | None) -> str:
    return "" if split is None else f"; checkpoint chosen on {split}"


def recall_table(
    title: str,
    teacher: dict[str, dict[str, float]],
    student: dict[str, dict[str, float]] | None,
    retention: dict[str, Any] | None,
) -> Table:
    """Recalls of teacher and student side by side, in percent."""
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for direction, recalls in teacher.items():
        for name in recalls:
            table.add_column(f"{direction}\n{name}", justify="right", no_wrap=True)
    rows = {"teacher": teacher, "student": student, "retention %": retention}
    for label, values in rows.items():
        if values is not None:
            cells = [values[direction][name] for direction, recalls in teacher.items() for name in recalls]
            table.add_row(label, *("-" if cell is None else f"{cell:.1f}" for cell in cells))
    return table
