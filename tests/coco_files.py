"""COCO 2017 as it is published, made of a few photographs: what the commands of docs/howto/coco.md are tried on."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


def write_coco(root: Path, splits: dict[str, Sequence[tuple[Path, list[str]]]]) -> Path:
    """``annotations/captions_SPLIT.json`` beside ``SPLIT/000000000001.jpg`` ..., as in COCO's archives.

    Args:
        splits: for each split (``train2017``) the photographs, which are copied, with their captions.
    """
    (root / "annotations").mkdir(parents=True)
    number = 0
    for split, photographs in splits.items():
        (root / split).mkdir()
        images, annotations = [], []
        for path, captions in photographs:
            number += 1
            name = f"{number:012d}.jpg"
            shutil.copyfile(path, root / split / name)
            images.append({"id": number, "file_name": name})
            annotations += [
                {"id": 10 * number + i, "image_id": number, "caption": text} for i, text in enumerate(captions)
            ]
        table = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
        (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(table))
    return root


def captions_of(flickr: Path, names: Iterable[str]) -> list[tuple[Path, list[str]]]:
    """Photographs of a dataset in Flickr8k's form with their captions, in the order of the names."""
    captions: dict[str, list[str]] = {}
    with (flickr / "captions.txt").open(newline="") as lines:
        for row in csv.DictReader(lines):
            captions.setdefault(row["image"], []).append(row["caption"])
    return [(flickr / "images" / name, captions[name]) for name in names]


if (
    __name__ == "__main__"
):  # python -m tests.coco_files ../shared/flickr8k data/coco: 240 photographs to train on, 60 others
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    parts = {"train2017": ("train.txt", 240), "val2017": ("dev.txt", 60)}
    write_coco(
        target,
        {
            split: captions_of(source, (source / names).read_text().split()[:count])
            for split, (names, count) in parts.items()
        },
    )
