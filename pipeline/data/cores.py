"""Cores that this process may use, which in a container are fewer than the machine has."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_FEW_CORES = 4
_MOST_PROCESSES = 32  # some 47,000 small images/s (reckoned), and each may fetch one remote image of 32
_MOST_THREADS = 16  # threads that decode share Python's lock: more take turns away from the one that feeds the teacher


def usable_cores() -> int:
    """Return the number of cores that this process may use: its affinity, and the CPU quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _quota() or cores))


def decode_threads() -> int:
    """Return the default number of threads that decode images in one process."""
    return min(usable_cores(), _MOST_THREADS)


def decode_processes(cuda: bool) -> int:
    """Return the default number of processes that decode for one teacher; 0: threads of its own process.

    A GPU takes more images than threads that share Python's lock prepare. All its share of the cores but one decode,
    if they are more than four. A build of Python without the lock needs no processes.

    Args:
        cuda: the teacher is on a GPU. A teacher on the CPU is slower than any decoder, and needs the cores.
    """
    if not cuda or not getattr(sys, "_is_gil_enabled", lambda: True)():
        return 0
    import torch

    return processes_of(usable_cores() // max(1, torch.cuda.device_count()))


def processes_of(cores: int) -> int:
    """Return the number of processes that decode for a GPU with this many cores; 0: threads."""
    return min(cores - 1, _MOST_PROCESSES) if cores > _FEW_CORES else 0


def loader_workers(cuda: bool, processes: int = 1) -> int:
    """Return the default number of processes that decode for one training process.

    Args:
        cuda: the student is on a GPU, which leaves all cores but one to decoding; else the step needs half of them.
        processes: number of training processes on this machine, which share its cores.
    """
    if cuda:
        return max(1, min(_MOST_THREADS, usable_cores() // processes - 1))
    workers = min(8, usable_cores() // 2)
    return workers if processes == 1 else max(1, workers // processes)


def _quota() -> int | None:
    """Return the cores of the CPU quota, rounded up, of cgroups 2 or 1. None: no quota."""
    with suppress(OSError, ValueError):
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return -(-int(quota) // int(period)) if quota != "max" else None
    with suppress(OSError, ValueError):
        quota, period = ((_CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return -(-int(quota) // int(period)) if int(quota) > 0 else None
    return None
