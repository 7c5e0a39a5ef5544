"""Files of other projects and files made to harm, through the readers of datasets: ``benchmarks/fuzz.md``.

    python -m benchmarks.odd_files --seeds 2000 PACKAGE.tar.gz FOLDER ...

Each JSON, tar, CSV, Parquet and Arrow file in an archive or folder is given to every reader that it could be meant for,
as it is and in some damaged forms; then files of ``tests/hostile_files.py``, one for each seed. A reader takes them,
refuses them as documented, or the line of its fault is printed. Nothing is kept.
"""

from __future__ import annotations

import argparse
import random
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz_targets import TARGETS
from tests.hostile_files import HOSTILE, broken

_MEANT_FOR = {
    ".json": ("coco", "karpathy", "imagefolder", "labelled", "scenes"),
    ".jsonl": ("coco", "karpathy"),
    ".tar": ("webdataset",),
    ".csv": ("table", "flickr"),
    ".tsv": ("table", "flickr"),
    ".txt": ("table", "flickr", "flickr-list"),
    ".parquet": ("parquet",),
    ".arrow": ("parquet",),
    ".feather": ("parquet",),
}
_MOST_BYTES = 4_000_000
_DAMAGED = 5  # forms of each file


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("places", nargs="*", type=Path)
    parser.add_argument("--seeds", type=int, default=200)
    arguments = parser.parse_args()
    faults = 0
    for place in arguments.places:
        files = [(name, data) for name, data in _files(place) if Path(name).suffix in _MEANT_FOR]
        faults += _tried(str(place), ((reader, form) for name, data in files for reader, form in _forms(name, data)))
    for reader, make in HOSTILE.items():
        made = ((reader, make(random.Random(seed))) for seed in range(arguments.seeds))
        faults += _tried(f"made to harm: {reader}", made)
    sys.exit(bool(faults))


def _files(place: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a folder or of a source distribution."""
    if place.is_dir():
        for path in sorted(place.rglob("*")):
            if path.is_file() and path.stat().st_size <= _MOST_BYTES:
                yield path.name, path.read_bytes()
        return
    with tarfile.open(place) as archive:
        for member in archive:
            if member.isreg() and member.size <= _MOST_BYTES:
                yield member.name, archive.extractfile(member).read()  # type: ignore[union-attr]


def _forms(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    rng = random.Random(name)
    for reader in _MEANT_FOR[Path(name).suffix]:
        yield reader, data
        for _ in range(_DAMAGED):
            yield reader, broken(rng, data, always=True)


def _tried(what: str, inputs: Iterator[tuple[str, bytes]]) -> int:
    """Give inputs to their readers, print a line, and return the number of faults."""
    readers, faults, slowest = Counter[str](), 0, 0.0
    for reader, data in inputs:
        readers[reader] += 1
        with tempfile.TemporaryDirectory() as scratch:
            began = time.perf_counter()
            try:
                TARGETS[reader].run(data, Path(scratch))
            except Exception:
                faults += 1
                print(f"{what}, {reader}: {data[:60]!r}\n{traceback.format_exc(limit=-3)}")
            slowest = max(slowest, time.perf_counter() - began)
    print(f"{what}: {sum(readers.values()):,} inputs ({dict(readers)}), {faults} faults, slowest {slowest:.1f} s")
    return faults


if __name__ == "__main__":
    main()
