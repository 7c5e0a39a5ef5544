"""Threads and processes are counted by the cores that a process may use, not by those of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from teacher_cache.pipeline.data import cores


@pytest.mark.parametrize(
    ("files", "usable"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000"}, 64),
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
    ],
)
def test_a_quota_or_an_affinity_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], usable: int
) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(cores, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert cores.usable_cores() == usable
    assert cores.decode_threads() == min(usable, 16)


@pytest.mark.parametrize(
    ("usable", "cuda", "processes", "workers"),
    [
        (2, False, 1, 1),
        (1, False, 1, 0),
        (64, False, 1, 8),
        (2, False, 2, 1),
        (16, True, 1, 15),
        (200, True, 8, 16),
        (8, True, 8, 1),
        (32, True, 2, 15),
    ],
)
def test_with_a_gpu_all_cores_but_one_decode(
    monkeypatch: pytest.MonkeyPatch, usable: int, cuda: bool, processes: int, workers: int
) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: usable)
    assert cores.loader_workers(cuda, processes) == workers
