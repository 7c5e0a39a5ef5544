"""Exact recall in both directions against clip-benchmark, and one bare product of the embeddings.

Two sizes, 512 wide: COCO's validation set (5,000 images, 25,000 captions) and its training set (118,287 and 591,435).
Random unit rows, the captions around their images. Of the large one a share is measured and multiplied, as notes say.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.bench.harness import Row, Settings, interleave, speed

DIM = 512
CAPTIONS = 5  # per image
SMALL, LARGE = 5_000, 118_287
KS = (1, 5, 10)
BATCH = 64  # clip-benchmark's default
LARGE_BATCH = 8  # its one-hot matrices of 64 queries x 10 x 591,435 would take 3 GB, and again as much multiplied
RANKED = 4_096  # queries of each direction that are ranked at the large size
PRODUCT_IMAGES = 2_048  # that are multiplied with all captions there
SHARE = 8  # of clip-benchmark's batches one in so many is run
PUBLISHED = "clip-benchmark's recall_at_k"
PRODUCT = "one float32 product by numpy"

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


def measure(settings: Settings) -> list[Row]:
    small, large = (300, 1_500) if settings.quick else (SMALL, LARGE)
    return [*at_validation_size(settings, small), *at_training_size(settings, large)]


def at_validation_size(settings: Settings, images: int) -> list[Row]:
    from teacher_cache.pipeline.evaluate.recall import retrieval_recall

    image, text, owner = embeddings(images)
    near = embeddings(images, collapsed=True)

    exact = partial(retrieval_recall, image, text, owner)
    seconds = interleave(
        {
            "ours": exact,
            "product": partial(product, image, text),
            "collapsed": partial(retrieval_recall, *near),
        },
        settings.rounds,
    )
    theirs: list[float] = []
    beside = interleave(
        {"ours": exact, "theirs": lambda: theirs.append(published(image, text, owner, SHARE))},
        min(settings.rounds, 3),
        warm_up=False,
    )
    size = f"{images:,} images x {len(text):,} captions"
    queries = images + len(text)
    memory = {way: child(way, images)["bytes"] for way in ("ours", "published")}
    return [
        speed(f"recall, {size}", PUBLISHED, beside["ours"], theirs, queries, "queries/s", 3.0, _PUBLISHED_NOTE),
        times(f"recall, {size}", PRODUCT, seconds["ours"], seconds["product"], note=_PRODUCT_NOTE),
        times(f"recall of a collapsed student, {size}", PRODUCT, seconds["collapsed"], seconds["product"], note=_NEAR),
        peak(f"peak memory, {size}", memory["ours"], memory["published"], note="beyond the embeddings; both measured"),
    ]


_PUBLISHED_NOTE = (
    f"from the embeddings on, batches of {BATCH}; its scores in full, "
    f"of its batches one in {SHARE} and their time x {SHARE}"
)
_PRODUCT_NOTE = "all scores once, in tiles that are thrown away; FAISS multiplies once per direction"
_NEAR = "all rows within 0.01 of one direction, as at a student's start: float32 tells few scores apart"


def at_training_size(settings: Settings, images: int) -> list[Row]:
    found = child("large", images, min(settings.rounds, 2))
    texts = CAPTIONS * images
    size = f"{images:,} images x {texts:,} captions"
    share = f"measured on {found['queries_ours']:,} queries of each direction and multiplied"
    theirs = [bare + found["published"] for bare in found["product"]]
    held = 5 * images * texts
    return [
        times(f"recall, {size}", PRODUCT, found["ours"], found["product"], note=share),
        speed(
            f"recall, {size}",
            PUBLISHED,
            found["ours"],
            theirs,
            images + texts,
            "queries/s",
            3.0,
            f"ours {share}; theirs the same product, and recall_at_k of {found['queries']} queries of each direction "
            "at once, multiplied: its scores would not fit into memory",
        ),
        peak(
            f"peak memory, {size}",
            found["bytes"],
            held,
            0.1,
            "ours measured beyond the embeddings on that share; theirs reckoned: its scores in float32 and its matrix "
            "of positives, before any batch",
        ),
    ]


def times(
    what: str, against: str, ours: Sequence[float], theirs: Sequence[float], most: float | None = None, note: str = ""
) -> Row:
    """Seconds, and how many times theirs ours are."""
    ratios = [mine / bare for mine, bare in zip(ours, theirs, strict=True)]
    return Row(
        what,
        against,
        median(ours),
        median(theirs),
        "s",
        median(ratios),
        min(ratios),
        max(ratios),
        most,
        at_most=True,
        note=note,
    )


def peak(what: str, ours: int, theirs: int, most: float | None = None, note: str = "") -> Row:
    """Megabytes."""
    ratio = ours / theirs
    return Row(what, PUBLISHED, ours / 1e6, theirs / 1e6, "MB", ratio, ratio, ratio, most, at_most=True, note=note)


def embeddings(images: int, collapsed: bool = False) -> tuple[Floats, Floats, Rows]:
    """Unit rows: captions around their images; collapsed: all around one direction, as of a student at its start."""
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(images), CAPTIONS)
    image = rng.standard_normal((images, DIM), dtype=np.float32)
    text = rng.standard_normal((len(owner), DIM), dtype=np.float32)
    middle = rng.standard_normal(DIM, dtype=np.float32)
    for rows, of in ((text, owner), (image, None)):
        for start in range(0, len(rows), 65_536):
            part = rows[start : start + 65_536]
            if collapsed:
                part *= np.float32(0.01)
                part += middle
            elif of is not None:
                part *= np.float32(6)
                part += image[of[start : start + 65_536]]
            part /= np.linalg.norm(part, axis=1, keepdims=True)
    return image, text, owner


def product(image: Floats, text: Floats) -> None:
    """All scores once and nothing else, by all cores, 2,048 images by 1,024 captions at a time into one buffer."""
    buffer = np.empty(2_048 * 1_024, np.float32)
    for first in range(0, len(image), 2_048):
        for start in range(0, len(text), 1_024):
            some, columns = image[first : first + 2_048], text[start : start + 1_024]
            out = buffer[: len(some) * len(columns)].reshape(len(some), len(columns))
            np.matmul(some, columns.T, out=out)


def published(image: Floats, text: Floats, owner: Rows, share: int) -> float:
    """Seconds of what clip-benchmark does once it has the embeddings, by one in ``share`` of its batches."""
    import torch
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    started = time.perf_counter()
    scores = torch.from_numpy(text) @ torch.from_numpy(image).t()
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(text)), torch.from_numpy(owner)] = True
    whole = time.perf_counter() - started
    parts = 0.0
    for some, pairs in ((scores, positive), (scores.T, positive.T)):
        kept = max(BATCH, len(some) // share // BATCH * BATCH)
        started = time.perf_counter()
        for k in KS:
            (batchify(recall_at_k, some[:kept], pairs[:kept], BATCH, "cpu", k=k) > 0).float().mean().item()
        parts += (time.perf_counter() - started) * len(some) / kept
    return whole + parts


def published_at_large(image: Floats, text: Floats, owner: Rows) -> tuple[float, int]:
    """Seconds of ``recall_at_k`` of all queries of both directions, from those of a few, and how many these were."""
    import torch
    from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k

    seconds = 0.0
    for queries, gallery, mine, theirs in ((image, text, np.arange(len(image)), owner), (text, image, owner, None)):
        gallery_owner = np.arange(len(gallery)) if theirs is None else theirs
        scores = torch.from_numpy(queries[:LARGE_BATCH]) @ torch.from_numpy(gallery).t()
        pairs = torch.from_numpy(mine[:LARGE_BATCH, None] == gallery_owner)
        recall_at_k(scores[:1], pairs[:1], 1)  # torch's threads have started
        started = time.perf_counter()
        for k in KS:
            recall_at_k(scores, pairs, k)
        seconds += (time.perf_counter() - started) * len(queries) / LARGE_BATCH
    return seconds, LARGE_BATCH


def ranked_share(image: Floats, text: Floats, owner: Rows) -> float:
    """Seconds of ranking all queries of both directions, from those of some."""
    from teacher_cache.pipeline.evaluate.faiss_search import Matches, find_engine, rows_ahead
    from teacher_cache.storage.look.nearest import exact_scores

    engine, seconds = find_engine("cpu"), 0.0
    some = np.arange(min(RANKED, len(image)))
    for queries, gallery, match in ((image, text, CAPTIONS * some), (text, image, owner[some])):
        started = time.perf_counter()
        matches = Matches(queries[some], exact_scores(queries, gallery, some, match), match)
        rows_ahead(matches, gallery, max(KS), engine)
        seconds += (time.perf_counter() - started) * len(queries) / len(some)
    return seconds


def child(way: str, images: int, rounds: int = 1) -> dict[str, Any]:
    """What :func:`in_child` finds in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench.recall", way, str(images), str(rounds)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def in_child(way: str, images: int, rounds: int) -> dict[str, Any]:
    """Peak memory beyond the embeddings of one way; of the large size times too."""
    from teacher_cache.pipeline.evaluate.recall import retrieval_recall

    image, text, owner = embeddings(images)
    if way == "published":
        import clip_benchmark.metrics.zeroshot_retrieval  # noqa: F401  # libraries are no part of it
    before = status_bytes("VmRSS")
    if way != "large":
        retrieval_recall(image, text, owner) if way == "ours" else published(image, text, owner, SHARE)
        return {"bytes": status_bytes("VmHWM") - before}
    found: dict[str, Any] = {"ours": [], "product": []}
    for _ in range(rounds):
        found["ours"].append(ranked_share(image, text, owner))
        found.setdefault("bytes", status_bytes("VmHWM") - before)
        started = time.perf_counter()
        product(image[:PRODUCT_IMAGES], text)
        found["product"].append((time.perf_counter() - started) * images / PRODUCT_IMAGES)
    found["queries_ours"] = min(RANKED, images)
    found["published"], found["queries"] = published_at_large(image, text, owner)
    return found


def status_bytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, name
    return 1024 * int(found[1])


if __name__ == "__main__":
    print(json.dumps(in_child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
