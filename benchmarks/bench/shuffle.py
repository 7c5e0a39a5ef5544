"""How far the window shuffle is from a uniform one, and what that costs a small student.

The first rows count, for batches of a million rows, how many of a row's batch mates were its chunk mates. The others
train a perceptron (:mod:`benchmarks.bench.perceptron`) on Flickr8k; only differences between orders mean anything.
Once in the order of the files, once with the images sorted by content, which is what a dataset sorted by class does to
chunks.
"""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.bench.harness import Row, Settings
from benchmarks.bench.perceptron import perceptron_recall, thumbnails
from teacher_cache.storage.read.shuffle import batches, window_order

BATCH = 1024
_IN_ORDER, _SORTED = "in the order of the files", "sorted by content"


def mates_share(rows: int, chunk_rows: int, window_chunks: int, batch_size: int, batches_read: int) -> float:
    """Of all pairs of rows in a batch, the share that is of one chunk of the cache; mean over the first batches."""
    order = window_order(np.arange(rows), chunk_rows, window_chunks, seed=0, epoch=0)
    shares = []
    for batch in itertools.islice(batches(order, batch_size), batches_read):
        counts = np.bincount(batch // chunk_rows).astype(np.int64)
        shares.append(float((counts * (counts - 1)).sum()) / (batch_size * (batch_size - 1)))
    return statistics.mean(shares)


def _mixing(settings: Settings) -> list[Row]:
    chunk_rows, chunks = (256, 32) if settings.quick else (4096, 256)
    rows = chunk_rows * chunks
    batch = min(BATCH, chunk_rows)
    uniform = (chunk_rows - 1) / (rows - 1)
    made = []
    for window in sorted({1, 4, 16, 64, chunks}):
        if window > chunks:
            continue
        share = mates_share(rows, chunk_rows, window, batch, 64)
        what = f"batch mates that were chunk mates, window of {window} of {chunks} chunks"
        ratio = share / uniform
        note = "It should be one in as many as the window has chunks." if window == 16 else ""
        made.append(Row(what, "uniform shuffle", 100 * share, 100 * uniform, "%", ratio, ratio, ratio, note=note))
    return made


def _features(settings: Settings, images: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(images, 768) thumbnails, and (images, dim) unit features of the teacher."""
    import torch
    from PIL import Image

    from teacher_cache.pipeline.models.teacher import load_teacher

    teacher = load_teacher(f"local-dir:{settings.shared / 'teacher-flickr8k'}", device="cpu")
    transform = teacher.preprocess.transform
    features = []
    paths = sorted((settings.shared / "flickr8k" / "images").glob("*.jpg"))[:images]
    for first in range(0, len(paths), 32):
        pictures = [Image.open(path).convert("RGB") for path in paths[first : first + 32]]
        features.append(teacher.image_features(torch.stack([transform(picture) for picture in pictures])).numpy())
    return thumbnails(paths), np.concatenate(features)


def _training(settings: Settings) -> list[Row]:
    images, held_out, epochs = (192, 64, 1) if settings.quick else (4072, 1000, 12)
    pixels, targets = _features(settings, images)
    train = len(pixels) - held_out
    centred = targets[:train] - targets[:train].mean(0)
    by_content = np.argsort(centred @ np.linalg.svd(centred, full_matrices=False)[2][0], kind="stable")
    made = []
    chunks = -(-train // 64)
    seeds = range(2 if settings.quick else max(settings.rounds, 5))
    for order, rows in ((_IN_ORDER, np.arange(train)), (_SORTED, by_content)):
        arranged = np.concatenate([rows, np.arange(train, len(pixels))])
        x, y = pixels[arranged], targets[arranged]
        uniform = [perceptron_recall(x, y, held_out, chunks, seed, epochs) for seed in seeds]
        for window in (1, 4, 16):
            found = [perceptron_recall(x, y, held_out, window, seed, epochs) for seed in seeds]
            ratios = [ours / max(theirs, 1 / held_out) for ours, theirs in zip(found, uniform, strict=True)]
            made.append(
                Row(
                    f"R@10 of a perceptron, window of {window} of {chunks} chunks, images {order}",
                    "uniform shuffle, same seeds",
                    100 * statistics.median(found),
                    100 * statistics.median(uniform),
                    "%",
                    statistics.median(ratios),
                    min(ratios),
                    max(ratios),
                    note=f"{len(seeds)} seeds, which change weights and order; {epochs} epochs of {train:,} images."
                    if window == 16
                    else "",
                )
            )
    return made


def measure(settings: Settings) -> list[Row]:
    made = _mixing(settings)
    if Path(settings.shared / "teacher-flickr8k").is_dir() and Path(settings.shared / "flickr8k").is_dir():
        made += _training(settings)
    else:
        print(f"shuffle: no photographs and teacher in {settings.shared}: training left out")
    return made
