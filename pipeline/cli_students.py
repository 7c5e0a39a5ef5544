"""The commands ``promote``, ``students`` and ``rollback``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.cli_flags import say, setting
from pipeline.promote import PromoteConfig
from storage.cli import JsonFlag, app, print_json
from storage.errors import UsageError

if TYPE_CHECKING:
    from pipeline.registry import Candidate, Promotion

__all__ = ["promote", "rollback", "students"]

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
    from pipeline.promote import promote as run_promote
    from pipeline.run_file import load_config
    from storage.console import StageProgress

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
    from pipeline.registry import StudentRegistry, Students

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
    from pipeline.promote import roll_back

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
