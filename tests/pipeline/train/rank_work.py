"""Two ranks, one of which fails or is stopped in the middle of a run; also as a script, for torchrun."""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch.distributed

from teacher_cache.pipeline.data.batches.targets import CachedTeacher
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.read.reader import EmbeddingReader

FAILING_RANK, FAILING_STEP = 1, 3


class FailingTeacher:
    """The step asks it for its scale, on the main thread, when the other rank is in the same step."""

    def __init__(self, reader: EmbeddingReader, how: str, pids: Path) -> None:
        cached = CachedTeacher(reader)
        self._scale, self.logit_bias, self.targets = cached.logit_scale, cached.logit_bias, cached.targets
        self._how, self._asked = how, 0
        (pids / str(os.getpid())).touch()

    @property
    def logit_scale(self) -> float:
        self._asked += 1
        if torch.distributed.get_rank() == FAILING_RANK and self._asked == FAILING_STEP:
            if self._how == "raises":
                raise ZeroDivisionError("a fault of rank 1")
            if self._how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if self._how == "stops":
                os.kill(os.getppid(), signal.SIGTERM)
                while signal.getsignal(signal.SIGTERM).__self__.request is None:  # type: ignore[union-attr]
                    time.sleep(0.01)
                return self._scale
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else torch and torchrun wait 30 s, and kill it
            time.sleep(3600)
        return self._scale


def failing_teacher(reader: EmbeddingReader, how: str, pids: Path) -> FailingTeacher:
    return FailingTeacher(reader, how, pids)


def train_failing(config: TrainConfig, how: str, pids: Path) -> None:
    train(config, teacher_source=partial(failing_teacher, how=how, pids=pids))


if __name__ == "__main__":
    train_failing(TrainConfig.model_validate_json(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
