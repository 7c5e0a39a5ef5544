"""Targets of an epoch in window-shuffled order, against a bare memory map of the same rows that checks nothing.

Warm page cache, batches of 1,024, windows of eight chunks. Both sides get the rows of each batch ready made and
hand out new arrays, of which nothing is made. Only our side has threads: they load chunks ahead. A run of several
epochs is the sum of a first and of later ones, each measured by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.bench.big_cache import big_cache
from benchmarks.bench.harness import Row, Settings, interleave, speed
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.shuffle import batches, window_order
from teacher_cache.storage.read.stream import Prove

WIDTH, CHUNK_ROWS, WINDOW, BATCH = 512, 4096, 8, 1024
_EPOCHS = 5


def measure(settings: Settings) -> list[Row]:
    """Rows per second of whole epochs."""
    count = 20_000 if settings.quick else 1_000_000
    location = big_cache(settings.scratch, count, WIDTH, CHUNK_ROWS, captions=0)
    path = settings.scratch / "rows.bin"
    bare = bare_memmap(location, path)
    order = list(batches(window_order(np.arange(count), CHUNK_ROWS, WINDOW, 0, 0), BATCH))
    rows = sum(len(batch) for batch in order)
    used = new_reader(location)
    anew = [new_reader(location) for _ in range(settings.rounds + 1)]  # a round is to warm up

    # whoever uses a batch holds it until the next one comes: both sides have two arrays in turn
    def fancy(rows: NDArray[np.float16]) -> None:
        for batch in order:
            held = rows[batch]
        del held

    def take(rows: NDArray[np.float16]) -> None:
        for batch in order:
            held = np.take(rows, batch, axis=0)
        del held

    def stream(reader: Callable[[], EmbeddingReader], prove: Prove) -> Callable[[], None]:
        def run() -> None:
            for _ in reader().stream("image", order, prove=prove):
                pass

        return run

    def one_by_one() -> None:
        reader = new_reader(location)
        for batch in order:
            held = reader.take("image", batch)
        del held

    seconds = interleave(
        {
            "fancy": lambda: fancy(bare),
            "take": lambda: take(bare),
            "take, opened anew": lambda: take(open_memmap(path, count)),
            "fancy, opened anew": lambda: fancy(open_memmap(path, count)),
            "first": stream(anew.pop, "first"),
            "later": stream(lambda: used, "first"),
            "every": stream(lambda: used, "every"),
            "one by one": one_by_one,
        },
        settings.rounds,
    )

    def better(fancy: str, take: str) -> list[float]:
        """The better of two ways to say it, in each round."""
        return [min(pair) for pair in zip(seconds[fancy], seconds[take], strict=True)]

    theirs, theirs_anew = better("fancy", "take"), better("fancy, opened anew", "take, opened anew")
    # of a run of several epochs the first one proves
    ours_run = [first + (_EPOCHS - 1) * later for first, later in zip(seconds["first"], seconds["later"], strict=True)]
    their_run = [first + (_EPOCHS - 1) * later for first, later in zip(theirs_anew, theirs, strict=True)]
    against, against_anew = "np.memmap, unchecked", "np.memmap opened anew, unchecked"
    first = (
        "the commits had been read, as they are once in a run. Two cores share the memory: the consumer gathers slower "
        "while a thread proves, see docs/design/016-streaming.md"
    )
    return [
        speed(
            f"stream, a run of {_EPOCHS} epochs, each chunk proven once",
            against_anew,
            ours_run,
            their_run,
            _EPOCHS * rows,
            "rows/s",
            0.8,
        ),
        speed(
            "stream, a run's first epoch by itself",
            against_anew,
            seconds["first"],
            theirs_anew,
            rows,
            "rows/s",
            0.8,
            first,
        ),
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
        for chunk in range(layout.chunks("image")):
            file.write(reader.chunk(ChunkRef("image", 0, chunk)).data)
    return open_memmap(path, layout.image_rows)


def open_memmap(path: Path, rows: int) -> NDArray[np.float16]:
    """The rows that :func:`bare_memmap` wrote, mapped anew: none of their pages is in its table yet."""
    return np.memmap(path, np.float16, "r", shape=(rows, WIDTH))
