"""The ``deploy`` command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from pydantic import BaseModel, Field
from rich.console import Console

from teacher_cache.pipeline.cli.flags import say, setting
from teacher_cache.pipeline.deploy.record import require_packages
from teacher_cache.pipeline.settings.deploy import DeployConfig
from teacher_cache.pipeline.settings.run_file import load_config
from teacher_cache.storage.cli.app import JsonFlag, app, print_json
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.progress import StageProgress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from teacher_cache.pipeline.deploy.runtime import StudentRuntime

__all__ = ["ImageScores", "Inference", "deploy", "infer"]


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
    from teacher_cache.pipeline.deploy.run import deploy as run_deploy
    from teacher_cache.pipeline.deploy.table import describe, terminal_table

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


_BATCH = 64  # images decoded before they are embedded, so that memory stays the same for any number of them
_TEXTS_SHOWN = 5


class ImageScores(BaseModel):
    """One image against each text, in the order of ``Inference.texts``."""

    image: str
    probabilities: list[float] = Field(description="softmax(100 x cosine) over the texts; they sum to 1.")
    cosines: list[float]


class Inference(BaseModel):
    """What ``infer --json`` prints."""

    student: str
    variant: str
    texts: list[str]
    images: list[ImageScores]
    unreadable: list[str] = Field(description="Images that could not be read or decoded, each with the reason.")


@app.command()
def infer(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files; a folder means its images.")],
    text: Annotated[list[str], typer.Option("--text", help="A text to compare the images with; give several.")],
    student: Annotated[str, typer.Option("--student", help="Folder of a deployed student.")],
    variant: Annotated[str, typer.Option("--variant", help="fp32 or int8.")] = "fp32",
    json: JsonFlag = False,
) -> None:
    """How well texts fit images, by a deployed student: softmax(100 x cosine) over the texts."""
    files = _files(images)
    from teacher_cache.pipeline.deploy.runtime import StudentRuntime

    found = _infer(StudentRuntime(student, cast(Any, variant)), files, text)
    for line in found.unreadable:
        say(f"left out: {line}")
    if json:
        print_json(found)
    elif found.images:
        _show(found)
    if found.unreadable:
        raise typer.Exit(1)


def _files(images: list[str]) -> list[str]:
    """The images named, and those in the folders named, by name."""
    from teacher_cache.pipeline.data.datasets.records import IMAGE_ENDINGS, contents

    files: list[str] = []
    for name in images:
        folder = Path(name)
        if not folder.is_dir():
            files.append(name)
            continue
        inside = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_ENDINGS)
        if not inside:
            endings = ", ".join(IMAGE_ENDINGS)
            raise UsageError(f"{name}: no images in this folder, only {contents(folder)}; an image ends in {endings}")
        files.extend(map(str, inside))
    return files


def _infer(student: StudentRuntime, files: list[str], texts: list[str]) -> Inference:
    import numpy as np

    from teacher_cache.pipeline.data.images.decode import UndecodableImageError
    from teacher_cache.pipeline.deploy.runtime import probabilities
    from teacher_cache.storage.observe.safe_text import printable

    text_features = student.embed_texts(texts)
    found = Inference(student=str(student.folder), variant=student.variant, texts=texts, images=[], unreadable=[])
    for start in range(0, len(files), _BATCH):
        names: list[str] = []
        pixels: list[NDArray[np.float32]] = []
        for name in files[start : start + _BATCH]:
            try:
                pixels.append(student.pixels(name))
            except (UndecodableImageError, OSError) as error:
                found.unreadable.append(printable(str(error)))
            else:
                names.append(name)
        if not names:
            continue
        features = student.embed_pixels(np.stack(pixels))
        rows = zip(names, probabilities(features, text_features), features @ text_features.T, strict=True)
        found.images += [
            ImageScores(image=name, probabilities=likely.tolist(), cosines=cosines.tolist())
            for name, likely, cosines in rows
        ]
    return found


def _show(found: Inference) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"{found.student}, {found.variant}"), title_justify="left", box=SIMPLE_HEAD)
    for name in ("image", "text"):
        table.add_column(name, overflow="fold")
    # a single text is certain; how near it is says something
    alone = len(found.texts) == 1
    table.add_column("cosine" if alone else "%", justify="right", no_wrap=True)
    for image in found.images:
        best = sorted(range(len(found.texts)), key=lambda text: -image.cosines[text])
        for place, text in enumerate(best[:_TEXTS_SHOWN]):
            score = f"{image.cosines[text]:.3f}" if alone else f"{100 * image.probabilities[text]:.1f}"
            table.add_row(escape(image.image) if place == 0 else "", escape(found.texts[text]), score)
        if len(best) > _TEXTS_SHOWN:
            table.add_row("", f"... and {len(best) - _TEXTS_SHOWN} more; --json has all", "")
    Console().print(table)
