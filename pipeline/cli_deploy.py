"""The ``deploy`` command."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from pipeline.cli_flags import say, setting
from pipeline.config import DeployConfig
from pipeline.deployment import require_packages
from pipeline.run_file import load_config
from storage.cli import JsonFlag, app, print_json
from storage.console import StageProgress

__all__ = ["deploy"]


@app.command()
def deploy(
    run: Annotated[str | None, setting(DeployConfig, "run")] = None,
    out: Annotated[str | None, setting(DeployConfig, "out")] = None,
    checkpoint: Annotated[str | None, setting(DeployConfig, "checkpoint")] = None,
    cache: Annotated[str | None, setting(DeployConfig, "cache")] = None,
    split: Annotated[str | None, setting(DeployConfig, "split")] = None,
    image_root: Annotated[str | None, setting(DeployConfig, "image_root")] = None,
    teacher: Annotated[str | None, setting(DeployConfig, "teacher")] = None,
    pretrained: Annotated[str | None, setting(DeployConfig, "pretrained")] = None,
    zero_shot: Annotated[str | None, setting(DeployConfig, "zero_shot")] = None,
    prompts: Annotated[str | None, setting(DeployConfig, "prompts")] = None,
    int8: Annotated[bool | None, typer.Option("--int8/--no-int8", help="Make int8 files too; they are made.")] = None,
    calibration_images: Annotated[int | None, setting(DeployConfig, "calibration_images")] = None,
    max_recall_loss: Annotated[float | None, setting(DeployConfig, "max_recall_loss")] = None,
    rounds: Annotated[int | None, setting(DeployConfig, "rounds")] = None,
    threads: Annotated[int | None, setting(DeployConfig, "threads")] = None,
    json: JsonFlag = False,
) -> None:
    """Ship a run's student: ONNX, int8, open_clip weights, tokenizer, each proven; and one table of all of them."""
    flags = {
        "run": run,
        "out": out,
        "checkpoint": checkpoint,
        "cache": cache,
        "split": split,
        "image_root": image_root,
        "teacher": teacher,
        "pretrained": pretrained,
        "zero_shot": zero_shot,
        "prompts": prompts,
        "int8": int8,
        "calibration_images": calibration_images,
        "max_recall_loss": max_recall_loss,
        "rounds": rounds,
        "threads": threads,
    }
    config = load_config(DeployConfig, "deploy", None, flags)
    require_packages()
    from pipeline.deploy import deploy as run_deploy
    from pipeline.student_table import describe, terminal_table

    with StageProgress() as progress:
        result = run_deploy(config, progress)
    if json:
        print_json(result)
        return
    console = Console()
    console.print(terminal_table(result.table))
    console.print(describe(result.table), markup=False, highlight=False, soft_wrap=True)
    for tower, why in result.deployment.not_quantised.items():
        say(f"no int8 file of the {tower} tower: {why}")
    console.print(f"{result.out}: {len(result.deployment.artefacts())} proven files", markup=False, soft_wrap=True)
