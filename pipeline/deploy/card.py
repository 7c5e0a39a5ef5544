"""Picture of a deployed student's table (bars, and all numbers below), and its model card. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher_cache.pipeline.deploy.record import Deployment
from teacher_cache.pipeline.deploy.table import Retained, StudentTable, TableRow, cells, to_markdown
from teacher_cache.pipeline.models.run_record import AveragedRun
from teacher_cache.storage.errors import UsageError

__all__ = ["draw_table", "model_card"]

_COLOURS = {"teacher": "#7f7f7f", "student": "#1f77b4", "int8": "#d95f02", "fp32": "#1b9e77"}


@dataclass(frozen=True)
class _Panel:
    """One bar chart: a number for each row of the table.

    Attributes:
        between: ends of the number's interval, or None.
    """

    title: str
    value: Callable[[TableRow], float]
    digits: int = 0
    between: Callable[[TableRow], tuple[float, float] | None] = lambda row: None


def draw_table(table: StudentTable, path: Path) -> None:
    """Write the table as PNG.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("a picture of the table needs matplotlib: pip install 'teacher-cache[deploy]'") from error
    # no pyplot: it picks a backend and keeps global state
    figure = Figure(figsize=(15, 9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(2, 1, height_ratios=[1, 2.2])
    bars, numbers = halves
    bars.suptitle(f"{table.student}, distilled from {table.teacher}", fontsize=13, x=0.01, ha="left", weight="bold")
    panels = _panels(table)
    axes = bars.subplots(1, len(panels), sharey=True)
    for axis, panel in zip(axes, panels, strict=True):
        _draw_bars(axis, panel, table.rows)
    axes[0].invert_yaxis()  # all axes share it
    _draw_numbers(numbers.subplots(), table)
    figure.savefig(path, metadata={"Software": None})


def _panels(table: StudentTable) -> list[_Panel]:
    batch = max(table.rows[0].cost.images)
    panels = [
        _Panel("size, MB", lambda row: row.bytes / 1e6, 1),
        _Panel(f"images/s, batch {batch}", lambda row: row.cost.images[batch].per_second),
        _Panel(f"captions/s, batch {batch}", lambda row: row.cost.texts[batch].per_second),
        _Panel("mean recall, % of the teacher's", lambda row: _share(_kept(row)), 1, lambda row: _ends(_kept(row))),
    ]
    if table.zero_shot_dataset is not None:
        panels.append(
            _Panel(
                "zero-shot top-1, % of the teacher's",
                lambda row: _share(row.zero_shot_retention),
                1,
                lambda row: _ends(row.zero_shot_retention),
            )
        )
    return panels


def _kept(row: TableRow) -> Retained | None:
    return row.retention.mean if row.retention else None


def _share(kept: Retained | None) -> float:
    """Return the share in percent: 100 for the teacher itself."""
    return 100.0 if kept is None else kept.share or 0.0


def _ends(kept: Retained | None) -> tuple[float, float] | None:
    return None if kept is None or kept.interval is None else (kept.interval.low, kept.interval.high)


def _draw_bars(axis: Any, panel: _Panel, rows: tuple[TableRow, ...]) -> None:
    values = [panel.value(row) for row in rows]
    ends = [panel.between(row) for row in rows]
    axis.barh([row.name for row in rows], values, color=[_colour(row) for row in rows], height=0.7)
    right = [max(value, *(between or ())) if between else value for value, between in zip(values, ends, strict=True)]
    for position, (value, between) in enumerate(zip(values, ends, strict=True)):
        if between is not None:
            axis.plot(between, [position, position], color="#222222", linewidth=1.5)
        axis.text(right[position], position, f"  {value:,.{panel.digits}f}", va="center", fontsize=9)
    axis.set_title(panel.title, fontsize=10, loc="left")
    axis.set_xlim(0, 1.3 * max(*right, 1e-9))
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.tick_params(bottom=False, labelbottom=False, left=False)


def _colour(row: TableRow) -> str:
    return next((colour for word, colour in _COLOURS.items() if word in row.name), "#444444")


def _draw_numbers(axis: Any, table: StudentTable) -> None:
    headings, rows = cells(table)
    axis.axis("off")
    # transposed, as in the terminal: the columns do not fit side by side
    grid = axis.table(
        cellText=[[row[index] for row in rows] for index in range(1, len(headings))],
        rowLabels=headings[1:],
        colLabels=[row[0] for row in rows],
        cellLoc="right",
        loc="center",
        colWidths=[0.19] * len(rows),
    )
    grid.auto_set_font_size(False)
    grid.set_fontsize(9)
    for cell in grid.get_celld().values():
        cell.set_linewidth(0.3)
        cell.set_height(1 / (len(headings) + 0.5))


def model_card(deployment: Deployment, table: StudentTable, averaged: Sequence[AveragedRun]) -> str:
    """Return the model card in Markdown, with the YAML header that model hubs read.

    Args:
        averaged: runs whose mean this student is; empty for a single run.
    """
    size = "x".join(str(edge) for edge in deployment.preprocess["size"])
    files = [
        f"- `{artefact.file}`: {tower} tower, {variant}, {artefact.bytes / 1e6:.1f} MB"
        for variant, towers in deployment.towers.items()
        for tower, artefact in towers.items()
    ]
    files += [
        f"- int8 of the {tower} tower: {report.method}, {report.share_int8:.1%} of {report.parameters:,} parameters; "
        f"kept in float: {'; '.join(f'{kind}, {why}' for kind, why in report.kept_float.items()) or 'none'}"
        for tower, report in table.int8.items()
    ]
    files += [f"- no int8 file of the {tower} tower: {why}" for tower, why in deployment.not_quantised.items()]
    gates = "\n".join(f"| {gate.name} | {gate.found:.7g} | {gate.wanted} |" for gate in table.gates)
    # the runtime needs both towers of one variant
    smallest = [variant for variant, made in deployment.towers.items() if len(made) == 2][-1]
    dense = deployment.weights.bytes > 1.1 * 4 * deployment.parameters
    multiplied_out = "; the factorised token embedding is multiplied out there" if dense else ""
    runs = f" Its weights are the mean of those of {len(averaged)} runs that began alike." if averaged else ""
    return f"""---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags: [clip, distillation, onnx, teacher-cache]
---
# {deployment.name}

A CLIP student with {deployment.parameters:,} parameters and {deployment.embed_dim} dimensions, distilled from
{deployment.teacher} by its cached embeddings (cache {deployment.cache_manifest_digest[:12]}). It sees {size} pixels and
reads up to {deployment.tokenization.context_length} tokens.{runs}

![Size, speed and recall of {deployment.name}, its teacher and its ONNX files](table.png)

{to_markdown(table)}
What each file had to pass, and did:

| | found | wanted |
|---|---:|---|
{gates}

## Files
{chr(10).join(files)}
- `model.safetensors`, `open_clip_config.json`: for open_clip, {deployment.weights.bytes / 1e6:.1f} MB{multiplied_out}
- `tokenizer.json`: for Hugging Face's tokenizers; `deploy.json`: preprocessing, tokenization, sha256 of each file
- `table.md`, `table.json`, `table.png`: the table above

## Use
With onnxruntime and without torch (`pip install 'teacher-cache[runtime]'`):
```python
from teacher_cache.pipeline.deploy.runtime import StudentRuntime

student = StudentRuntime("FOLDER", variant="{smallest}")
print(student.classify(["photo.jpg"], ["a photo of a dog", "a photo of a cat"]))
```
```
teacher-cache infer photo.jpg --text "a photo of a dog" --text "a photo of a cat" --student FOLDER
```
With open_clip:
```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
```

## Limits
It learned from the images and captions of one dataset and knows little beside; what it keeps of its teacher elsewhere
is in the table only as far as it was measured. The numbers hold for the machine and the split that are named.
"""
