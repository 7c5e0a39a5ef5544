"""The commands ``students``: champions and challengers, and retraining."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from teacher_cache.pipeline.cli.options import settings_command
from teacher_cache.pipeline.settings.promote import PromoteConfig, RetrainConfig
from teacher_cache.storage.cli.app import Argument, Group, command, json_flag, of_kind, print_json, print_result
from teacher_cache.storage.cli.tables import Table
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.places import REGISTRY, RUN, similar_names
from teacher_cache.storage.observe.logs import say, suggest_next
from teacher_cache.storage.observe.progress import StageProgress
from teacher_cache.storage.observe.quantities import counted

if TYPE_CHECKING:
    from teacher_cache.pipeline.promote.gate import PromoteResult
    from teacher_cache.pipeline.promote.registry import Candidate, Students
    from teacher_cache.pipeline.promote.retrain import RetrainResult

_registry = click.argument(
    "registry",
    cls=Argument,
    default="students",
    callback=of_kind(REGISTRY),
    metavar="[REGISTRY]",
    described=f"{PromoteConfig.model_fields['registry'].description} Default: students.",
)


@settings_command("promote", PromoteConfig, example="students promote --run runs/a --registry students --split test")
@json_flag
def _promote(config: PromoteConfig, as_json: bool) -> None:
    """Make a student the champion if it is not worse than the champion.

    Both are measured on the same images. Exit 1 if the student is rejected.
    """
    from teacher_cache.pipeline.promote.gate import promote as run

    with StageProgress() as progress:
        result = run(config, progress)
    print_result(result, as_json, _verdict)
    if not as_json:
        suggest_next("students", "list", config.registry)
    if result.promotion is None:
        sys.exit(1)


@command("list", example="students list students")
@_registry
@click.option("--champion", is_flag=True, help="Print only the champion's folder: deployed, else its checkpoint.")
@json_flag
def _list(registry: str, champion: bool, as_json: bool) -> None:
    """List champions and challengers: cache, settings, recall, date, and why they passed or not."""
    from teacher_cache.pipeline.promote.registry import StudentRegistry, Students

    stored = StudentRegistry(registry)
    students, promotions = stored.candidates(), stored.promotions()
    if not students and (inner := similar_names(registry, REGISTRY)):
        raise UsageError(f"{registry}: no registry of students.{inner}")
    if not students and Path(registry).is_dir() and (run := similar_names(registry, RUN)):
        raise UsageError(
            f"{registry}: no registry of students, but a folder of training runs.{run} teacher-cache students list "
            "REGISTRY lists what promote measured, report CACHE --run RUN shows runs, info FOLDER lists caches"
        )
    number = promotions[-1].candidate if promotions else None
    if champion:
        if number is None:
            raise UsageError(f"{registry}: no champion yet; teacher-cache students promote makes one")
        print_result(stored.candidate(number), as_json, lambda one: [one.deployed or f"{one.run}/{one.checkpoint}"])
        return
    listed = Students(registry=registry, champion=number, students=students, promotions=promotions)
    if listed.students or as_json:
        print_result(listed, as_json, lambda _: [_table(listed)])
    else:
        say(f"{registry}: no student yet; teacher-cache students promote --run RUN --registry {registry} adds one")


@command("rollback", example="students rollback students --to 3")
@_registry
@click.option("--to", type=int, help="Number of an earlier champion. Default: the previous one.")
@json_flag
def _rollback(registry: str, to: int | None, as_json: bool) -> None:
    """Make an earlier champion the champion again."""
    from teacher_cache.pipeline.promote.gate import roll_back

    earlier, promotion = roll_back(registry, to)
    if as_json:
        print_json(promotion)
    else:
        again = f"student {earlier.number} ({earlier.run}) is the champion again"
        say(f"{registry}: {again}, after student {promotion.before}")


@settings_command(
    "retrain",
    RetrainConfig,
    flags=(
        *("dataset", "teacher", "pretrained", "home", "caches", "dtype", "decoder", "student"),
        *("start", "split", "margin", "min_retention", "max_removed", "ship", "device"),
    ),
    example="students retrain configs/retrain.toml",
)
@json_flag
def _retrain(config: RetrainConfig, as_json: bool) -> None:
    """Retrain and promote a student if the dataset has changed. Exit 1 if the student is rejected."""
    from teacher_cache.pipeline.promote.retrain import retrain as run

    with StageProgress() as progress:
        result = run(config, progress)
    print_result(result, as_json, retrain_lines)
    if result.outcome == "rejected":
        sys.exit(1)


students = Group("students", commands=[_list, _promote, _retrain, _rollback], no_args_is_help=True)


def _verdict(result: PromoteResult) -> Iterator[str]:
    one = result.candidate
    yield f"student {one.number} of {result.registry}: {result.outcome}: {one.reason}"
    both = "measured" if one.comparison is None else "both measured"
    yield (
        f"{both} on {one.measured_cache}, split {one.split!r}: {counted(one.images, 'image')}, "
        f"{counted(one.captions, 'caption')}"
    )
    yield from one.learned_lines()
    if one.comparison is not None and one.comparison.other_images is not None:
        yield f"accepted: {one.comparison.other_images}"


def _table(listed: Students) -> Table:
    reigned = {promotion.candidate for promotion in listed.promotions}
    table = Table(listed.registry)
    for name in ("", "date", "run", "student", "cache", "split"):
        table.add_column(name)
    for name in ("mean\nrecall", "of the\nteacher", "of the\nchampion"):
        table.add_column(name, right=True)
    table.add_column("why")
    for candidate in reversed(listed.students):
        state = _state(candidate, reigned, listed.champion)
        versus = candidate.comparison
        table.add_row(
            f"{candidate.number} {state}",
            candidate.date[:10],
            candidate.run,
            candidate.student,
            f"{candidate.cache} {candidate.cache_manifest_digest[:12]}",
            candidate.split,
            f"{candidate.mean_recall:.1f}",
            _share(candidate.retention, candidate.retention_interval),
            _share(versus.share, versus.interval) if versus else "-",
            candidate.reason if state in ("rejected", "passed") else "",
        )
    return table


def _state(candidate: Candidate, reigned: set[int], champion: int | None) -> str:
    if candidate.number == champion:
        return "champion"
    if candidate.number in reigned:
        return "was champion"
    return "passed" if candidate.passed else "rejected"


def _share(value: float | None, interval: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1f} %" + (f"\n{interval.low:.1f}-{interval.high:.1f}" if interval else "")


def retrain_lines(result: RetrainResult) -> list[str]:
    """Return a line for each step that a retraining took."""
    look, changes = result.look, result.look.changes
    lines = [*look.notices]
    if changes is not None and result.outcome != "nothing-new":
        lines.append(
            f"{counted(changes.new_images, 'new image')}, {changes.removed_images:,} gone, "
            f"{counted(changes.new_captions, 'new caption')}, {changes.removed_captions:,} gone"
        )
    if result.encoded is not None:
        reused = result.encoded.rows_reused
        lines.append(
            f"{look.cache}: {look.images - reused['image']:,} of {counted(look.images, 'image')} and "
            f"{look.captions - reused['text']:,} of {counted(look.captions, 'caption')} encoded, the others copied"
            if result.encoded.chunks_encoded
            else f"{look.cache}: nothing was left to encode"
        )
    if result.candidate is not None:
        one = result.candidate
        lines += one.learned_lines()
        verdict = f"{result.outcome}: {one.reason}"
        if result.outcome == "nothing-new":
            verdict = f"nothing new since it was {'promoted' if one.passed else 'rejected'}"
        lines.append(f"student {one.number}, {one.run}: {verdict}")
    lines.append(f"champion: {'none' if result.champion is None else f'student {result.champion}'}")
    return lines
