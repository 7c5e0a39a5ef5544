"""Records of all dataset adapters: samples with their captions, and problems."""

from __future__ import annotations

import io
import json
import os
import posixpath
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.safe_text import CONTROL, MAX_NAME_CHARACTERS, NOT_TEXT, printable, redact

# torchvision's ImageFolder endings, and the other decodable ones (``teacher_cache.pipeline.data.images.decode``)
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif", ".avif", ".jfif")

# a folder or a part of a file name that equals one of these names a split
SPLIT_NAMES = ("train", "val", "valid", "validation", "dev", "test", "trainval", "restval")

# folders of images in the published archives of Flickr8k and Flickr30k
FLICKR_FOLDERS = (
    "images",
    "Images",
    "Flicker8k_Dataset",  # spelt so in the published archive
    "Flickr8k_Dataset",
    "flickr30k-images",
    "flickr30k_images",
    ".",
)

_DATA_FILE_ENDINGS = (".csv", ".tsv", ".txt", ".parquet", ".pq", ".json", ".tar")

# A teacher reads about 77 tokens, 300 characters. Byte-pair encoding is quadratic in the length of a word: 4 s for a
# word of this length, half an hour for 500,000.
MAX_CAPTION_CHARACTERS = 16_384

ProblemKind = Literal[
    "missing-file",  # listed by the dataset, not on disk
    "unreadable-file",  # on disk, but its bytes cannot be read
    "no-caption",  # an image that no caption names
    "no-image",  # a caption whose image is not in the dataset
    "empty-caption",  # only white space
    "duplicate-id",  # a second sample with the same sample_id; the first one stays
    "bad-record",  # a line, row or member without the published form
]


@dataclass(frozen=True)
class Sample:
    """Image and its captions, as listed in the published dataset.

    Attributes:
        sample_id: permanent name of the image, unique in the dataset (a file name, a COCO id, a tar key).
        uri: path relative to the dataset's root, an absolute path, or a URL.
        split: published name of the split, ``""`` if there is none.
        captions: in published order, stripped of surrounding white space. Empty only in ``labelled`` datasets.
        offset: first byte of the image inside ``uri`` (a member of a tar), -1 for the whole file.
        length: number of bytes from ``offset``, -1 for the whole file.
    """

    sample_id: str
    uri: str
    split: str
    captions: tuple[str, ...]
    offset: int = -1
    length: int = -1


@dataclass(frozen=True)
class Problem:
    """Part of the dataset that gets no row in the cache, and why.

    Attributes:
        kind: one of the fixed kinds, for counting.
        where: the sample_id, file, line or row concerned.
        detail: description in one sentence. Both are made printable.
        lost_image: True if an image gets no row because of this. A lost caption or a second listing loses no image, so
            that images = rows + lost images.
    """

    kind: ProblemKind
    where: str
    detail: str
    lost_image: bool

    def __post_init__(self) -> None:
        for name in ("where", "detail"):
            object.__setattr__(self, name, printable(getattr(self, name)))


Record: TypeAlias = Sample | Problem


@dataclass
class SampleSet:
    """Dataset as read from disk: ``samples`` in row order, ``problems`` in the order of reading."""

    kind: str
    root: str
    samples: list[Sample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def num_captions(self) -> int:
        """Number of captions of all samples."""
        return sum(len(sample.captions) for sample in self.samples)


def clean_captions(sample_id: str, captions: Iterable[str]) -> tuple[tuple[str, ...], list[Problem]]:
    """Strip captions, drop empty and overlong ones, and repair invalid UTF-8.

    Adapters decode with ``errors="surrogateescape"``. Here each invalid byte, and each lone surrogate from JSON's
    ``\\ud83d``, becomes U+FFFD; the caption stays and gets a ``bad-record`` problem. A caption of more than
    ``MAX_CAPTION_CHARACTERS`` is dropped with a ``bad-record`` problem. All other text stays unchanged, also line
    breaks, NUL, HTML entities and ``<end_of_text>``. None of these problems loses the image.
    """
    texts: list[str] = []
    problems: list[Problem] = []
    for number, caption in enumerate(captions):
        text, replaced = NOT_TEXT.subn("\ufffd", caption.strip())
        kind, detail = _caption_problem(number, text, replaced)
        if kind is not None:
            problems.append(Problem(kind, sample_id, detail, lost_image=False))
        if text and len(text) <= MAX_CAPTION_CHARACTERS:
            texts.append(text)
    return tuple(texts), problems


def _caption_problem(number: int, text: str, replaced: int) -> tuple[ProblemKind | None, str]:
    if not text:
        return "empty-caption", f"caption {number} is empty"
    if len(text) > MAX_CAPTION_CHARACTERS:
        return "bad-record", f"caption {number} has {len(text):,} characters, the most is {MAX_CAPTION_CHARACTERS:,}"
    if replaced:
        return "bad-record", f"caption {number} is not UTF-8; {replaced} byte(s) became U+FFFD"
    return None, ""


def sample_or_problem(
    sample_id: str, uri: str, split: str, captions: Iterable[str], offset: int = -1, length: int = -1
) -> Iterator[Record]:
    """Yield the sample with its clean captions, or a problem: no caption, or a name that no cache can hold."""
    for what, text in (("sample_id", sample_id), ("path", uri), ("split", split)):
        unfit = _unfit_name(text)
        if unfit:
            detail = f"the {what} {printable(text)!r} holds {unfit}"
            yield Problem("bad-record", sample_id, detail, lost_image=True)
            return
    texts, problems = clean_captions(sample_id, captions)
    yield from problems
    if texts:
        yield Sample(sample_id, uri, split, texts, offset, length)
    else:
        yield Problem("no-caption", sample_id, f"{uri}: no caption names this image", lost_image=True)


def _unfit_name(text: str) -> str:
    """Return why a cache cannot hold a name, or an empty text if it can."""
    if len(text) > MAX_NAME_CHARACTERS:
        return f"{len(text):,} characters, the most is {MAX_NAME_CHARACTERS:,}"
    if NOT_TEXT.search(text):
        return "bytes that are not UTF-8; rename the file"
    if CONTROL.search(text):
        return "a NUL, a line break or another control character; rename the file"
    if redact(text) != text:
        return (
            "a password, a signature or a key, which a cache would keep for as long as it lives; "
            "name the file without it (credentials belong into the environment), or download it"
        )
    return ""


def uri_below(folder: str, name: str) -> str | None:
    """Return ``folder/name`` for a name in a dataset file, or None if it would leave the folder.

    A downloaded list must not be able to name ``/etc/passwd``, ``../../x`` or a URL; a user's own table may.
    """
    if not name or "://" in name or posixpath.isabs(name) or posixpath.normpath(name).split("/")[0] == "..":
        return None
    return posixpath.join(folder, name) if folder not in ("", ".") else name


def local_folder(kind: str, root: str) -> Path:
    """Return the root as a folder on this machine.

    Raises:
        UsageError: it is a URL or a file, or does not exist.
    """
    path = Path(root)
    if path.is_dir():
        return path
    what = "a URL, and this form is read from a local folder" if "://" in root else "no folder"
    if path.is_file():
        what = "a file"
    raise UsageError(f"{root} is {what}; write {kind}:FOLDER")


def data_folder(root: str) -> str:
    """Return the folder that relative uris start from.

    That is ``root`` itself, the folder of the file ``root`` (a table, a JSON, a tar), or for a pattern such as
    ``shards/{000..003}.tar`` the part before the first brace.
    """
    path = Path(root)
    if "://" not in root and path.exists():
        return str((path.parent if path.is_file() else path).resolve())
    folder = root
    if "{" in root:
        folder = root[: root.index("{")].rpartition("/")[0]
    elif root.lower().split("?")[0].endswith(_DATA_FILE_ENDINGS):
        folder = root.rpartition("/")[0]
    return folder if "://" in root else str(Path(folder).resolve())


def image_folders(
    root: Path, places: Mapping[str, Sequence[str]], names: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Find the folder of each group of images (a split, COCO's ``filepath``) below ``root``.

    Args:
        root: the dataset's root.
        places: candidates of each group, relative or absolute, the most likely first; ``"."`` is the root itself.
        names: file names of each group's images. One match is enough.

    Returns:
        For each group the first candidate with one of the images in it; else one that exists and is not the root, or
        the first, so that its images are reported missing one by one.

    Raises:
        UsageError: no group has a folder.
    """
    folders = {group: _image_folder(root, several, names[group]) for group, several in places.items()}
    if not any(folders.values()):
        looked = ", ".join(f"{place}/" for several in places.values() for place in several if place != ".")
        raise UsageError(
            f"{root}: no folder of images; looked for {looked or 'none, as no image is listed'}; found "
            f"{contents(root)}; give it with ?images=FOLDER"
        )
    return {group: folder or places[group][0] for group, folder in folders.items()}


def _image_folder(root: Path, places: Sequence[str], names: Sequence[str]) -> str | None:
    existing = [folder for folder in places if (root / folder).is_dir()]
    for folder in existing:
        below = (uri_below(str(root / folder), name) for name in names[:50])
        if any(path is not None and _is_file(path) for path in below):
            return folder
    return next((folder for folder in existing if folder != "."), None)


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name that is too long or contains NUL
        return False


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading bytes; refuse a pipe, a socket or a device.

    The check comes before opening, which may block for ever or affect hardware.

    Raises:
        FileNotFoundError: the file does not exist.
        IsADirectoryError: it is a folder.
        OSError: it is no regular file, or cannot be read.
    """
    _require_regular(path, Path(path).stat().st_mode)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    file = open(descriptor, "rb")  # noqa: PTH123, SIM115 - a descriptor; the caller closes it
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)  # the path may have been swapped since the check
    except OSError:
        file.close()
        raise
    return file


def _require_regular(path: str | Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a folder, not a file")
    if not stat.S_ISREG(mode):
        kinds = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
        kind = next((name for test, name in kinds if test(mode)), "a device")
        raise OSError(f"{path} is {kind}, not a file; it is not opened")


def contents(folder: Path, most: int = 12) -> str:
    """List a folder's contents for a message."""
    names = sorted(printable(entry.name) + "/" * entry.is_dir() for entry in folder.iterdir())
    if not names:
        return "nothing"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def open_text(path: Path) -> Any:
    """Open a text file as UTF-8 with or without a byte-order mark. Invalid bytes become lone surrogates.

    :func:`clean_captions` repairs them.
    """
    return io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", errors="surrogateescape", newline="")


def read_json(path: Path) -> Any:
    """Read the JSON value of one file.

    Raises:
        UsageError: not JSON.
    """
    with open_text(path) as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}: not JSON ({printable(str(error))}); download or copy it again") from None


def read_json_object(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Read the JSON object of one file, with lists under ``keys``.

    Raises:
        UsageError: not JSON, or not an object with a list under each key.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UsageError(f"{path}: holds a {type(content).__name__}, an object with {', '.join(keys)} is wanted")
    for key in keys:
        if not isinstance(content.get(key), list):
            raise UsageError(f"{path}: no list {key!r}; its keys are {printable(', '.join(sorted(content))) or 'none'}")
    return content


@dataclass(frozen=True)
class Listing:
    """Images of a dataset with their classes.

    Attributes:
        images: images without captions, in order.
        problems: problems of the same split, and of whole tars.
        keys: class of each image, by the dataset's own key: a folder name or a number.
        own: the dataset's own class names by key, in its order.
        named: whether these are names, not only numbers.
        templates: the dataset's own templates, if any.
        order_of: prompt set whose class names are in the dataset's order, if known; ``any`` if every list of names is
            taken to be in this order.
    """

    where: str
    images: list[Sample]
    keys: list[str]
    problems: list[Problem]
    own: dict[str, str]
    named: bool
    templates: tuple[str, ...] = ()
    order_of: str = ""
