"""The ``inherit``, ``train``, ``soup`` and ``resize`` commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from teacher_cache.pipeline.cli.flags import LogFlag, LogFormat, MetricsFlag, RunFile, say, setting
from teacher_cache.pipeline.settings.recipes import RECIPE_SETTINGS
from teacher_cache.pipeline.settings.run_file import check_config, given_settings, load_config
from teacher_cache.pipeline.settings.student import InheritConfig, MeanConfig, ResizeConfig
from teacher_cache.pipeline.settings.train import PixelsConfig, TrainConfig
from teacher_cache.storage.cli.app import JsonFlag, app, print_json
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.progress import StageProgress


@app.command()
def inherit(
    teacher: Annotated[str | None, setting(InheritConfig, "teacher")] = None,
    student: Annotated[str | None, setting(InheritConfig, "student")] = None,
    out: Annotated[str | None, setting(InheritConfig, "out")] = None,
    pretrained: Annotated[str | None, setting(InheritConfig, "pretrained")] = None,
    trunk_weights: Annotated[str | None, setting(InheritConfig, "trunk_weights")] = None,
    text_layers: Annotated[str | None, setting(InheritConfig, "text_layers")] = None,
    image_layers: Annotated[str | None, setting(InheritConfig, "image_layers")] = None,
    cache: Annotated[str | None, setting(InheritConfig, "cache")] = None,
    split: Annotated[str | None, setting(InheritConfig, "split")] = None,
    seed: Annotated[int | None, setting(InheritConfig, "seed")] = None,
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
    from teacher_cache.pipeline.models.inherit.run import inherit as run_inherit

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
    cache: Annotated[str | None, setting(TrainConfig, "cache")] = None,
    student: Annotated[str | None, setting(TrainConfig, "student")] = None,
    out: Annotated[str | None, setting(TrainConfig, "out")] = None,
    split: Annotated[str | None, setting(TrainConfig, "split")] = None,
    image_root: Annotated[str | None, setting(TrainConfig, "image_root")] = None,
    pixels: Annotated[str | None, setting(TrainConfig, "pixels")] = None,
    expect: Annotated[str | None, setting(TrainConfig, "expect")] = None,
    accept_mismatch: Annotated[list[str] | None, setting(TrainConfig, "accept_mismatch")] = None,
    init: Annotated[str | None, setting(TrainConfig, "init")] = None,
    lock_image_unlocked_groups: Annotated[int | None, setting(TrainConfig, "lock_image_unlocked_groups")] = None,
    train_image_size: Annotated[int | None, setting(TrainConfig, "train_image_size")] = None,
    recipe: Annotated[str | None, setting(TrainConfig, "recipe")] = None,
    views: Annotated[int | None, setting(TrainConfig, "views")] = None,
    captions_per_image: Annotated[int | None, setting(TrainConfig, "captions_per_image")] = None,
    epochs: Annotated[int | None, setting(TrainConfig, "epochs")] = None,
    batch_size: Annotated[int | None, setting(TrainConfig, "batch_size")] = None,
    micro_batch: Annotated[int | None, setting(TrainConfig, "micro_batch")] = None,
    learning_rate: Annotated[float | None, setting(TrainConfig, "learning_rate")] = None,
    ema_decay: Annotated[float | None, setting(TrainConfig, "ema_decay")] = None,
    seed: Annotated[int | None, setting(TrainConfig, "seed")] = None,
    device: Annotated[str | None, setting(TrainConfig, "device")] = None,
    devices: Annotated[int | None, setting(TrainConfig, "devices")] = None,
    precision: Annotated[str | None, setting(TrainConfig, "precision")] = None,
    compile_: Annotated[bool | None, setting(TrainConfig, "compile", "--compile")] = None,
    workers: Annotated[int | None, setting(TrainConfig, "workers")] = None,
    checkpoint_seconds: Annotated[float | None, setting(TrainConfig, "checkpoint_seconds")] = None,
    select_split: Annotated[str | None, setting(TrainConfig, "select_split")] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --out, whose settings count; it was stopped or killed."),
    ] = False,
    metrics_port: MetricsFlag = None,
    log_format: LogFlag = LogFormat.text,
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
        "lock_image_unlocked_groups": lock_image_unlocked_groups,
        "train_image_size": train_image_size,
        "recipe": recipe,
        "views": views,
        "captions_per_image": captions_per_image,
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
    if resume:
        config = _resumed_config(run_file, flags)
    else:
        config = load_config(TrainConfig, "train", run_file, flags)
        given = given_settings("train", run_file, flags)
        # a run file with losses of its own is easily forgotten when recipes are compared
        if "recipe" in given and (kept := sorted(RECIPE_SETTINGS & given.keys())):
            say(f"recipe {config.recipe}, but for {', '.join(kept)}: as given")
    from teacher_cache.pipeline.train.launch import launched_rank
    from teacher_cache.pipeline.train.loop import StepProgress
    from teacher_cache.pipeline.train.loop import train as run_train

    try:
        with StageProgress() as progress:

            def report(at: StepProgress) -> None:
                note = f"loss {at.loss:.3f}  {at.samples_per_second:,.0f} samples/s  data wait {at.data_wait_share:.0%}"
                progress("train", at.step, at.total_steps, note, at.eta_seconds)

            result = run_train(config, report, resume=resume)
    except KeyboardInterrupt:
        say(f"stopped: {_how_to_train_on(config.out)}")
        raise typer.Exit(1) from None
    if launched_rank():
        return  # rank 0 tells of the run
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
        f"seen of each image: {record.view}\n"
        f"last epoch: loss {last.loss:.4f}, {last.samples_per_second:,.0f} samples/s, "
        f"{last.data_wait_share:.0%} of the time waiting for data\n"
        f"checkpoint: {result.run}/{record.checkpoint}{best}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def soup(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help=MeanConfig.model_fields["runs"].description)],
    out: Annotated[str | None, setting(MeanConfig, "out")] = None,
    json: JsonFlag = False,
) -> None:
    """Average the weights of runs that began at the same ones: one student of the same size, often a better one."""
    config = load_config(MeanConfig, "soup", None, {"runs": runs, "out": out})
    from teacher_cache.pipeline.models.average import soup as run_soup

    record = run_soup(config)
    if json:
        print_json(record)
        return
    summary = (
        f"{config.out}: the mean of {len(record.averaged)} runs of {record.student_parameters:,} parameters, "
        f"{record.steps:,} steps in {record.seconds:,.1f} s together\ncheckpoint: {config.out}/{record.checkpoint}"
    )
    Console().print(summary, markup=False, highlight=False, soft_wrap=True)


@app.command()
def resize(
    run: Annotated[str, typer.Argument(metavar="RUN", help=ResizeConfig.model_fields["run"].description)],
    image_size: Annotated[int | None, setting(ResizeConfig, "image_size")] = None,
    out: Annotated[str | None, setting(ResizeConfig, "out")] = None,
    checkpoint: Annotated[str | None, setting(ResizeConfig, "checkpoint")] = None,
    json: JsonFlag = False,
) -> None:
    """Give a trained student another image size.

    A convolutional one is often better at more pixels than it learned from; the positions of a transformer are
    interpolated, and want some more training.
    """
    settings = {"run": run, "image_size": image_size, "out": out, "checkpoint": checkpoint}
    config = load_config(ResizeConfig, "resize", None, settings)
    from teacher_cache.pipeline.models.resize import resize as run_resize

    record = run_resize(config)
    if json:
        print_json(record)
        return
    assert record.resized is not None  # that is what was written
    before = " x ".join(map(str, record.resized.image_size))
    names = ", ".join(record.resized.interpolated)
    kept = f"all but {names}, which is interpolated, are the same" if names else "all are the same"
    summary = (
        f"{config.out}: {config.run} at {config.image_size} x {config.image_size} pixels, there {before}; "
        f"{record.student_parameters:,} parameters: {kept}\ncheckpoint: {config.out}/{record.checkpoint}"
    )
    if names:
        summary += (
            "\nTrain it on: teacher-cache train --cache CACHE --student CHECKPOINT/open_clip_config.json --init "
            "CHECKPOINT, with that checkpoint"
        )
    Console().print(summary, markup=False, highlight=False, soft_wrap=True)


def _resumed_config(run_file: Path | None, flags: dict[str, Any]) -> TrainConfig:
    """The settings of the run in --out, with those given on top: training refuses the ones that differ."""
    from teacher_cache.pipeline.models.run_folder import RunFolder

    given = given_settings("train", run_file, flags)
    if "out" not in given:
        raise UsageError("--resume goes on with the run in --out; name its folder")
    record = RunFolder(given["out"]).read()
    settings = record.config.model_dump() | given
    if "cache" in given and "://" not in given["cache"]:
        settings["cache"] = str(Path(given["cache"]).resolve())
    config = check_config(TrainConfig, settings, "train --resume")
    if not record.averaged:  # training refuses it
        say(f"{config.out}: " + ("is finished" if record.finished else f"goes on after step {record.steps}"))
    return config


def _how_to_train_on(out: str) -> str:
    from teacher_cache.pipeline.models.run_folder import RunFolder

    folder = RunFolder(out)
    try:
        if not folder.resumable():
            return "nothing is saved yet. Run the same command again to start anew."
        return f"{folder.read().steps} steps are saved. Go on by: teacher-cache train --resume --out {out}"
    except UsageError as error:
        return str(error)


__all__ = ["pixels"]


@app.command()
def pixels(
    cache: Annotated[str | None, setting(PixelsConfig, "cache")] = None,
    student: Annotated[str | None, setting(PixelsConfig, "student")] = None,
    out: Annotated[str | None, setting(PixelsConfig, "out")] = None,
    train_image_size: Annotated[int | None, setting(PixelsConfig, "train_image_size")] = None,
    split: Annotated[str | None, setting(PixelsConfig, "split")] = None,
    views: Annotated[int | None, setting(PixelsConfig, "views")] = None,
    image_root: Annotated[str | None, setting(PixelsConfig, "image_root")] = None,
    threads: Annotated[int | None, setting(PixelsConfig, "threads")] = None,
    json: JsonFlag = False,
) -> None:
    """Decode a split's images once, for train --pixels. Stop it at any time; run it again to go on."""
    flags = {
        "cache": cache,
        "student": student,
        "out": out,
        "train_image_size": train_image_size,
        "split": split,
        "views": views,
        "image_root": image_root,
        "threads": threads,
    }
    config = load_config(PixelsConfig, "pixels", None, flags)
    try:
        from teacher_cache.pipeline.train.make_pixels import (  # takes seconds, in which it may be stopped
            make_pixels,
            plan_pixels,
        )

        plan = plan_pixels(config)
        say(str(plan))
        with StageProgress() as progress:
            result = make_pixels(plan, progress)
    except KeyboardInterrupt:
        say("stopped: finished chunks stay. Run the same command again to go on.")
        raise typer.Exit(1) from None
    except OSError as error:  # an image that cannot be read, a full disk
        say(f"error: {str(error).rstrip('.')}. Finished chunks stay.")
        raise typer.Exit(1) from None
    if json:
        print_json(result)
        return
    height, width = result.size
    Console().print(
        f"{result.out}: {result.images:,} images in {result.views} views at {height} x {width}, "
        f"{result.nbytes / 1e9:,.2f} GB\n{result.chunks_made:,} of {result.chunks:,} chunks made by this run",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
