"""Exact recall both ways at COCO's sizes: seconds and peak memory, against the bare matrix product and clip-benchmark.

python benchmarks/retrieval.py [--rounds 3]           # 5,000 x 25,000 x 512, the size of COCO's validation set
python benchmarks/retrieval.py --large --rounds 1     # 118,287 x 591,435, that of its training set
python benchmarks/retrieval.py --large --part 10      # every tenth query of these, against the whole galleries

Each measurement is a process of its own, the variants in turn. Peak memory is what the process held at most beyond the
two arrays of embeddings (VmHWM of /proc; Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIM = 512
CAPTIONS = 5  # per image
SMALL, LARGE = 5_000, 118_287
PRODUCT, RECALL, COLLAPSED, PUBLISHED = "matrix product", "recall", "recall, collapsed rows", "clip-benchmark"

Work = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help=f"{LARGE:,} images instead of {SMALL:,}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", type=int, default=1, help="every so many-th query only")
    parser.add_argument("--measure", metavar="VARIANT", help=argparse.SUPPRESS)  # what the processes are told
    options = parser.parse_args()
    images = LARGE if options.large else SMALL
    if options.measure:
        print(json.dumps(measure(options.measure, images, options.part)))
        return
    # clip-benchmark holds all scores, and a K x gallery one-hot for each query: not at the large size
    variants = [PRODUCT, RECALL] if options.large or options.part > 1 else [PRODUCT, RECALL, COLLAPSED, PUBLISHED]
    found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    size = [*(["--large"] if options.large else []), "--part", str(options.part)]
    for _ in range(options.rounds):
        for variant in variants:
            command = [sys.executable, __file__, *size, "--measure", variant]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[variant].append(json.loads(done.stdout))
            print(f"{variant}: {done.stdout.strip()}", file=sys.stderr)
    recalls = [one["recall"] for variant in (RECALL, PUBLISHED) for one in found.get(variant, [])]
    assert all(recall == recalls[0] for recall in recalls), recalls
    print(f"{images:,} images, {CAPTIONS * images:,} captions, {DIM} wide, {os.cpu_count()} cores: {recalls[0]}")
    print(f"all scores once, in float32: {4 * CAPTIONS * images**2 / 1e9:,.1f} GB\n")
    print("| | seconds | times the product | peak memory, MB |\n|---|---|---|---|")
    floor = [one["seconds"] for one in found[PRODUCT]]
    for variant, rounds in found.items():
        seconds = [one["seconds"] for one in rounds]
        ratios = [mine / bare for mine, bare in zip(seconds, floor, strict=True)]
        peaks = [one["peak_bytes"] / 1e6 for one in rounds]
        print(f"| {variant} | {spread(seconds, '.1f')} | {spread(ratios, '.2f')} | {spread(peaks, ',.0f')} |")


def spread(values: list[float], form: str) -> str:
    middle = format(float(np.median(values)), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}}-{max(values):{form}})"


def measure(variant: str, images: int, part: int) -> dict[str, Any]:
    image, text, text_image = embeddings(images, collapsed=variant == COLLAPSED)
    work = {PRODUCT: bare_product, RECALL: exact, COLLAPSED: exact, PUBLISHED: published}[variant]
    if part > 1:
        work = {PRODUCT: partial(bare_product, part=part), RECALL: partial(exact_part, part=part)}[variant]
    run = work(image, text, text_image)
    before = status_bytes("VmRSS")
    started = time.perf_counter()
    recall = run()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_bytes": status_bytes("VmHWM") - before, "recall": recall}


def embeddings(images: int, collapsed: bool) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Unit rows: captions around their images; collapsed: all around one direction, as of a student at its start."""
    rng = np.random.default_rng(0)
    text_image = np.repeat(np.arange(images), CAPTIONS)
    image = rng.standard_normal((images, DIM), dtype=np.float32)
    text = rng.standard_normal((len(text_image), DIM), dtype=np.float32)
    if collapsed:
        middle = rng.standard_normal(DIM, dtype=np.float32)
        image, text = image * np.float32(0.01) + middle, text * np.float32(0.01) + middle
    else:
        text *= np.float32(6)
        for start in range(0, len(text), 65_536):
            text[start : start + 65_536] += image[text_image[start : start + 65_536]]
    for rows in (image, text):
        for start in range(0, len(rows), 65_536):
            part = rows[start : start + 65_536]
            part /= np.linalg.norm(part, axis=1, keepdims=True)
    return image, text, text_image


def exact(image: NDArray[np.float32], text: NDArray[np.float32], text_image: NDArray[np.int64]) -> Work:
    import faiss  # noqa: F401  # its libraries are no part of the work

    from pipeline.metrics import retrieval_recall

    return lambda: retrieval_recall(image, text, text_image)


def exact_part(image: NDArray[np.float32], text: NDArray[np.float32], text_image: NDArray[np.int64], part: int) -> Work:
    """The same search for every ``part``-th query of each direction."""
    import faiss  # noqa: F401

    from pipeline.nearest import nearest_parts

    def run() -> dict[str, dict[str, float]]:
        recalls: dict[str, dict[str, float]] = {}
        own = np.arange(len(image))
        for direction, asked, asked_image, gallery, gallery_image in (
            ("i2t", image[::part], own[::part], text, text_image),
            ("t2i", text[::part], text_image[::part], image, own),
        ):
            hits = np.zeros(3)
            for start, rows in nearest_parts(asked, gallery, 10):
                right = gallery_image[rows] == asked_image[start : start + len(rows), None]
                hits += [right[:, :k].any(axis=1).sum() for k in (1, 5, 10)]
            recalls[direction] = {f"R@{k}": 100 * hit / len(asked) for k, hit in zip((1, 5, 10), hits, strict=True)}
        return recalls

    return run


def bare_product(
    image: NDArray[np.float32], text: NDArray[np.float32], text_image: NDArray[np.int64], part: int = 1
) -> Work:
    """All scores of both directions and nothing else: 1,024 queries by 8,192 rows at a time, into one buffer."""
    buffer = np.empty((1024, 8192), np.float32)

    def run() -> None:
        for queries, gallery in ((image[::part], text), (text[::part], image)):
            for start in range(0, len(queries), 1024):
                for first in range(0, len(gallery), 8192):
                    some, rows = queries[start : start + 1024], gallery[first : first + 8192]
                    np.matmul(some, rows.T, out=buffer[: len(some), : len(rows)])

    return run


def published(image: NDArray[np.float32], text: NDArray[np.float32], text_image: NDArray[np.int64]) -> Work:
    """What clip-benchmark does once it has the embeddings, with batches of 64, its default."""
    import torch
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    def run() -> dict[str, dict[str, float]]:
        scores = torch.from_numpy(text) @ torch.from_numpy(image).t()
        positive = torch.zeros_like(scores, dtype=torch.bool)
        positive[torch.arange(len(text)), torch.from_numpy(text_image)] = True
        recalls: dict[str, dict[str, float]] = {"i2t": {}, "t2i": {}}
        for direction, some, pairs in (("i2t", scores.T, positive.T), ("t2i", scores, positive)):
            for k in (1, 5, 10):
                hits = int((batchify(recall_at_k, some, pairs, 64, "cpu", k=k) > 0).sum())
                recalls[direction][f"R@{k}"] = 100 * hits / len(some)
        return recalls

    return run


def status_bytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, name
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
