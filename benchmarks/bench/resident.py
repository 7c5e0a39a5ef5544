"""Fully random rows from memory that workers share, against ``np.take`` of an array of one's own."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench.big_cache import big_cache
from benchmarks.bench.harness import Row, Settings, interleave, speed
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.resident import ResidentRows

WIDTH, CHUNK_ROWS, BATCH, WORKERS = 512, 4096, 1024, 4
_DEADLINE_SECONDS = 300


def measure(settings: Settings) -> list[Row]:
    """Rows per second of random batches; memory of several workers by how often the rows are in it."""
    count = 20_000 if settings.quick else 1_000_000
    reader = EmbeddingReader(big_cache(settings.scratch, count, WIDTH, CHUNK_ROWS, captions=0))
    resident = reader.resident("image")
    own = np.array(resident.rows)
    random = np.random.default_rng(0).permutation(count)
    order = [random[start : start + BATCH] for start in range(0, count, BATCH)]

    def ours() -> None:
        for batch in order:
            resident.take(batch)

    def theirs() -> None:
        for batch in order:
            np.take(own, batch, axis=0)

    seconds = interleave({"ours": ours, "theirs": theirs}, settings.rounds)
    what = "resident rows, random order"
    rows = [speed(what, "np.take, a copy of one's own", seconds["ours"], seconds["theirs"], count, "rows/s", 0.95)]
    for method in ("fork", "spawn"):
        times = [copies(resident, method) for _ in range(1 if settings.quick else 3)]
        value = float(np.median(times))
        rows.append(
            Row(
                f"resident rows in {WORKERS} workers, {method}",
                "rows in memory, times",
                value,
                None,
                "x",
                value,
                min(times),
                max(times),
                None if settings.quick else 1.1,
                at_most=True,
                note="proportional set size (PSS) of the rows in all workers and their parent, over the rows' bytes",
            )
        )
    return rows


def copies(resident: ResidentRows, method: str) -> float:
    """How often the rows are in the memory of all workers and this process together."""
    context = multiprocessing.get_context(method)
    together, found = context.Barrier(WORKERS + 1), context.Queue()
    processes = [context.Process(target=_touch, args=(resident, together, found), daemon=True) for _ in range(WORKERS)]
    for process in processes:
        process.start()
    together.wait(_DEADLINE_SECONDS)
    resident.rows[:, :1].sum()
    own = proportional_bytes(resident)
    total = own + sum(found.get(timeout=_DEADLINE_SECONDS) for _ in processes)
    together.wait(_DEADLINE_SECONDS)
    for process in processes:
        process.join()
    return float(total / resident.nbytes)


def _touch(resident: ResidentRows, together: Any, found: Any) -> None:
    resident.rows[:, :1].sum()  # every page of it
    together.wait(_DEADLINE_SECONDS)
    found.put(proportional_bytes(resident))
    together.wait(_DEADLINE_SECONDS)  # nobody ends before all have looked


def proportional_bytes(resident: ResidentRows) -> int:
    """What the rows' own memory takes in this process, what n processes share counted as an n-th: PSS."""
    inside, total, address = False, 0, resident.rows.ctypes.data
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split()[0]
        if "-" in name:
            first, stop = (int(part, 16) for part in name.split("-"))
            inside = first < address + resident.nbytes and stop > address  # advice splits a mapping
        elif inside and name == "Pss:":
            total += int(line.split()[1]) * 1024
    return total
