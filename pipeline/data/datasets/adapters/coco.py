"""COCO captions as published: ``annotations/captions_*.json`` beside the folders of images.

    coco/
      annotations/captions_train2017.json  captions_val2017.json   (instances_*.json etc. are ignored)
      train2017/000000000009.jpg ...       or images/train2017/, or images/
      val2017/...

The split is the part after ``captions_`` (``train2017``). A ``sample_id`` is split and file name
(``train2017/000000000009.jpg``). Files are read in the order of their names, images and captions in the order of the
file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from teacher_cache.pipeline.data.datasets.files import (
    contents,
    image_folders,
    local_folder,
    read_json_object,
    uri_below,
)
from teacher_cache.pipeline.data.datasets.records import Problem, Record, sample_or_problem
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.safe_text import printable

_PREFIX = "captions_"


def read(root: str, *, splits: str = "", images: str = "") -> Iterator[Record]:
    """Read the samples of every captions file, or of some.

    Args:
        root: the folder that holds ``annotations/``.
        splits: splits to read, separated by commas (``val2017``). Default: all.
        images: folder that holds ``train2017/`` ... or the images themselves. Default: ``root``.

    Raises:
        UsageError: no captions file, none for a split, or no folder of images for any split.
    """
    folder = local_folder("coco", root)
    files = _captions_files(folder, splits)
    tables = {split: read_json_object(path, ("images", "annotations")) for split, path in files.items()}
    names = {split: [str(_get(entry, "file_name")) for entry in table["images"]] for split, table in tables.items()}
    folders = image_folders(folder, {split: _places(split, images) for split in tables}, names)
    for split, table in tables.items():
        yield from _read_split(split, files[split].name, folders[split], table)


def check(root: str, *, splits: str = "", images: str = "") -> None:
    """Check that the file of captions is there."""
    _captions_files(local_folder("coco", root), splits)


def _captions_files(folder: Path, splits: str) -> dict[str, Path]:
    annotations = folder / "annotations"
    if not annotations.is_dir():
        raise UsageError(f"{folder}: no annotations/captions_*.json; found {contents(folder)}")
    files = {path.stem.removeprefix(_PREFIX): path for path in sorted(annotations.glob(f"{_PREFIX}*.json"))}
    if not files:
        raise UsageError(f"{annotations}: no captions_*.json; found {contents(annotations)}")
    names = [split for split in splits.split(",") if split]
    for split in names:
        if split not in files:
            raise UsageError(f"{annotations}: no captions_{split}.json; there are splits {', '.join(files)}")
    return {split: path for split, path in files.items() if not names or split in names}


def _places(split: str, images: str) -> tuple[str, ...]:
    if images:
        return (f"{images.rstrip('/')}/{split}", images)
    return (split, f"images/{split}", "images")


def _read_split(split: str, file_name: str, folder: str, table: dict[str, list[object]]) -> Iterator[Record]:
    names: dict[int | str, str] = {}
    for number, entry in enumerate(table["images"]):
        image_id, name = _id(entry, "id"), _get(entry, "file_name")
        where = f"{file_name} images[{number}]"
        if image_id is None or not isinstance(name, str):
            yield Problem("bad-record", where, "no id and file_name in it", lost_image=True)
        elif image_id in names:
            detail = f"image id {image_id} belongs to {printable(names[image_id])}"
            yield Problem("duplicate-id", where, detail, lost_image=names[image_id] != name)
        elif uri_below(folder, name) is None:
            detail = f"file_name {printable(name)!r} leaves the folder of images"
            yield Problem("bad-record", where, detail, lost_image=True)
            names[image_id] = ""  # so that its captions are not reported as orphans too
        else:
            names[image_id] = name

    captions: dict[int | str, list[str]] = {image_id: [] for image_id in names}
    for number, entry in enumerate(table["annotations"]):
        owner, caption = _id(entry, "image_id"), _get(entry, "caption")
        where = f"{file_name} annotations[{number}]"
        if owner is None or not isinstance(caption, str):
            yield Problem("bad-record", where, "no image_id and caption in it", lost_image=False, lost_captions=1)
        elif owner not in captions:
            yield Problem("no-image", where, f"no image has the id {owner}", lost_image=False, lost_captions=1)
        else:
            captions[owner].append(caption)

    for image_id, name in names.items():
        uri = uri_below(folder, name)
        if uri is not None:
            yield from sample_or_problem(f"{split}/{name}", uri, split, captions[image_id])


def _id(entry: object, key: str) -> int | str | None:
    value = _get(entry, key)
    # bool is an int in Python: true would be image 1
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _get(entry: object, key: str) -> object:
    return entry.get(key) if isinstance(entry, dict) else None
