"""Names of the tars of a dataset: a folder, a file, or a pattern with braces or ``*``."""

from __future__ import annotations

import re
from pathlib import Path

from teacher_cache.pipeline.data.datasets.files import before_pattern, contents, data_folder, is_pattern, require_there
from teacher_cache.storage.errors import UsageError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_MOST_TARS = 1_000_000


def tar_names(root: str) -> list[str]:
    """Return the absolute paths or URLs of tars, in order.

    Raises:
        UsageError: no tar has such a name, or the names of a folder behind a URL are asked for.
    """
    if "://" not in root:
        path = Path(root)
        if path.is_file():
            return [str(path.parent.resolve() / path.name)]
        if path.is_dir():
            tars = sorted(str(tar) for tar in path.resolve().rglob("*.[tT][aA][rR]") if tar.is_file())
            if not tars:
                packed = "; tars are read in place: unpack those that are compressed" * any(path.rglob("*.tar.*"))
                raise UsageError(f"{root}: no *.tar in or below it; found {contents(path)}{packed}")
            return tars
        if ".tar," in root or "::" in root:
            raise UsageError(f"{root}: commas and :: join no tars; write webdataset:FOLDER or :FOLDER/{{000,001}}.tar")
        if not is_pattern(root):
            require_there(root)
            raise UsageError(f"{root} is no file; write webdataset:FOLDER, :FILE.tar or :FOLDER/{{000..003}}.tar")
        root = str(path.absolute())
        # uris have this prefix too, despite symbolic links in the pattern
        root = data_folder(root) + root[len(before_pattern(root)) :]
        return [tar for name in _expand(root) for tar in _listed(name)]
    elif "*" in root or not root.split("?")[0].endswith(".tar"):
        folder = root.partition("/*")[0]
        raise UsageError(f"{root}: a folder behind a URL is not listed; write its tars as {folder}/{{000..003}}.tar")
    return _expand(root)


def _listed(name: str) -> list[str]:
    """Return the files that a name with ``*`` stands for, or a name without one."""
    if "*" not in name:
        return [name]
    folder = before_pattern(name)
    paths = Path(folder).glob(name[len(folder) + 1 :])
    if tars := sorted(str(path) for path in paths if path.suffix.lower() == ".tar" and path.is_file()):
        return tars
    raise UsageError(f"{name}: no tar has such a name; {folder} holds {contents(require_there(folder))}")


def _expand(pattern: str) -> list[str]:
    """Return every name of a pattern: ``{000..003}`` counts, ``{a,b}`` lists. Braces do not nest."""
    braces = _BRACES.search(pattern)
    if braces is None:
        return [pattern]
    counted = _RANGE.fullmatch(braces[1])
    if counted:
        first, last = counted.groups()
        numbers = range(int(first), int(last) + 1)
        if len(numbers) > _MOST_TARS:
            raise UsageError(f"{{{braces[1]}}} stands for {len(numbers):,} tars; write one of at most {_MOST_TARS:,}")
        words = [str(number).zfill(len(first)) for number in numbers]
    else:
        words = braces[1].split(",")
    tails = _expand(pattern[braces.end() :])
    if len(words) * len(tails) > _MOST_TARS:
        raise UsageError(f"{pattern} stands for {len(words) * len(tails):,} tars; at most {_MOST_TARS:,} are read")
    return [pattern[: braces.start()] + word + tail for word in words for tail in tails]
