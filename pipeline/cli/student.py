"""The commands of ``student``: inherit, mean, resize, pixels, cost, push, open-clip-train."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_cache.pipeline.cli.options import settings_command
from teacher_cache.pipeline.cli.stopping import resumable
from teacher_cache.pipeline.settings.deploy import PushConfig
from teacher_cache.pipeline.settings.evaluate import CostConfig
from teacher_cache.pipeline.settings.names import CHECKPOINT_CONFIG
from teacher_cache.pipeline.settings.student import InheritConfig, MeanConfig, ResizeConfig
from teacher_cache.pipeline.settings.train import OpenClipTrainConfig, PixelsConfig
from teacher_cache.storage.cli.app import Group, json_flag, print_result
from teacher_cache.storage.observe.logs import json_logs, say, stop_logs, suggest_next
from teacher_cache.storage.observe.progress import StageProgress
from teacher_cache.storage.observe.quantities import byte_size, counted

if TYPE_CHECKING:
    from teacher_cache.pipeline.models.inherit.run import InheritResult
    from teacher_cache.pipeline.models.run_record import RunRecord


@settings_command(
    "inherit",
    InheritConfig,
    example="student inherit --teacher local-dir:teacher --student vit-s-32 --out start",
)
@json_flag
def _inherit(config: InheritConfig, as_json: bool) -> None:
    """Write a student that starts with its teacher's weights, as far as they fit, for train --init."""
    from teacher_cache.pipeline.models.inherit.run import inherit

    with StageProgress() as progress:
        result = inherit(config, progress)
    print_result(result, as_json, _inherited_lines)
    if not as_json:
        suggest_next(*_training(config.cache or "CACHE", f"{config.out}/{CHECKPOINT_CONFIG}"), "--init", config.out)


@settings_command("mean", MeanConfig, argument="runs", example="student mean runs/a runs/b --out runs/mean")
@json_flag
def _mean(config: MeanConfig, as_json: bool) -> None:
    """Average the weights of runs that started from the same weights: one student of the same size, often better."""
    from teacher_cache.pipeline.models.derive.average import mean

    record = mean(config)
    lines = [
        f"{config.out}: the mean of {len(record.averaged)} runs of {record.student_parameters:,} parameters, "
        f"{record.steps:,} steps in {record.seconds:,.1f} s together",
        f"checkpoint: {config.out}/{record.checkpoint}",
    ]
    print_result(record, as_json, lambda _: lines)
    if not as_json:
        suggest_next("evaluate", "--run", config.out)


@settings_command(
    "resize", ResizeConfig, argument="run", example="student resize runs/a --image-size 256 --out runs/a-256"
)
@json_flag
def _resize(config: ResizeConfig, as_json: bool) -> None:
    """Give a trained student another image size.

    A convolutional student is often better at more pixels than in training. The positions of a transformer are
    interpolated and need some more training.
    """
    from teacher_cache.pipeline.models.derive.resize import resize

    record = resize(config)
    print_result(record, as_json, lambda _: _resized_lines(config, record))
    if as_json:
        return
    if record.resized is not None and record.resized.interpolated:
        start = f"{config.out}/{record.checkpoint}"
        suggest_next(*_training(record.config.cache, f"{start}/{CHECKPOINT_CONFIG}"), "--init", start)
    else:
        suggest_next("evaluate", "--run", config.out)


@settings_command("pixels", PixelsConfig, example="student pixels --cache a.cache --student vit-s-32 --out pixels")
@json_flag
def _pixels(config: PixelsConfig, as_json: bool) -> None:
    """Decode a split's images once, for train --pixels. Stop it at any time and run it again to continue."""
    with resumable(lambda: "finished chunks stay. Run the same command again to go on."):
        from teacher_cache.pipeline.train.make_pixels import make_pixels, plan_pixels

        plan = plan_pixels(config)
        say(str(plan))
        with StageProgress() as progress:
            result = make_pixels(plan, progress)
    height, width = result.size
    lines = [
        f"{result.out}: {counted(result.images, 'image')} in {counted(result.views, 'view')} at {height} x {width}, "
        f"{byte_size(result.nbytes)}",
        f"{result.chunks_made:,} of {result.chunks:,} chunks made by this run",
    ]
    print_result(result, as_json, lambda _: lines)
    if not as_json:
        suggest_next(*_training(config.cache, config.student), "--pixels", config.out, exclude=config.exclude)


@settings_command("cost", CostConfig, example="student cost --run runs/a --teacher local-dir:teacher")
@json_flag
def _cost(config: CostConfig, as_json: bool) -> None:
    """Measure parameters, size, FLOPs, latency, images/s and peak memory of a student and its teacher, in turns."""
    from teacher_cache.pipeline.evaluate.cost.measure import cost
    from teacher_cache.pipeline.evaluate.cost.table import cost_table

    with StageProgress() as progress:
        result = cost(config, progress)
    print_result(result, as_json, lambda _: [cost_table(result)])


@settings_command("push", PushConfig, example="student push --run runs/a --to ORG/NAME --deployed deployed/a")
@json_flag
def _push(config: PushConfig, as_json: bool) -> None:
    """Upload a student to Hugging Face's hub, for open_clip's hf-hub:ORG/NAME. One commit, whole or not at all."""
    from teacher_cache.pipeline.deploy.push import push

    result = push(config)
    lines = [f"{result.url}: {counted(len(result.files), 'file')}, {byte_size(sum(result.files.values()))}"]
    print_result(result, as_json, lambda _: [*lines, f"open_clip loads it as hf-hub:{result.repository}"])


@settings_command(
    "open-clip-train",
    OpenClipTrainConfig,
    argument="arguments",
    example="student open-clip-train --cache a.cache -- --model RN50 --train-data a.csv",
)
def _open_clip_train(config: OpenClipTrainConfig) -> None:
    """Train with open_clip's own trainer: as with its --distill-model, but the teacher's outputs come from a cache.

    Its CSV or tars, loss, optimizer, logs and checkpoints stay its own. Students see the crops that the teacher saw.
    """
    from teacher_cache.pipeline.train.open_clip_trainer import train

    if not json_logs():
        stop_logs()  # open_clip's trainer writes its own lines
    train(config)


student = Group(
    "student", commands=[_inherit, _mean, _resize, _pixels, _cost, _push, _open_clip_train], no_args_is_help=True
)


def _inherited_lines(result: InheritResult) -> list[str]:
    random = sum(part.parameters for part in result.parts if part.random)
    return [
        *(f"{part.part:<18} {part.parameters:>12,}  {part.source}" for part in result.parts),
        *(f"note: {note}" for note in result.notes),
        f"{result.out}: {result.parameters:,} parameters, {result.parameters / result.teacher_parameters:.1%} of "
        f"{result.teacher}'s {result.teacher_parameters:,}; {random:,} of them random",
    ]


def _resized_lines(config: ResizeConfig, record: RunRecord) -> list[str]:
    assert record.resized is not None  # resize wrote this record
    before = " x ".join(map(str, record.resized.image_size))
    names = ", ".join(record.resized.interpolated)
    weights = f"all but {names}, which is interpolated, are the same" if names else "all are the same"
    return [
        f"{config.out}: {config.run} at {config.image_size} x {config.image_size} pixels, before {before}; "
        f"{record.student_parameters:,} parameters: {weights}",
        f"checkpoint: {config.out}/{record.checkpoint}",
    ]


def _training(cache: str, student: str) -> tuple[str, ...]:
    """Return the words of a training to suggest."""
    return "train", "--cache", cache, "--student", student, "--out", "runs/NAME"
