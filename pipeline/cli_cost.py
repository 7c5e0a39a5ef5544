"""The ``cost`` command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.cli_flags import setting
from pipeline.config import CostConfig
from pipeline.run_file import load_config
from storage.cli import JsonFlag, app, counted, print_json
from storage.console import StageProgress

if TYPE_CHECKING:
    from pipeline.cost import CostResult, ModelCost
    from pipeline.latency import Ratio

__all__ = ["cost", "cost_table"]


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
    from pipeline.cost import cost as measure

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
