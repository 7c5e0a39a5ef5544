"""A student that trains in a second: what a change of the targets or of their order does, over many seeds.

A two-layer perceptron on 16 x 16 thumbnails learns a teacher's image features, by feature and contrastive terms, in
batches drawn by ``storage/read/shuffle.py``. Measured is how often, among images held out, the teacher's own row is
one of the ten nearest. It is no CLIP student: only differences mean anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.read.shuffle import batches, window_order


def thumbnails(paths: Sequence[Path]) -> NDArray[np.float32]:
    """Pixels of images, float32 (len(paths), 768), from -1 to 1."""
    from PIL import Image

    return np.stack(
        [
            np.asarray(Image.open(path).convert("RGB").resize((16, 16)), np.float32).reshape(-1) / 127.5 - 1
            for path in paths
        ]
    )


def perceptron_recall(
    pixels: NDArray[np.float32],
    targets: NDArray[np.float32],
    held_out: int,
    window_chunks: int,
    seed: int,
    epochs: int,
) -> float:
    """R@10 of the last ``held_out`` rows after training on the others; ``seed`` is of weights and order."""
    import torch
    from torch import nn
    from torch.nn import functional

    torch.manual_seed(seed)
    x, y = torch.from_numpy(pixels), torch.from_numpy(targets)
    rows = np.arange(len(x) - held_out)
    student: Any = nn.Sequential(nn.Linear(x.shape[1], 512), nn.GELU(), nn.Linear(512, y.shape[1]))
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3, weight_decay=0.05)
    for epoch in range(epochs):
        for batch in batches(window_order(rows, 64, window_chunks, seed, epoch), 128):
            at = torch.from_numpy(batch)
            u, p = functional.normalize(student(x[at]), dim=-1), y[at]
            logits = 15 * u @ p.T
            loss = functional.cross_entropy(logits, torch.arange(len(at))) + 500 * functional.mse_loss(u, p)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        scores = functional.normalize(student(x[-held_out:]), dim=-1) @ y[-held_out:].T
    above = (scores > scores.diagonal()[:, None]).sum(1)
    return float((above < 10).float().mean())
