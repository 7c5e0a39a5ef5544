"""Streams of a cache at a URL: the rows of ``take``, each chunk read once, and memory that is used again."""

from __future__ import annotations

import uuid

import numpy as np
import pytest

from teacher_cache.storage.read.chunk_region import ChunkRegion
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import known_row, make_known_cache

IMAGES = 200


@pytest.fixture
def reader() -> EmbeddingReader:
    location = f"memory://{uuid.uuid4()}/x.cache"
    make_known_cache(location, images=IMAGES, captions=10)
    return EmbeddingReader(location)


def test_rows_are_those_that_were_written_and_places_are_used_again(
    reader: EmbeddingReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teacher_cache.storage.read.stream._GROUP_ROWS", 8)
    monkeypatch.setattr("teacher_cache.storage.read.stream._CHECKED_ROWS", 16)
    places: list[int] = []
    fill = ChunkRegion.fill

    def noted(self: ChunkRegion, number: int, values: np.ndarray, again: bool = False) -> None:
        places.append(number)
        fill(self, number, values, again)

    monkeypatch.setattr(ChunkRegion, "fill", noted)
    # a window of three chunks at a time, shuffled
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(part) for part in np.split(np.arange(IMAGES), range(12, IMAGES, 12))])
    batches = np.split(order, range(5, IMAGES, 5))
    found = np.concatenate(list(reader.stream("image", batches, read_ahead_bytes=2 * 4 * 8 * 2)))
    assert np.array_equal(found, [known_row("image", row) for row in order])
    assert len(places) == reader.objects_read == IMAGES // 4
    assert len(set(places)) < IMAGES // 8  # of fifty chunks; more than a few are never there together
