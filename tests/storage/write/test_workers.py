"""One reader, many users: torch's workers, forked and spawned, and threads that crowd each other out of memory."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import known_row

pytestmark = [
    pytest.mark.timeout(180),  # a deadlock ends as a failure
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


class Rows(Dataset[torch.Tensor]):
    """Image and text row of a number, side by side."""

    def __init__(self, reader: EmbeddingReader) -> None:
        self.reader = reader

    def __getitem__(self, row: int) -> torch.Tensor:
        here = np.array([row])
        both = np.concatenate([self.reader.take("image", here % 10)[0], self.reader.take("text", here)[0]])
        return torch.from_numpy(both.astype(np.float32))

    def __len__(self) -> int:
        return 25


EXPECTED = np.stack([np.concatenate([known_row("image", row % 10), known_row("text", row)]) for row in range(25)])


@pytest.mark.parametrize(
    ("method", "persistent", "touched"),
    [
        ("fork", True, True),
        ("fork", True, False),
        ("fork", False, True),
        ("fork", False, False),
        # a spawned worker imports torch anew and gets no rows from its parent: two of these tell as much as four
        ("spawn", True, False),
        ("spawn", False, True),
    ],
)
def test_workers_of_a_data_loader_get_the_same_rows(
    known_cache: Path, method: str, persistent: bool, touched: bool
) -> None:
    """Over a reader that is open already.

    Args:
        touched: the parent has read rows before.
    """
    reader = EmbeddingReader(str(known_cache))
    if touched:
        reader.take("image", np.arange(10))
        reader.take("text", np.arange(25))
    loader = DataLoader(
        Rows(reader),
        batch_size=4,
        num_workers=2,
        multiprocessing_context=method,
        persistent_workers=persistent,
    )
    for _ in range(2 if persistent or method == "fork" else 1):
        np.testing.assert_array_equal(torch.cat(list(loader)).numpy(), EXPECTED.astype(np.float32))


def _take_all(reader: EmbeddingReader, answers: multiprocessing.Queue[list[float]]) -> None:
    assert len(reader.image_rows("train")) == 8
    answers.put(reader.take("text", np.arange(25), array="norm").tolist())


@pytest.mark.parametrize(
    "ask",
    [
        lambda reader: reader.take("image", np.arange(4)),
        lambda reader: reader.quarantined,
        lambda reader: reader.samples,
    ],
    ids=["take", "quarantined", "samples"],
)
def test_a_fork_while_another_thread_reads_does_not_hang(
    known_cache: Path, ask: Callable[[EmbeddingReader], object]
) -> None:
    """The child's copy of a lock belongs to a thread that the child does not have."""
    reader = EmbeddingReader(str(known_cache))
    holding, let_go = threading.Event(), threading.Event()
    read = reader.files.read

    def slow(key: str) -> bytes:
        holding.set()
        let_go.wait()
        return read(key)

    reader.files.read = slow  # type: ignore[method-assign]
    busy = threading.Thread(target=ask, args=(reader,))
    busy.start()
    holding.wait()
    reader.files.read = read  # type: ignore[method-assign]
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.Queue[list[float]] = context.Queue()
    child = context.Process(target=_take_all, args=(reader, answers))
    child.start()
    try:
        assert answers.get(timeout=60) == [float(row) for row in range(1, 26)]
    finally:
        let_go.set()
        busy.join()
        child.kill()
        child.join()


def test_threads_get_right_rows_while_chunks_come_and_go(known_cache: Path) -> None:
    reader = EmbeddingReader(str(known_cache), memory_bytes=2 * 4 * 8 * 2)  # two chunks of 17
    expected = {"image": EXPECTED[:10, :8], "text": EXPECTED[:, 8:]}

    def read(seed: int) -> int:
        rng = np.random.default_rng(seed)
        for _ in range(150):
            tower = rng.choice(["image", "text"])
            rows = rng.integers(0, len(expected[tower]), rng.integers(1, 9))
            np.testing.assert_array_equal(reader.take(tower, rows), expected[tower][rows])
        return seed

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(8))) == list(range(8))
    assert reader.objects_read > 100  # they did crowd each other out
    assert reader.chunks.held_bytes <= 2 * 4 * 8 * 2
