"""The ``train`` command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from teacher_cache.pipeline.cli.options import Settings, log_format_option, metrics_option, settings_command
from teacher_cache.pipeline.cli.stopping import resumable
from teacher_cache.pipeline.data.service.fork_server import start_fork_server
from teacher_cache.pipeline.settings.recipes import RECIPE_SETTINGS
from teacher_cache.pipeline.settings.run_file import check_config
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.log.trackers import require_trackers
from teacher_cache.storage.cli.app import json_flag, print_result
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.new_files import require_writable
from teacher_cache.storage.observe.logs import say, suggest_next
from teacher_cache.storage.observe.progress import StageProgress
from teacher_cache.storage.observe.quantities import counted

if TYPE_CHECKING:
    from teacher_cache.pipeline.train.loop import StepProgress, TrainResult


@settings_command(
    "train",
    TrainConfig,
    flags=(
        *("cache", "student", "out", "split", "exclude", "image_root", "init", "recipe", "pixels"),
        *("epochs", "batch_size", "learning_rate", "select_split", "precision", "seed", "device", "devices"),
        "report_to",
    ),
    example="train --cache a.cache --student vit-s-32 --out runs/a --set workers=4",
    checked=False,
)
@click.option("--resume", is_flag=True, help="Continue the stopped run in --out with its own settings.")
@metrics_option
@log_format_option
@json_flag
def train(settings: Settings[TrainConfig], resume: bool, as_json: bool) -> None:
    """Stop it at any time and continue it with --resume."""
    if not resume:
        _say_what_the_recipe_leaves(settings.explicit())
    config = _resumed(settings) if resume else settings.load()
    if os.environ.get("RANK", "0") == "0":  # another rank may find what rank 0 has begun
        _check_folder(config, resume)
    require_trackers(config.report_to)

    def state() -> str:
        return _saved_steps(config.out)

    with resumable(state, errors=False):
        if config.workers != 0 and config.devices == 1:
            start_fork_server()  # while this process imports torch
        from teacher_cache.pipeline.train.launch import launched_rank  # torch takes seconds, and may be interrupted
        from teacher_cache.pipeline.train.loop import train as run

        with StageProgress() as progress:

            def report(at: StepProgress) -> None:
                note = f"loss {at.loss:.3f}  {at.samples_per_second:,.0f} samples/s  data wait {at.data_wait_share:.0%}"
                progress("train", at.step, at.total_steps, note, at.eta_seconds)

            result = run(config, report, resume=resume)
    if launched_rank():
        return  # rank 0 prints the result
    print_result(result.record, as_json, lambda _: _lines(result))
    if not as_json:  # recall needs captions
        captioned = result.record.config.captions_per_image
        suggest_next(*(("evaluate",) if captioned else ("zero-shot", "DATASET")), run=config.out)


def _check_folder(config: TrainConfig, resume: bool) -> None:
    """Check what training checks again, before torch is imported."""
    from teacher_cache.pipeline.models.run_folder import RunFolder

    run = RunFolder(config.out)
    run.require_unlocked()
    if not resume:
        run.require_free()
        require_writable(run.path)


def _say_what_the_recipe_leaves(explicit: dict[str, Any]) -> None:
    """Report the settings that override the recipe: losses in a run file are easily forgotten."""
    if "recipe" in explicit and (own := sorted(RECIPE_SETTINGS & explicit.keys())):
        say(f"recipe {explicit['recipe']}, but for {', '.join(own)}: as given")


def _lines(result: TrainResult) -> list[str]:
    record, shares = result.record, result.record.config.teacher_shares
    last = record.epochs[-1]
    lines = [
        f"{result.run}: {record.student_parameters:,} parameters, {record.steps} steps over "
        f"{record.train_images:,} images in {record.seconds:,.1f} s",
        f"seen of each image: {record.view}",
        f"last epoch: loss {last.loss:.4f}, {last.samples_per_second:,.0f} samples/s, "
        f"{last.data_wait_share:.0%} of the time waiting for data",
        f"checkpoint: {result.run}/{record.checkpoint}",
    ]
    if record.others:
        lines.insert(1, f"teachers: {record.teacher}, " + " : ".join(f"{share:.0%}" for share in shares))
    if record.excluded:
        lines.insert(1, f"left out: {counted(record.excluded.images, 'image')} of {record.excluded.path}")
    if record.dropped_images:
        lines.insert(1, f"left out: {counted(record.dropped_images, 'image')} that not all caches have")
    if record.best is not None:
        lines.append(
            f"best: {result.run}/{record.best.checkpoint}, epoch {record.best.epoch + 1}, mean recall "
            f"{record.best.mean_recall:.1f} %, chosen on {record.best.split}"
        )
    return lines


def _resumed(settings: Settings[TrainConfig]) -> TrainConfig:
    """Return the settings of the run in --out, with the typed ones; training refuses a difference."""
    from teacher_cache.pipeline.models.run_folder import RunFolder

    explicit = settings.explicit()
    if "out" not in explicit:
        raise UsageError("--resume continues the run in --out; name its folder")
    record = RunFolder(explicit["out"]).read()
    merged = record.config.model_dump() | explicit
    if "cache" in explicit:
        named = [explicit["cache"]] if isinstance(explicit["cache"], str) else explicit["cache"]
        first, *others = [cache if "://" in cache else str(Path(cache).resolve()) for cache in named]
        merged |= {"cache": first} | ({"other_caches": others} if others else {})
    config = check_config(TrainConfig, merged, "train --resume")
    if not record.averaged:  # training refuses a mean
        say(f"{config.out}: " + ("is finished" if record.finished else f"goes on after step {record.steps}"))
    return config


def _saved_steps(out: str) -> str:
    from teacher_cache.pipeline.models.run_folder import RunFolder

    folder = RunFolder(out)
    try:
        if not folder.resumable():
            return "nothing is saved yet. Run the same command again to start anew."
        return f"{folder.read().steps} steps are saved. Go on by: teacher-cache train --resume --out {out}"
    except UsageError as error:
        return str(error)
