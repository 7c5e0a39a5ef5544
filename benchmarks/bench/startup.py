"""How long a user waits: `--help`, `info`, of a cache and of a folder, as whole processes, and opening a large cache.

The floor beside ``info`` is a process that imports the libraries which it cannot do without and does nothing.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.bench.big_cache import big_cache
from benchmarks.bench.harness import Row, Settings, interleave

ROOT = Path(__file__).resolve().parents[2]
_LIBRARIES = "import click, rich.console, rich.table, pydantic; pydantic.BaseModel"
_OPEN = """
import sys, time
from teacher_cache.storage.read.reader import EmbeddingReader
started = time.perf_counter()
EmbeddingReader(sys.argv[1])
print(time.perf_counter() - started)
"""


def _run(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def _limit(what: str, against: str, seconds: Sequence[float], wanted: float, floor: float | None = None) -> Row:
    middle = statistics.median(seconds)
    row = Row(what, against, middle, floor, "s", middle, min(seconds), max(seconds), wanted, at_most=True)
    return replace(row, value_unit="s")


def measure(settings: Settings) -> list[Row]:
    small, many = (2_000, 20_000) if settings.quick else (7_000, 10_000_000)
    flickr = big_cache(settings.scratch, small, 512, 256, captions=5 * small)
    large = big_cache(settings.scratch, many, 8, captions=4096)
    opened: list[float] = []
    seconds = interleave(
        {
            "help": lambda: _run("-m", "teacher_cache.pipeline.cli.app", "--help"),
            "info folder": lambda: _run("-m", "teacher_cache.pipeline.cli.app", "info", str(Path(large).parent)),
            "info": lambda: _run("-m", "teacher_cache.pipeline.cli.app", "info", flickr),
            "info large": lambda: _run("-m", "teacher_cache.pipeline.cli.app", "info", large),
            "libraries": lambda: _run("-c", _LIBRARIES),
            "open": lambda: opened.append(float(_run("-c", _OPEN, large))),
        },
        settings.rounds,
    )
    floor = statistics.median(seconds["libraries"])
    libraries = "the whole process; beside it one that imports click, rich and pydantic and ends"
    return [
        _limit("teacher-cache --help", libraries, seconds["help"], 0.6, floor),
        _limit(f"teacher-cache info of a folder, {many:,} images", libraries, seconds["info folder"], 0.5, floor),
        _limit(f"teacher-cache info, {small:,} images", libraries, seconds["info"], 0.5, floor),
        _limit(f"teacher-cache info, {many:,} images", libraries, seconds["info large"], 0.5, floor),
        _limit(f"EmbeddingReader() of {many:,} images", "a new process, imports not counted", opened[1:], 0.2),
    ]
