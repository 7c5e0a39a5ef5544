"""Values of a training step, which a GPU computes while the next step is launched."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from teacher_cache.pipeline.data.batches.pairs import Pairs
from teacher_cache.pipeline.models.device import mark
from teacher_cache.storage.observe.logs import event, logger

_LOG = logger("train")


@dataclass(frozen=True)
class StepValues:
    """Values of one step for the logs.

    Attributes:
        step: step of the run, from 1.
        parts: each named loss before weighting.
        grad_norm: norm of all gradients, before clipping.
        logit_scale: the student's logit scale in the loss, after exp.
    """

    step: int
    loss: float
    parts: dict[str, float]
    learning_rate: float
    grad_norm: float
    logit_scale: float


class LateValues:
    """Values of a step on their way from the device. Nothing waits for them before :meth:`read`.

    Args:
        step: step of the run, from 0.
        values: loss, norm of the gradient, logit scale and each of ``parts``; (3 + parts,) on the device.
        parts: names of the losses.
        pairs: rows of the whole batch, for messages.
    """

    def __init__(self, step: int, learning_rate: float, values: Tensor, parts: list[str], pairs: Pairs) -> None:
        self._step, self._learning_rate, self._parts, self._pairs = step + 1, learning_rate, parts, pairs
        self._values = values.to("cpu", non_blocking=True)  # into pinned memory
        self._there = mark(values.device)

    @property
    def ready(self) -> bool:
        """True if the step has ended. On a CPU: always."""
        return self._there is None or bool(self._there.query())  # type: ignore[no-untyped-call]

    def read(self) -> StepValues:
        """Wait for the step to end and return its values.

        Raises:
            FloatingPointError: the loss or the gradient is not finite; the message names the rows of this batch.
        """
        if self._there is not None:
            self._there.synchronize()
        loss, grad_norm, scale, *parts = self._values.tolist()
        named = dict(zip(self._parts, parts, strict=True))
        if not math.isfinite(loss):
            raise FloatingPointError(self._not_finite(f"loss is {loss} ({named})"))
        if not math.isfinite(grad_norm):
            raise FloatingPointError(self._not_finite(f"the gradient's norm is {grad_norm}"))
        return StepValues(self._step, loss, named, self._learning_rate, grad_norm, scale)

    def _not_finite(self, what: str) -> str:
        images, captions = self._pairs.image_rows.tolist(), self._pairs.caption_rows.ravel().tolist()
        rows: dict[str, Any] = {"image_rows": images, "caption_rows": captions}
        event(
            _LOG, logging.ERROR, "not finite", step=self._step, detail=what, learning_rate=self._learning_rate, **rows
        )
        return (
            f"step {self._step}: {what}. Image rows {images}, caption rows {captions}. Lower the learning rate "
            f"({self._learning_rate:.2g}), or use precision fp32."
        )
