"""Run sections of the benchmark and write the day's table into ``benchmarks/results``.

    python -m benchmarks.bench                      # all sections of this device
    python -m benchmarks.bench streaming recall     # some of them
    python -m benchmarks.bench --quick              # small sizes: that everything runs

Each section is a module of this folder with ``measure(settings) -> list[Row]``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path

from benchmarks.bench.harness import Settings, keep

HERE = Path(__file__).resolve().parent
SECTIONS: dict[str, tuple[str, ...]] = {
    # module: devices it is for
    "rivals": ("cpu",),
    "startup": ("cpu",),
    "memory": ("cpu",),
    "shuffle": ("cpu",),
    "decode": ("cpu",),
    "precompute": ("cpu", "cuda"),
    "cpu_precisions": ("cpu",),
    "training": ("cpu", "cuda"),
    "input": ("cpu",),
    "storage": ("cpu",),
    "s3": ("cpu",),
    "streaming": ("cpu",),
    "resident": ("cpu",),
    "recall": ("cpu",),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all if none is named"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small sizes, numbers that mean nothing")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shared", type=Path, default=HERE.parents[2] / "shared", help="photographs and their teacher")
    parser.add_argument("--scratch", type=Path, help="a folder for what is built; a temporary one if left out")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    options = parser.parse_args()
    if unknown := sorted(set(options.sections) - set(SECTIONS)):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    wanted = options.sections or [name for name, devices in SECTIONS.items() if options.device in devices]
    failed = []
    for name in wanted:
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            settings = Settings(Path(scratch), options.shared, options.rounds, options.quick, options.device)
            started = time.perf_counter()
            print(f"{name} ...", file=sys.stderr, flush=True)
            try:
                rows = import_module(f"benchmarks.bench.{name}").measure(settings)
            except Exception:  # the other sections are worth their time
                traceback.print_exc()
                failed.append(name)
                continue
            print(keep(options.out, name, rows, settings, (time.perf_counter() - started) / 60))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
