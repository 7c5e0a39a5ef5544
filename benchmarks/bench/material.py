"""What the sections about models are made of: photographs, teachers with random weights, rows of times."""

from __future__ import annotations

import io
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.bench.harness import Row


def photographs(
    source: Path, folder: Path, count: int, size: tuple[int, int] | None = None, captions: int = 5
) -> dict[str, str]:
    """A data set in Flickr's form: Flickr8k's first photographs, linked, or enlarged as cameras make them.

    Args:
        source: Flickr8k, with ``images``, ``captions.txt`` and ``train.txt``.
        folder: made here.
        size: (width, height) in pixels to enlarge to.
        captions: of each photograph, at most.

    Returns:
        Each photograph's first caption, by its name.

    Raises:
        FileNotFoundError: Flickr8k is not there.
    """
    names = (source / "train.txt").read_text().split()[:count]
    (folder / "images").mkdir(parents=True)
    for name in names:
        target = folder / "images" / name
        if size is None:
            target.symlink_to((source / "images" / name).resolve())
        else:
            with Image.open(source / "images" / name) as image:
                image.resize(size, Image.Resampling.BICUBIC).save(target, quality=90)
    chosen = set(names)
    taken: dict[str, list[str]] = {}
    header, *lines = (source / "captions.txt").read_text().splitlines()
    for line in lines:
        name = line.partition(",")[0]
        if name in chosen and len(taken.setdefault(name, [])) < captions:
            taken[name].append(line)
    written = [line for of_one in taken.values() for line in of_one]
    (folder / "captions.txt").write_text("\n".join([header, *written]) + "\n")
    (folder / "train.txt").write_text("\n".join(names) + "\n")
    return {name: lines[0].partition(",")[2].strip('"') for name, lines in taken.items()}


def made_photographs(folder: Path, count: int, size: tuple[int, int], distinct: int = 256) -> None:
    """A data set in Flickr's form that needs no data: pictures that compress like photographs, each with a caption.

    Args:
        size: (width, height) in pixels.
        distinct: number of different pictures. Each file has its own bytes, so that no two share a digest.
    """
    generator, pictures = np.random.default_rng(0), []
    for _ in range(min(distinct, count)):
        coarse = generator.integers(0, 256, (size[1] // 16 + 1, size[0] // 16 + 1, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.int16)
        grainy = (smooth + generator.normal(0, 4, (size[1], size[0], 1))).clip(0, 255).astype(np.uint8)
        sink = io.BytesIO()
        Image.fromarray(grainy).save(sink, "JPEG", quality=90)
        pictures.append(sink.getvalue())
    (folder / "images").mkdir(parents=True)
    names = [f"{number:07d}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        (folder / "images" / name).write_bytes(pictures[number % len(pictures)] + b"%07d" % number)
    captions = [f"{name},a photograph of thing number {number} on a table" for number, name in enumerate(names)]
    (folder / "captions.txt").write_text("\n".join(["image,caption", *captions]) + "\n")
    (folder / "train.txt").write_text("\n".join(names) + "\n")


def random_weights(name: str, folder: Path) -> Path:
    """A file of seeded random weights for a built-in open_clip architecture: speed does not depend on what it knows."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        model: Any = open_clip.create_model(name, pretrained=None, require_pretrained=False)
        save_file(model.state_dict(), path)
    return path


def at_most(
    what: str, against: str, ours: list[float], theirs: list[float], limit: float | None, per: float, note: str = ""
) -> Row:
    """A row of times: ratio is ours by theirs within a round, and should stay below ``limit``.

    Args:
        per: how many of what is named (steps) were done in each of the seconds.
    """
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    return Row(
        what,
        against,
        1000 * statistics.median(ours) / per,
        1000 * statistics.median(theirs) / per,
        "ms",
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        limit,
        at_most=True,
        note=note,
    )
