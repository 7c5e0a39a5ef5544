"""What a teacher's forward pass costs on a CPU with and without pipeline.device.keep_freed_memory.

    python benchmarks/cpu_allocator.py local-dir:../shared/teacher-flickr8k

Each figure is a process of its own, the two kinds in turn, several rounds; medians and the range are printed.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

SECONDS = 4.0


def measure(teacher_name: str, batch_size: int, keep: bool) -> dict[str, float]:
    """Images per second, share of system time and page faults per image of one process."""
    import torch

    from pipeline import device, teacher

    if not keep:
        teacher.keep_freed_memory = lambda: None  # type: ignore[attr-defined]
    assert device.keep_freed_memory is not None
    live = teacher.load_teacher(teacher_name, device="cpu")
    pixels = torch.randn(batch_size, 3, *live.preprocess.size)
    for _ in range(2):
        live.encode_images(pixels)
    before, started, images = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        live.encode_images(pixels)
        images += batch_size
    spent, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "images_per_second": images / spent,
        "system_share": (after.ru_stime - before.ru_stime) / busy,
        "faults_per_image": (after.ru_minflt - before.ru_minflt) / images,
    }


def main() -> None:
    """Run the rounds, or one figure when called by them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.teacher, int(options.one[0]), options.one[1] == "keep")))
        return
    for batch_size in options.batch_sizes:
        found: dict[str, list[dict[str, float]]] = {"default": [], "keep": []}
        for _ in range(options.rounds):
            for kind, rows in found.items():
                command = [sys.executable, __file__, options.teacher, "--one", str(batch_size), kind]
                rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        for kind, rows in found.items():
            rates = [row["images_per_second"] for row in rows]
            system = statistics.median(row["system_share"] for row in rows)
            faults = statistics.median(row["faults_per_image"] for row in rows)
            spread = f"{min(rates):.1f}-{max(rates):.1f}"
            rate = f"{statistics.median(rates):.1f} images/s ({spread})"
            print(f"batch {batch_size} {kind}: {rate}, {system:.0%} system time, {faults:.0f} faults/image")
        pairs = zip(found["keep"], found["default"], strict=True)
        ratios = [keep["images_per_second"] / default["images_per_second"] for keep, default in pairs]
        median = statistics.median(ratios)
        print(f"batch {batch_size} ratio: {median:.2f} ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    main()
