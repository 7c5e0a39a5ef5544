"""Kinds of places: what lies at a local path, told by the record in it. Standard library only."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

MANIFEST_KEY, BACKUP_KEY = "manifest.json", "manifest.backup.json"

CACHE, RUN, DEPLOYED, REGISTRY = "cache", "run", "deployed student", "registry of students"
RUN_FILE, EXPORT, INDEX = "run file", "folder of exported rows", "search index"
_RECORDS = {MANIFEST_KEY: CACHE, BACKUP_KEY: CACHE, "run.json": RUN, "deploy.json": DEPLOYED, "search.json": INDEX}
_RECORDS |= {"candidates": REGISTRY, "export.json": EXPORT}
TABLE, TAR, SPREADSHEET = "table", "tar of images", "spreadsheet"
_ENDINGS = {".toml": RUN_FILE, ".tar": TAR, **dict.fromkeys((".csv", ".tsv", ".parquet", ".arrow"), TABLE)}
_ENDINGS |= dict.fromkeys((".xlsx", ".xls", ".ods"), SPREADSHEET)
# the field in a record that names where the place comes from
_ORIGINS = {RUN: ("run.json", "config", "cache"), DEPLOYED: ("deploy.json", "run")}
_ORIGINS |= {EXPORT: ("export.json", "cache"), INDEX: ("search.json", "cache")}
# how each kind is typed: --SETTING VALUE
_TYPED = {CACHE: ("cache", ""), RUN: ("run", ""), DEPLOYED: ("deployed", "")}
_TYPED |= {TABLE: ("dataset", "table:"), TAR: ("dataset", "webdataset:")}


def kind_of(location: str) -> str:
    """Return the kind of what lies at a local path. Empty: a URL, nothing, or nothing known."""
    if "://" in location:
        return ""
    path = Path(location).expanduser()
    if path.is_dir():
        return next((kind for name, kind in _RECORDS.items() if (path / name).exists()), "")
    return _ENDINGS.get(path.suffix.lower(), "file") if path.is_file() else ""


def described(location: str) -> str:
    """Return a sentence without its end: ``r1 is a run, of b.cache``. Empty if :func:`kind_of` is."""
    kind = kind_of(location)
    return f"{location} is a {kind}{', of ' + origin if (origin := _origin(location, kind)) else ''}" if kind else ""


def typed_as(location: str, settings: Collection[str]) -> str:
    """Return ``r1 is a run: --run r1`` if a command has a setting for what lies here. Empty: it has none."""
    setting, prefix = _TYPED.get(kind_of(location), ("", ""))
    return f"{described(location)}: --{setting} {prefix}{location}" if setting in settings else ""


def misplaced(location: str, wanted: str, settings: Collection[str] = ()) -> str:
    """Return what is wrong with a path where another kind is wanted. Empty: nothing is known to be.

    Args:
        settings: settings of the command; one of them may take what lies here.
    """
    if kind_of(location) in ("", wanted):
        return ""
    example = ": --registry students" if wanted == REGISTRY and "registry" in settings else ""
    if (kind_of(location), wanted) == (RUN, DEPLOYED):
        example = f": teacher-cache deploy --run {location} --out deployed/a makes one of it"
    typed = "" if example else typed_as(location, settings)
    return typed or f"{described(location)}; a {wanted} is wanted here{example}"


def similar_names(location: str, wanted: str = "") -> str:
    """Return `` Did you mean b.cache?`` for a path where nothing is, if its folder holds a similar name.

    Args:
        wanted: kind of place. Only such places are named, for a folder those in it.
    """
    path = Path(location).expanduser()
    if "://" in location or not path.parent.is_dir() or (path.exists() and not wanted):
        return ""
    if path.is_dir():
        hints = {str(path / name): f" It holds {path / name}." for name in _names(path)}
        for name in _names(path.parent):
            if name.startswith(f"{path.name}."):  # photos.cache beside photos
                other = str(Path(location).with_name(name))
                hints[other] = f" Did you mean {other}?"
        return next((hint for place, hint in hints.items() if kind_of(place) == wanted), "")
    name = similar_name(path)
    similar = str(Path(location).with_name(name)) if name else ""
    return f" Did you mean {similar}?" if similar and wanted in ("", kind_of(similar)) else ""


def similar_name(path: Path) -> str:
    """Return the most similar name in a path's folder, in whatever case. Empty: none is similar."""
    by_case = {name.lower(): name for name in _names(path.parent)}
    return next((by_case[name] for name in get_close_matches(path.name.lower(), by_case, n=1, cutoff=0.7)), "")


def _names(folder: Path) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            # a folder of a million photographs is not compared name by name
            yield from (entry.name for entry in islice(entries, 10_000) if not entry.name.startswith("."))
    except OSError:
        return


def _origin(location: str, kind: str) -> str:
    """Return the place that a record names, relative to the working directory if it is below it."""
    if kind not in _ORIGINS:
        return ""
    name, *fields = _ORIGINS[kind]
    try:
        value = json.loads((Path(location).expanduser() / name).read_bytes())
        for field in fields:
            value = value[field]
        return str(Path(value).relative_to(Path.cwd())) if Path(value).is_relative_to(Path.cwd()) else str(value)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
