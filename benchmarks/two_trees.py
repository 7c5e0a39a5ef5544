"""Compare the speed of this tree with that of another commit: whole commands, by turns.

    git worktree add ../before COMMIT
    python -m benchmarks.two_trees ../before

Each command runs once in each tree and round, on caches that its own tree has made. Wall seconds, CPU seconds (with
child processes) and the memory of the largest process are the operating system's. A ratio is this tree by the other
one, within a round: below 1 this tree is faster, or takes less memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bench.harness import hardware

HERE = Path(__file__).resolve().parents[1]
# a small process of its own: the memory that a process ends with is at least that of the one that started it
_LAUNCHER = """
import json, os, subprocess, sys, time
started = time.perf_counter()
with open(sys.argv[1], "wb") as log:
    process = subprocess.Popen(sys.argv[2:], stdout=log, stderr=subprocess.STDOUT)
    _, status, usage = os.wait4(process.pid, 0)
wall = time.perf_counter() - started
print(json.dumps([status, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]))
"""
_MATERIAL = """
import sys
from pathlib import Path
from benchmarks.bench.big_cache import big_cache
from benchmarks.bench.material import photographs, random_weights
folder, flickr8k = Path(sys.argv[1]), Path(sys.argv[2])
photographs(flickr8k, folder / "photos", 256)
random_weights("ViT-S-32-alt", folder)
Path(big_cache(folder, 7_000, 512, 256, captions=35_000)).rename(folder / "small.cache")
Path(big_cache(folder, 1_000_000, 512, 4096, captions=0)).rename(folder / "large.cache")
"""
_IMPORTS = (  # of the flat tree that was before version 0.1, and of this one
    "from storage.reader import EmbeddingReader; from storage.order import batches, window_order",
    "from teacher_cache.storage.read.reader import EmbeddingReader; "
    "from teacher_cache.storage.read.shuffle import batches, window_order",
)
_EPOCHS = """
import numpy, sys
reader = EmbeddingReader(sys.argv[1])
rows = numpy.arange(reader.manifest.layout.image_rows)
for epoch in range(3):
    order = list(batches(window_order(rows, 4096, 8, 0, epoch), 1024))
    for _ in reader.stream("image", order):
        pass
"""
_ENCODE = "precompute --dataset flickr:{folder}/photos --device cpu --cache {out}"
_FAST = f"{_ENCODE} --teacher ViT-S-32-alt --pretrained {{folder}}/ViT-S-32-alt.safetensors"
_REAL = f"{_ENCODE} --teacher local-dir:{{shared}}/teacher-flickr8k"
COMMANDS = {
    "`--help`": "--help",
    "`info`, 7,000 images": "info {folder}/small.cache",
    "`info`, a million images": "info {folder}/large.cache",
    "`stats`, 7,000 images": "stats {folder}/small.cache",
    "`verify`, 256 photographs": "verify {folder}/learned.cache",
    "streaming: three epochs of a million rows": "EPOCHS {folder}/large.cache",
    "`precompute`, 256 photographs, 1,280 captions": _REAL,
    "`precompute`, the same by a fast teacher": _FAST,
    "`precompute --views 3`, a fast teacher": f"{_FAST} --views 3",
    "`train`, two epochs of 256 photographs": "train --cache {folder}/learned.cache --student ViT-S-32-alt --epochs 2 "
    "--batch-size 32 --device cpu --out {out}",
}


@dataclass(frozen=True)
class Cost:
    """What one process cost: seconds, seconds of CPU, MiB of the largest process."""

    wall: float
    cpu: float
    memory: float


@dataclass
class Tree:
    """A checkout, the folder of its caches, and the dataset and teacher that both trees use."""

    root: Path
    folder: Path
    shared: Path
    outputs: int = 0

    def make_material(self) -> None:
        """Make what the commands read."""
        self.folder.mkdir()
        self._start("-c", _MATERIAL, str(self.folder), str(self.shared / "flickr8k"))
        self.run(_REAL.replace("{out}", "{folder}/learned.cache"))

    def run(self, line: str) -> Cost:
        """Run a command line of ``COMMANDS``."""
        self.outputs += 1
        filled = line.format(folder=self.folder, shared=self.shared, out=self.folder / f"out-{self.outputs}")
        arguments = filled.split()
        is_flat = not (self.root / "teacher_cache").is_dir()
        if arguments[0] == "EPOCHS":
            return self._start("-c", f"{_IMPORTS[0 if is_flat else 1]}\n{_EPOCHS}", arguments[1])
        return self._start("-m", "pipeline.cli" if is_flat else "teacher_cache.pipeline.cli.app", *arguments)

    def _start(self, *arguments: str) -> Cost:
        log = self.folder / "log"
        command = [sys.executable, "-c", _LAUNCHER, str(log), sys.executable, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(self.root)}
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, check=True)
        status, *cost = json.loads(done.stdout)
        if status:
            raise RuntimeError(f"{self.root}: {' '.join(arguments[:3])} failed: {log.read_text()[-2000:]}")
        return Cost(*cost)


def _row(title: str, before: list[Cost], after: list[Cost]) -> str:
    cells = []
    for name in ("wall", "cpu", "memory"):
        ratios = [getattr(new, name) / getattr(old, name) for old, new in zip(before, after, strict=True)]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})")
    seconds = [f"{statistics.median(cost.wall for cost in costs):.2f}" for costs in (before, after)]
    return "| " + " | ".join([title, *seconds, *cells]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path, help="a checkout of the commit to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shared", type=Path, default=HERE.parent / "shared", help="photographs and their teacher")
    parser.add_argument("--only", default="", help="only commands whose title contains this text")
    options = parser.parse_args()
    shared = options.shared.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        before = Tree(options.before.resolve(), Path(scratch, "before"), shared)
        after = Tree(HERE, Path(scratch, "after"), shared)
        for tree in (before, after):
            tree.make_material()
        print(f"{time.strftime('%Y-%m-%d')}, {hardware('cpu')}; {options.rounds} rounds after one to warm up\n")
        print(
            "| command | before, s | after, s | wall, ratio | CPU, ratio | memory, ratio |\n|---|---|---|---|---|---|"
        )
        for title, line in COMMANDS.items():
            if options.only not in title:
                continue
            costs: list[tuple[Cost, Cost]] = []
            for turn in range(options.rounds + 1):
                if turn % 2:
                    costs.append((before.run(line), after.run(line)))
                else:
                    costs.append((after.run(line), before.run(line))[::-1])
            print(_row(title, *map(list, zip(*costs[1:], strict=True))), flush=True)


if __name__ == "__main__":
    main()
