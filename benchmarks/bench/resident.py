"""Fully random rows from memory that workers share, against ``np.take`` of an array of one's own."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench.big_cache import big_cache
from benchmarks.bench.harness import Row, Settings, interleave, speed
from storage.reader import EmbeddingReader
from storage.resident import ResidentRows

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
                note="what the workers' proportional set size (PSS) grows by while all of them hold all rows, and the "
                "parent's share, over the bytes of the rows",
            )
        )
    return rows


def copies(resident: ResidentRows, method: str) -> float:
    """How often the rows are in the memory of all workers and this process together."""
    context = multiprocessing.get_context(method)
    together, found = context.Barrier(WORKERS), context.Queue()
    processes = [context.Process(target=_touch, args=(resident, together, found), daemon=True) for _ in range(WORKERS)]
    for process in processes:
        process.start()
    grown = sum(found.get(timeout=_DEADLINE_SECONDS) for _ in processes)
    for process in processes:
        process.join()
    # all hold it alike, this process too
    return float(grown / WORKERS * (WORKERS + 1) / resident.nbytes)


def _touch(resident: ResidentRows, together: Any, found: Any) -> None:
    together.wait(_DEADLINE_SECONDS)  # what forks share with their parent is no longer divided among more of them
    before = proportional_bytes()
    together.wait(_DEADLINE_SECONDS)
    resident.rows[:, :1].sum()  # every page of it
    together.wait(_DEADLINE_SECONDS)
    grown = proportional_bytes() - before
    together.wait(_DEADLINE_SECONDS)
    found.put(grown)


def proportional_bytes() -> int:
    """What this process takes, memory that n processes share counted as an n-th."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) * 1024
