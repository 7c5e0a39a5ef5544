"""Search indexes: inner products and time of a query beside exact search, and the recall that each kind loses.

python -m benchmarks.search f8k.cache --within 1 --rounds 3
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np

from teacher_cache import Cache
from teacher_cache.pipeline.search.approximate import ApproximateIndex
from teacher_cache.pipeline.search.build import IndexedRows, build_index
from teacher_cache.storage.errors import UsageError

FACTORIES = ("HNSW32", "HNSW16", "IVF64,Flat", "IVF256,Flat", "IVF64,PQ64", "PCA128,HNSW32")
QUERIES = 500


def built(cache: str, factory: str, within: float) -> None:
    """Build one kind of index and print what it loses, or why it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            record = build_index(cache, str(Path(folder, "index")), within, factory)
        except UsageError as error:
            print(f"{factory}: refused: {error}")
            return
        for name, tower in (("image to text", record.text), ("text to image", record.image)):
            print(
                f"{factory}, {name}: effort {tower.effort}, exact {tower.exact:.2f}, index {tower.found:.2f}, "
                f"lost at most {tower.lost_at_most:.2f}, {tower.products:,.0f} products a query, "
                f"{tower.times_fewer:.1f} times fewer; {record.seconds:.0f} s for both"
            )


def timed(cache: str, within: float, rounds: int) -> None:
    """Print how many times faster single text queries are than exact search, over rounds that take turns."""
    rows = IndexedRows(Cache(cache))
    images = rows.embeddings("image", np.arange(len(rows.rows["image"])))
    texts = rows.embeddings("text", np.arange(QUERIES))
    with tempfile.TemporaryDirectory() as folder:
        record = build_index(cache, str(Path(folder, "index")), within)
        data = record.proven(Path(folder, "index"), "image")
    index = ApproximateIndex.loaded(data, record.image.rows, record.embed_dim, record.image.effort)

    def seconds(search: Callable[[np.ndarray], object]) -> float:
        started = time.perf_counter()
        for text in texts:
            search(text[None])
        return time.perf_counter() - started

    ratios = [
        seconds(lambda text: faiss.knn(text, images, 10, metric=faiss.METRIC_INNER_PRODUCT))
        / seconds(lambda text: index.search(text, 10))
        for _ in range(rounds)
    ]
    print(f"one text at a time: {statistics.median(ratios):.1f} times as fast ({min(ratios):.1f} to {max(ratios):.1f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache")
    parser.add_argument("--within", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for kind in (*FACTORIES, *["HNSW32"] * (arguments.rounds - 1)):
        built(arguments.cache, kind, arguments.within)
    timed(arguments.cache, arguments.within, arguments.rounds)
