"""A teacher's forward pass on a CPU: what keeping freed memory and sleeping threads change, alone and in company.

    python benchmarks/cpu_teacher.py local-dir:../shared/teacher-flickr8k

Each figure is a process of its own. The variants take turns, several rounds; medians and ranges are printed. The
busy neighbour is one process that multiplies matrices on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

SECONDS = 4.0
BATCH = 16
# variant -> keep freed memory, waiting threads sleep
VARIANTS = {"as it comes": (False, False), "memory kept": (True, False), "both": (True, True)}
NEIGHBOUR = "import numpy as np\na = np.ones((700, 700))\nwhile True: a @ a"


def measure(teacher_name: str, keep: bool) -> dict[str, float]:
    """Images per second, share of system time and page faults per image of this process."""
    import torch  # first: OpenMP then waits as the environment says, not as pipeline sets it

    from teacher_cache.pipeline.models.device import keep_freed_memory
    from teacher_cache.pipeline.models.teacher import load_teacher

    if keep:
        keep_freed_memory(torch.device("cpu"))
    live = load_teacher(teacher_name, device="cpu")
    pixels = torch.randn(BATCH, 3, *live.preprocess.size)
    for _ in range(2):
        live.encode_images(pixels)
    before, started, images = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        live.encode_images(pixels)
        images += BATCH
    spent, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "images_per_second": images / spent,
        "system_share": (after.ru_stime - before.ru_stime) / busy,
        "faults_per_image": (after.ru_minflt - before.ru_minflt) / images,
    }


def run(teacher: str, variant: str) -> dict[str, float]:
    """One figure from a process of its own."""
    keep, sleep = VARIANTS[variant]
    env = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    if sleep:
        import teacher_cache.pipeline  # noqa: F401  # sets how threads wait, where nothing else did

        env |= {name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, __file__, teacher, "--one", "keep" if keep else "plain"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Run the rounds, or one figure when called by them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", choices=["keep", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.teacher, options.one == "keep")))
        return
    print(f"{os.cpu_count()} cores, batch {BATCH}, {options.rounds} rounds of {SECONDS:.0f} s")
    for company in ("alone", "busy neighbour"):
        found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
        env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        neighbour = subprocess.Popen([sys.executable, "-c", NEIGHBOUR], env=env) if company != "alone" else None
        try:
            for _ in range(options.rounds):
                for name, rows in found.items():
                    rows.append(run(options.teacher, name))
        finally:
            if neighbour is not None:
                neighbour.kill()
                neighbour.wait()
        base = [row["images_per_second"] for row in found["as it comes"]]
        for name, rows in found.items():
            rates = [row["images_per_second"] for row in rows]
            ratios = [rate / other for rate, other in zip(rates, base, strict=True)]
            system = statistics.median(row["system_share"] for row in rows)
            faults = statistics.median(row["faults_per_image"] for row in rows)
            print(
                f"| {company} | {name} | {statistics.median(rates):.1f} ({min(rates):.1f}-{max(rates):.1f}) "
                f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) "
                f"| {system:.0%} | {faults:,.0f} |"
            )


if __name__ == "__main__":
    main()
