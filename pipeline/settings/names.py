"""Names of teachers, students and devices, checked without importing torch or open_clip."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from string import ascii_lowercase

from teacher_cache.storage.errors import MissingPackageError, UsageError
from teacher_cache.storage.files.places import described, similar_names
from teacher_cache.storage.observe.safe_text import printable

_PIPELINE = Path(__file__).parents[1]
BUNDLED = {"bundled:scenes": _PIPELINE / "models" / "scenes_teacher"}
CHECKPOINT_CONFIG = "open_clip_config.json"
HUB = "hf-hub:"
TRANSFORMERS = "transformers:"
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_USUAL_TAGS = ("openai", "laion2b", "datacomp_xl", "webli", "dfn")
# one of them exists on a machine with a GPU: NVIDIA's driver, in WSL, on Jetson; AMD's driver
_GPU_FILES = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg", "/dev/nvmap", "/dev/kfd")


def presets() -> dict[str, Path]:
    """Return the shipped student configs by name."""
    # in an installed wheel they are in the package, in a clone at the top
    packaged = _PIPELINE / "configs" / "students"
    folder = packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "configs" / "students"
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def first_student(teacher: str | None) -> str:
    """Return the preset to try first with a teacher."""
    return "scenes-small" if teacher == "bundled:scenes" else "vit-ti-32"


def next_run() -> str:
    """Return a folder for the next run, relative to this folder: the first of runs/a to runs/z that is free."""
    return next((run for letter in ascii_lowercase if not Path(run := f"runs/{letter}").exists()), "runs/NAME")


def open_clip_models() -> list[str]:
    """Return the names of open_clip's own model configs.

    Raises:
        MissingPackageError: open_clip is not installed.
    """
    package = find_spec("open_clip")
    if package is None or package.origin is None:
        raise MissingPackageError("open_clip", "a teacher or student")
    return sorted(path.stem for path in (Path(package.origin).parent / "model_configs").glob("*.json"))


def open_clip_tags(model: str) -> list[str] | None:
    """Return the tags of weights that open_clip has for one of its models, read from its source.

    Importing open_clip to ask it would take seconds. None: its source has another form, or derives this model's tags.
    """
    package = find_spec("open_clip")
    if package is None or package.origin is None or model.endswith("-quickgelu"):
        return None
    values = {
        statement.targets[0].id: statement.value
        for statement in ast.parse((Path(package.origin).parent / "pretrained.py").read_text()).body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
    tables = values.get("_PRETRAINED")
    if not isinstance(tables, ast.Dict):
        return None
    for key, value in zip(tables.keys, tables.values, strict=True):
        if isinstance(key, ast.Constant) and key.value == model:
            table = values.get(value.id) if isinstance(value, ast.Name) else value
            return [tag.arg for tag in table.keywords if tag.arg] if isinstance(table, ast.Call) else None
    return []


def teacher_folder(name: str) -> Path | None:
    """Return the folder of a teacher that is named by its folder, or is shipped. None: a built-in name, or a hub's."""
    schema, _, rest = name.partition(":")
    if schema == "local-dir":
        return Path(rest)
    if name.startswith(TRANSFORMERS) and (Path(rest).is_dir() or not _REPOSITORY.fullmatch(rest)):
        return Path(rest)
    return BUNDLED.get(name)


def without_path(recorded: str) -> bool:
    """Return whether a record's name of a teacher is that of a folder, whose path no record has."""
    schema, _, rest = recorded.partition(":")
    return schema == "local-dir" or (recorded.startswith(TRANSFORMERS) and "/" not in rest)


def check_teacher(
    name: str,
    pretrained: str | None,
    models: Callable[[], list[str]] = open_clip_models,
    tags: Callable[[str], list[str] | None] = open_clip_tags,
) -> None:
    """Check the form of a teacher's name, and that open_clip knows it and the tag of its weights.

    Args:
        models: returns the names that open_clip knows.
        tags: returns the tags that it has for a model; None if they are not known.

    Raises:
        UsageError: the name is unknown or has no folder; ``pretrained`` is set for a teacher with its own weights; or
            it is missing, or neither a tag of the model nor a file.
    """
    what = f"teacher {printable(name)!r}"
    schema, _, rest = name.partition(":") if ":" in name else ("", "", name)
    if schema not in ("", "hf-hub", "local-dir", "transformers") and name not in BUNDLED:
        forms = f"an open_clip name, hf-hub:ORG/REPO, local-dir:PATH, transformers:PATH-OR-REPO or {', '.join(BUNDLED)}"
        raise UsageError(f"{what} is not known.{did_you_mean(name, [*BUNDLED])} Write {forms}")
    if schema and pretrained:
        raise UsageError(f"{what} brings its own weights; leave pretrained ({printable(pretrained)!r}) out")
    for package in ("transformers", "sentencepiece") if schema == "transformers" else ():
        if find_spec(package) is None:
            raise MissingPackageError(package, what)
    folder, config = teacher_folder(name), "config.json" if schema == "transformers" else CHECKPOINT_CONFIG
    if folder is not None and not (folder / config).is_file():
        place = described(rest) or f"no {config} in {printable(rest)}"
        kind = "a transformers model, or its ORG/REPO" if schema == "transformers" else "an open_clip model"
        raise UsageError(f"{what}: {place}.{similar_names(rest)} Name the folder of {kind}")
    if schema:
        return
    model = rest.replace("/", "-")
    if model not in (known := models()):
        hint = did_you_mean(rest, known) or f" There are {', '.join(known[:8])} and others."
        raise UsageError(f"{what}: no open_clip model has this name.{hint}")
    _check_weights(what, pretrained, tags(model))


def _check_weights(what: str, pretrained: str | None, tags: list[str] | None) -> None:
    if tags is None or (pretrained and Path(pretrained).is_file()):
        return
    tags = sorted(tags, key=_by_use)
    few = ", ".join(tags[:8]) + (f" and {len(tags) - 8} more" if len(tags) > 8 else "")
    known = f"one of {few}, or a weights file" if tags else "a weights file: open_clip has no tag for it"
    if not pretrained:
        raise UsageError(f"{what} needs --pretrained, {known}; without weights it would be random")
    if pretrained.lower().replace("-", "_") not in tags:  # as open_clip reads it
        hint = did_you_mean(pretrained, tags) or f" Give {known}"
        raise UsageError(f"{what}: --pretrained {printable(pretrained)!r} is no tag of it and no file.{hint}")


def _by_use(tag: str) -> int:
    return next((place for place, start in enumerate(_USUAL_TAGS) if tag.startswith(start)), len(_USUAL_TAGS))


def check_student(name: str) -> None:
    """Check that a student is a preset, a model of open_clip, a file or a name on a hub.

    Raises:
        UsageError: it is none of these. The message names the most similar ones.
    """
    if name in presets() or name.startswith(HUB) or (name.endswith(".json") and Path(name).is_file()):
        return
    if name.endswith(".json") or name not in open_clip_models():
        raise unknown_student(name)


def unknown_student(name: str) -> UsageError:
    """Return the error about a student that is no preset, no model of open_clip and no file."""
    shipped = presets()
    what = f"student {printable(name)!r}"
    if name.endswith(".json"):
        return UsageError(f"{what}: no such file.{similar_names(name)} Presets are {', '.join(shipped)}")
    if (Path(name) / CHECKPOINT_CONFIG).is_file():
        return UsageError(f"{what} is a checkpoint: write {Path(name) / CHECKPOINT_CONFIG}")
    hint = did_you_mean(name, [*shipped, *open_clip_models()])
    near = ", ".join(get_close_matches(name, shipped, n=len(shipped), cutoff=0))
    return UsageError(
        f"{what} is not known.{hint} Presets are {near}; or give an open_clip model name, hf-hub:ORG/NAME, or the "
        "path of a model config ending in .json"
    )


def check_device(name: str) -> None:
    """Check that a machine may have this device, as far as its files tell.

    Raises:
        UsageError: a CUDA device is named on a machine without any.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if name.startswith("cuda") and (hidden or not any(Path(file).exists() for file in _GPU_FILES)):
        raise no_such_device(name, 0)


def no_such_device(name: str, count: int) -> UsageError:
    """Return the error about a CUDA device that this machine does not have."""
    return UsageError(f"device {name!r} asked for, but this machine has {count} CUDA devices; use --device cpu")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean A, B or C?``, or an empty text if none is similar."""
    lowered = {word.lower(): word for word in reversed([*known])}  # of equal names the first
    close = [lowered[word] for word in get_close_matches(name.lower(), lowered, n=3)]
    return f" Did you mean {' or '.join(filter(None, (', '.join(close[:-1]), close[-1])))}?" if close else ""
