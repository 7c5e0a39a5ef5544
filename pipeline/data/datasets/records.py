"""Records that every dataset adapter yields: samples with their captions, and problems."""

from __future__ import annotations

import io
import json
import os
import posixpath
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.safe_text import CONTROL, MAX_NAME_CHARACTERS, NOT_TEXT, printable, redact

# what torchvision's ImageFolder takes for an image, and what else can be decoded
# (``teacher_cache.pipeline.data.images.decode``)
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif", ".avif", ".jfif")

# a folder or a part of a file name that spells one of these names a split; anything else is a name
SPLIT_NAMES = ("train", "val", "valid", "validation", "dev", "test", "trainval", "restval")

_DATA_FILE_ENDINGS = (".csv", ".tsv", ".txt", ".parquet", ".pq", ".json", ".tar")

# A teacher reads 77 tokens or so, about 300 characters. What is far longer is a document in the wrong place, and
# byte-pair encoding takes the square of a word's length: 4 s for one word of this length, half an hour for 500,000.
MAX_CAPTION_CHARACTERS = 16_384

ProblemKind = Literal[
    "missing-file",  # listed by the dataset, not on disk
    "unreadable-file",  # there, but its bytes cannot be read
    "no-caption",  # an image that no caption names
    "no-image",  # a caption whose image is not in the dataset
    "empty-caption",  # nothing left of a caption after stripping white space
    "duplicate-id",  # a second sample with a sample_id already taken; the first one stays
    "bad-record",  # a line, row or member that does not have the published form
]


@dataclass(frozen=True)
class Sample:
    """One image and its captions, as the published form of the dataset lists them.

    Attributes:
        sample_id: names the image for ever; unique in the dataset (a file name, a COCO id, a tar key).
        uri: path relative to the dataset's root, an absolute path, or a URL.
        split: the published name of the split, ``""`` when the form has none.
        captions: one or more, in published order, stripped of surrounding white space.
        offset: first byte of the image inside ``uri`` (a member of a tar), -1 for the whole file.
        length: bytes from ``offset``, -1 for the whole file.
    """

    sample_id: str
    uri: str
    split: str
    captions: tuple[str, ...]
    offset: int = -1
    length: int = -1


@dataclass(frozen=True)
class Problem:
    """Something of the dataset that gets no row in the cache, and why.

    Attributes:
        kind: one of the fixed kinds, so that problems can be counted.
        where: the sample_id, file, line or row concerned.
        detail: one sentence with what was found.
        lost_image: True when an image of the dataset gets no row because of this (a lost caption or a
            second listing of the same image loses none), so that images in = rows + lost images.
    """

    kind: ProblemKind
    where: str
    detail: str
    lost_image: bool


Record: TypeAlias = Sample | Problem


@dataclass
class SampleSet:
    """A dataset as read from disk: ``samples`` in row order, ``problems`` in the order met."""

    kind: str
    root: str
    samples: list[Sample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def num_captions(self) -> int:
        """Captions of all samples."""
        return sum(len(sample.captions) for sample in self.samples)


def clean_captions(sample_id: str, captions: Iterable[str]) -> tuple[tuple[str, ...], list[Problem]]:
    """Strip captions, drop the empty and the endless ones and mend those that are not text.

    Adapters decode with ``errors="surrogateescape"``, so that this one place sees which caption held bytes that
    are not UTF-8: each such byte, and each half of a surrogate pair that JSON's ``\\ud83d`` leaves, becomes
    U+FFFD, the caption stays, and a ``bad-record`` problem says so. One of more than ``MAX_CAPTION_CHARACTERS`` is
    left out with a ``bad-record`` problem. All other text is kept as it is: line breaks, NUL, HTML entities,
    ``<end_of_text>``; the tokenizer knows what it makes of them. No problem from here loses the image.
    """
    texts: list[str] = []
    problems: list[Problem] = []
    for number, caption in enumerate(captions):
        text, replaced = NOT_TEXT.subn("\ufffd", caption.strip())
        kind, detail = _caption_problem(number, text, replaced)
        if kind is not None:
            problems.append(Problem(kind, printable(sample_id), detail, lost_image=False))
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
    """Yield the sample with its clean captions, or the problem that it has none or a name no cache can hold."""
    for what, text in (("sample_id", sample_id), ("path", uri), ("split", split)):
        unfit = _unfit_name(text)
        if unfit:
            detail = f"the {what} {printable(text)!r} holds {unfit}"
            yield Problem("bad-record", printable(sample_id), detail, lost_image=True)
            return
    texts, problems = clean_captions(sample_id, captions)
    yield from problems
    if texts:
        yield Sample(sample_id, uri, split, texts, offset, length)
    else:
        yield Problem("no-caption", sample_id, f"{uri}: no caption names this image", lost_image=True)


def _unfit_name(text: str) -> str:
    """Why a name may not go into a cache, which is kept, copied and shown; empty when it may."""
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
    """``folder/name`` for a name written inside a dataset file; None when it would leave the folder.

    A downloaded list must not be able to name ``/etc/passwd``, ``../../x`` or a URL; what the user writes in a
    table of their own may.
    """
    if not name or "://" in name or posixpath.isabs(name) or posixpath.normpath(name).split("/")[0] == "..":
        return None
    return posixpath.join(folder, name) if folder not in ("", ".") else name


def local_folder(kind: str, root: str) -> Path:
    """Return the root as a folder on this machine.

    Raises:
        UsageError: it is a URL, a file, or not there.
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

    That is ``root`` itself, the folder of the file that ``root`` names (a table, a JSON, a tar), or what stands
    before the first brace of ``shards/{000..003}.tar``.
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


def image_folder(root: Path, candidates: Sequence[str], names: Sequence[str]) -> str | None:
    """Find the folder below ``root`` that holds the images.

    Args:
        root: the dataset's root.
        candidates: relative or absolute folders, the likeliest first; ``"."`` is the root itself.
        names: some file names of images; one found is proof enough.

    Returns:
        The first candidate with one of the names in it; else the first that is there and is not the root, so
        that its images are reported missing one by one; else None.
    """
    existing = [folder for folder in candidates if (root / folder).is_dir()]
    for folder in existing:
        below = (uri_below(str(root / folder), name) for name in names)
        if any(path is not None and _is_file(path) for path in below):
            return folder
    return next((folder for folder in existing if folder != "."), None)


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name too long, or with a NUL in it
        return False


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading bytes; never a pipe, a socket or a device.

    Opening one of those may wait for ever, or do something to hardware, so the look comes before the opening.

    Raises:
        FileNotFoundError: nothing is there.
        IsADirectoryError: a folder is.
        OSError: something else is that is not a file; or it cannot be read.
    """
    _require_regular(path, Path(path).stat().st_mode)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    file = open(descriptor, "rb")  # noqa: PTH123, SIM115 - a descriptor; the caller closes it
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)  # it may have been swapped since
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
    """List what a folder holds, for a message."""
    names = sorted(printable(entry.name) + "/" * entry.is_dir() for entry in folder.iterdir())
    if not names:
        return "nothing"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def open_text(path: Path) -> Any:
    """Open a text file as UTF-8 with or without a byte-order mark; broken bytes become lone surrogates.

    :func:`clean_captions` finds those again.
    """
    return io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", errors="surrogateescape", newline="")


def read_json_object(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Read the JSON object of one file, with lists under ``keys``.

    Raises:
        UsageError: not JSON, or not an object with a list under each key.
    """
    with open_text(path) as file:
        try:
            content = json.load(file)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}: not JSON ({printable(str(error))}); download or copy it again") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: holds a {type(content).__name__}, an object with {', '.join(keys)} is wanted")
    for key in keys:
        if not isinstance(content.get(key), list):
            raise UsageError(f"{path}: no list {key!r}; its keys are {printable(', '.join(sorted(content))) or 'none'}")
    return content


@dataclass(frozen=True)
class Listing:
    """Images of a dataset, with its classes.

    Attributes:
        images: without captions, in order.
        problems: of the same split, and of whole tars.
        keys: the class of each image, by the dataset's own key: the name of a folder, or a number.
        own: the dataset's classes in its order, by key, with the names it has for them.
        named: whether these are names, and not mere numbers.
        templates: its own, if it has some.
        order_of: the prompt set whose class names are known to be in its order, if there is one; ``any`` where it is
            the order of whatever list comes with it.
    """

    where: str
    images: list[Sample]
    keys: list[str]
    problems: list[Problem]
    own: dict[str, str]
    named: bool
    templates: tuple[str, ...] = ()
    order_of: str = ""
