"""The ``teacher-cache`` command: a verb and a run file, or a verb and flags.

Results go to stdout, progress to stderr. Exit 0: fine; 1: something is wrong with the data, or the run stopped;
2: the command or a setting cannot be used. torch is imported by the commands that need it, when they need it.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.config import EvaluateConfig, PrecomputeConfig, TrainConfig, load_config
from storage.cli import JsonFlag, app, print_json
from storage.console import StageProgress
from storage.errors import CacheError, UsageError

__all__ = ["app", "main"]

RunFile = Annotated[
    Path | None, typer.Argument(metavar="[RUN.toml]", help="Run file with a table per stage; flags win over it.")
]


def _setting(config: type[Any], name: str, option: str | None = None) -> Any:
    """A flag that says what the setting of the same name says."""
    flag = option or "--" + name.replace("_", "-")
    return typer.Option(flag, help=config.model_fields[name].description, show_default=False)


@app.command()
def precompute(
    run_file: RunFile = None,
    dataset: Annotated[str | None, _setting(PrecomputeConfig, "dataset")] = None,
    teacher: Annotated[str | None, _setting(PrecomputeConfig, "teacher")] = None,
    pretrained: Annotated[str | None, _setting(PrecomputeConfig, "pretrained")] = None,
    cache: Annotated[str | None, _setting(PrecomputeConfig, "cache")] = None,
    device: Annotated[str | None, _setting(PrecomputeConfig, "device")] = None,
    precision: Annotated[str | None, _setting(PrecomputeConfig, "precision")] = None,
    batch_size: Annotated[int | None, _setting(PrecomputeConfig, "batch_size")] = None,
    chunk_rows: Annotated[int | None, _setting(PrecomputeConfig, "chunk_rows")] = None,
    json: JsonFlag = False,
) -> None:
    """Run a teacher once over a dataset and keep its embeddings. Stop it at any time; run it again to go on."""
    flags = {
        "dataset": dataset,
        "teacher": teacher,
        "pretrained": pretrained,
        "cache": cache,
        "device": device,
        "precision": precision,
        "batch_size": batch_size,
        "chunk_rows": chunk_rows,
    }
    config = load_config(PrecomputeConfig, "precompute", run_file, flags)
    from pipeline.plan import count_done
    from pipeline.precompute import precompute as run_precompute

    try:
        with StageProgress() as progress:
            result = run_precompute(config, progress)
    except KeyboardInterrupt:
        try:
            done, total = count_done(config.cache)
            state = f"{done} of {total} chunks are committed"
        except CacheError:
            state = "nothing is committed yet"
        _say(f"stopped: {state}. Run the same command again to go on.")
        raise typer.Exit(1) from None
    if json:
        print_json(result)
        return
    rates = f"{result.images_per_second or 0:,.0f} images/s, {result.captions_per_second or 0:,.0f} captions/s"
    for line in result.problem_details:
        _say(line)
    if result.replaced_manifest_digest:
        _say(
            f"repaired chunks differ from the sealed ones: the manifest is {result.manifest_digest[:12]} now, it was "
            f"{result.replaced_manifest_digest[:12]}. Runs that name the old one learned from the old bytes."
        )
    problems = ", ".join(f"{kind} {count}" for kind, count in result.problems.items()) or "none"
    Console().print(
        f"{result.cache}: {result.images:,} images and {result.captions:,} captions by {result.teacher}\n"
        f"{result.chunks_encoded} of {result.chunks} chunks encoded by this run in {result.seconds:,.1f} s ({rates})\n"
        f"problems: {problems}; {result.lost_images} images without a row, {result.quarantined} quarantined",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def train(
    run_file: RunFile = None,
    cache: Annotated[str | None, _setting(TrainConfig, "cache")] = None,
    student: Annotated[str | None, _setting(TrainConfig, "student")] = None,
    out: Annotated[str | None, _setting(TrainConfig, "out")] = None,
    split: Annotated[str | None, _setting(TrainConfig, "split")] = None,
    image_root: Annotated[str | None, _setting(TrainConfig, "image_root")] = None,
    expect: Annotated[str | None, _setting(TrainConfig, "expect")] = None,
    accept_mismatch: Annotated[list[str] | None, _setting(TrainConfig, "accept_mismatch")] = None,
    epochs: Annotated[int | None, _setting(TrainConfig, "epochs")] = None,
    batch_size: Annotated[int | None, _setting(TrainConfig, "batch_size")] = None,
    learning_rate: Annotated[float | None, _setting(TrainConfig, "learning_rate")] = None,
    seed: Annotated[int | None, _setting(TrainConfig, "seed")] = None,
    device: Annotated[str | None, _setting(TrainConfig, "device")] = None,
    precision: Annotated[str | None, _setting(TrainConfig, "precision")] = None,
    workers: Annotated[int | None, _setting(TrainConfig, "workers")] = None,
    json: JsonFlag = False,
) -> None:
    """Train a student from a finished cache. No teacher is loaded."""
    flags = {
        "cache": cache,
        "student": student,
        "out": out,
        "split": split,
        "image_root": image_root,
        "expect": expect,
        "accept_mismatch": accept_mismatch or None,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "device": device,
        "precision": precision,
        "workers": workers,
    }
    config = load_config(TrainConfig, "train", run_file, flags)
    from pipeline.train import StepProgress
    from pipeline.train import train as run_train

    with StageProgress() as progress:

        def report(at: StepProgress) -> None:
            note = f"loss {at.loss:.3f}  {at.samples_per_second:,.0f} samples/s  data wait {at.data_wait_share:.0%}"
            progress("train", at.step, at.total_steps, note)

        result = run_train(config, report)
    if json:
        print_json(result.record)
        return
    record = result.record
    last = record.epochs[-1]
    Console().print(
        f"{result.run}: {record.student_parameters:,} parameters, {record.steps} steps over "
        f"{record.train_images:,} images in {record.seconds:,.1f} s\n"
        f"last epoch: loss {last.loss:.4f}, {last.samples_per_second:,.0f} samples/s, "
        f"{last.data_wait_share:.0%} of the time waiting for data\n"
        f"checkpoint: {result.run}/{record.checkpoint}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def evaluate(
    run_file: RunFile = None,
    cache: Annotated[str | None, _setting(EvaluateConfig, "cache")] = None,
    run: Annotated[str | None, _setting(EvaluateConfig, "run")] = None,
    split: Annotated[str | None, _setting(EvaluateConfig, "split")] = None,
    image_root: Annotated[str | None, _setting(EvaluateConfig, "image_root")] = None,
    accept_mismatch: Annotated[list[str] | None, _setting(EvaluateConfig, "accept_mismatch")] = None,
    device: Annotated[str | None, _setting(EvaluateConfig, "device")] = None,
    json: JsonFlag = False,
) -> None:
    """Recall of the cached teacher on a split; with --run that of a student too, and what it retains."""
    flags = {
        "cache": cache,
        "run": run,
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
        Console().print(recall_table(title, result.teacher, result.student, result.retention))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the demo; its cache and run are replaced.")] = Path(
        "runs/demo"
    ),
    json: JsonFlag = False,
) -> None:
    """Run the main job on rendered scenes and a small teacher that are shipped: precompute, train, evaluate."""
    from pipeline.demo import demo_table, run_demo

    with StageProgress() as progress:
        result = run_demo(out, progress)
    if json:
        print_json(result)
    else:
        Console().print(demo_table(result))


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


def _say(line: str) -> None:
    print(line, file=sys.stderr)  # noqa: T201


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of the ``teacher-cache`` command."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        app(standalone_mode=True)
    except UsageError as error:
        _say(f"error: {error}")
        sys.exit(2)
    # FloatingPointError: the loss left the numbers; OSError: a file or a disk; both name what they met
    except (CacheError, FloatingPointError, OSError) as error:
        _say(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        _say("stopped")
        sys.exit(1)


if __name__ == "__main__":
    main()
