"""Labelled images whose published archive names the images of a split in a list.

    test_images.txt, images/<class>/*.jpg                              Birdsnap
    ucfTrainTestlist/testlist01.txt, UCF-101-midframes/<Class>/*.jpg   UCF101: the middle frame of each clip, as CoOp
                                                                       publishes it
    dev.jsonl or dev_seen.jsonl, img/*.png                             Hateful Memes, the 500 labelled memes of CLIP's
                                                                       table

A split is called like its list, without the ending: ``testlist02``, ``dev_unseen``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from teacher_cache.pipeline.data.datasets.files import contents, open_text
from teacher_cache.pipeline.data.datasets.records import Listing, Problem, Sample, sample_or_problem
from teacher_cache.storage.errors import UsageError

# the lists that CLIP's table measures on
_LISTS = ("test_images.txt", "ucfTrainTestlist/testlist01.txt", "dev.jsonl", "dev_seen.jsonl")
_WORD = re.compile(r"[A-Z][^A-Z]*")


def measured_list(root: str) -> Path | None:
    """Return the list of the split that CLIP's table measures, or None for a folder in another form."""
    return next((path for path in (Path(root, name) for name in _LISTS) if path.is_file()), None)


def require_list(root: str, split: str = "") -> Path:
    """Return the list of a split.

    Raises:
        UsageError: it is missing.
    """
    measured = measured_list(root)
    if measured is None:
        raise UsageError(f"{root}: none of {', '.join(_LISTS)} in it; it holds {contents(Path(root))}")
    path = measured.with_name(split + measured.suffix) if split else measured
    if not path.is_file():
        raise UsageError(f"{root}: no list {path.name} of a split; {path.parent} holds {contents(path.parent)}")
    return path


def list_published(root: str, split: str = "") -> Listing:
    """List the images of one split with their classes.

    The labels 0 and 1 of Hateful Memes are in the order of CLIP's class names; other classes have names.

    Args:
        split: name of a list without its ending. Default: the one that CLIP's table measures.

    Raises:
        UsageError: the list is missing.
    """
    path = require_list(root, split)
    memes = path.suffix == ".jsonl"
    images: list[Sample] = []
    keys: list[str] = []
    problems: list[Problem] = []
    with open_text(path) as file:
        lines = file.read().splitlines()
    for key, address in _memes(lines) if memes else _class_folders(lines, path.parent.name == "ucfTrainTestlist"):
        if not key:
            problems.append(Problem("bad-record", path.name, address, lost_image=True))
            continue
        for record in sample_or_problem(address, address, path.stem, None):
            if isinstance(record, Sample):
                images.append(record)
                keys.append(key)
            else:
                problems.append(record)
    own = {"0": "0", "1": "1"} if memes else {key: key.replace("_", " ") for key in sorted(set(keys))}
    where = f"lists:{root}"
    return Listing(where, images, keys, problems, own, not memes, order_of="hateful_memes" if memes else "")


def _class_folders(lines: list[str], clips: bool) -> Iterator[tuple[str, str]]:
    """Yield class folder and address of each image; an empty class and the reason for a line that cannot be read."""
    for number, line in enumerate(lines, 1):
        words = line.split()
        folder, slash, name = words[0].partition("/") if words else ("", "", "")
        if slash and clips:  # ApplyLipstick/v_ApplyLipstick_g01_c01.avi, in training lists with a number
            folder = "_".join(_WORD.findall(folder)) or folder
            yield folder, f"UCF-101-midframes/{folder}/{Path(name).stem}.jpg"
        elif slash:
            yield folder, f"images/{folder}/{name}"
        elif words and line.strip() != "path":  # the header of Birdsnap's list
            yield "", f"line {number} is no CLASS/IMAGE: {line}"


def _memes(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Yield label and address of each meme; an empty label and the reason for a line that cannot be read."""
    for number, line in enumerate(lines, 1):
        try:
            meme = json.loads(line)
            label, address = meme["label"], meme["img"]
        except (ValueError, KeyError, TypeError, RecursionError):
            label, address = None, None
        if label in (0, 1) and isinstance(address, str):
            yield str(int(label)), address
        else:
            yield "", f'line {number} is no {{"img": "img/NAME.png", "label": 0 or 1}}'
