"""The ``infer`` command. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from pydantic import BaseModel, Field

from pipeline.cli_flags import say
from storage.cli import JsonFlag, app, print_json
from storage.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.runtime import StudentRuntime

__all__ = ["ImageScores", "Inference", "infer"]

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
    from pipeline.runtime import StudentRuntime

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
    from pipeline.datasets.base import IMAGE_ENDINGS, contents

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

    from pipeline.datasets.base import printable
    from pipeline.decode import UndecodableImageError
    from pipeline.runtime import probabilities

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
