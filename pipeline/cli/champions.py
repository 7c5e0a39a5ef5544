"""The commands ``promote``, ``students`` and ``rollback``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from teacher_cache.pipeline.cli.flags import say, setting
from teacher_cache.pipeline.settings.promote import PromoteConfig
from teacher_cache.storage.cli.app import JsonFlag, app, print_json
from teacher_cache.storage.errors import UsageError

if TYPE_CHECKING:
    from teacher_cache.pipeline.promote.registry import Candidate, Promotion
from typing import TYPE_CHECKING

from teacher_cache.pipeline.cli.flags import RunFile
from teacher_cache.pipeline.settings.promote import RetrainConfig
from teacher_cache.pipeline.settings.run_file import load_config
from teacher_cache.storage.cli.app import counted
from teacher_cache.storage.observe.progress import StageProgress

if TYPE_CHECKING:
    from teacher_cache.pipeline.promote.retrain import RetrainResult

__all__ = ["promote", "retrain", "rollback", "students"]

Registry = Annotated[str, typer.Argument(metavar="[REGISTRY]", help="Folder or URL of champions and challengers.")]


@app.command()
def promote(
    run: Annotated[str | None, setting(PromoteConfig, "run")] = None,
    registry: Annotated[str | None, setting(PromoteConfig, "registry")] = None,
    checkpoint: Annotated[str | None, setting(PromoteConfig, "checkpoint")] = None,
    cache: Annotated[str | None, setting(PromoteConfig, "cache")] = None,
    split: Annotated[str | None, setting(PromoteConfig, "split")] = None,
    accept_mismatch: Annotated[list[str] | None, setting(PromoteConfig, "accept_mismatch")] = None,
    image_root: Annotated[str | None, setting(PromoteConfig, "image_root")] = None,
    margin: Annotated[float | None, setting(PromoteConfig, "margin")] = None,
    min_retention: Annotated[float | None, setting(PromoteConfig, "min_retention")] = None,
    deployed: Annotated[str | None, setting(PromoteConfig, "deployed")] = None,
    device: Annotated[str | None, setting(PromoteConfig, "device")] = None,
    json: JsonFlag = False,
) -> None:
    """Measure a student beside the champion; it becomes the champion if it is not worse. Exit 1 if it is rejected."""
    flags = {
        "run": run,
        "registry": registry,
        "checkpoint": checkpoint,
        "cache": cache,
        "split": split,
        "accept_mismatch": accept_mismatch or None,
        "image_root": image_root,
        "margin": margin,
        "min_retention": min_retention,
        "deployed": deployed,
        "device": device,
    }
    from teacher_cache.pipeline.promote.gate import promote as run_promote
    from teacher_cache.pipeline.settings.run_file import load_config
    from teacher_cache.storage.observe.progress import StageProgress

    config = load_config(PromoteConfig, "promote", None, flags)
    with StageProgress() as progress:
        result = run_promote(config, progress)
    if json:
        print_json(result)
    else:
        Console().print(
            f"student {result.candidate.number} of {result.registry}: {result.outcome}: {result.candidate.reason}",
            markup=False,
            soft_wrap=True,
        )
    if result.promotion is None:
        raise typer.Exit(1)


@app.command()
def students(
    registry: Registry = "students",
    champion: Annotated[
        bool,
        typer.Option("--champion", help="Print the champion's folder alone: the deployed one, else its checkpoint."),
    ] = False,
    json: JsonFlag = False,
) -> None:
    """List champions and challengers with lineage: cache, settings, recall, date, and why each passed or not."""
    from teacher_cache.pipeline.promote.registry import StudentRegistry, Students

    found = StudentRegistry(registry)
    promotions = found.promotions()
    now = promotions[-1].candidate if promotions else None
    if champion:
        if now is None:
            raise UsageError(f"{registry}: no champion yet; teacher-cache promote makes one")
        one = found.candidate(now)
        if json:
            print_json(one)
        else:
            typer.echo(one.deployed or f"{one.run}/{one.checkpoint}")
        return
    candidates = found.candidates()
    if json:
        print_json(Students(registry=registry, champion=now, students=candidates, promotions=promotions))
    elif not candidates:
        say(f"{registry}: no student yet; teacher-cache promote --run RUN --registry {registry} adds one")
    else:
        Console().print(_table(registry, candidates, promotions, now))


@app.command()
def rollback(
    registry: Registry = "students",
    to: Annotated[int | None, typer.Option("--to", help="Number of an earlier champion.")] = None,
    json: JsonFlag = False,
) -> None:
    """Make an earlier champion the champion again."""
    from teacher_cache.pipeline.promote.gate import roll_back

    earlier, promotion = roll_back(registry, to)
    if json:
        print_json(promotion)
    else:
        again = f"student {earlier.number} ({earlier.run}) is the champion again"
        say(f"{registry}: {again}, after student {promotion.before}")


def _table(
    registry: str, candidates: tuple[Candidate, ...], promotions: tuple[Promotion, ...], now: int | None
) -> Table:
    reigned = {promotion.candidate for promotion in promotions}
    table = Table(title=escape(registry), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", justify="right")
    table.add_column("", no_wrap=True)
    for name in ("date", "run", "student", "cache"):
        table.add_column(name, overflow="fold")
    for name in ("split", "mean\nrecall", "of the\nteacher", "of the\nchampion"):
        table.add_column(name, justify="right")
    table.add_column("why", overflow="fold")
    for each in reversed(candidates):
        state = "champion" if each.number == now else "was champion" if each.number in reigned else "rejected"
        if each.passed and state == "rejected":
            state = "passed"
        versus = each.comparison
        table.add_row(
            str(each.number),
            state,
            each.date[:10],
            escape(each.run),
            escape(each.student),
            f"{escape(each.cache)} {each.cache_manifest_digest[:8]}",
            escape(each.split),
            f"{each.mean_recall:.1f}",
            _share(each.retention, each.retention_interval),
            _share(versus.share, versus.interval) if versus else "-",
            escape(each.reason) if state in ("rejected", "passed") else "",
        )
    return table


def _share(value: float | None, interval: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1f} %" + (f"\n{interval.low:.1f}-{interval.high:.1f}" if interval else "")


@app.command()
def retrain(
    run_file: RunFile = None,
    dataset: Annotated[str | None, setting(RetrainConfig, "dataset")] = None,
    teacher: Annotated[str | None, setting(RetrainConfig, "teacher")] = None,
    pretrained: Annotated[str | None, setting(RetrainConfig, "pretrained")] = None,
    home: Annotated[str | None, setting(RetrainConfig, "home")] = None,
    caches: Annotated[str | None, setting(RetrainConfig, "caches")] = None,
    dtype: Annotated[str | None, setting(RetrainConfig, "dtype")] = None,
    decoder: Annotated[str | None, setting(RetrainConfig, "decoder")] = None,
    student: Annotated[str | None, setting(RetrainConfig, "student")] = None,
    start: Annotated[str | None, setting(RetrainConfig, "start")] = None,
    split: Annotated[str | None, setting(RetrainConfig, "split")] = None,
    margin: Annotated[float | None, setting(RetrainConfig, "margin")] = None,
    min_retention: Annotated[float | None, setting(RetrainConfig, "min_retention")] = None,
    max_removed: Annotated[float | None, setting(RetrainConfig, "max_removed")] = None,
    ship: Annotated[
        bool | None,
        typer.Option("--ship/--no-ship", help="Deploy a student that passed, then promote it; shipped if left out."),
    ] = None,
    device: Annotated[str | None, setting(RetrainConfig, "device")] = None,
    json: JsonFlag = False,
) -> None:
    """Retrain if the dataset has changed, and promote the student if it is not worse than the champion.

    More settings of train and deploy come from [retrain.train] and [retrain.deploy] of the run file. Exit 1 if the
    student is rejected.
    """
    flags = {
        "dataset": dataset,
        "teacher": teacher,
        "pretrained": pretrained,
        "home": home,
        "caches": caches,
        "dtype": dtype,
        "decoder": decoder,
        "student": student,
        "start": start,
        "split": split,
        "margin": margin,
        "min_retention": min_retention,
        "max_removed": max_removed,
        "ship": ship,
        "device": device,
    }
    config = load_config(RetrainConfig, "retrain", run_file, flags)
    from teacher_cache.pipeline.promote.retrain import retrain as run_retrain

    with StageProgress() as progress:
        result = run_retrain(config, progress)
    if json:
        print_json(result)
    else:
        for line in _lines(result):
            typer.echo(line)
    if result.outcome == "rejected":
        raise typer.Exit(1)


def _lines(result: RetrainResult) -> list[str]:
    look, changes = result.look, result.look.changes
    lines = [] if look.unread is None else [look.unread]
    if changes is not None and result.outcome != "nothing-new":
        lines.append(
            f"{counted(changes.new_images, 'new image')}, {changes.removed_images:,} gone, "
            f"{counted(changes.new_captions, 'new caption')}, {changes.removed_captions:,} gone"
        )
    if result.encoded is not None:
        if look.not_reused is not None:
            lines.append(look.not_reused)
        reused = result.encoded.rows_reused
        lines.append(
            f"{look.cache}: {look.images - reused['image']:,} of {counted(look.images, 'image')} and "
            f"{look.captions - reused['text']:,} of {counted(look.captions, 'caption')} encoded, the others copied"
            if result.encoded.chunks_encoded
            else f"{look.cache}: nothing was left to encode"
        )
    if result.candidate is not None:
        verdict = "nothing new" if result.outcome == "nothing-new" else result.outcome
        lines.append(f"student {result.candidate.number}, {result.candidate.run}: {verdict}: {result.candidate.reason}")
    if look.unshipped is not None:
        lines.append(look.unshipped)
    lines.append(f"champion: {'none' if result.champion is None else f'student {result.champion}'}")
    return lines
