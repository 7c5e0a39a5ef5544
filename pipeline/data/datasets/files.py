"""Files of datasets: where a dataset's lists and images are, and how they are opened."""

from __future__ import annotations

import codecs
import io
import json
import os
import posixpath
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.places import similar_name
from teacher_cache.storage.observe.logs import hint
from teacher_cache.storage.observe.quantities import counted
from teacher_cache.storage.observe.safe_text import NOT_TEXT, printable

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

# not Flickr8k.lemma.token.txt: it holds lemmas, not captions
CAPTION_FILES = ("captions.txt", "captions.csv", "results.csv", "Flickr8k.token.txt", "results_20130124.token")

PARQUET_ENDINGS = (".parquet", ".pq")
_COLUMNAR_ENDINGS = (*PARQUET_ENDINGS, ".arrow", ".feather")
TABLE_ENDINGS = (".csv", ".tsv", *_COLUMNAR_ENDINGS)
_DATA_FILE_ENDINGS = (*TABLE_ENDINGS, ".txt", ".json", ".tar")


def is_image(path: Path) -> bool:
    """Return whether a file is an image by its ending; hidden files are not."""
    return path.name.lower().endswith(IMAGE_ENDINGS) and not path.name.startswith(".")


def is_table(name: str) -> bool:
    """Return whether a file is a table by its ending."""
    return name.lower().split("?")[0].endswith(TABLE_ENDINGS)


def is_columnar(name: str) -> bool:
    """Return whether a file is Parquet or Arrow by its ending."""
    return name.lower().split("?")[0].endswith(_COLUMNAR_ENDINGS)


def entries_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """List folders and files of a folder by name, without hidden ones."""
    entries = sorted(
        (entry for entry in folder.iterdir() if not entry.name.startswith(".")), key=lambda path: path.name
    )
    return [entry for entry in entries if entry.is_dir()], [entry for entry in entries if not entry.is_dir()]


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and of the folders below it, each by name, without hidden ones."""
    waiting = [folder]  # a stack, not recursion: folders may be nested deeper than the recursion limit
    while waiting:
        folders, files = entries_in(waiting.pop())
        yield from files
        # a link may form a loop
        waiting.extend(inner for inner in reversed(folders) if not inner.is_symlink())


def flickr_text_folders(folder: Path) -> tuple[Path, Path]:
    """Return where Flickr8k and Flickr30k may have their captions and lists."""
    return folder, folder / "Flickr8k_text"


def require_there(root: str) -> Path:
    """Return the root as a path on this machine.

    Raises:
        UsageError: it does not exist. The message names the most similar path, or what is there; for a relative path
            in full, since a worker of Prefect's may run in another folder than its user.
    """
    path = Path(root)
    if path.exists():
        return path
    path = path.absolute()
    while not path.parent.exists():
        path = path.parent
    similar = similar_name(path)
    instead = f"{path.parent / similar} is" if similar else f"{path.parent} holds {contents(path.parent)}"
    missing = "not there" if path == Path(root) else f"{path} is not there"
    if not Path(root).is_absolute():
        instead += "; write the whole path if it lies elsewhere"
    raise UsageError(f"{printable(root)}: {printable(missing)}; {printable(instead)}")


def found_instead(folder: str, uri: str) -> str:
    """Return where a listed file is that is not where it is said to be: a path from the folder, or an empty text.

    Looked for: with slashes for backslashes, without its first folders, in a folder below, with the ending of an image.
    """
    base, path = Path(folder), PurePosixPath(uri.replace("\\", "/"))
    if "://" in folder or "://" in uri or path.is_absolute() or not base.is_dir():
        return ""
    guesses = [
        *(PurePosixPath(*path.parts[first:]) for first in range(len(path.parts))),
        *(PurePosixPath(inner.name, path.name) for inner in entries_in(base)[0]),
        *(path.with_name(path.name + ending) for ending in IMAGE_ENDINGS),
    ]
    return next((str(guess) for guess in guesses if _is_file(str(base / guess))), "")


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
    what = "a URL, and this form is read from a local folder"
    if "://" not in root:
        path = require_there(root)
        if path.is_dir():
            return path
        if is_table(root):
            raise UsageError(f"{root} is a table: write table:{root}")
        what = "a file"
    raise UsageError(f"{root} is {what}; write {kind}:FOLDER")


def data_folder(root: str) -> str:
    """Return the folder that relative uris start from.

    That is ``root`` itself, the folder of the file ``root`` (a table, a JSON, a tar), or for a pattern such as
    ``shards/{000..003}.tar`` or ``shards/*.tar`` the folder before it.
    """
    path = Path(root)
    if "://" not in root and path.exists():
        return str((path.parent if path.is_file() else path).resolve())
    folder = root
    if is_pattern(root):
        folder = before_pattern(root)
    elif root.lower().split("?")[0].endswith(_DATA_FILE_ENDINGS):
        folder = root.rpartition("/")[0]
    return folder if "://" in root else str(Path(folder).resolve())


def is_pattern(root: str) -> bool:
    """Return whether a root stands for several files."""
    return "{" in root or "*" in root


def before_pattern(root: str) -> str:
    """Return the folder before the first brace or star."""
    return re.split(r"[{*]", root)[0].rpartition("/")[0]


def split_in_name(uri: str, folder: str) -> str:
    """Return the split that a data file's name, its folders from the nearest up, or the root names; else nothing."""
    parts = PurePosixPath(uri)
    for words in (re.split(r"[-_.]", parts.stem), *([name] for name in reversed(parts.parts[:-1]))):
        for word in words:
            if word in SPLIT_NAMES:
                return word
    name = PurePosixPath(folder).name
    return name if name in SPLIT_NAMES else ""


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
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    names = sorted(printable(entry.name) + "/" * entry.is_dir() for entry in entries)
    if not names:
        return "nothing"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def open_text(path: Path, encoding: str = "utf-8") -> io.TextIOWrapper:
    """Open a text file. Invalid bytes become lone surrogates, which ``clean_captions`` repairs."""
    return as_text(open_regular(path), encoding)


def say_several_lines(root: str, texts: int) -> None:
    """Say how many texts of several lines were read as one caption each, if any."""
    if texts:
        hint(f"{root}: {counted(texts, 'text')} of several lines, read as one caption each; ?txt=lines splits them")


def as_text(file: IO[bytes], encoding: str = "utf-8") -> io.TextIOWrapper:
    """Decode an open file as :func:`open_text` does. UTF-8 may begin with a byte-order mark.

    Raises:
        UsageError: no text encoding has this name.
    """
    name = text_encoding(encoding)
    return io.TextIOWrapper(
        file, encoding="utf-8-sig" if name == "utf-8" else name, errors="surrogateescape", newline=""
    )


def text_encoding(name: str) -> str:
    """Return Python's own name of a text encoding.

    Raises:
        UsageError: no text encoding has this name.
    """
    try:
        codec = codecs.lookup(name)
        if codec._is_text_encoding:
            return codec.name
    except (LookupError, ValueError):
        pass
    raise UsageError(f"encoding={printable(name)!r} is not known; write for example encoding=latin-1")


def require_utf8(text: str, where: str) -> None:
    """Check that a text was decoded without a loss.

    Raises:
        UsageError: it holds bytes that are not UTF-8. The message names the setting that reads them.
    """
    wrong = NOT_TEXT.search(text)
    if wrong:
        shown = printable(text[max(wrong.start() - 20, 0) : wrong.start() + 20].strip())
        raise UsageError(
            f"{where}: not UTF-8 at {shown!r}. Save it as UTF-8, or name its encoding, for example ?encoding=cp1252 "
            "(Windows, Western Europe); with ?encoding=utf-8 broken characters become U+FFFD and are counted"
        )


def read_json(path: Path, advice: str = "download or copy it again") -> Any:
    """Read the JSON value of one file.

    Args:
        advice: what to do if it is not JSON.

    Raises:
        UsageError: not JSON.
    """
    with open_text(path) as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}: not JSON ({printable(str(error))}); {advice}") from None


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
