"""What the commands of ``teacher-cache`` share: flags that say what the settings say, and lines on stderr."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["RunFile", "say", "setting"]

RunFile = Annotated[
    Path | None, typer.Argument(metavar="[RUN.toml]", help="Run file with a table per stage; flags win over it.")
]


def setting(config: type[Any], name: str, option: str | None = None) -> Any:
    """A flag that says what the setting of the same name says."""
    flag = option or "--" + name.replace("_", "-")
    return typer.Option(flag, help=config.model_fields[name].description, show_default=False)


def say(line: str) -> None:
    """A line on stderr: results alone go to stdout."""
    print(line, file=sys.stderr)  # noqa: T201
