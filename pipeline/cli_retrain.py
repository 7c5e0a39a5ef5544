"""The ``retrain`` command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli_flags import RunFile, setting
from pipeline.retrain_config import RetrainConfig
from pipeline.run_file import load_config
from storage.cli import JsonFlag, app, counted, print_json
from storage.console import StageProgress

if TYPE_CHECKING:
    from pipeline.retrain import RetrainResult

__all__ = ["retrain"]


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
    from pipeline.retrain import retrain as run_retrain

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
