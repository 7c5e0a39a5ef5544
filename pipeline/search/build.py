"""A cache's rows to two indexes, each certified in the direction that it answers. No torch."""

from __future__ import annotations

import hashlib
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from teacher_cache.pipeline.evaluate.faiss_search import find_engine
from teacher_cache.pipeline.evaluate.split import Progress
from teacher_cache.pipeline.search.approximate import ApproximateIndex
from teacher_cache.pipeline.search.certificate import Direction, certify, draw_queries
from teacher_cache.pipeline.search.record import RECORD, IndexedTower, IndexRecord
from teacher_cache.storage.files.location import absolute_location
from teacher_cache.storage.files.new_files import new_folder, require_free
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.look.nearest import unit_rows
from teacher_cache.storage.read.reader import EmbeddingReader

_ROWS_AT_ONCE = 65_536
_MEMORY_BYTES = 64 << 20  # each chunk is read once
_SEEDS: dict[Tower, int] = {"image": 0, "text": 1}


class IndexedRows:
    """Images of a cache that have an embedding, with their captions: the rows of both indexes, by position.

    Attributes:
        rows: rows of the cache by tower.
        image: number of the image, from 0, that each row shows or describes, by tower.

    Raises:
        UsageError: an image has no caption.
    """

    def __init__(self, reader: EmbeddingReader) -> None:
        images = reader.image_rows()
        reader.require_captions(images, "Recall cannot be measured without, so no index is certified.")
        captions, caption_image = reader.caption_rows(images)
        self._reader = reader
        self.rows: dict[Tower, NDArray[np.int64]] = {"image": images, "text": captions}
        self.image: dict[Tower, NDArray[np.int64]] = {"image": np.arange(len(images)), "text": caption_image}

    def embeddings(self, tower: Tower, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return unit rows of view 0, float32 (positions, dim)."""
        rows = self.rows[tower][positions]
        out = np.empty((len(rows), self._reader.embed_dim), np.float32)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            out[part] = unit_rows(self._reader.take(tower, rows[part]))
        return out

    def direction(self, answers: Tower) -> Direction:
        """Return the direction that the index of a tower answers, with all rows of this tower."""
        asks: Tower = "text" if answers == "image" else "image"
        asked, sampled = draw_queries(len(self.rows[asks]), _SEEDS[answers])
        return Direction(
            f"{asks} to {answers}",
            self.embeddings(answers, np.arange(len(self.rows[answers]))),
            self.image[answers],
            self.embeddings(asks, asked),
            self.image[asks][asked],
            sampled,
        )


def build_index(
    cache: str, out: str, within: float, factory: str = "HNSW32", progress: Progress | None = None
) -> IndexRecord:
    """Build an index over a cache's images and one over its captions; write both if each loses little enough.

    The rows of one tower are in memory twice, as float32. A call that fails or is killed leaves no index.

    Args:
        out: folder to make.
        within: points of R@10 that each direction may lose to exact search.
        factory: FAISS's factory string.
        progress: called with (stage, done, total).

    Raises:
        UsageError: ``out`` exists, FAISS cannot build such an index, it loses more, or images have no captions.
        CacheError: the cache is missing, unfinished or damaged.
    """
    started, made_with = time.perf_counter(), find_engine("cpu").name
    require_free(Path(out))
    reader = EmbeddingReader(cache, memory_bytes=_MEMORY_BYTES)
    rows = IndexedRows(reader)
    built: dict[Tower, tuple[bytes, IndexedTower]] = {}
    for tower in ("image", "text"):
        if progress is not None:
            progress("index", len(built), 2)
        built[tower] = _certified(rows.direction(tower), factory, within)
    if progress is not None:
        progress("index", 2, 2)
    record = IndexRecord(
        cache=absolute_location(cache),
        cache_manifest_digest=reader.manifest.digest,
        teacher=reader.identity.teacher.name,
        embed_dim=reader.embed_dim,
        factory=factory,
        within=within,
        image=built["image"][1],
        text=built["text"][1],
        made_with=made_with,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.perf_counter() - started,
    )
    with new_folder(Path(out)) as folder:
        for tower, (data, _) in built.items():
            (folder / f"{tower}.faiss").write_bytes(data)
        (folder / RECORD).write_text(record.model_dump_json(indent=2) + "\n")
    return record


def _certified(direction: Direction, factory: str, within: float) -> tuple[bytes, IndexedTower]:
    index = ApproximateIndex.build(factory, direction.gallery)
    reached = certify(index, direction, within)
    data = index.to_bytes()
    return data, IndexedTower(
        rows=len(direction.gallery), bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), **reached._asdict()
    )
