"""The ``teacher-cache`` command: a verb and a run file, or a verb and flags.

Results go to stdout, progress to stderr. Exit 0: fine; 1: something is wrong with the data, or the run stopped;
2: the command or a setting cannot be used. torch is imported by the commands that need it, when they need it.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from teacher_cache.pipeline.cli.flags import say
from teacher_cache.pipeline.train.stop_signals import interrupt
from teacher_cache.storage.cli.app import JsonFlag, app, commands_in, print_json
from teacher_cache.storage.errors import CacheError, MissingPackageError, UsageError
from teacher_cache.storage.observe.logs import start_json_logs_if_asked, stop_json_logs

__all__ = ["app", "main"]

commands_in("teacher_cache.pipeline.cli.caches", "plan")
commands_in("teacher_cache.pipeline.cli.caches", "precompute", "verify", "repair")
commands_in("teacher_cache.pipeline.cli.caches", "import")
commands_in("teacher_cache.pipeline.cli.train", "pixels")
commands_in("teacher_cache.pipeline.cli.train", "inherit", "train", "soup", "resize")
commands_in("teacher_cache.pipeline.cli.evaluate", "evaluate")
commands_in("teacher_cache.pipeline.cli.evaluate", "zero-shot")
commands_in("teacher_cache.pipeline.cli.evaluate", "cost")
commands_in("teacher_cache.pipeline.cli.deploy", "deploy")
commands_in("teacher_cache.pipeline.cli.deploy", "infer")
commands_in("teacher_cache.pipeline.cli.champions", "promote", "students", "rollback")
commands_in("teacher_cache.pipeline.cli.report", "report")
commands_in("teacher_cache.pipeline.cli.champions", "retrain")

_INTERRUPTED = 130  # what typer makes of a KeyboardInterrupt, without a word


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the demo; its cache and run are replaced.")] = Path(
        "runs/demo"
    ),
    json: JsonFlag = False,
) -> None:
    """Run the main job on rendered scenes and a small teacher that are shipped: precompute, train, evaluate."""
    from rich.console import Console

    from teacher_cache.pipeline.cli.demo import demo_table, run_demo
    from teacher_cache.storage.observe.progress import StageProgress

    with StageProgress() as progress:
        result = run_demo(out, progress)
    if json:
        print_json(result)
    else:
        Console().print(demo_table(result))


def main() -> None:
    """Entry point of the ``teacher-cache`` command. SIGTERM stops it as Ctrl-C does, and is given back after.

    One that came leaves this process deaf to the end of its children
    (``teacher_cache.pipeline.train.stop_signals.interrupt``).
    """
    # none is ours, and to look for some reads the metadata of every package that is installed
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        start_json_logs_if_asked()
        app(standalone_mode=True)
    except SystemExit as ended:
        if ended.code != _INTERRUPTED:
            raise
        say("stopped")
        sys.exit(1)
    except UsageError as error:
        say(f"error: {error}")
        sys.exit(2)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("teacher_cache"):
            raise
        say(f"error: {MissingPackageError(error.name)}")
        sys.exit(2)
    # FloatingPointError: the loss left the numbers; OSError: a file or a disk; both name what they met
    except (CacheError, FloatingPointError, OSError) as error:
        say(f"error: {error}")
        sys.exit(1)
    finally:
        stop_json_logs()
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
