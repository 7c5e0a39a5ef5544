"""What the commands of ``teacher-cache`` share: flags that say what the settings say, and lines on stderr."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from teacher_cache.storage.errors import CacheError, CacheNotFoundError
from teacher_cache.storage.observe.logs import LOG_FORMAT, say, start_json_logs, stop_json_logs
from teacher_cache.storage.observe.telemetry import METRICS_PORT, require_metrics

__all__ = ["LogFlag", "LogFormat", "MetricsFlag", "RunFile", "how_to_go_on", "say", "setting", "which_checkpoint"]

RunFile = Annotated[
    Path | None, typer.Argument(metavar="[RUN.toml]", help="Run file with a table per stage; flags win over it.")
]


class LogFormat(StrEnum):
    """How a command says on stderr what it does."""

    text = "text"
    json = "json"


def _choose_log_format(chosen: LogFormat) -> LogFormat:
    if chosen is LogFormat.json:
        start_json_logs()
    else:  # the environment may have asked for the other
        os.environ.pop(LOG_FORMAT, None)
        stop_json_logs()
    return chosen


def _choose_metrics_port(context: typer.Context, port: int | None) -> int | None:
    source = context.get_parameter_source("metrics_port")
    if port is not None and source is not None and source.name == "COMMANDLINE":
        require_metrics(port)
    return port


LogFlag = Annotated[
    LogFormat,
    typer.Option(
        "--log-format",
        envvar=LOG_FORMAT,
        is_eager=True,
        callback=_choose_log_format,
        help="Of stderr: lines for people, or one JSON object a line, with run, chunk and row.",
    ),
]
MetricsFlag = Annotated[
    int | None,
    typer.Option(
        "--metrics-port",
        envvar=METRICS_PORT,
        min=0,
        max=65_535,
        callback=_choose_metrics_port,
        help="Port on which Prometheus can ask for metrics while it works; 0: a free one. None if left out.",
    ),
]


def setting(config: type[Any], name: str, option: str | None = None) -> Any:
    """A flag that says what the setting of the same name says, and its default.

    The flag itself has none, so that a run file is not overruled by what nobody typed. A description that says what
    happens when the setting is left out says it all.
    """
    field = config.model_fields[name]
    default: str | bool = False
    if not (field.is_required() or field.default in (None, ()) or "left out" in str(field.description)):
        default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)
    if isinstance(field.default, bool):  # a switch, off until it is typed
        default = False
    flag = option or "--" + name.replace("_", "-")
    return typer.Option(flag, help=field.description, show_default=default)


def how_to_go_on(cache: str) -> str:
    """What is committed of a cache whose making was stopped, and what to do."""
    from teacher_cache.storage.look.info import count_committed  # storage alone: torch may be half imported

    try:
        done, total = count_committed(cache)
        state = f"{done} of {total} chunks are committed"
    except CacheNotFoundError:
        state = "nothing is committed yet"
    except (CacheError, OSError):
        state = "what is committed stays"
    return f"{state}. Run the same command again to go on."


def which_checkpoint(checkpoint: str | None, chosen_on: str | None) -> str:
    """The student's checkpoint as the title of a table ends: one named by a step is of a run that is not finished."""
    if checkpoint is None:
        return ""
    return f"; checkpoint {checkpoint.rpartition('/')[2]}" + ("" if chosen_on is None else f", chosen on {chosen_on}")
