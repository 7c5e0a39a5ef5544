"""Models of known memory for ``teacher_cache.pipeline.evaluate.cost.peak_memory``, loaded in a process of its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

MB = 1_000_000


class Hungry:
    """Takes so much for each image, and nothing for captions."""

    def __init__(self, kept_mb: int, image_mb: int) -> None:
        self._kept, self._image_mb = np.ones(kept_mb * MB, np.uint8), image_mb

    def images(self, batch: int) -> Callable[[], object]:
        return lambda: np.ones(batch * self._image_mb * MB, np.uint8).sum()

    def texts(self, batch: int) -> Callable[[], object]:
        return lambda: None


def load(kept_mb: int, image_mb: int, loading_mb: int = 0) -> Hungry:
    np.ones(loading_mb * MB, np.uint8).sum()  # gone when it is loaded
    return Hungry(kept_mb, image_mb)


def killed() -> Hungry:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def refused() -> Hungry:
    raise ValueError("nothing here to load")
