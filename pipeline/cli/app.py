"""The ``teacher-cache`` command: a verb and a run file, or a verb and flags.

Results go to stdout, progress to stderr. Exit 0: fine; 1: something is wrong with the data, or the run stopped;
2: the command or a setting cannot be used. Only commands that need torch import it, when they need it.
"""

from __future__ import annotations

import os
import signal
import sys

import click

from teacher_cache.pipeline.train.stop_signals import interrupt
from teacher_cache.storage.cli.app import app, register
from teacher_cache.storage.errors import CacheError, CacheNotFoundError, MissingPackageError, UsageError
from teacher_cache.storage.observe.logs import json_logs, say, start_json_logs_if_asked, start_text_logs, stop_logs

register(
    "teacher_cache.pipeline.cli",
    ("Cache", "precompute", "caches", "Run a teacher once over a dataset and keep its embeddings."),
    ("Cache", "import", "caches", "Make a cache from embeddings of clip-retrieval or DataCompDR."),
    ("Cache", "verify", "caches", "Check every byte of a cache; with --sample, random rows against the teacher."),
    ("Cache", "repair", "caches", "Mend a damaged cache; with --leftovers, list files that belong to nothing."),
    (
        "Student",
        "student",
        "student",
        "A student's own jobs: inherit, mean, resize, pixels, cost, push, open-clip-train.",
    ),
    ("Look inside", "twins", "report", "Find images to learn from that show the same picture as a measured one."),
    ("Student", "train", "train", "Train a student from a finished cache."),
    ("Look inside", "compare", "compare", "Train small students of several teachers, and say which one to pay for."),
    ("Student", "evaluate", "evaluate", "Measure the recall of a teacher and its student, and the retention."),
    ("Student", "zero-shot", "evaluate", "Measure the zero-shot accuracy of a student, a teacher or both."),
    ("Ship", "deploy", "deploy", "Ship a student: ONNX, int8, open_clip weights, tokenizer, a table of measurements."),
    ("Ship", "infer", "deploy", "Score texts against images with a deployed student."),
    ("Ship", "students", "champions", "Champions and challengers: list, promote, retrain, rollback."),
    ("Look inside", "index", "search", "Build a search index over a cache, with a bound on the recall that it loses."),
    ("Look inside", "search", "search", "Search an index by a text or a picture."),
    ("Operate", "report", "report", "Write one HTML page about a cache and its students."),
    ("Operate", "demo", "demo", "Run the main job on built-in scenes: precompute, train, evaluate."),
)


def main() -> None:
    """Run the command line and exit. SIGTERM stops it as Ctrl-C does; its handler is restored afterwards.

    A stopped process no longer reaps its children (``teacher_cache.pipeline.train.stop_signals.interrupt``).
    """
    # the search for pydantic plugins, which we do not use, reads the metadata of every installed package
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        start_text_logs()  # before open_clip is imported, which adds a handler where there is none
        start_json_logs_if_asked()
        sys.exit(app.main(prog_name="teacher-cache", standalone_mode=False) or 0)
    except click.ClickException as error:
        if json_logs():
            say(f"error: {error.format_message()}")
        else:
            error.show()
        sys.exit(error.exit_code)
    except (UsageError, CacheNotFoundError) as error:  # a path without a cache is a wrong setting
        say(f"error: {error}")
        sys.exit(2)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("teacher_cache"):
            raise
        say(f"error: {MissingPackageError(error.name)}")
        sys.exit(2)
    # FloatingPointError: the loss is not finite; OSError: a file or a disk; both messages name the cause
    except (CacheError, FloatingPointError, OSError) as error:
        say(f"error: {error}")
        sys.exit(1)
    finally:
        stop_logs()
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
