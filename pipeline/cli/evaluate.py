"""The ``evaluate`` command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from teacher_cache.pipeline.cli.flags import RunFile, say, setting, which_checkpoint
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.run_file import load_config
from teacher_cache.storage.cli.app import JsonFlag, app, print_json
from teacher_cache.storage.observe.progress import StageProgress

if TYPE_CHECKING:
    from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult
from typing import TYPE_CHECKING

import typer

from teacher_cache.pipeline.settings.evaluate import ZeroShotConfig
from teacher_cache.storage.cli.app import counted

if TYPE_CHECKING:
    from teacher_cache.pipeline.evaluate.zero_shot import ZeroShotResult
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from teacher_cache.pipeline.settings.evaluate import CostConfig

if TYPE_CHECKING:
    from teacher_cache.pipeline.evaluate.cost.latency import Ratio
    from teacher_cache.pipeline.evaluate.cost.results import CostResult, ModelCost

__all__ = ["accuracy_table", "cost", "cost_table", "evaluate", "recall_table", "zero_shot"]


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
    from teacher_cache.pipeline.evaluate.retrieval import evaluate as run_evaluate

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
    from teacher_cache.pipeline.evaluate.recall import mean_recall

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
    from teacher_cache.pipeline.evaluate.zero_shot import zero_shot as measure

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


@app.command()
def cost(
    run: Annotated[str | None, setting(CostConfig, "run")] = None,
    checkpoint: Annotated[str | None, setting(CostConfig, "checkpoint")] = None,
    teacher: Annotated[str | None, setting(CostConfig, "teacher")] = None,
    pretrained: Annotated[str | None, setting(CostConfig, "pretrained")] = None,
    batch: Annotated[str | None, setting(CostConfig, "batch")] = None,
    rounds: Annotated[int | None, setting(CostConfig, "rounds")] = None,
    threads: Annotated[int | None, setting(CostConfig, "threads")] = None,
    device: Annotated[str | None, setting(CostConfig, "device")] = None,
    json: JsonFlag = False,
) -> None:
    """Parameters, size, FLOPs, latency, images/s and peak memory of a student and its teacher, measured in turns."""
    flags = {
        "run": run,
        "checkpoint": checkpoint,
        "teacher": teacher,
        "pretrained": pretrained,
        "batch": batch,
        "rounds": rounds,
        "threads": threads,
        "device": device,
    }
    config = load_config(CostConfig, "cost", None, flags)
    from teacher_cache.pipeline.evaluate.cost.measure import cost as measure

    with StageProgress() as progress:
        result = measure(config, progress)
    if json:
        print_json(result)
    else:
        Console().print(cost_table(result))


def cost_table(result: CostResult) -> Table:
    """A column a model; behind each but the reference its share of the reference, or how many times as fast it is."""
    threads = "" if result.threads is None else f", {counted(result.threads, 'thread')}"
    table = Table(
        title=escape(f"{result.device}{threads}; without decoding and tokenizing"),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for name in result.models:
        table.add_column(escape(name), justify="right", no_wrap=True)
        if name != result.reference:
            table.add_column(escape(f"/ {result.reference}"), justify="right", no_wrap=True)
    for label, values, digits in _quantities(result):
        if any(value is not None for value in values.values()):
            base = values[result.reference]
            shown = {name: "-" if value is None else f"{value:,.{digits}f}" for name, value in values.items()}
            shares = {name: f"{value / base:.0%}" for name, value in values.items() if value is not None and base}
            _add(table, result, label, shown, shares)
    for tower, noun in (("images", "image"), ("texts", "caption")):
        for batch in result.rounds:
            times = {name: getattr(model, tower)[batch] for name, model in result.models.items()}
            what = f"{batch:,} {noun}s" if batch > 1 else f"one {noun}"
            latencies = {name: f"{time.p50_ms:,.1f} / {time.p95_ms:,.1f}" for name, time in times.items()}
            _add(table, result, f"{what}, p50 / p95 ms", latencies, {})
            rates = {name: f"{time.per_second:,.1f}" for name, time in times.items()}
            ratios = {name: _times(getattr(speed, tower)[batch]) for name, speed in result.speed.items()}
            _add(table, result, f"{noun}s/s", rates, ratios)
    return table


def _quantities(result: CostResult) -> Iterator[tuple[str, dict[str, float | None], int]]:
    """Label, value by model and decimal places of each row but the timings."""

    def of(value: Callable[[ModelCost], float | None]) -> dict[str, float | None]:
        return {name: value(model) for name, model in result.models.items()}

    def memory(part: str) -> dict[str, float | None]:
        return of(lambda model: _scaled(getattr(model.memory, part) if model.memory else None, 1e6))

    def flops(part: str) -> dict[str, float | None]:
        return of(lambda model: _scaled(getattr(model.facts.flops, part) if model.facts.flops else None, 1e9))

    def tokens(part: str) -> str:
        """One number if all models have the same."""
        found = {name: getattr(model.facts.flops, part) for name, model in result.models.items() if model.facts.flops}
        return " or ".join(str(count) for count in dict.fromkeys(found.values()))

    yield "parameters", of(lambda model: model.facts.parameters), 0
    yield "weights on disk, MB", of(lambda model: _scaled(model.facts.weights_bytes, 1e6)), 1
    yield "weights in memory, MB", of(lambda model: _scaled(model.facts.state_bytes, 1e6)), 1
    yield f"memory for a batch of {result.memory_batch}, MB", memory("encoding_bytes"), 0
    yield "peak of the process, MB", memory("peak_bytes"), 0
    yield "on the GPU, MB", memory("cuda_peak_bytes"), 0
    yield "GFLOPs of an image", flops("image"), 3
    yield f"GFLOPs of a text, {tokens('text_tokens')} tokens", flops("text"), 3
    yield f"GFLOPs of a caption, {tokens('caption_tokens')} tokens", flops("caption"), 3


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _times(ratio: Ratio) -> str:
    return f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def _add(table: Table, result: CostResult, label: str, shown: dict[str, str], compared: dict[str, str]) -> None:
    cells: list[str] = []
    for name in result.models:
        cells.append(shown[name])
        if name != result.reference:
            cells.append(compared.get(name, ""))
    table.add_row(label, *cells)
