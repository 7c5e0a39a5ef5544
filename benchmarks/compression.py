"""Compressed caches: bytes saved on a teacher's embeddings, by storage type and setting; speed of streams."""

from __future__ import annotations

import argparse
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from benchmarks.bench.big_cache import big_cache
from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.storage.format.int8 import quantize
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.shuffle import batches, window_order

CHUNK_ROWS = 4096
SETTINGS = (("bitshuffle", 1, 0), ("bitshuffle", 1, 1 << 20), ("bitshuffle", 9, 1 << 20), ("shuffle", 1, 1 << 20))
SHUFFLES = {"bitshuffle": blosc.BITSHUFFLE, "shuffle": blosc.SHUFFLE}


def teacher_rows(cache: str, teacher: str) -> dict[str, NDArray[Any]]:
    """A chunk of captions as the cache can hold them, and as the teacher gives them."""
    reader, live = EmbeddingReader(cache), load_teacher(teacher, device="cpu")
    half = reader.take("text", np.arange(CHUNK_ROWS))
    texts = reader.captions["text"].to_pylist()[:CHUNK_ROWS]
    parts = [live.text_features(live.tokenizer(texts[at : at + 64])).numpy() for at in range(0, CHUNK_ROWS, 64)]
    full = np.concatenate(parts)
    assert np.abs(full - half).max() < 1e-3
    return {"float16": half, "int8": quantize(half)[0], "float32": full}


def print_bytes(rows: dict[str, NDArray[Any]], rounds: int) -> None:
    blosc.use_threads = False
    for (name, values), (shuffle, level, block) in product(rows.items(), SETTINGS):
        codec = blosc.Blosc("zstd", level, SHUFFLES[shuffle], block, typesize=values.itemsize)
        packed = codec.encode(values)
        rates = []
        for _ in range(rounds):
            start = time.perf_counter()
            codec.encode(values)
            middle = time.perf_counter()
            codec.decode(packed)
            rates.append(np.array([1 / (middle - start), 1 / (time.perf_counter() - middle)]) * values.nbytes / 1e6)
        write, read = np.median(rates, axis=0)
        saved = 100 * (1 - len(packed) / values.nbytes)
        blocks = "default" if block == 0 else "1 MiB"
        print(f"| {name} | {shuffle} | {level} | {blocks} | {saved:.1f} % | {write:,.0f} | {read:,.0f} |")


def epoch(reader: EmbeddingReader, number: int) -> float:
    """Rows per second of one epoch in windows of 16 chunks."""
    order = window_order(reader.image_rows(), CHUNK_ROWS, 16, 0, number)
    start = time.perf_counter()
    rows = sum(len(values) for values in reader.stream("image", batches(order, 256)))
    return rows / (time.perf_counter() - start)


def print_streams(folder: Path, block: NDArray[np.float16], dtype: str, rows: int, rounds: int) -> None:
    """The same rows raw and compressed, in turn; a fresh reader each time, and its second epoch."""
    fields: dict[str, Any] = {"embedding_dtype": None if dtype == "float16" else dtype}
    caches = {
        kind: big_cache(folder / f"{dtype}-{kind}", rows, block=block, compressor=compressor, **fields)
        for kind, compressor in (("raw", None), ("compressed", "blosc"))
    }
    taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in caches}
    for _ in range(rounds):
        for kind, cache in caches.items():
            reader = EmbeddingReader(cache)
            taken[kind].append((epoch(reader, 0), epoch(reader, 1)))
    stored = {
        kind: sum(path.stat().st_size for path in Path(cache).glob("targets.zarr/**/c/**/*") if path.is_file())
        for kind, cache in caches.items()
    }
    for at, which in enumerate(("first", "later")):
        raw, packed = ([pair[at] for pair in taken[kind]] for kind in ("raw", "compressed"))
        ratios = [second / first for first, second in zip(raw, packed, strict=True)]
        shown = [f"{median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f})" for rates in (raw, packed)]
        ratio = f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        share = f"{100 * (1 - stored['compressed'] / stored['raw']):.1f} %"
        print(f"| {dtype} | {share} | {which} | {shown[0]} | {shown[1]} | {ratio} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", help="float16 cache of the teacher, with 4,096 captions or more")
    parser.add_argument("teacher")
    parser.add_argument("folder", type=Path, help="for the caches that are streamed")
    parser.add_argument("--rows", type=int, default=131_072)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    rows = teacher_rows(given.cache, given.teacher)
    print_bytes(rows, given.rounds)
    for dtype in ("float16", "int8"):
        print_streams(given.folder, rows["float16"], dtype, given.rows, given.rounds)


if __name__ == "__main__":
    main()
