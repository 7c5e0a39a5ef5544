"""The ``evaluate`` command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.cli_flags import RunFile, say, setting, which_checkpoint
from pipeline.config import EvaluateConfig
from pipeline.run_file import load_config
from storage.cli import JsonFlag, app, print_json
from storage.console import StageProgress

if TYPE_CHECKING:
    from pipeline.evaluate import EvaluateResult

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
    ranks: Annotated[str | None, setting(EvaluateConfig, "ranks")] = None,
    towers: Annotated[bool | None, setting(EvaluateConfig, "towers", "--towers")] = None,
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
        "ranks": ranks,
        "towers": towers,
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
        title += which_checkpoint(result.checkpoint, result.chosen_on)
        Console().print(recall_table(title, result))
    if result.not_kept:
        say(f"warning: not left in the run, so that no report of it will show it: {result.not_kept}")
    if result.ranks:
        say(f"{result.ranks}: the rank of each of {result.images + result.captions:,} queries")


def recall_table(title: str, found: EvaluateResult) -> Table:
    """Recalls of teacher and student side by side, what was retained and how far that may be off; in percent.

    Of each tower, if it was measured, its recalls beside the teacher's other one.
    """
    from pipeline.metrics import mean_recall

    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    columns = [(direction, name) for direction, recalls in found.teacher.items() for name in recalls]
    for direction, name in columns:
        table.add_column(f"{direction}\n{name}", justify="right", no_wrap=True)
    table.add_column("\nmean", justify="right", no_wrap=True)

    def row(label: str, values: dict[str, Any], mean: float | None) -> None:
        cells = [*(values[direction][name] for direction, name in columns), mean]
        table.add_row(label, *("-" if cell is None else f"{cell:.1f}" for cell in cells))

    row("teacher", found.teacher, mean_recall(found.teacher))
    if found.student is not None and found.retention is not None and found.retention_intervals is not None:
        row("student", found.student, mean_recall(found.student))
        row("retention %", found.retention, found.retention["mean"])
        spans = found.retention_intervals.model_dump()
        for end, label in (("low", f"{100 * found.interval_level:.0f} % from"), ("high", "to")):
            ends = {
                direction: {name: span and span[end] for name, span in spans[direction].items()}
                for direction in found.teacher
            }
            row(label, ends, spans["mean"] and spans["mean"][end])
    for name, tower in (found.towers or {}).items():
        row(f"{name} tower", tower.recall, mean_recall(tower.recall))
        row("  retention %", tower.retention, tower.retention["mean"])
    return table
