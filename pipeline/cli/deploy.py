"""The commands ``deploy`` and ``infer``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click
from pydantic import BaseModel, Field

from teacher_cache.pipeline.cli.options import settings_command
from teacher_cache.pipeline.deploy.record import Variant, require_packages
from teacher_cache.pipeline.settings.deploy import DeployConfig
from teacher_cache.storage.cli.app import Argument, command, json_flag, option, print_result
from teacher_cache.storage.cli.tables import Part, Table
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.logs import say, suggest_next
from teacher_cache.storage.observe.progress import StageProgress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from teacher_cache.pipeline.deploy.run import DeployResult
    from teacher_cache.pipeline.deploy.runtime import StudentRuntime


@settings_command("deploy", DeployConfig, example="deploy --run runs/a --out deployed/a")
@json_flag
def deploy(config: DeployConfig, as_json: bool) -> None:
    """Prove every file before it is shipped."""
    require_packages(*(("openvino",) if config.openvino else ()))
    from teacher_cache.pipeline.deploy.run import deploy as run

    with StageProgress() as progress:
        result = run(config, progress)
    print_result(result, as_json, _deployed)
    if not as_json:
        suggest_next(
            "infer", "IMAGE", "--text", "a photo of a dog", "--text", "a photo of a cat", "--student", config.out
        )


_BATCH = 64  # images decoded at a time: bounds the memory
_TEXTS_SHOWN = 5


class ImageScores(BaseModel):
    """Scores of one image against each text, in the order of ``Inference.texts``."""

    image: str
    probabilities: list[float] = Field(
        description="softmax(logit_scale x cosine) over the texts, or with a logit_bias sigmoid(logit_scale x cosine + "
        "logit_bias) of each."
    )
    cosines: list[float]


class Inference(BaseModel):
    """Result of ``infer``."""

    student: str
    variant: str
    logit_scale: float
    logit_bias: float | None = None
    texts: list[str]
    images: list[ImageScores]
    unreadable: list[str] = Field(description="Images that could not be read or decoded, each with the reason.")


@command("infer", example='infer photo.jpg --text "a dog" --text "a cat" --student deployed/a')
@click.argument(
    "images", cls=Argument, nargs=-1, required=True, metavar="IMAGE...", described="Image files, or folders of images."
)
@option("--text", "Text to compare the images with. Give several.", multiple=True, required=True)
@option("--student", "Folder of a deployed student.", required=True)
@option("--variant", "Weights of the student.", "fp32", type=click.Choice(get_args(Variant)))
@option(
    "--logit-scale",
    "Multiplier of the cosines; 100 for CLIP's own models. Default: the student's.",
    type=click.FloatRange(0, min_open=True),
    metavar="X",
)
@json_flag
def infer(
    images: tuple[str, ...],
    text: tuple[str, ...],
    student: str,
    variant: Variant,
    logit_scale: float | None,
    as_json: bool,
) -> None:
    """Print each image's cosine with each text, and the probability by softmax, or by sigmoid if it learned so."""
    files = _files(images)
    if not all(map(str.strip, text)):
        raise UsageError("--text is empty: write a text for each class, for example --text 'a photo of a dog'")
    from teacher_cache.pipeline.deploy.runtime import StudentRuntime

    result = _infer(StudentRuntime(student, variant), files, list(text), logit_scale)
    for line in result.unreadable:
        say(f"left out: {line}")
    if as_json or result.images:
        print_result(result, as_json, lambda _: [_scores(result)])
    if result.unreadable:
        sys.exit(1)


def _deployed(result: DeployResult) -> Iterator[Part]:
    from teacher_cache.pipeline.deploy.table import describe, terminal_table

    yield terminal_table(result.table)
    yield from describe(result.table).splitlines()
    for tower, reason in result.deployment.not_quantised.items():
        say(f"no int8 file of the {tower} tower: {reason}")
    yield f"{result.out}: {len(result.deployment.artefacts())} proven files"


def _files(images: Sequence[str]) -> list[str]:
    """Return the image files, with each folder replaced by its images in name order."""
    from teacher_cache.pipeline.data.datasets.files import IMAGE_ENDINGS, contents, require_there

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
    if not any(Path(file).exists() for file in files):
        require_there(files[0])
    return files


def _infer(student: StudentRuntime, files: list[str], texts: list[str], logit_scale: float | None) -> Inference:
    import numpy as np

    from teacher_cache.pipeline.data.images.decode import UndecodableImageError
    from teacher_cache.pipeline.deploy.runtime import probabilities
    from teacher_cache.storage.observe.safe_text import printable

    text_features = student.embed_texts(texts)
    scale = student.deployment.logit_scale if logit_scale is None else logit_scale
    bias = student.deployment.logit_bias
    result = Inference(
        student=str(student.folder),
        variant=student.variant,
        logit_scale=scale,
        logit_bias=bias,
        texts=texts,
        images=[],
        unreadable=[],
    )
    for start in range(0, len(files), _BATCH):
        names: list[str] = []
        pixels: list[NDArray[np.float32]] = []
        for name in files[start : start + _BATCH]:
            try:
                pixels.append(student.pixels(name))
            except (UndecodableImageError, OSError) as error:
                result.unreadable.append(printable(str(error)))
            else:
                names.append(name)
        if not names:
            continue
        features = student.embed_pixels(np.stack(pixels))
        rows = zip(names, probabilities(features, text_features, scale, bias), features @ text_features.T, strict=True)
        result.images += [
            ImageScores(image=name, probabilities=likely.tolist(), cosines=cosines.tolist())
            for name, likely, cosines in rows
        ]
    return result


def _scores(result: Inference) -> Table:
    sigmoid = "" if result.logit_bias is None else f", bias {result.logit_bias:.1f}: each text by itself"
    table = Table(f"{result.student}, {result.variant}, logit scale {result.logit_scale:.1f}{sigmoid}")
    for name in ("image", "text"):
        table.add_column(name)
    table.add_column("cosine", right=True)
    # softmax over a single text is always 1
    several = len(result.texts) > 1 or bool(sigmoid)
    if several:
        table.add_column("%", right=True)
    for image in result.images:
        best = sorted(range(len(result.texts)), key=lambda text: -image.cosines[text])
        for place, text in enumerate(best[:_TEXTS_SHOWN]):
            scores = [f"{image.cosines[text]:.3f}", *([f"{100 * image.probabilities[text]:.1f}"] if several else [])]
            table.add_row(image.image if place == 0 else "", result.texts[text], *scores)
        if len(best) > _TEXTS_SHOWN:
            table.add_row("", f"... and {len(best) - _TEXTS_SHOWN} more; --json has all")
    return table
