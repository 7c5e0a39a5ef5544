"""Images in class folders, with captions made from prompt templates.

    pictures/<class>/*.jpg            or
    pictures/<split>/<class>/*.jpg    where <split> is train, val, valid, validation, dev or test

A class is called what its folder is called, with spaces for underscores, or what ``?classes=`` says. A
``sample_id`` is the path relative to the root; samples come in the order of their paths. Hidden files and
folders are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.datasets.base import (
    IMAGE_ENDINGS,
    SPLIT_NAMES,
    Problem,
    Record,
    contents,
    local_folder,
    open_text,
    printable,
    read_json_object,
    sample_or_problem,
)
from storage.errors import UsageError

__all__ = ["DEFAULT_TEMPLATES", "read"]

# three of CLIP's own: its 7 or 80 would give every image as many rows of captions
DEFAULT_TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "a good photo of a {}.")

_WORDNET_ID = re.compile(r"n\d{8}")


def read(root: str, *, templates: str = "photo", classes: str = "") -> Iterator[Record]:
    """Samples of every class folder.

    Args:
        root: the folder.
        templates: ``photo`` for :data:`DEFAULT_TEMPLATES`; ``simple`` or ``openai`` for the 7 or 80 of CLIP's
            that open_clip ships; else a text file with one template per line and ``{}`` for the class.
        classes: a JSON file ``{"folder": "name of the class"}``, or ``imagenet`` for open_clip's names of the
            1,000 folders of ImageNet.

    Raises:
        UsageError: no class folder with images, templates without ``{}``, or classes without a name.
    """
    folder = local_folder("imagefolder", root)
    fill = _templates(templates)
    class_folders, stray = _class_folders(folder)
    if not class_folders:
        raise UsageError(f"{root}: no <class>/*.jpg and no <split>/<class>/*.jpg; found {contents(folder)}")
    names = _class_names(root, sorted({path.name for _, path in class_folders}), classes)
    for path in stray:
        where = printable(path.relative_to(folder).as_posix())
        yield Problem("bad-record", where, "an image outside the class folders", lost_image=True)
    for split, class_folder in class_folders:
        captions = [template(names[class_folder.name]) for template in fill]
        empty = True
        for path in _files_below(class_folder):
            relative = path.relative_to(folder).as_posix()
            if path.name.lower().endswith(IMAGE_ENDINGS):
                empty = False
                yield from sample_or_problem(relative, relative, split, captions)
            else:
                detail = f"not an image by its ending; those are {', '.join(IMAGE_ENDINGS)}"
                yield Problem("bad-record", printable(relative), detail, lost_image=False)
        if empty:
            where = printable(class_folder.relative_to(folder).as_posix())
            yield Problem("bad-record", where, "a class folder without an image", lost_image=False)


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Folders and files of a folder by name, without the hidden ones."""
    entries = sorted(
        (entry for entry in folder.iterdir() if not entry.name.startswith(".")), key=lambda path: path.name
    )
    return [entry for entry in entries if entry.is_dir()], [entry for entry in entries if not entry.is_dir()]


def _files_below(folder: Path) -> Iterator[Path]:
    waiting = [folder]  # a stack: folders may be nested deeper than functions may call each other
    while waiting:
        folders, files = _entries(waiting.pop())
        yield from files
        # a link could lead back up for ever
        waiting.extend(inner for inner in reversed(folders) if not inner.is_symlink())


def _class_folders(root: Path) -> tuple[list[tuple[str, Path]], list[Path]]:
    """(split, class folder) pairs in order, and the images that lie beside class folders."""
    top, files = _entries(root)
    pairs: list[tuple[str, Path]] = []
    beside = files
    for folder in top:
        inner, inner_files = _entries(folder)
        # a class that is called "test" holds images, a split holds folders
        if folder.name in SPLIT_NAMES and inner:
            pairs.extend((folder.name, class_folder) for class_folder in inner)
            beside = beside + inner_files
        else:
            pairs.append(("", folder))
    return pairs, [path for path in beside if path.name.lower().endswith(IMAGE_ENDINGS)]


def _templates(templates: str) -> list[Callable[[str], str]]:
    if templates in ("simple", "openai"):
        import open_clip  # two seconds that the other templates do without

        shipped = {
            "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
            "openai": open_clip.OPENAI_IMAGENET_TEMPLATES,
        }
        return list(shipped[templates])
    if templates == "photo":
        lines = list(DEFAULT_TEMPLATES)
    else:
        path = Path(templates)
        if not path.is_file():
            raise UsageError(
                f"templates={templates!r} is neither photo, simple nor openai, nor a file of templates that is there"
            )
        with open_text(path) as file:
            lines = [line.strip() for line in file if line.strip()]
        for line in lines:
            if "{}" not in line:
                raise UsageError(f"{path}: the template {printable(line)!r} has no {{}} for the class")
        if not lines:
            raise UsageError(f"{path}: no template in it; write one per line, with {{}} for the class")

    # not str.format: a template may hold other braces
    def filled(line: str) -> Callable[[str], str]:
        return lambda name: line.replace("{}", name)

    return [filled(line) for line in lines]


def _class_names(root: str, folders: list[str], classes: str) -> dict[str, str]:
    if classes == "imagenet":
        if len(folders) != 1000 or not all(_WORDNET_ID.fullmatch(folder) for folder in folders):
            raise UsageError(
                f"{root}: classes=imagenet wants the 1,000 folders n01440764 ... n15075141; found {len(folders)} "
                f"from {printable(folders[0])} to {printable(folders[-1])}; give classes=FILE instead"
            )
        import open_clip

        # open_clip's list is in the order of the sorted folders
        return dict(zip(folders, open_clip.IMAGENET_CLASSNAMES, strict=True))
    if classes:
        path = Path(classes)
        if not path.is_file():
            raise UsageError(f"classes={classes!r} is neither imagenet nor a JSON file that is there")
        names = read_json_object(path, ())
        nameless = [folder for folder in folders if not isinstance(names.get(folder), str)]
        if nameless:
            raise UsageError(
                f"{path}: no name for {len(nameless)} of {len(folders)} class folders: "
                f"{printable(', '.join(nameless[:12]))}"
            )
        return {folder: str(names[folder]) for folder in folders}
    if all(_WORDNET_ID.fullmatch(folder) for folder in folders):
        raise UsageError(
            f"{root}: the class folders are WordNet ids ({folders[0]} ...), which make no captions; give "
            "classes=imagenet, or classes=FILE with their names"
        )
    return {folder: folder.replace("_", " ") for folder in folders}
