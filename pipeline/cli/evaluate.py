"""The commands ``evaluate`` and ``zero-shot``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teacher_cache.pipeline.cli.options import settings_command
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig, ZeroShotConfig
from teacher_cache.pipeline.settings.names import first_student, next_run
from teacher_cache.storage.cli.app import json_flag, print_result
from teacher_cache.storage.cli.tables import Table
from teacher_cache.storage.observe.logs import command_line, say, suggest_next
from teacher_cache.storage.observe.progress import StageProgress
from teacher_cache.storage.observe.quantities import counted

if TYPE_CHECKING:
    from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult
    from teacher_cache.pipeline.evaluate.zero_shot.all_datasets import AllDatasets
    from teacher_cache.pipeline.evaluate.zero_shot.measure import ZeroShotResult


_FEW_IMAGES = 100


@settings_command("evaluate", EvaluateConfig, example="evaluate --run runs/a --split test")
@json_flag
def evaluate(config: EvaluateConfig, as_json: bool) -> None:
    """Measure only the teacher where --run is left out; that needs no torch."""
    from teacher_cache.pipeline.evaluate.retrieval import evaluate as run

    with StageProgress() as progress:
        result = run(config, progress)
    print_result(result, as_json, lambda _: [_recall_table(result)])
    for line in _remarks(result):
        say(line)
    if result.ranks:
        say(f"{result.ranks}: the rank of each of {result.images + result.captions:,} queries")
    if not as_json:
        suggest_next(*_after(result))


def _remarks(result: EvaluateResult) -> Iterator[str]:
    """Yield what a reader of the table should know."""
    for number, other in enumerate(result.other_teachers, start=2):
        yield f"teacher {number}: {other.teacher_name}, {other.cache}"
    if result.together is not None:
        retained = "; the retention is of the first teacher" if result.student else ""
        yield f"together: by the mean of the teachers' logits{retained}"
    yield from _twins(result)
    if result.not_kept:
        yield f"warning: not left in the run, so that no report of it will show it: {result.not_kept}"
    if result.student is not None and result.images < _FEW_IMAGES:
        every = (values[direction].values() for _, values, _ in _recall_rows(result) for direction in result.teacher)
        gaps = ". -: not measurable on so few" if any(None in cells for cells in every) else ""
        yield f"{counted(result.images, 'image')}: few; read the 95 % intervals{gaps}"
    if result.distinct_captions is not None and 2 * result.distinct_captions < result.captions:
        labelled = result.dataset if result.dataset and result.dataset.startswith("imagefolder:") else "DATASET"
        yield (
            f"{counted(result.distinct_captions, 'different caption')} among {result.captions:,}: recall and retention "
            "say little, since no caption belongs to one image. Measure the classes: "
            + command_line("zero-shot", labelled, run=result.run, teacher=None if result.run else "TEACHER")
        )
    elif low := _near_chance(result):
        retention = "the retention says" if result.student else "a student's retention will say"
        yield f"the {low} is hardly above chance: {retention} nothing"


def _twins(result: EvaluateResult) -> Iterator[str]:
    """Yield how many images have a twin in training, and what is kept without them."""
    from teacher_cache.pipeline.evaluate.recall import mean_recall

    twins = result.twins
    if twins and twins.unread:
        yield f"{counted(twins.unread, 'image')} not compared with training: a picture cannot be read"
    if not twins or not twins.images:
        return
    images = counted(twins.images, f"{result.split} image".strip())
    line = f"{images} {'has' if twins.images == 1 else 'have'} a twin in training"
    if twins.teacher and twins.student and twins.retention:
        means = [f"{mean_recall(recalls):.1f}" for recalls in (twins.teacher, twins.student)]
        kept = twins.retention["mean"]
        share = "" if kept is None else f", retention {kept:.1f} %"
        line += f"; without them: mean recall of the teacher {means[0]}, of the student {means[1]}{share}"
    yield f"{line}. teacher-cache twins lists them, and train --exclude leaves them out"


def _near_chance(result: EvaluateResult) -> str:
    """Return the model whose mean recall is less than 1.2 times that of chance, or an empty text."""
    from teacher_cache.pipeline.evaluate.recall import mean_recall

    least = 1.2 * (mean_recall(result.chance) if result.chance else 0)
    models = {"teacher": result.teacher, "student": result.student}
    return next((name for name, recalls in models.items() if recalls and mean_recall(recalls) < least), "")


def _after(result: EvaluateResult) -> tuple[str, ...]:
    if result.run is None:
        return "train", "--cache", result.cache, "--student", first_student(result.teacher_name), "--out", next_run()
    if result.unfinished:
        return "train", "--resume", "--out", result.run
    return "deploy", "--run", result.run, "--out", f"deployed/{Path(result.run).resolve().name}"


@settings_command(
    "zero-shot",
    ZeroShotConfig,
    argument="dataset",
    example="zero-shot imagefolder:data/cifar10 --prompts cifar10 --run runs/a",
)
@json_flag
def zero_shot(config: ZeroShotConfig, as_json: bool) -> None:
    """Show top-1, top-5 and the mean over classes."""
    if config.all:
        _zero_shot_all(config, as_json)
        return
    from teacher_cache.pipeline.evaluate.zero_shot.measure import zero_shot as measure

    with StageProgress() as progress:
        result = measure(config, progress)
    for line in result.undecodable:
        say(f"left out: {line}")
    print_result(result, as_json, lambda _: [_accuracy_table(result)])
    if learned := _learned(result, f"these {counted(result.images, 'image')}"):
        way_out = "Measure others: another --split, or ?holdout=10% behind a dataset that was cached so"
        if "holdout=" in config.dataset:
            way_out = "The same files lie among those that it learned from, under other names: delete the copies"
        say(f"{learned}. {way_out}")


def _zero_shot_all(config: ZeroShotConfig, as_json: bool) -> None:
    """Show a row per dataset; exit 1 if one could not be measured."""
    from teacher_cache.pipeline.evaluate.zero_shot.all_datasets import zero_shot_all

    with StageProgress() as progress:
        result = zero_shot_all(config, progress)
    print_result(result, as_json, lambda _: [_datasets_table(result)])
    for row in result.rows:
        if row.result is None:
            say(f"{row.name}: not measured: {row.problem}")
            continue
        if lost := row.result.undecodable_images + row.result.lost_images:
            say(f"{row.name}: left out: {counted(lost, 'image')}, the first: {row.result.undecodable[0]}")
        if learned := _learned(row.result, f"its {counted(row.result.images, 'image')}"):
            say(f"{row.name}: {learned}")
    if result.missing:
        say(f"not there: {', '.join(result.missing)}")
    if result.other_folders:
        say(f"no dataset of CLIP's table: {', '.join(result.other_folders)}")
    if not result.ok:
        sys.exit(1)


def _datasets_table(result: AllDatasets) -> Table:
    """Return the table of all datasets, by the measure that CLIP's table has for each."""
    total = len(result.rows) + len(result.missing)
    measured = sum(not row.problem for row in result.rows)
    models = [name for name in ("teacher", "student", "share") if getattr(result.mean, name) is not None]
    table = Table(
        f"{result.root}: {measured} of {total} datasets, in percent", ["", "images", "classes", "measure", *models]
    )
    for row in (*result.rows, result.mean):
        counts = (f"{row.result.images:,}", f"{row.result.classes:,}") if row.result else ("-", "-")
        values = (getattr(row, name) for name in models)
        cells = ("-" if value is None else f"{value:.1f}" for value in values)
        table.add_row(row.name, *counts, "not measured" if row.problem else row.measure, *cells)
    return table


def _recall_table(result: EvaluateResult) -> Table:
    """Return the table of recalls of teacher, student and measured towers, with retention and interval, in percent."""
    where = f"{result.cache}, {result.split}" if result.split else result.cache
    title = f"{where}: {counted(result.images, 'image')}, {counted(result.captions, 'caption')}"
    title += f" of kind {result.caption_kind}" * bool(result.caption_kind)
    title += _checkpoint(result.checkpoint, result.chosen_on)
    if any(field.startswith("dataset") for field in result.accepted_mismatches):
        title += f", which learned from {result.learned_from}"
    if learned := _learned(result, "them"):
        title += f"; {learned}"
    if result.unfinished:
        title += f", {result.unfinished}"
    columns = [(direction, name) for direction, recalls in result.teacher.items() for name in recalls]
    table = Table(title, ["", *("\n".join(column) for column in columns), "\nmean"])
    for label, values, mean in _recall_rows(result):
        cells = [*(values[direction][name] for direction, name in columns), mean]
        table.add_row(label, *("-" if cell is None else f"{cell:.1f}" for cell in cells))
    return table


def _recall_rows(result: EvaluateResult) -> Iterator[tuple[str, Any, float | None]]:
    """Yield label, values by direction and name, and mean of each row."""
    from teacher_cache.pipeline.evaluate.recall import mean_recall

    yield "teacher", result.teacher, mean_recall(result.teacher)
    for number, other in enumerate(result.other_teachers, start=2):
        yield f"teacher {number}", other.recall, mean_recall(other.recall)
    if result.together is not None:
        yield "together", result.together, mean_recall(result.together)
    if result.student is not None and result.retention is not None and result.retention_intervals is not None:
        yield "student", result.student, mean_recall(result.student)
        yield "retention %", result.retention, result.retention["mean"]
        spans = result.retention_intervals.model_dump()
        for end, label in (("low", f"{100 * result.interval_level:.0f} % from"), ("high", "to")):
            ends = {
                direction: {name: span and span[end] for name, span in spans[direction].items()}
                for direction in result.teacher
            }
            yield label, ends, spans["mean"] and spans["mean"][end]
    for name, tower in (result.towers or {}).items():
        yield f"{name} tower", tower.recall, mean_recall(tower.recall)
        yield "  retention %", tower.retention, tower.retention["mean"]
    if result.chance is not None:
        yield "chance", result.chance, mean_recall(result.chance)


def _accuracy_table(result: ZeroShotResult) -> Table:
    """Return the table of teacher's and student's accuracies, in percent."""
    title = (
        f"{result.dataset}{f', {result.split}' if result.split else ''}: {result.images:,} images, "
        f"{result.classes:,} classes by {result.matched_by}, {counted(len(result.prompts), 'prompt')} a class"
    )
    title += _checkpoint(result.checkpoint, result.chosen_on)
    # of five classes, the true one is always among the first five
    names = [name for name in result.chance if name != "top-5" or result.classes > 5]
    table = Table(title, ["", *names])
    for label, values in (("teacher", result.teacher), ("student", result.student), ("chance", result.chance)):
        if values:
            table.add_row(label, *(f"{values[name]:.1f}" for name in names))
    return table


def _learned(result: EvaluateResult | ZeroShotResult, of: str) -> str:
    """Return from how many of the measured images the student learned, in words; empty if from none."""
    from teacher_cache.pipeline.evaluate.learned import learned_words

    return learned_words(result.learned_images, of) if result.run else ""


def _checkpoint(checkpoint: str | None, chosen_on: str | None) -> str:
    """Return the end of a table's title: the name of the student's checkpoint."""
    if checkpoint is None:
        return ""
    return f"; checkpoint {checkpoint.rpartition('/')[2]}" + ("" if chosen_on is None else f", chosen on {chosen_on}")
