"""Rows per second that other people's trainers get from a cache: one by one, resident, streamed; and by content."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from itertools import islice
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.bench.big_cache import big_cache
from teacher_cache import Cache, StreamedTargets, TargetDataset

BATCH = 256


class OneByOne(Dataset[Any]):
    """What a loop writes without TargetDataset: a row by ``Cache.take`` for each item."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, row: int) -> Any:
        caption = int(self.cache.caption_offsets[row])
        return row, self.cache.take("image", np.array([row]))[0], self.cache.take("text", np.array([caption]))[0]


def rows_per_second(batches: Iterable[Any], count: int) -> float:
    """From the first batch on, so that workers and chunks are there; a stream reads on."""
    coming = iter(batches)
    next(coming)
    start = time.perf_counter()
    taken = sum(1 for _ in islice(coming, count))
    return taken * BATCH / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--rows", type=int, default=250_000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    cache = big_cache(given.folder, given.rows)
    start = time.perf_counter()
    resident = TargetDataset(cache)
    print(f"resident rows loaded in {time.perf_counter() - start:.1f} s")
    lazy = TargetDataset(cache, resident=False)
    single = OneByOne(Cache(cache))
    for row in range(0, given.rows, 4096):  # all chunks in its memory
        single[row]
    shuffled: dict[str, Callable[[], tuple[Any, int]]] = {
        "one by one": lambda: (DataLoader(single, BATCH, shuffle=True), 20),
        "TargetDataset": lambda: (DataLoader(resident, BATCH, shuffle=True), 100),
        "TargetDataset, 2 workers": lambda: (DataLoader(resident, BATCH, shuffle=True, num_workers=2), 100),
        "StreamedTargets": lambda: (DataLoader(StreamedTargets(lazy, BATCH), batch_size=None), 400),
    }
    taken: dict[str, list[float]] = {name: [] for name in shuffled}
    for _ in range(given.rounds):
        for name, make in shuffled.items():
            taken[name].append(rows_per_second(*make()))
    for name, rates in taken.items():
        ratios = [rate / base for rate, base in zip(rates, taken["one by one"], strict=True)]
        shown = [
            f"{median(each):,.{digits}f} ({min(each):,.{digits}f}-{max(each):,.{digits}f})"
            for each, digits in ((rates, 0), (ratios, 1))
        ]
        print(f"| {name} | {shown[0]} | {shown[1]} |")
    reader = Cache(cache)
    rows = np.random.default_rng(0).permutation(given.rows)[:BATCH].tolist()
    asked = [f"{row:064d}" for row in rows], [f"picture {row}" for row in rows]
    start = time.perf_counter()
    reader.lookup(*asked)
    print(f"first lookup {time.perf_counter() - start:.2f} s")
    times = []
    for _ in range(20):
        start = time.perf_counter()
        reader.lookup(*asked)
        times.append((time.perf_counter() - start) / BATCH * 1e6)
    print(f"further lookups {median(times):.1f} ({min(times):.1f}-{max(times):.1f}) microseconds per image and caption")


if __name__ == "__main__":
    main()
