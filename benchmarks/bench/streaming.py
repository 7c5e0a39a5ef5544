"""Targets of an epoch in window-shuffled order, against a bare memory map of the same rows that checks nothing.

Warm page cache, batches of 1,024, windows of eight chunks. Both sides get the rows of each batch ready made and
hand out new arrays, of which nothing is made. Only our side has threads: they load chunks ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.bench.big_cache import big_cache
from benchmarks.bench.harness import Row, Settings, interleave, speed
from storage.commits import ChunkRef
from storage.order import batches, window_order
from storage.reader import EmbeddingReader
from storage.stream import Prove

WIDTH, CHUNK_ROWS, WINDOW, BATCH = 512, 4096, 8, 1024


def measure(settings: Settings) -> list[Row]:
    """Rows per second of whole epochs."""
    count = 20_000 if settings.quick else 1_000_000
    location = big_cache(settings.scratch, count, WIDTH, CHUNK_ROWS, captions=0)
    bare = bare_memmap(location, settings.scratch / "rows.bin")
    order = list(batches(window_order(np.arange(count), CHUNK_ROWS, WINDOW, 0, 0), BATCH))
    rows = sum(len(batch) for batch in order)
    used = new_reader(location)

    def fancy() -> None:
        for batch in order:
            bare[batch]

    def take() -> None:
        for batch in order:
            np.take(bare, batch, axis=0)

    def stream(reader: Callable[[], EmbeddingReader], prove: Prove) -> Callable[[], None]:
        def run() -> None:
            for _ in reader().stream("image", order, prove=prove):
                pass

        return run

    def one_by_one() -> None:
        reader = new_reader(location)
        for batch in order:
            reader.take("image", batch)

    seconds = interleave(
        {
            "fancy": fancy,
            "take": take,
            "first": stream(lambda: new_reader(location), "first"),
            "later": stream(lambda: used, "first"),
            "every": stream(lambda: used, "every"),
            "one by one": one_by_one,
        },
        settings.rounds,
    )
    # the better of two ways to say it, in each round
    theirs = [min(pair) for pair in zip(seconds["fancy"], seconds["take"], strict=True)]
    against = "np.memmap, unchecked"
    first = (
        "the commits had been read, as they are once in a run. Checksum and NaN are looked at here: by processor time "
        "0.5 us a row in the threads, beside 0.26 us in the consumer's, so that this wants two cores to itself"
    )
    return [
        speed("stream, a run's first epoch", against, seconds["first"], theirs, rows, "rows/s", 0.8, first),
        speed("stream, a later epoch", against, seconds["later"], theirs, rows, "rows/s", 0.8),
        speed("stream, proven at every read", against, seconds["every"], theirs, rows, "rows/s", 0.6),
        speed("take by batches, chunks kept", against, seconds["one by one"], theirs, rows, "rows/s"),
    ]


def new_reader(location: str) -> EmbeddingReader:
    """A reader that has read the commits and no chunk."""
    reader = EmbeddingReader(location)
    _ = reader.quarantined
    return reader


def bare_memmap(location: str, path: Path) -> NDArray[np.float16]:
    """The image rows of a cache as one file."""
    reader = EmbeddingReader(location, memory_bytes=1)
    layout = reader.manifest.layout
    with path.open("wb") as file:
        for chunk in range(layout.image_chunks):
            file.write(reader.chunk(ChunkRef("image", 0, chunk)).data)
    return np.memmap(path, np.float16, "r", shape=(layout.image_rows, layout.embed_dim))
