"""A cache whose captions lie near their images, for search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacher_cache.storage.format.commits import ChunkRef
from tests.conftest import finish_known_cache, known_row, plan_known_cache

IMAGES, CAPTIONS = 300, 600
LOST = (7, 250)


def make_paired_cache(path: Path, **plan: Any) -> Path:
    """A sealed cache of 300 images, two of them quarantined, and 600 captions near their images."""
    plan_known_cache(path, images=IMAGES, captions=CAPTIONS, chunk_rows=64, **plan)
    owners = np.sort(np.arange(CAPTIONS) % IMAGES)

    def near(ref: ChunkRef, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
        if ref.tower == "text":
            rows = np.arange(len(arrays["embedding"])) + ref.chunk * 64
            mixed = [known_row("image", owners[row]) + 0.9 * known_row("text", row) for row in rows]
            arrays["embedding"] = np.stack([row / np.linalg.norm(row) for row in mixed]).astype(np.float16)

    finish_known_cache(path, LOST, change=near)
    return path


@pytest.fixture(scope="session")
def paired_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """:func:`make_paired_cache`, to be left as it is."""
    return make_paired_cache(tmp_path_factory.mktemp("search") / "paired.cache")
