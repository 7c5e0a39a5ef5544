"""Images in class folders, with captions made from prompt templates.

    pictures/<class>/*.jpg            or
    pictures/<split>/<class>/*.jpg    where <split> is train, val, valid, validation, dev or test

The name of a class comes from ``?classes=``, else from its folder, with spaces for underscores. A ``sample_id`` is the
path relative to the root. Samples come in the order of their paths. Hidden files and folders are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from teacher_cache.pipeline.data.datasets.files import (
    IMAGE_ENDINGS,
    SPLIT_NAMES,
    contents,
    entries_in,
    files_below,
    is_image,
    local_folder,
)
from teacher_cache.pipeline.data.datasets.prompts import filled, match_classes, read_class_names, read_templates
from teacher_cache.pipeline.data.datasets.records import Problem, Record, sample_or_problem
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.logs import hint, say
from teacher_cache.storage.observe.safe_text import printable

_WORDS = re.compile(r"[a-z]+")
# words in the names of folders above the class folders
_LEVELS = {*SPLIT_NAMES, "training", "testing", "images", "data"}


def read(root: str, *, templates: str = "photo", classes: str = "", split: str = "") -> Iterator[Record]:
    """Read the samples of every class folder.

    Args:
        root: the folder.
        split: split of the images that are in no folder of a split.
        templates: name or file (:func:`teacher_cache.pipeline.data.datasets.prompts.read_templates`).
        classes: JSON file ``{"folder": "name of the class"}``, or ``imagenet`` for open_clip's names of ImageNet's
            folders.

    Raises:
        UsageError: no class folder with images, templates without ``{}``, or classes without a name.
    """
    fill = read_templates(templates)
    names = _class_names(root, class_folders(root), classes)
    for record, its_split, folder in read_classes(root):
        if isinstance(record, Problem):
            yield record
        else:
            yield from sample_or_problem(record.sample_id, record.uri, its_split or split, filled(fill, names[folder]))


def check(root: str, *, templates: str = "photo", classes: str = "", split: str = "") -> None:
    """Check what :func:`read` checks before it reads the folders of the classes, and say which they are."""
    read_templates(templates)
    folders = _folders_of_classes(root)
    names = _class_names(root, sorted({folder.name for folder in folders}), classes)
    _say_classes(root, tuple(names.values()), tuple(folders))


@lru_cache(maxsize=1)
def _say_classes(root: str, names: tuple[str, ...], folders: tuple[Path, ...]) -> None:
    """Say once which classes a folder has, and which of them look like folders of classes."""
    say(f"{root}: the classes are {printable(_listed(names))}")
    for folder in folders:
        # a class has a picture among its first files: few are looked at
        if not any(map(is_image, folder.iterdir())) and (inner := entries_in(folder)[0]):
            below = printable(_listed([path.name for path in inner]))
            hint(f"{folder}: its pictures lie in {below}, which count as one class. Are those the classes?")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def class_folders(root: str) -> list[str]:
    """List the names of the class folders of all splits, sorted.

    Raises:
        UsageError: there are none.
    """
    return sorted({folder.name for folder in _folders_of_classes(root)})


def _folders_of_classes(root: str) -> list[Path]:
    folder = local_folder("imagefolder", root)
    folders = _class_folders(folder)[0]
    if not folders:
        loose = f"; for pictures without classes write images:{root}" if any(map(is_image, folder.iterdir())) else ""
        raise UsageError(f"{root}: no <class>/*.jpg and no <split>/<class>/*.jpg; found {contents(folder)}{loose}")
    return [path for _, path in folders]


def read_classes(root: str) -> Iterator[tuple[Record, str, str]]:
    """Yield every image, with its folder's name as its caption, and problems: (record, split, class folder)."""
    folder = local_folder("imagefolder", root)
    pairs, stray = _class_folders(folder)
    for split, path in stray:
        where = path.relative_to(folder).as_posix()
        yield Problem("bad-record", where, "an image outside the class folders", lost_image=True), split, ""
    for split, class_folder in pairs:
        empty = True
        for path in files_below(class_folder):
            relative = path.relative_to(folder).as_posix()
            if is_image(path):
                empty = False
                for record in sample_or_problem(relative, relative, split, [class_folder.name]):
                    yield record, split, class_folder.name
            else:
                detail = f"not an image by its ending; those are {', '.join(IMAGE_ENDINGS)}"
                yield Problem("bad-record", relative, detail, lost_image=False), split, ""
        if empty:
            where = class_folder.relative_to(folder).as_posix()
            yield Problem("bad-record", where, "a class folder without an image", lost_image=False), split, ""


def _class_folders(root: Path) -> tuple[list[tuple[str, Path]], list[tuple[str, Path]]]:
    """Return (split, class folder) in order, and (split, path) of images beside class folders."""
    top, files = entries_in(root)
    pairs: list[tuple[str, Path]] = []
    beside = [("", path) for path in files]
    levels: list[str] = []  # folders that contain only folders and have no class's name
    for folder in top:
        inner, inner_files = entries_in(folder)
        # a class named "test" contains images, a split contains folders
        if (split := folder.name.casefold()) in SPLIT_NAMES and inner:
            pairs.extend((split, class_folder) for class_folder in inner)
            beside.extend((split, path) for path in inner_files)
        else:
            pairs.append(("", folder))
            words = _WORDS.findall(folder.name.casefold())
            if inner and not any(map(is_image, inner_files)) and _LEVELS.intersection(words):
                levels.append(folder.name)
    if levels:
        names = ", ".join(repr(printable(name)) for name in levels[:5])
        raise UsageError(
            f"{root}: no images in {names}, but folders. Are those the classes? Name splits as one of "
            f"{', '.join(SPLIT_NAMES)}, or give the folder above the classes"
        )
    return pairs, [(split, path) for split, path in beside if is_image(path)]


def _class_names(root: str, folders: list[str], classes: str) -> dict[str, str]:
    own = {folder: folder.replace("_", " ") for folder in folders}
    matched = match_classes(root, own, read_class_names(classes) if classes else None)
    return {folder: matched.names[matched.number[folder]] for folder in folders}
