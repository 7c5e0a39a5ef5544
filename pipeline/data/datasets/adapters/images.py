"""Pictures in a folder and the folders below it, without classes: no list is needed.

    pictures/one.jpg    one.txt       its caption, if it has one
    pictures/more/two.png             a picture without a caption

A ``sample_id`` is the path relative to the root. The split is the first folder of that path if its name is one of
train, val, valid, validation, dev and test, as in an ``imagefolder``. Samples come in the order of their paths. Hidden
files and folders are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from teacher_cache.pipeline.data.datasets.files import (
    IMAGE_ENDINGS,
    SPLIT_NAMES,
    contents,
    files_below,
    is_image,
    local_folder,
    open_text,
    require_utf8,
    say_several_lines,
)
from teacher_cache.pipeline.data.datasets.records import Problem, Record, sample_or_problem
from teacher_cache.storage.errors import UsageError

_COULD_BE_CAPTIONS = (".txt", ".caption", ".json")


def read(root: str, *, txt: str = "whole", encoding: str = "") -> Iterator[Record]:
    """Read the samples of every picture.

    Args:
        root: the folder.
        txt: ``whole`` if a .txt is one caption, ``lines`` if each line is one.
        encoding: encoding of the .txt files, for example ``cp1252``. Default: UTF-8 without broken characters.

    Raises:
        UsageError: no picture, a .txt in another encoding, or an option with another value.
    """
    check(root, txt=txt)
    folder = local_folder("images", root)
    texts: set[Path] = set()
    others: list[Path] = []
    uncaptioned: dict[str, Path] = {}
    glued = 0
    for path in files_below(folder):
        if not is_image(path):
            others.append(path)
            continue
        beside = path.with_suffix(".txt")
        if not beside.is_file():
            beside = path.with_suffix(".TXT")
        captions: list[str] = []
        if beside.is_file():
            texts.add(beside)
            captions = _captions(beside, encoding, lines=txt == "lines")
            glued += txt == "whole" and "\n" in captions[0].strip()
        else:
            uncaptioned[path.stem] = path
        relative = path.relative_to(folder)
        split = relative.parts[0].casefold() if len(relative.parts) > 1 else ""
        name = relative.as_posix()
        yield from sample_or_problem(name, name, split if split in SPLIT_NAMES else "", captions)
    say_several_lines(root, glued)
    for path in others:
        if path not in texts:
            detail = f"no image by its ending, nor the caption of one; images are {', '.join(IMAGE_ENDINGS)}"
            picture = uncaptioned.get(path.stem) if path.suffix.lower() in _COULD_BE_CAPTIONS else None
            if picture is not None:
                where = picture.with_suffix(".txt").relative_to(folder).as_posix()
                detail = f"not read: the caption belongs in {where}, or in a CSV (path,caption)"
            name, lost = path.relative_to(folder).as_posix(), int(picture is not None)
            yield Problem("bad-record", name, detail, lost_image=False, lost_captions=lost)


def check(root: str, *, txt: str = "whole", encoding: str = "") -> None:
    """Check the options, and that there is a picture."""
    if txt not in ("whole", "lines"):
        raise UsageError(f"images option txt={txt!r} is not known; it is one of whole, lines")
    folder = local_folder("images", root)
    if not any(map(is_image, files_below(folder))):
        raise UsageError(f"{root}: no picture in or below it; found {contents(folder)}")


def _captions(path: Path, encoding: str, lines: bool) -> list[str]:
    with open_text(path, encoding or "utf-8") as file:
        text = file.read()
    if not encoding:
        require_utf8(text, str(path))
    return list(filter(str.strip, text.splitlines())) if lines else [text]
