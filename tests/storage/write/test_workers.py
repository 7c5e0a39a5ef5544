"""One reader, many users: workers of any start method, and threads that crowd each other out of memory."""

from __future__ import annotations

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
        ("fork", False, True),
        ("forkserver", True, False),
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
    for _ in range(2 if persistent else 1):
        np.testing.assert_array_equal(torch.cat(list(loader)).numpy(), EXPECTED.astype(np.float32))


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
