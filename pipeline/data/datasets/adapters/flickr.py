"""Flickr8k and Flickr30k as published: one file of captions, split lists and a folder of images.

    flickr8k/
      captions.txt                   CSV with a header: image,caption (or image_name,comment_number,comment)
      train.txt  dev.txt  test.txt   one image name per line
      images/

Other forms of the captions are ``Flickr8k.token.txt`` or ``results_20130124.token`` (``name.jpg#0<TAB>caption``) and
``results.csv`` (``name.jpg| 0| caption``); of the lists ``Flickr_8k.trainImages.txt`` and so on. Captions and lists are
in the folder or in ``Flickr8k_text/``, images in ``images/``, ``Images/``, ``Flicker8k_Dataset/``,
``flickr30k-images/`` or ``flickr30k_images/``.

A ``sample_id`` is the file name. The lists train, dev, val, test come first, each in its own order; then, with split
``""``, images with captions but in no list, in the order of the captions.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from teacher_cache.pipeline.data.datasets.files import (
    CAPTION_FILES,
    FLICKR_FOLDERS,
    IMAGE_ENDINGS,
    contents,
    flickr_text_folders,
    image_folders,
    local_folder,
    open_text,
    uri_below,
)
from teacher_cache.pipeline.data.datasets.records import Problem, Record, sample_or_problem
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.safe_text import printable

_SPLIT_FILES = {
    "train": ("train.txt", "Flickr_8k.trainImages.txt"),
    "dev": ("dev.txt", "Flickr_8k.devImages.txt"),
    "val": ("val.txt",),
    "test": ("test.txt", "Flickr_8k.testImages.txt"),
}
_NAME_COLUMNS = ("image", "image_name")
_CAPTION_COLUMNS = ("caption", "comment")


def read(root: str, *, captions: str = "", images: str = "") -> Iterator[Record]:
    """Read the samples of one folder of Flickr8k or Flickr30k.

    Args:
        root: the folder.
        captions: file of captions, if the folder has several.
        images: folder of images, if it has none of the published names.

    Raises:
        UsageError: no file of captions, several of them, or no folder of images.
    """
    folder = local_folder("flickr", root)
    captions_of: dict[str, list[str]] = {}
    for line in _read_captions(_captions_file(folder, captions)):
        if isinstance(line, Problem):
            yield line
        else:
            captions_of.setdefault(line[0], []).append(line[1])

    places = (images,) if images else FLICKR_FOLDERS
    image_place = image_folders(folder, {"": places}, {"": list(captions_of)})[""]
    split_of: dict[str, str] = {}
    for path, split, number, listed in _listed(folder):
        # Flickr30k's lists omit the ending
        name = f"{listed}.jpg" if listed not in captions_of and f"{listed}.jpg" in captions_of else listed
        if name in split_of:
            detail = f"{printable(name)} is listed in {split_of[name]!r} already"
            yield Problem("duplicate-id", f"{path.name} line {number}", detail, lost_image=False)
            continue
        split_of[name] = split
        yield from _sample(image_place, name, split, captions_of.get(name, []))
    for name, lines in captions_of.items():
        if name not in split_of:
            yield from _sample(image_place, name, "", lines)

    for name in sorted(entry.name for entry in (folder / image_place).iterdir()):
        if name.lower().endswith(IMAGE_ENDINGS) and name not in captions_of and name not in split_of:
            yield from _sample(image_place, name, "", [])


def check(root: str, *, captions: str = "", images: str = "") -> None:
    """Check that the file of captions is there."""
    _captions_file(local_folder("flickr", root), captions)


def _sample(folder: str, name: str, split: str, captions: list[str]) -> Iterator[Record]:
    uri = uri_below(folder, name)
    if uri is None:
        detail = "the name leaves the folder of images"
        yield Problem("bad-record", name, detail, lost_image=True)
    else:
        yield from sample_or_problem(name, uri, split, captions)


def _captions_file(folder: Path, captions: str) -> Path:
    if captions:
        if not (folder / captions).is_file():
            raise UsageError(f"{folder}: no file {captions}; found {contents(folder)}")
        return folder / captions
    files = [
        place / name for place in flickr_text_folders(folder) for name in CAPTION_FILES if (place / name).is_file()
    ]
    if not files:
        raise UsageError(f"{folder}: none of {', '.join(CAPTION_FILES)}; found {contents(folder)}")
    if len(files) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in files)
        raise UsageError(f"{folder}: several files of captions ({names}); choose with ?captions=FILE")
    return files[0]


def _listed(folder: Path) -> Iterator[tuple[Path, str, int, str]]:
    """Yield file, split, line number and name of each image in the split lists."""
    for split, files in _SPLIT_FILES.items():
        paths = [place / file for place in flickr_text_folders(folder) for file in files]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            continue
        with open_text(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield path, split, number, line.strip()


def _read_captions(path: Path) -> Iterator[tuple[str, str] | Problem]:
    """Yield image name and caption of each line. The first line shows which of the three forms the file has.

    Lines are parsed one by one, since a caption has no line break: an unclosed quote costs only its own line.
    """
    with open_text(path) as lines:
        first = lines.readline()
        if "#" in first and "\t" in first:
            header, parse = None, _token_line
        elif "|" in first:
            header, parse = first, _piped_line
        else:
            columns = [column.strip().lower() for column in first.split(",")]
            name = next((columns.index(column) for column in _NAME_COLUMNS if column in columns), -1)
            if name < 0 or columns[-1] not in _CAPTION_COLUMNS:
                raise UsageError(
                    f"{path}: begins with {printable(first.strip())!r}; a header such as 'image,caption' or "
                    "'image_name| comment_number| comment', or lines 'name.jpg#0<TAB>caption', are wanted"
                )

            def parse(line: str) -> tuple[str, str] | str:
                return _comma_line(line, name, len(columns))

            header = first
        if header is None:
            lines.seek(0)
        for number, line in enumerate(lines, 1 if header is None else 2):
            if not line.strip():
                continue
            parsed = parse(line.rstrip("\r\n"))
            if isinstance(parsed, str):
                shown = printable(line.strip()[:80])
                where, detail = f"{path.name} line {number}", f"{parsed}: {shown!r}"
                yield Problem("bad-record", where, detail, lost_image=False, lost_captions=1)
            else:
                yield parsed


def _token_line(line: str) -> tuple[str, str] | str:
    tagged, tab, caption = line.partition("\t")
    name, mark, _number = tagged.rpartition("#")
    if not tab or not mark or not name.strip():
        return "not name#number<TAB>caption"
    return name.strip(), caption


def _piped_line(line: str) -> tuple[str, str] | str:
    fields = line.split("|", 2)
    if len(fields) < 3 or not fields[0].strip():
        return "not name|number|caption"
    return fields[0].strip(), fields[2]


def _comma_line(line: str, name: int, columns: int) -> tuple[str, str] | str:
    try:
        fields = next(csv.reader([line], strict=True))
    except csv.Error as error:
        return f"not CSV ({error})"
    if len(fields) < columns or not fields[name].strip():
        return f"{len(fields)} of {columns} fields"
    # the caption comes last, so unquoted commas belong to it
    return fields[name].strip(), ",".join(fields[columns - 1 :])
