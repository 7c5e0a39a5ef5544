"""Karpathy's splits of COCO, Flickr30k and Flickr8k: one ``dataset_*.json`` beside the images.

    dataset_flickr30k.json   {"dataset": ..., "images": [{"filename", "split", "sentences": [{"raw"}]}]}
    flickr30k-images/        or images/, Images/, Flicker8k_Dataset/, the folder itself

COCO's file also has a ``filepath`` (``val2014``): its images are in ``val2014/`` or ``images/val2014/``. Splits keep
their published names (train, val, test, restval). A ``sample_id`` is ``filepath/filename``, or the file name if there
is no filepath. Images and captions come in the order of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from teacher_cache.pipeline.data.datasets.files import (
    FLICKR_FOLDERS,
    contents,
    image_folders,
    local_folder,
    read_json_object,
    uri_below,
)
from teacher_cache.pipeline.data.datasets.records import Problem, Record, sample_or_problem
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.safe_text import printable


def read(root: str, *, images: str = "") -> Iterator[Record]:
    """Read the samples of one of Karpathy's files.

    Args:
        root: the JSON file, or a folder with exactly one.
        images: folder of images (for COCO, of ``val2014/`` ...), if it is not below that folder.

    Raises:
        UsageError: no such file, several of them, one without the published form, or no images.
    """
    path = _json_file(root)
    entries = read_json_object(path, ("images",))["images"]
    names: dict[str, list[str]] = {}
    for entry in entries:
        name, filepath = _name(entry)
        names.setdefault(filepath, []).append(name)
    folders = image_folders(path.parent, {filepath: _places(filepath, images) for filepath in names}, names)
    for number, entry in enumerate(entries):
        where = f"{path.name} images[{number}]"
        name, filepath = _name(entry)
        sentences = entry.get("sentences") if isinstance(entry, dict) else None
        if not name or not isinstance(sentences, list):
            yield Problem("bad-record", where, "no filename and sentences in it", lost_image=True)
            continue
        uri = uri_below(folders[filepath], name)
        if uri is None or uri_below("", filepath or ".") is None:
            detail = f"{printable(filepath)!r} / {printable(name)!r} leaves the folder of images"
            yield Problem("bad-record", where, detail, lost_image=True)
            continue
        captions = []
        for index, sentence in enumerate(sentences):
            raw = sentence.get("raw") if isinstance(sentence, dict) else None
            if isinstance(raw, str):
                captions.append(raw)
            else:
                detail = f"sentence {index} of {printable(name)} has no raw text"
                yield Problem("bad-record", where, detail, lost_image=False, lost_captions=1)
        split = entry.get("split")
        if not isinstance(split, str):
            detail = f"{printable(name)} has no split; it is kept with none"
            yield Problem("bad-record", where, detail, lost_image=False)
            split = ""
        yield from sample_or_problem(f"{filepath}/{name}" if filepath else name, uri, split, captions)


def check(root: str, *, images: str = "") -> None:
    """Check that the file of captions is there."""
    _json_file(root)


def _json_file(root: str) -> Path:
    path = Path(root)
    if path.is_file():
        return path
    folder = local_folder("karpathy", root)
    files = sorted(folder.glob("dataset*.json")) or sorted(folder.glob("*.json"))
    if not files:
        raise UsageError(f"{root}: no dataset_*.json; found {contents(folder)}")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UsageError(f"{root}: holds {names}; name one of them, for example karpathy:{files[0]}")
    return files[0]


def _name(entry: object) -> tuple[str, str]:
    """Return file name and filepath of an entry, empty if missing."""
    if not isinstance(entry, dict):
        return "", ""
    name, filepath = entry.get("filename"), entry.get("filepath")
    return (name if isinstance(name, str) else ""), (filepath if isinstance(filepath, str) else "")


def _places(filepath: str, images: str) -> tuple[str, ...]:
    if images:
        return (f"{images.rstrip('/')}/{filepath}", images) if filepath else (images,)
    if filepath and uri_below("", filepath) is not None:
        return (filepath, f"images/{filepath}", *FLICKR_FOLDERS)
    return FLICKR_FOLDERS
