"""The table of ``student cost``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from teacher_cache.pipeline.evaluate.cost.latency import Ratio
from teacher_cache.pipeline.evaluate.cost.results import CostResult, ModelCost
from teacher_cache.storage.cli.tables import Table
from teacher_cache.storage.observe.quantities import counted


def cost_table(result: CostResult) -> Table:
    """Return a table with a column per model, and beside it the share or speed relative to the reference."""
    threads = "" if result.threads is None else f", {counted(result.threads, 'thread')}"
    others = {name: [] if name == result.reference else [f"/ {result.reference}"] for name in result.models}
    columns = ["", *(column for name, compared in others.items() for column in (name, *compared))]
    table = Table(f"{result.device}{threads}; without decoding and tokenizing", columns)
    for label, values, digits in _quantities(result):
        if any(value is not None for value in values.values()):
            base = values[result.reference]
            shown = {name: "-" if value is None else f"{value:,.{digits}f}" for name, value in values.items()}
            shares = {name: f"{value / base:.0%}" for name, value in values.items() if value is not None and base}
            _add(table, result, label, shown, shares)
    for label, timings, ratios in _timings(result):
        _add(table, result, label, timings, ratios)
    return table


def _quantities(result: CostResult) -> Iterator[tuple[str, dict[str, float | None], int]]:
    """Yield label, value by model and decimal places of each row except the timings."""

    def by_model(value: Callable[[ModelCost], float | None]) -> dict[str, float | None]:
        return {name: value(model) for name, model in result.models.items()}

    def memory(part: str) -> dict[str, float | None]:
        return by_model(lambda model: _scaled(getattr(model.memory, part) if model.memory else None, 1e6))

    def flops(part: str) -> dict[str, float | None]:
        return by_model(lambda model: _scaled(getattr(model.facts.flops, part) if model.facts.flops else None, 1e9))

    def tokens(part: str) -> str:
        """Return the number of tokens, or all numbers if models differ."""
        counts = [getattr(model.facts.flops, part) for model in result.models.values() if model.facts.flops]
        return " or ".join(str(count) for count in dict.fromkeys(counts))

    yield "parameters", by_model(lambda model: model.facts.parameters), 0
    yield "weights on disk, MB", by_model(lambda model: _scaled(model.facts.weights_bytes, 1e6)), 1
    yield "weights in memory, MB", by_model(lambda model: _scaled(model.facts.state_bytes, 1e6)), 1
    yield f"memory for a batch of {result.memory_batch}, MB", memory("encoding_bytes"), 0
    yield "peak of the process, MB", memory("peak_bytes"), 0
    yield "on the GPU, MB", memory("cuda_peak_bytes"), 0
    yield "GFLOPs of an image", flops("image"), 3
    yield f"GFLOPs of a text, {tokens('text_tokens')} tokens", flops("text"), 3
    yield f"GFLOPs of a caption, {tokens('caption_tokens')} tokens", flops("caption"), 3


def _timings(result: CostResult) -> Iterator[tuple[str, dict[str, str], dict[str, str]]]:
    """Yield label, text by model and speed relative to the reference of each row of timings."""
    for tower, noun in (("images", "image"), ("texts", "caption")):
        for batch in result.rounds:
            times = {name: getattr(model, tower)[batch] for name, model in result.models.items()}
            batch_name = f"{batch:,} {noun}s" if batch > 1 else f"one {noun}"
            latencies = {name: f"{time.p50_ms:,.1f} / {time.p95_ms:,.1f}" for name, time in times.items()}
            yield f"{batch_name}, p50 / p95 ms", latencies, {}
            rates = {name: f"{time.per_second:,.1f}" for name, time in times.items()}
            yield (
                f"{noun}s/s",
                rates,
                {name: _times(getattr(speed, tower)[batch]) for name, speed in result.speed.items()},
            )


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
