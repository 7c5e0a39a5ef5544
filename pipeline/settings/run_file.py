"""Settings of a stage from a run file and flags: TOML with a table per stage, checked before any model is built."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from teacher_cache.pipeline.settings.base import StageConfig
from teacher_cache.storage.errors import UsageError

__all__ = ["check_config", "given_settings", "load_config"]

# a run file's tables, one for each stage that can be set there
_TABLES = {
    "precompute": "PrecomputeConfig",
    "train": "TrainConfig",
    "evaluate": "EvaluateConfig",
    "retrain": "RetrainConfig",
}

_C = TypeVar("_C", bound=StageConfig)


def load_config(kind: type[_C], section: str, path: Path | None, overrides: dict[str, Any]) -> _C:
    """One stage's settings from a run file and flags; a flag wins.

    The run file is TOML with a table per stage, ``[precompute]`` and ``[train]``. A top-level ``cache`` counts
    for all stages but ``[retrain]``, which makes its own. Paths in it are relative to the working directory, as
    those of flags are.

    Args:
        overrides: settings by name; None means not given.

    Raises:
        UsageError: the file is not TOML, has an unknown table or setting, or a setting is missing or wrong; the
            message names the file and each setting.
    """
    where = f"{path} [{section}]" if path else section
    return check_config(kind, given_settings(section, path, overrides), where)


def given_settings(section: str, path: Path | None, overrides: dict[str, Any]) -> dict[str, Any]:
    """The settings of a stage that a run file and flags name; see :func:`load_config`, without its checks of values.

    Raises:
        UsageError: the run file cannot be read, is not TOML or has an unknown table.
    """
    settings: dict[str, Any] = {}
    if path is not None:
        try:
            tables = tomllib.loads(path.read_text())
        except FileNotFoundError as error:
            raise UsageError(f"{path}: no such run file") from error
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: not TOML: {error}") from error
        for name, table in tables.items():
            if name != "cache" and not isinstance(table, dict):
                raise UsageError(f"{path}: {name} = {table!r} where a table [{name}] is wanted")
        unknown = sorted(set(tables) - {"cache", *_TABLES})
        if unknown:
            known = ", ".join(f"[{name}]" for name in _TABLES)
            raise UsageError(f"{path}: unknown {', '.join(unknown)}; a run file has cache, {known}")
        shared = {"cache": tables["cache"]} if "cache" in tables and section != "retrain" else {}
        settings = {**shared, **tables.get(section, {})}
    return settings | {name: value for name, value in overrides.items() if value is not None}


def check_config(kind: type[_C], settings: dict[str, Any], where: str) -> _C:
    """Settings by name as a checked object.

    Args:
        where: what names them in a message: a run file and its table.

    Raises:
        UsageError: a setting is missing, unknown or wrong.
    """
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "missing":
                or_file = " or set it in a run file" if kind.__name__ in _TABLES.values() else ""
                lines.append(f"{name} is missing: give --{name.replace('_', '-')}{or_file}")
            elif problem["type"] == "extra_forbidden":
                near = difflib.get_close_matches(name, kind.model_fields, n=1)
                lines.append(f"{name} is no setting" + (f"; is {near[0]} meant?" if near else ""))
            else:
                said = str(problem["msg"]).removeprefix("Value error, ")
                lines.append(f"{name}: {said}" if name else said)
        raise UsageError(f"{where}: " + "; ".join(lines)) from error
