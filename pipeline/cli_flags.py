"""What the commands of ``teacher-cache`` share: flags that say what the settings say, and lines on stderr."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from storage.errors import CacheError, CacheNotFoundError

__all__ = ["RunFile", "how_to_go_on", "say", "setting"]

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


def how_to_go_on(cache: str) -> str:
    """What is committed of a cache whose making was stopped, and what to do."""
    from storage.inspect import count_committed  # storage alone: torch may be half imported

    try:
        done, total = count_committed(cache)
        state = f"{done} of {total} chunks are committed"
    except CacheNotFoundError:
        state = "nothing is committed yet"
    except (CacheError, OSError):
        state = "what is committed stays"
    return f"{state}. Run the same command again to go on."
