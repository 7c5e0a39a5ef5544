"""How a measurement is made and kept: candidates by turns, ratios within a round, medians with their range."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """What every section is told.

    Attributes:
        scratch: an empty folder for what is built to be measured; about 20 GB for all sections.
        shared: the folder with the photographs and their teacher; a section that needs it and misses it says so.
        rounds: how often each candidate has its turn.
        quick: small sizes, to see that everything runs; its numbers mean nothing.
        device: of the sections that use torch, ``cpu`` or ``cuda``.
    """

    scratch: Path
    shared: Path
    rounds: int = 5
    quick: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what, against: ours, and what it is compared with.
        ours, theirs: medians, in ``unit``; ``theirs`` is None where the target is a plain limit.
        ratio, low, high: median and range of the rounds' ratios; of a plain limit the value itself.
        value_unit: of those three where they are no ratio: ``s`` of a limit, ``points`` of a difference of percents.
        wanted: what ``ratio`` should reach; None where nothing was promised.
        at_most: ``ratio`` should not exceed ``wanted``, rather than reach it.
        note: what a reader has to know, the reason for a miss among it.
    """

    what: str
    against: str
    ours: float
    theirs: float | None
    unit: str
    ratio: float
    low: float
    high: float
    wanted: float | None = None
    at_most: bool = False
    note: str = ""
    value_unit: str = ""

    @property
    def in_each_round(self) -> bool:
        """Whether all rounds say of the target what their median says."""
        if self.wanted is None:
            return True
        return not min(self.low, self.high) < self.wanted < max(self.low, self.high)

    @property
    def reached(self) -> bool | None:
        """Whether the median reaches what was wanted."""
        if self.wanted is None:
            return None
        return self.ratio <= self.wanted if self.at_most else self.ratio >= self.wanted


def interleave(
    candidates: Mapping[str, Callable[[], Any]], rounds: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round; they take turns, each round begun by another one.

    Args:
        warm_up: each runs once before, unmeasured.
    """
    names = list(candidates)
    if warm_up:
        for name in names:
            candidates[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            started = time.perf_counter()
            candidates[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def speed(
    what: str,
    against: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    work: float,
    unit: str,
    wanted: float | None = None,
    note: str = "",
) -> Row:
    """A row of speeds from seconds: ratio > 1 where ours is the faster one.

    Args:
        ours, theirs: seconds by round, of the same rounds.
        work: what one run does, in ``unit`` x seconds: rows for rows/s.
    """
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    return Row(
        what,
        against,
        work / statistics.median(ours),
        work / statistics.median(theirs),
        unit,
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        wanted,
        note=note,
    )


def hardware(device: str) -> str:
    """The machine in words."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    text = f"{os.cpu_count()} cores ({model}), {memory:.0f} GiB, Python {platform.python_version()}"
    if device == "cuda":
        import torch

        text += f", {torch.cuda.get_device_name()}"
    return text


def _commit() -> str:
    """The commit of the code that is measured, with a plus sign if files differ from it; empty outside of a clone."""
    look = partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    commit = look(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    return commit + ("+" if commit and look(["git", "status", "--porcelain", "-uno"]).stdout.strip() else "")


def keep(folder: Path, section: str, rows: Sequence[Row], settings: Settings, minutes: float) -> Path:
    """Put a section into today's results and write their table anew; other sections of the day stay.

    Returns:
        The table, ``DATE-DEVICE.md``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{date.today().isoformat()}-{settings.device}" + ("-quick" if settings.quick else "")
    kept_at = folder / f"{name}.json"
    kept: dict[str, Any] = json.loads(kept_at.read_text()) if kept_at.exists() else {}
    kept[section] = {
        "command": f"python -m benchmarks.bench {section} --rounds {settings.rounds} --device {settings.device}"
        + (" --quick" if settings.quick else ""),
        "commit": _commit(),
        "hardware": hardware(settings.device),
        "date": date.today().isoformat(),
        "minutes": round(minutes, 1),
        "rows": [asdict(row) for row in rows],
    }
    kept_at.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    written = folder / f"{name}.md"
    written.write_text(table(kept))
    return written


def table(kept: Mapping[str, Any]) -> str:
    """Results as Markdown."""
    lines = ["# Measured against the peers", ""]
    lines += [
        "Ratios are within a round of candidates by turns: median (least - greatest), so that they need not be those "
        "of the medians beside them. A value with a unit is no ratio. Speeds: more is better.",
        "",
    ]
    for section, found in kept.items():
        lines += [f"## {section}", ""]
        at = f", commit {found['commit']}" if found.get("commit") else ""
        lines += [f"`{found['command']}`, {found['date']}{at}, {found['hardware']}; {found['minutes']} min.", ""]
        lines += ["| what | against | ours | theirs | ratio or value | wanted | |", "|---|---|---|---|---|---|---|"]
        rows = [Row(**row) for row in found["rows"]]
        for row in rows:
            theirs = "" if row.theirs is None else f"{row.theirs:,.4g} {row.unit}"
            ratio = f"{row.ratio:,.3g} ({row.low:,.3g} - {row.high:,.3g}) {row.value_unit}".rstrip()
            wanted = "" if row.wanted is None else f"{'<=' if row.at_most else '>='} {row.wanted:g}"
            verdict = {None: "", True: "reached", False: "**missed**"}[row.reached]
            verdict += "" if row.in_each_round else ", not in each round"
            ours = f"{row.ours:,.4g} {row.unit}"
            lines.append(f"| {row.what} | {row.against} | {ours} | {theirs} | {ratio} | {wanted} | {verdict} |")
        unknown = "why it was missed is not known"
        said = [(row, row.note or (unknown if row.reached is False else "")) for row in rows]
        notes = [f"- {row.what}, {row.against}: {note}" for row, note in said if note]
        lines += ["", *notes, ""] if notes else [""]
    return "\n".join(lines).rstrip() + "\n"
