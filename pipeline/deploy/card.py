"""Model cards, and a picture of the main numbers of a deployed student's table, which needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from teacher_cache.pipeline.deploy.record import Deployment
from teacher_cache.pipeline.deploy.table import Retained, StudentTable, TableRow, to_markdown
from teacher_cache.pipeline.evaluate.recall import mean_recall
from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult
from teacher_cache.pipeline.models.run_record import AveragedRun, RunRecord
from teacher_cache.storage.observe.safe_text import unmarked

_COLOURS = {"teacher": "#7f7f7f", "student": "#1f77b4", "int8": "#d95f02", "fp32": "#1b9e77", "OpenVINO": "#7570b3"}


_WITH_OPEN_CLIP = """With open_clip:
```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
```
"""
_LIMITS = """## Limits
It learned from the images and captions of one dataset and knows little beside; what it keeps of its teacher elsewhere
is in the table only as far as it was measured. """

_Bar = tuple[float, ...]
"""A number, and the ends of its interval if it has one."""


def draw_table(table: StudentTable, path: Path) -> None:
    """Write the table as PNG."""
    # imported here: the model card needs no matplotlib. No pyplot: it picks a backend and keeps global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{table.student}, distilled from {table.teacher}", fontsize=13, x=0.01, ha="left", weight="bold")
    panels = _panels(table)
    axes: Any = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, digits, bars) in zip(axes, panels, strict=True):
        _draw_bars(axis, title, digits, table.rows, bars)
    axes[0].invert_yaxis()  # all axes share it
    figure.savefig(path, metadata={"Software": None})


def _panels(table: StudentTable) -> list[tuple[str, int, list[_Bar]]]:
    """Return title, decimal places and a bar for each row of each panel."""
    rows = table.rows
    batch = max(rows[0].cost.images)
    panels: list[tuple[str, int, list[_Bar]]] = [
        ("size, MB", 1, [(row.bytes / 1e6,) for row in rows]),
        (f"images/s, batch {batch}", 0, [(row.cost.images[batch].per_second,) for row in rows]),
        (f"captions/s, batch {batch}", 0, [(row.cost.texts[batch].per_second,) for row in rows]),
        ("mean recall, % of the teacher's", 1, [_kept(row.retention.mean if row.retention else None) for row in rows]),
    ]
    if table.zero_shot_dataset is not None:
        panels.append(("zero-shot top-1, % of the teacher's", 1, [_kept(row.zero_shot_retention) for row in rows]))
    return panels


def _kept(retained: Retained | None) -> _Bar:
    """Return the share in percent: 100 for the teacher itself."""
    if retained is None:
        return (100.0,)
    between = retained.interval
    return (retained.share or 0.0, *((between.low, between.high) if between else ()))


def _draw_bars(axis: Any, title: str, digits: int, rows: Sequence[TableRow], bars: list[_Bar]) -> None:
    axis.barh([row.name for row in rows], [bar[0] for bar in bars], color=[_colour(row) for row in rows], height=0.7)
    for position, bar in enumerate(bars):
        axis.plot(bar[1:], [position] * len(bar[1:]), color="#222222", linewidth=1.5)
        axis.text(max(bar), position, f"  {bar[0]:,.{digits}f}", va="center", fontsize=9)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlim(0, 1.3 * max(*map(max, bars), 1e-9))
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.tick_params(bottom=False, labelbottom=False, left=False)


def _colour(row: TableRow) -> str:
    return next((colour for word, colour in _COLOURS.items() if word in row.name), "#444444")


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
    files += [
        f"- no int8 file of the {tower} tower: {unmarked(why)}" for tower, why in deployment.not_quantised.items()
    ]
    gates = "\n".join(f"| {unmarked(gate.name)} | {gate.found:.7g} | {unmarked(gate.wanted)} |" for gate in table.gates)
    # the runtime needs both towers of one variant
    smallest = "int8" if len(deployment.towers.get("int8", {})) == 2 else "fp32"
    weights = deployment.weights
    dense = weights.bytes > 1.1 * 4 * deployment.parameters
    multiplied_out = "; the factorised token embedding is multiplied out there" if dense else ""
    runs = f" Its weights are the mean of those of {len(averaged)} runs that began alike." if averaged else ""
    return f"""{_header("onnx")}
# {unmarked(deployment.name)}

A CLIP student with {deployment.parameters:,} parameters and {deployment.embed_dim} dimensions, distilled from
{unmarked(deployment.teacher)} by its cached embeddings (cache {deployment.cache_manifest_digest[:12]}).
It sees {size} pixels and reads up to {deployment.tokenization.context_length} tokens.{runs}

![Size, speed and recall of the student, its teacher and its ONNX files](table.png)

{to_markdown(table)}
What each file had to pass, and did:

| | found | wanted |
|---|---:|---|
{gates}

## Files
{chr(10).join(files)}
- `{weights.file}`, `open_clip_config.json`: for open_clip, {weights.bytes / 1e6:.1f} MB{multiplied_out}
- `tokenizer.json`: for Hugging Face's tokenizers; `deploy.json`: preprocessing, tokenization, sha256 of each file
- `table.md`, `table.json`, `table.png`: the table above

## Use
With onnxruntime and without torch (`pip install 'teacher-cache[runtime]'`):
```python
from teacher_cache import StudentRuntime

student = StudentRuntime("FOLDER", variant="{smallest}")
print(student.classify(["photo.jpg"], ["a photo of a dog", "a photo of a cat"]))
```
```
teacher-cache infer photo.jpg --text "a photo of a dog" --text "a photo of a cat" --student FOLDER
```
{_WITH_OPEN_CLIP}
{_LIMITS}The numbers hold for the machine and the split that are named.
"""


def run_card(name: str, record: RunRecord, size: tuple[int, int], measured: Sequence[EvaluateResult]) -> str:
    """Return the model card of a student that was not deployed, with the recall that ``evaluate`` measured.

    Args:
        size: height and width of its images, in pixels.
        measured: evaluations of the checkpoint that is published.
    """
    chosen = ", which its checkpoint was chosen on"
    lines = [
        f"| {unmarked(result.split)}{chosen if result.chosen_on == result.split else ''} | {result.images:,} "
        f"| {mean_recall(result.teacher):.1f} | {mean_recall(result.student):.1f} |"
        for result in measured
        if result.student is not None
    ]
    table = "\n".join(["| split | images | teacher | student |", "|---|---:|---:|---:|", *lines])
    recalls = f"Mean of the six recalls, in percent:\n\n{table}" if lines else "Its recall was not measured."
    return f"""{_header()}
# {unmarked(name)}

A CLIP student with {record.student_parameters:,} parameters and {record.student_config["embed_dim"]} dimensions,
distilled from {unmarked(record.teacher)} by its cached embeddings (cache {record.cache_manifest_digest[:12]}).
It sees {size[0]}x{size[1]} pixels.

{recalls}

## Use
{_WITH_OPEN_CLIP}
{_LIMITS}"""


def on_hub(card: str, repository: str) -> str:
    """Return a card whose lines for open_clip load the student from a repository, and say how to fetch its files."""
    card = card.replace("local-dir:FOLDER", f"hf-hub:{repository}")
    if "FOLDER" in card:
        fetch = f"`hf download {repository} --local-dir FOLDER` fetches the files.\n\n"
        card = card.replace("## Use\n", f"## Use\n{fetch}", 1)
    return card


def _header(*tags: str) -> str:
    """Return the YAML header that model hubs read."""
    return f"""---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags: [{", ".join(("clip", "distillation", *tags, "teacher-cache"))}]
---"""
