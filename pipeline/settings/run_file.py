"""Settings of a stage from a run file, ``--set name=value`` and flags, checked before any model is built.

A run file is TOML with a table per stage, such as ``[precompute]`` and ``[train]``. A top-level ``cache`` applies to
all stages except ``[retrain]``, which makes its own. ``--set`` overrides the run file, flags override both. Paths are
always relative to the working directory.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from teacher_cache.pipeline.settings.base import StageConfig
from teacher_cache.pipeline.settings.names import did_you_mean
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.places import RUN_FILE, TABLE, TAR, kind_of, misplaced

RUN_FILE_STAGES = ("precompute", "train", "evaluate", "retrain")

_C = TypeVar("_C", bound=StageConfig)


def load_config(
    kind: type[_C],
    stage: str,
    path: Path | None,
    flags: dict[str, Any],
    assignments: Sequence[str] = (),
    argument: str | None = None,
) -> _C:
    """Return the checked settings of one stage.

    Args:
        path: the run file, if any.
        flags: settings by name. None: the flag was not typed.
        assignments: texts ``name=value`` of ``--set``. The value is TOML, else a text; a dotted name is nested.
        argument: setting that is typed without a flag, if any.

    Raises:
        UsageError: the file is not TOML, has an unknown table or setting, or a setting is missing or wrong. The
            message names the file and each setting.
    """
    where = f"{path} [{stage}]" if path else stage
    typed = {name for name, value in flags.items() if value is not None and name != argument}
    return check_config(kind, explicit_settings(stage, path, flags, assignments), where, typed)


def explicit_settings(
    stage: str, path: Path | None, flags: dict[str, Any], assignments: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the settings of a stage from run file and command line, unchecked; see :func:`load_config`.

    Raises:
        UsageError: the run file cannot be read, is not TOML or has an unknown table; or an assignment is malformed.
    """
    settings: dict[str, Any] = {}
    if path is not None:
        tables = _read_tables(path, flags)
        if "cache" in tables and stage != "retrain":
            settings["cache"] = tables["cache"]
        settings |= tables.get(stage, {})
    for assignment in assignments:
        _assign(settings, assignment)
    return settings | {name: value for name, value in flags.items() if value is not None}


def check_config(kind: type[_C], settings: dict[str, Any], where: str, typed: Collection[str] = ()) -> _C:
    """Return settings by name as a checked object.

    Args:
        where: origin of the settings for messages: a run file and its table.
        typed: settings that were typed as flags; messages name the flag.

    Raises:
        UsageError: a setting is missing, unknown or wrong.
    """
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        problems = [_problem(kind, dict(problem), where, typed) for problem in error.errors()]
        raise UsageError(f"{where}: " + "; ".join(problems)) from error


def _read_tables(path: Path, settings: Collection[str]) -> dict[str, Any]:
    try:
        tables = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        hint = ""
        if ":" in str(path) and path.suffix != ".toml":
            hint = "; quote a dataset with a pattern, '{0..9}.tar', so that the shell leaves it one word"
        raise UsageError(f"{path}: no such run file{hint}") from error
    except IsADirectoryError as error:
        pictures = f". If it is a folder of pictures: --dataset {path}" * ("dataset" in settings)
        problem = misplaced(str(path), RUN_FILE, settings) or f"{path}: is a folder, not a run file{pictures}"
        raise UsageError(problem) from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        if kind_of(str(path)) in (TABLE, TAR):
            raise UsageError(misplaced(str(path), RUN_FILE, settings)) from error
        quotes = '. A text needs quotes: split = "test"' if "Invalid value" in str(error) else ""
        raise UsageError(f"{path}: not TOML: {error}{quotes}") from error
    for name, table in tables.items():
        if name != "cache" and not isinstance(table, dict):
            raise UsageError(f"{path}: {name} = {table!r} must be a table [{name}]")
        if name not in ("cache", *RUN_FILE_STAGES):
            stages = ", ".join(f"[{stage}]" for stage in RUN_FILE_STAGES)
            hint = did_you_mean(name, RUN_FILE_STAGES)
            raise UsageError(f"{path}: unknown table [{name}].{hint or f' A run file has cache, {stages}'}")
    return tables


def _assign(settings: dict[str, Any], assignment: str) -> None:
    """Set one value, copying the tables that contain it."""
    name, equals, text = assignment.partition("=")
    if not equals or not name:
        raise UsageError(f"--set {assignment}: write name=value")
    *parents, last = name.split(".")
    table = settings
    for parent in parents:
        inner = table.get(parent, {})
        if not isinstance(inner, dict):
            raise UsageError(f"--set {assignment}: {parent} holds no settings of its own")
        table[parent] = dict(inner)
        table = table[parent]
    table[last] = _toml_value(text)


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # --set split=test needs no quotes


# pydantic's kinds of problems in our words
_WORDS = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "{input!r} is not a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "{input!r} is not a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "{input!r} is neither true nor false"),
    "literal_error": "{input!r} is not one of {expected}",
    "greater_than": "must be greater than {gt:g}, not {input}",
    "greater_than_equal": "must be {ge:g} or more, not {input}",
    "less_than": "must be less than {lt:g}, not {input}",
    "less_than_equal": "must be {le:g} or less, not {input}",
}


def _problem(kind: type[StageConfig], problem: dict[str, Any], where: str, typed: Collection[str]) -> str:
    """Describe one of pydantic's problems, with the next step."""
    name = ".".join(str(part) for part in problem["loc"])
    field = name.partition(".")[0]
    flag = f"--{field.replace('_', '-')}"
    if problem["type"] == "missing":
        stage = where.rpartition("[")[2].rstrip("]")
        or_file = " or set it in a run file" if stage in RUN_FILE_STAGES else ""
        return f"{name} is missing: give {flag}{or_file}"
    if problem["type"] == "extra_forbidden":
        return f"{name} is not a setting.{did_you_mean(name, kind.model_fields)}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] in _WORDS:
        message = _WORDS[problem["type"]].format(input=problem["input"], **problem.get("ctx", {}))
    return f"{flag if field in typed else name}: {message}" if name else message
