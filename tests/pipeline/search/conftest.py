"""Caches, indexes and a student for search."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacher_cache.pipeline.search.build import build_index
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


@pytest.fixture(scope="session")
def paired_index(paired_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of the paired cache that finds all neighbours, to be left as it is."""
    out = tmp_path_factory.mktemp("index") / "paired.index"
    build_index(str(paired_cache), str(out), 0.0, "IVF8,Flat")
    return out


@pytest.fixture(scope="session")
def photo_index(photo_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of 40 photographs by the tiny teacher, to be left as it is."""
    out = tmp_path_factory.mktemp("photos") / "photos.index"
    build_index(str(photo_cache), str(out), 5.0)
    return out


@pytest.fixture(scope="session")
def photo_student(tiny_deployment: Path, photo_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployed student that says to be one of the photographs' teacher, to be left as it is."""
    student = shutil.copytree(tiny_deployment, tmp_path_factory.mktemp("student") / "student")
    record = json.loads((student / "deploy.json").read_text())
    record["teacher"] = json.loads((photo_cache / "manifest.json").read_text())["identity"]["teacher"]["name"]
    (student / "deploy.json").write_text(json.dumps(record))
    return student
