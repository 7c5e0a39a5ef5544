"""How memory grows with a cache: an epoch of training targets, and what training and encoding know of the dataset.

Each size in a process of its own. Counted are anonymous and shared pages, sampled every few milliseconds, over what the
process had when its modules were imported: mapped files are the page cache's. Rows of 32 float16, so that
ten million fit a disk: what is counted for each row does not depend on the width, and the shuffle's window is 16 MB.

    python -m benchmarks.bench.memory WORK CACHE    # what each of those processes runs
"""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.bench.big_cache import big_cache
from benchmarks.bench.harness import Row, Settings

ROOT = Path(__file__).resolve().parents[2]
WIDTH, CHUNK, BATCH, WINDOW_CHUNKS = 32, 16_384, 1024, 16
_BUDGET = 32 << 20  # of the reader, for chunks
_WINDOWS_OF_INPUTS = 4  # two are held, and those before them have been let go


class PeakMemory:
    """The most anonymous and shared memory of this process while it is entered, over what it had then."""

    def __init__(self, every_seconds: float = 0.004) -> None:
        self._every = every_seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.bytes = 0

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return sum(1024 * int(line.split()[1]) for line in status if line.startswith(("RssAnon", "RssShmem")))

    def _watch(self) -> None:
        while not self._over.wait(self._every):
            self.bytes = max(self.bytes, self._now() - self._before)

    def __enter__(self) -> PeakMemory:
        self._before = self._now()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self.bytes = max(self.bytes, self._now() - self._before)


def stream_epoch(location: str) -> int:
    """An epoch of pairs as training draws them, and the targets of each; batches."""
    from teacher_cache.pipeline.data.batches.pairs import PairOrder
    from teacher_cache.storage.read.reader import EmbeddingReader

    reader = EmbeddingReader(location, memory_bytes=_BUDGET)
    drawn = PairOrder(reader, reader.row_set(), BATCH, WINDOW_CHUNKS, seed=0).epoch(0)
    for_images, for_captions = itertools.tee(drawn)
    images = reader.stream("image", ((pairs.image_rows, pairs.views) for pairs in for_images))
    captions = reader.stream("text", (pairs.caption_rows.ravel() for pairs in for_captions))
    return sum(1 for _ in zip(images, captions, strict=True))


def input_tables(location: str) -> int:
    """What training looks up of an epoch's images and captions, for its first windows; batches."""
    from teacher_cache.pipeline.data.batches.cached_samples import CachedSamples
    from teacher_cache.pipeline.data.batches.pairs import PairOrder
    from teacher_cache.storage.read.reader import EmbeddingReader

    reader = EmbeddingReader(location, memory_bytes=_BUDGET)
    samples = CachedSamples(reader, 2 * WINDOW_CHUNKS)
    drawn = PairOrder(reader, reader.row_set(), BATCH, WINDOW_CHUNKS, seed=0).epoch(0)
    done = 0
    for pairs in itertools.islice(drawn, _WINDOWS_OF_INPUTS * WINDOW_CHUNKS * CHUNK // BATCH):
        samples.records(pairs.image_rows)
        samples.texts(pairs.image_rows, pairs.caption_rows)
        done += 1
    return done


def encode_tables(location: str) -> int:
    """What an encoding process holds of the dataset while it goes through its chunks; chunks gone through.

    Of each chunk the rows are read, as for its batches; of some the digest is taken that its record has, which at ten
    million rows would take minutes of all.
    """
    from teacher_cache.storage.format.commits import all_chunks
    from teacher_cache.storage.write.writer import EmbeddingWriter

    writer = EmbeddingWriter(location)
    refs = all_chunks(writer.manifest.layout)
    for number, ref in enumerate(refs):
        writer.table(ref.tower).read(ref.rows(writer.manifest.layout))
        if number % max(len(refs) // 16, 1) == 0:
            writer.rows_sha256(ref)
    return len(refs)


WORK: dict[str, tuple[Callable[[str], int], tuple[str, ...]]] = {
    "stream": (stream_epoch, ("teacher_cache.pipeline.data.batches.pairs", "teacher_cache.storage.read.reader")),
    "inputs": (
        input_tables,
        (
            "teacher_cache.pipeline.data.batches.pairs",
            "teacher_cache.pipeline.data.batches.cached_samples",
            "teacher_cache.storage.read.reader",
        ),
    ),
    "tables": (encode_tables, ("teacher_cache.storage.format.tables", "teacher_cache.storage.write.writer")),
}


def _peak(work: str, location: str) -> int:
    command = [sys.executable, "-m", "benchmarks.bench.memory", work, location]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return int(json.loads(done.splitlines()[-1])["bytes"])


def measure(settings: Settings) -> list[Row]:
    sizes = (8_192, 16_384, 32_768) if settings.quick else (100_000, 1_000_000, 10_000_000)
    peaks: dict[str, list[int]] = {work: [] for work in WORK}
    for rows in sizes:
        location = big_cache(settings.scratch, rows, WIDTH, CHUNK)
        for work, found in peaks.items():
            found.append(_peak(work, location))
    titles = {
        "stream": "an epoch of targets, both towers, window of 16 chunks",
        "inputs": "what training looks up of images and captions, window of 16 chunks",
        "tables": "an encoding process's tables of samples and captions",
    }
    notes = {
        "stream": "Of each image a bit (whether it takes part) and its share of the chunks' records; a byte more of "
        "images that differ in how many captions they have, which these do not. Chunks, the shuffle, the draws of "
        "captions and views, and columns that are looked through are flat.",
        "inputs": "Names, paths, digests and texts of two windows, over the first four of an epoch. What a run "
        "holds of the order is in it.",
        "tables": "Of each table at most 131,072 rows in memory, so that caches of fewer grow up to there; planning, "
        "which holds the dataset, is not in this row (docs/design/014-scale.md).",
    }
    made = []
    for work, title in titles.items():
        for rows, peak in zip(sizes, peaks[work], strict=True):
            mebibytes = peak / 2**20
            row = Row(f"{title}: {rows:,} rows", "", mebibytes, None, "MiB", mebibytes, mebibytes, mebibytes)
            made.append(replace(row, value_unit="MiB"))
        each = (peaks[work][-1] - peaks[work][-2]) / (sizes[-1] - sizes[-2])
        made.append(
            Row(f"{title}: each further row", "flat", each, None, "B", each, each, each, 1.0, True, notes[work], "B")
        )
    return made


def main() -> None:
    work, location = sys.argv[1:]
    run, modules = WORK[work]
    for module in modules:
        importlib.import_module(module)
    np.random.default_rng(0).permutation(10)  # what the first use of a generator takes is not the cache's
    with PeakMemory() as peak:
        done = run(location)
    print(json.dumps({"bytes": peak.bytes, "done": done}))


if __name__ == "__main__":
    main()
