"""Name of a dataset, ``KIND:PATH?option=value``: parsed, completed and checked in little time. Imports no torch."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import parse_qsl, quote

from teacher_cache.pipeline.data.datasets.adapters import ADAPTERS, KIND_OF, PART, check_form, require_kind
from teacher_cache.pipeline.data.datasets.files import (
    CAPTION_FILES,
    SPLIT_NAMES,
    contents,
    flickr_text_folders,
    is_columnar,
    is_image,
    is_table,
    require_there,
)
from teacher_cache.pipeline.data.datasets.part import Part
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.places import SPREADSHEET, described, kind_of
from teacher_cache.storage.observe.logs import say
from teacher_cache.storage.observe.quantities import counted
from teacher_cache.storage.observe.safe_text import NOT_TEXT, printable, redact

_FOLDERS_LOOKED_AT = 20
_OF_PICTURES = ("images", "imagefolder", "labelled")  # kinds of a folder with nothing but pictures


@dataclass(frozen=True)
class DatasetSpec:
    """Name of a dataset: ``KIND:PATH`` with optional ``?key=value&...`` settings of the adapter.

    A ``~`` at the start of the path or of a setting's value becomes the home folder.
    """

    kind: str
    root: str
    options: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", _at_home(self.root))
        object.__setattr__(self, "options", tuple((name, _at_home(value)) for name, value in self.options))
        texts = (self.root, *(text for option in self.options for text in option))
        if any("\0" in text or NOT_TEXT.search(text) for text in texts):
            raise UsageError(f"dataset {self.kind}:{printable(self.root)} has a NUL in it or is not UTF-8; rename it")
        refuse_credentials(f"{self.kind}:", self.root)
        for name, value in self.options:
            refuse_credentials(f"dataset setting {name}=", value)
        refuse_credentials("", str(self))  # the manifest keeps this text

    @property
    def part(self) -> Part | None:
        """Part of the dataset; None for all of it."""
        text = dict(self.options).get(PART)
        return None if text is None else Part.parse(text)

    @classmethod
    def parse(cls, text: str) -> DatasetSpec:
        """Read ``flickr:/data/flickr8k`` or ``table:/data/pairs.parquet?caption=title``.

        Without ``KIND:`` the kind follows from the path, and a line on stderr says which.

        Raises:
            UsageError: the kind is unknown, or none is given and none follows; the path is empty; a setting is
                repeated; or there is a password, signature or key.
        """
        shown = printable(text)
        kind, colon, rest = text.partition(":")
        if not colon or (rest.startswith("//") and kind not in ADAPTERS):
            kind, rest = "", text
        else:
            require_kind(kind)
        path, question, query = rest.rpartition("?")
        if not question or "=" not in query:
            path, query = rest, ""
        _refuse_misread_settings(kind, path)
        if not path:
            raise UsageError(f"dataset {shown!r} has no path; write {kind or 'KIND'}:PATH")
        options = tuple(parse_qsl(query, keep_blank_values=True))
        keys = [key for key, _ in options]
        if len(set(keys)) < len(keys):
            raise UsageError(f"dataset {shown!r} gives a setting twice; it has {printable(', '.join(keys))}")
        # a signed URL's parameters look like settings
        refuse_credentials(f"{kind}:" * bool(kind), rest)
        return cls(kind or _guessed_kind(path), path, options)

    def __str__(self) -> str:
        # quoted only as far as parse() needs: the % of holdout=10% is no escape
        query = "&".join(f"{quote(key)}={quote(value, safe='/:,{}')}" for key, value in self.options)
        query = re.sub("%25(?![0-9A-Fa-f]{2})", "%", query)
        return f"{self.kind}:{self.root}" + (f"?{query}" if query else "")


def check_dataset(text: str) -> DatasetSpec:
    """Return a dataset's parsed name if its kind, settings, path and form are right. Reads a header at most.

    Raises:
        UsageError: see :meth:`DatasetSpec.parse`; or the kind has no such setting, the path does not exist, the table
            has no such column, or the folder does not have the form of this kind.
    """
    spec = DatasetSpec.parse(text)
    try:
        check_form(spec.kind, spec.root, dict(spec.options))
    except UsageError as error:
        kind = ""
        if spec.kind not in _OF_PICTURES and Path(spec.root).is_dir():
            with suppress(UsageError):
                kind = _kind_of_folder(Path(spec.root))
        if kind not in _OF_PICTURES:
            raise
        raise UsageError(f"{spec.root}: it holds pictures: write {kind}:{spec.root}") from error
    return spec


def refuse_credentials(what: str, text: str) -> None:
    """Check that a text has no secret, since manifests live long and are shared.

    Raises:
        UsageError: it has one. The message hides it and says where it belongs.
    """
    if redact(text) != text:
        raise UsageError(
            f"{what}{printable(text)} holds a password, a signature or a key, which the cache would keep. Give "
            "credentials through the environment or the storage library's own files, or download the data first."
        )


def _refuse_misread_settings(kind: str, path: str) -> None:
    """Check that a path holds no settings that were meant to stand behind it."""
    try:
        if "://" in path or Path(_at_home(path)).exists():
            return
    except OSError:  # no path at all: the adapter says so
        return
    before, mark, wrong = path.partition("&" if "&" in path else "?")
    shown = printable(f"{kind}:" * bool(kind) + before)
    if mark == "&" and "=" in wrong and "?" not in before:
        raise UsageError(f"{shown}: settings follow a question mark: '{shown}?{printable(wrong)}'")
    if mark == "?" and "=" in wrong:
        raise UsageError(
            f"{shown}: has two question marks; join settings by &: '{shown}?{printable(wrong)}&NAME=VALUE'"
        )
    if mark == "?" and wrong.isidentifier():
        raise UsageError(f"{shown}: the setting {wrong} has no value: '{shown}?{wrong}=VALUE'")


def _at_home(text: str) -> str:
    return str(Path(text).expanduser()) if text == "~" or text.startswith("~/") else text


@cache
def _guessed_kind(path: str) -> str:
    """Return the kind that follows from a path, and say it on stderr, once in a process.

    Raises:
        UsageError: none follows, or nothing is there.
    """
    shown = printable(path)
    if Path(_at_home(path)).is_dir() and (place := described(_at_home(path))):
        raise UsageError(f"{printable(place)}; name the pictures, as KIND:PATH")
    try:
        kind = _kind_of_name(path) or _kind_of_folder(require_there(_at_home(path)))
    except (OSError, ValueError) as error:  # UsageError is a ValueError
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"dataset {shown!r} cannot be read ({printable(str(error))})") from error
    say(f"{shown}: no kind given, read as {kind}:{shown}{_OTHER_READING.get(kind, '').format(shown)}")
    return kind


# what a folder of these kinds could be just as well
_OTHER_READING = {
    "imagefolder": ", with captions made from the folders' names; for the pictures without captions write images:{}",
    "images": ", with a caption where NAME.txt is beside NAME.jpg",
}


def _kind_of_name(path: str) -> str:
    """Return the kind of a file by its name, or an empty text."""
    name = path.lower().split("?")[0]
    if is_table(path) or kind_of(path) == SPREADSHEET:  # the table says what to do
        return "table"
    if name.endswith(".tar"):
        return "webdataset"
    return "karpathy" if Path(name).match("dataset*.json") else ""


_NOT_READ: dict[str | tuple[str, ...], str] = {
    ".txt": "if it is a table of path and caption, write table:{}",
    (".jsonl", ".json"): "lines of JSON are not read: save it as CSV or Parquet with the columns path and caption",
    (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"): "tars are read in place: unpack the compression first",
}


def _kind_of_folder(path: Path) -> str:
    """Return the kind of a folder by what is in it.

    Raises:
        UsageError: it has the form of none, or holds a table that may name its pictures.
    """
    shown = printable(str(path))
    if not path.is_dir():
        advice = next(
            (text for ending, text in _NOT_READ.items() if shown.lower().endswith(ending)), f"write {KIND_OF}"
        )
        raise UsageError(f"dataset {shown!r} has no kind, and its ending shows none; {advice.format(shown)}")
    forms = {
        "table": (path / name for name in ("dataset_dict.json", "dataset_info.json")),  # save_to_disk of datasets
        "coco": (path / "annotations").glob("captions_*.json"),
        "karpathy": path.glob("dataset_*.json"),
        "flickr": (folder / name for folder in flickr_text_folders(path) for name in CAPTION_FILES),
        "webdataset": (tar for folder in (path, *_folders_in(path)) for tar in folder.glob("*.tar")),
    }
    for kind, files in forms.items():
        if any(file.is_file() for file in files):
            return kind
    if any(is_columnar(file.name) for folder in (path, *_folders_in(path)) for file in folder.iterdir()):
        return "table"
    tables = sorted(file.name for file in path.iterdir() if is_table(file.name))
    if not tables and (kind := _kind_of_pictures(path)):
        return kind
    example = f"; for a table in it write table:{shown.rstrip('/')}/{printable(tables[0])}" if tables else ""
    raise UsageError(f"dataset {shown!r} has no kind, and holds {contents(path)}{example}; write {KIND_OF}")


def _kind_of_pictures(folder: Path) -> str:
    """Return images, imagefolder if several folders of nearly all pictures look like classes, or an empty text."""
    classes, inside, beside = set(), 0, len(_pictures_in(folder))
    for inner in _folders_in(folder):
        places = [inner]
        if inner.name.casefold() in SPLIT_NAMES:
            places = _folders_in(inner) or places
        for place in places:
            pictures = _pictures_in(place)
            inside += len(pictures)
            captioned = any(picture.with_suffix(".txt").is_file() for picture in pictures)
            if pictures and not captioned and place.name.casefold() not in SPLIT_NAMES:
                classes.add(place.name)
    if len(classes) < 2:
        return "images" if inside or beside else ""
    if 20 * beside <= inside:
        return "imagefolder"
    where = printable(str(folder))
    say(
        f"{where}: folders of pictures, and {counted(beside, 'picture')} beside them: read as images:{where}, without "
        f"classes. For the classes write imagefolder:{where}"
    )
    return "images"


def _folders_in(folder: Path) -> list[Path]:
    folders = (entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return sorted(folders)[:_FOLDERS_LOOKED_AT]


def _pictures_in(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if is_image(entry)]
