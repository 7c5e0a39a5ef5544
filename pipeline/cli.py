"""The ``teacher-cache`` command: a verb and a run file, or a verb and flags.

Results go to stdout, progress to stderr. Exit 0: fine; 1: something is wrong with the data, or the run stopped;
2: the command or a setting cannot be used. torch is imported by the commands that need it, when they need it.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import pipeline.cli_pixels
import pipeline.cli_zero_shot  # noqa: F401  commands of their own
from pipeline.config import (
    EvaluateConfig,
    InheritConfig,
    PrecomputeConfig,
    ProofConfig,
    TrainConfig,
    check_config,
    given_settings,
    load_config,
)
from storage.cli import CacheArgument, JsonFlag, app, counted, print_findings, print_json, print_report
from storage.console import StageProgress
from storage.errors import CacheError, CacheNotFoundError, CacheUnreachableError, UsageError
from storage.inspect import count_committed
from storage.integrity import verify_cache

if TYPE_CHECKING:
    from pipeline.proof import ProofResult

__all__ = ["app", "main"]

_ROWS_SHOWN = 20
_INTERRUPTED = 130  # what typer makes of a KeyboardInterrupt, without a word

# by repair: an unfinished cache is precompute's, and a file that nobody knows or can read is left to its owner
_NOT_MENDED = {"incomplete", "unknown-file", "unreadable"}

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
    views: Annotated[int | None, _setting(PrecomputeConfig, "views")] = None,
    crop_scale: Annotated[tuple[float, float] | None, _setting(PrecomputeConfig, "crop_scale")] = None,
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
        "views": views,
        "crop_scale": crop_scale,
    }
    config = load_config(PrecomputeConfig, "precompute", run_file, flags)
    try:
        from pipeline.precompute import precompute as run_precompute  # takes seconds, in which it may be stopped

        with StageProgress() as progress:
            result = run_precompute(config, progress)
    except KeyboardInterrupt:
        _say(f"stopped: {_how_to_go_on(config.cache)}")
        raise typer.Exit(1) from None
    except CacheUnreachableError as error:  # it says how to go on; asking what is there would take as long again
        _say(f"error: {str(error).rstrip('.')}. What is committed stays.")
        raise typer.Exit(1) from None
    except OSError as error:  # a full disk, a missing right, a share that is away
        _say(f"error: {error}. {_how_to_go_on(config.cache)}")
        raise typer.Exit(1) from None
    if json:
        print_json(result)
        return
    seen = "" if result.views == 1 else f" in {result.views} views"
    rates = f"{result.images_per_second or 0:,.0f} images/s, {result.captions_per_second or 0:,.0f} captions/s"
    for line in result.problem_details:
        _say(line)
    if result.replaced_manifest_digest:
        _say(_replaced(result.manifest_digest, result.replaced_manifest_digest))
    problems = ", ".join(f"{kind} {count}" for kind, count in result.problems.items()) or "none"
    Console().print(
        f"{result.cache}: {result.images:,} images{seen} and {result.captions:,} captions by {result.teacher}\n"
        f"{result.chunks_encoded} of {result.chunks} chunks encoded by this run in {result.seconds:,.1f} s ({rates})\n"
        f"problems: {problems}; {result.lost_images} images without a row, {result.quarantined} quarantined",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def verify(
    cache: CacheArgument,
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample",
            help="Also encode so many random images, and captions, with the live teacher and compare. To find a fault "
            "in a fraction f of all rows with probability p: N = ln(1-p)/ln(1-f), 459 for 1 % at 99 %.",
        ),
    ] = None,
    teacher: Annotated[str | None, _setting(ProofConfig, "teacher")] = None,
    pretrained: Annotated[str | None, _setting(ProofConfig, "pretrained")] = None,
    dataset: Annotated[str | None, _setting(ProofConfig, "dataset")] = None,
    image_root: Annotated[str | None, _setting(ProofConfig, "image_root")] = None,
    seed: Annotated[int | None, _setting(ProofConfig, "seed")] = None,
    threshold: Annotated[float | None, _setting(ProofConfig, "threshold")] = None,
    device: Annotated[str | None, _setting(ProofConfig, "device")] = None,
    precision: Annotated[str | None, _setting(ProofConfig, "precision")] = None,
    json: JsonFlag = False,
) -> None:
    """Read all of a cache and prove digests, counts, finite values and unit norms. Exit 1 if anything is wrong.

    With --sample also prove random rows against the live teacher: digests do not show that the right rows were written.
    """
    flags = {
        "teacher": teacher,
        "pretrained": pretrained,
        "dataset": dataset,
        "image_root": image_root,
        "seed": seed,
        "threshold": threshold,
        "device": device,
        "precision": precision,
    }
    config = None
    if sample is not None:
        config = load_config(ProofConfig, "verify", None, {"cache": cache, "sample": sample, **flags})
    elif given := [name for name, value in flags.items() if value is not None]:
        raise UsageError(f"--{given[0].replace('_', '-')} needs --sample: plain verify loads no teacher")
    proof = None
    with StageProgress() as progress:
        report = verify_cache(cache, lambda done, total: progress("verify chunks", done, total))
        if config is not None and report.ok:
            from pipeline.proof import ProvenReport, prove_sample

            proof = prove_sample(config, progress)
            report = ProvenReport(**{**dict(report), "ok": proof.ok}, proof=proof)
    if json:
        print_json(report)
    else:
        print_report(report)
        if proof is not None:
            _print_proof(proof)
        elif config is not None:
            _say("no row was drawn: the cache is damaged or not complete.")
        if {finding.kind for finding in report.findings} - _NOT_MENDED:
            _say(f"Readers refuse what is damaged. Run teacher-cache repair {cache} to mend it.")
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def repair(
    cache: CacheArgument,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="KIND:PATH, where the dataset is now, if not where it was.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="As for precompute; needed for a local-dir teacher only.")
    ] = None,
    pretrained: Annotated[str | None, _setting(PrecomputeConfig, "pretrained")] = None,
    device: Annotated[str, _setting(PrecomputeConfig, "device")] = "auto",
    json: JsonFlag = False,
) -> None:
    """Mend what is damaged: manifest, tables and metadata are restored, bad chunks encoded again; then verify."""
    from pipeline.repair import repair as run_repair

    try:
        with StageProgress() as progress:
            result = run_repair(cache, dataset, teacher, pretrained, device, progress)
    except KeyboardInterrupt:
        _say("stopped: what is mended stays. Run the same command again to go on.")
        raise typer.Exit(1) from None
    if json:
        print_json(result)
    else:
        console = Console(highlight=False)
        for line in result.done:
            console.print(line, markup=False, soft_wrap=True)
        print_findings(result.findings)
        verdict = "sound" if result.ok else f"{counted(len(result.findings), 'finding')} left"
        work = counted(len(result.done), "repair") if result.done else "nothing to repair"
        console.print(f"{result.cache}: {work}, {verdict}", markup=False, soft_wrap=True)
    if result.replaced_manifest_digest:
        _say(_replaced(result.manifest_digest, result.replaced_manifest_digest))
    if not result.ok:
        raise typer.Exit(1)


@app.command()
def inherit(
    teacher: Annotated[str | None, _setting(InheritConfig, "teacher")] = None,
    student: Annotated[str | None, _setting(InheritConfig, "student")] = None,
    out: Annotated[str | None, _setting(InheritConfig, "out")] = None,
    pretrained: Annotated[str | None, _setting(InheritConfig, "pretrained")] = None,
    trunk_weights: Annotated[str | None, _setting(InheritConfig, "trunk_weights")] = None,
    text_layers: Annotated[str | None, _setting(InheritConfig, "text_layers")] = None,
    image_layers: Annotated[str | None, _setting(InheritConfig, "image_layers")] = None,
    cache: Annotated[str | None, _setting(InheritConfig, "cache")] = None,
    split: Annotated[str | None, _setting(InheritConfig, "split")] = None,
    seed: Annotated[int | None, _setting(InheritConfig, "seed")] = None,
    json: JsonFlag = False,
) -> None:
    """Write a student that begins with its teacher's weights, as far as they fit, for train --init."""
    flags = {
        "teacher": teacher,
        "student": student,
        "out": out,
        "pretrained": pretrained,
        "trunk_weights": trunk_weights,
        "text_layers": text_layers,
        "image_layers": image_layers,
        "cache": cache,
        "split": split,
        "seed": seed,
    }
    config = load_config(InheritConfig, "inherit", None, flags)
    from pipeline.inherit import inherit as run_inherit

    with StageProgress() as progress:
        result = run_inherit(config, progress)
    if json:
        print_json(result)
        return
    random = sum(part.parameters for part in result.parts if part.random)
    lines = [f"{part.part:<18} {part.parameters:>12,}  {part.source}" for part in result.parts]
    lines += [f"note: {note}" for note in result.notes]
    summary = (
        f"{result.out}: {result.parameters:,} parameters, {result.parameters / result.teacher_parameters:.1%} of "
        f"{result.teacher}'s {result.teacher_parameters:,}; {random:,} of them random"
    )
    Console().print("\n".join([*lines, summary]), markup=False, highlight=False, soft_wrap=True)


@app.command()
def train(
    run_file: RunFile = None,
    cache: Annotated[str | None, _setting(TrainConfig, "cache")] = None,
    student: Annotated[str | None, _setting(TrainConfig, "student")] = None,
    out: Annotated[str | None, _setting(TrainConfig, "out")] = None,
    split: Annotated[str | None, _setting(TrainConfig, "split")] = None,
    image_root: Annotated[str | None, _setting(TrainConfig, "image_root")] = None,
    pixels: Annotated[str | None, _setting(TrainConfig, "pixels")] = None,
    expect: Annotated[str | None, _setting(TrainConfig, "expect")] = None,
    accept_mismatch: Annotated[list[str] | None, _setting(TrainConfig, "accept_mismatch")] = None,
    init: Annotated[str | None, _setting(TrainConfig, "init")] = None,
    recipe: Annotated[str | None, _setting(TrainConfig, "recipe")] = None,
    views: Annotated[int | None, _setting(TrainConfig, "views")] = None,
    epochs: Annotated[int | None, _setting(TrainConfig, "epochs")] = None,
    batch_size: Annotated[int | None, _setting(TrainConfig, "batch_size")] = None,
    micro_batch: Annotated[int | None, _setting(TrainConfig, "micro_batch")] = None,
    learning_rate: Annotated[float | None, _setting(TrainConfig, "learning_rate")] = None,
    ema_decay: Annotated[float | None, _setting(TrainConfig, "ema_decay")] = None,
    seed: Annotated[int | None, _setting(TrainConfig, "seed")] = None,
    device: Annotated[str | None, _setting(TrainConfig, "device")] = None,
    devices: Annotated[int | None, _setting(TrainConfig, "devices")] = None,
    precision: Annotated[str | None, _setting(TrainConfig, "precision")] = None,
    compile_: Annotated[bool | None, _setting(TrainConfig, "compile", "--compile")] = None,
    workers: Annotated[int | None, _setting(TrainConfig, "workers")] = None,
    checkpoint_seconds: Annotated[float | None, _setting(TrainConfig, "checkpoint_seconds")] = None,
    select_split: Annotated[str | None, _setting(TrainConfig, "select_split")] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --out, whose settings count; it was stopped or killed."),
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Train a student from a finished cache. No teacher is loaded. Killed at any time, it goes on by --resume."""
    flags = {
        "cache": cache,
        "student": student,
        "out": out,
        "split": split,
        "image_root": image_root,
        "pixels": pixels,
        "expect": expect,
        "accept_mismatch": accept_mismatch or None,
        "init": init,
        "recipe": recipe,
        "views": views,
        "epochs": epochs,
        "batch_size": batch_size,
        "micro_batch": micro_batch,
        "learning_rate": learning_rate,
        "ema_decay": ema_decay,
        "seed": seed,
        "device": device,
        "devices": devices,
        "precision": precision,
        "compile": compile_,
        "workers": workers,
        "checkpoint_seconds": checkpoint_seconds,
        "select_split": select_split,
    }
    config = _resumed_config(run_file, flags) if resume else load_config(TrainConfig, "train", run_file, flags)
    from pipeline.train import StepProgress
    from pipeline.train import train as run_train

    try:
        with StageProgress() as progress:

            def report(at: StepProgress) -> None:
                note = f"loss {at.loss:.3f}  {at.samples_per_second:,.0f} samples/s  data wait {at.data_wait_share:.0%}"
                progress("train", at.step, at.total_steps, note, at.eta_seconds)

            result = run_train(config, report, resume=resume)
    except KeyboardInterrupt:
        _say(f"stopped: {_how_to_train_on(config.out)}")
        raise typer.Exit(1) from None
    if json:
        print_json(result.record)
        return
    record = result.record
    last = record.epochs[-1]
    best = (
        ""
        if record.best is None
        else f"\nbest: {result.run}/{record.best.checkpoint}, epoch {record.best.epoch + 1}, mean recall "
        f"{record.best.mean_recall:.1f} %, chosen on {record.best.split}"
    )
    Console().print(
        f"{result.run}: {record.student_parameters:,} parameters, {record.steps} steps over "
        f"{record.train_images:,} images in {record.seconds:,.1f} s\n"
        f"last epoch: loss {last.loss:.4f}, {last.samples_per_second:,.0f} samples/s, "
        f"{last.data_wait_share:.0%} of the time waiting for data\n"
        f"checkpoint: {result.run}/{record.checkpoint}{best}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def evaluate(
    run_file: RunFile = None,
    cache: Annotated[str | None, _setting(EvaluateConfig, "cache")] = None,
    run: Annotated[str | None, _setting(EvaluateConfig, "run")] = None,
    checkpoint: Annotated[str | None, _setting(EvaluateConfig, "checkpoint")] = None,
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
        if result.chosen_on is not None:
            title += f"; checkpoint chosen on {result.chosen_on}"
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


def _how_to_go_on(cache: str) -> str:
    try:
        done, total = count_committed(cache)  # storage alone: torch may be half imported
        state = f"{done} of {total} chunks are committed"
    except CacheNotFoundError:
        state = "nothing is committed yet"
    except (CacheError, OSError):
        state = "what is committed stays"
    return f"{state}. Run the same command again to go on."


def _resumed_config(run_file: Path | None, flags: dict[str, Any]) -> TrainConfig:
    """The settings of the run in --out, with those given on top: training refuses the ones that differ."""
    from pipeline.runs import RunFolder

    given = given_settings("train", run_file, flags)
    if "out" not in given:
        raise UsageError("--resume goes on with the run in --out; name its folder")
    recorded = RunFolder(given["out"]).read().config
    settings = recorded.model_dump() | given
    if "cache" in given and "://" not in given["cache"]:
        settings["cache"] = str(Path(given["cache"]).resolve())
    config = check_config(TrainConfig, settings, "train --resume")
    _say(f"{config.out}: goes on after step {RunFolder(config.out).read().steps}")
    return config


def _how_to_train_on(out: str) -> str:
    from pipeline.runs import RunFolder

    folder = RunFolder(out)
    try:
        if not folder.resumable():
            return "nothing is saved yet. Run the same command again to start anew."
        return f"{folder.read().steps} steps are saved. Go on by: teacher-cache train --resume --out {out}"
    except UsageError as error:
        return str(error)


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


def _print_proof(proof: ProofResult) -> None:
    console = Console(highlight=False)
    for row in proof.wrong[:_ROWS_SHOWN]:
        view = f", view {row.view}" if row.view else ""
        line = f"wrong: {row.tower} row {row.row}{view} ({row.sample_id}): {row.what}"
        console.print(line, markup=False, soft_wrap=True)
    if len(proof.wrong) > _ROWS_SHOWN:
        console.print(f"... and {len(proof.wrong) - _ROWS_SHOWN} more; --json lists all")
    least = "" if proof.least_cosine is None else f", least cosine {proof.least_cosine:.5f} at {proof.least_cosine_row}"
    from pipeline.proof import fraction_shown

    images = proof.images_compared + proof.quarantined_checked
    shown = fraction_shown(min(images, proof.captions_compared))
    verdict = "as the teacher makes them" if proof.ok else f"{len(proof.wrong)} rows are wrong"
    console.print(
        f"{proof.cache}: {verdict}: {proof.images_compared} images and {proof.captions_compared} captions against "
        f"{proof.teacher} on {proof.device} in {proof.precision}, {proof.quarantined_checked} quarantined tried again, "
        f"threshold {proof.threshold:g}{least}\n"
        f"a fault in {shown:.2%} of all images, or captions, would have shown with 99 % probability",
        markup=False,
        soft_wrap=True,
    )


def _replaced(now: str, before: str) -> str:
    return (
        f"repaired chunks differ from the sealed ones: the manifest is {now[:12]} now, it was {before[:12]}. "
        "Runs that name the old one learned from the old bytes."
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr)  # noqa: T201


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of the ``teacher-cache`` command."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        app(standalone_mode=True)
    except SystemExit as ended:
        if ended.code != _INTERRUPTED:
            raise
        _say("stopped")
        sys.exit(1)
    except UsageError as error:
        _say(f"error: {error}")
        sys.exit(2)
    # FloatingPointError: the loss left the numbers; OSError: a file or a disk; both name what they met
    except (CacheError, FloatingPointError, OSError) as error:
        _say(f"error: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
