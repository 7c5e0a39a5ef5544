"""open_clip's own trainer with a cache and with its live teacher: the same 20 steps on photographs, in turns.

The student is shown the evaluation crop in both. Prints the parameters of both models, the largest difference of a
step's loss, and the seconds of a step, first step apart.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import open_clip

from teacher_cache import PrecomputeConfig, precompute
from tests.conftest import make_model_folder
from tests.pipeline.train.open_clip_work import (
    COLUMNS,
    SMALL_STUDENT,
    batch_seconds,
    first_photographs,
    losses,
    words,
    write_pairs,
)

_STEPS = 20
_RUN = "import json, sys; from pathlib import Path; from tests.pipeline.train import open_clip_work as work; "


def main() -> None:
    """Run the comparison and print its table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("flickr8k", type=Path)
    options.add_argument("teacher", type=Path)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--batch-size", type=int, default=32)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _compare(chosen.flickr8k.resolve(), chosen.teacher.resolve(), Path(folder), chosen.rounds, chosen.batch_size)


def _compare(flickr8k: Path, teacher: Path, folder: Path, rounds: int, batch_size: int) -> None:
    student = make_model_folder(folder / "student", **SMALL_STUDENT)
    for name, path in (("teacher", teacher), ("student", student)):
        model = open_clip.create_model(f"local-dir:{path}")
        print(f"{name}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    # 5 captions each; open_clip drops the last batch unless it is full
    images = first_photographs(flickr8k, folder / "photographs", -(-_STEPS * batch_size // 5))
    cache, pairs = folder / "f8k.cache", folder / "pairs.csv"
    precompute(PrecomputeConfig(dataset=f"flickr:{images}", teacher=f"local-dir:{teacher}", cache=str(cache)))
    write_pairs(cache, pairs)
    for number in range(rounds):
        logs = {how: folder / f"{how}-{number}" for how in ("live", "cached")}
        for how, place in (("live", teacher), ("cached", cache)):
            given = words(student, pairs, logs[how], *COLUMNS, "--workers", "1", batch_size=batch_size)
            subprocess.run([sys.executable, "-c", f"{_RUN}work.{how}(Path({str(place)!r}), {given!r})"], check=True)
        both = zip(*(losses(logs[how])[:_STEPS] for how in logs), strict=True)
        seconds = {how: median(batch_seconds(logs[how])[1:_STEPS]) for how in logs}
        print(
            f"round {number}: {_STEPS} steps, largest difference of the loss "
            f"{max(abs(live - cached) for live, cached in both):.4f}; seconds a step live {seconds['live']:.2f}, "
            f"cached {seconds['cached']:.3f}, ratio {seconds['live'] / seconds['cached']:.1f}"
        )


if __name__ == "__main__":
    main()
