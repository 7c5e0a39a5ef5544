"""AdamW, its learning rate over a run, and the average of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def learning_rate_share(step: int, total_steps: int, warmup_fraction: float) -> float:
    """Return the share of the peak learning rate at a step (from 0): linear warm-up, then cosine to 0."""
    warmup = math.ceil(total_steps * warmup_fraction)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total_steps - warmup, 1)))


def adamw(student: nn.Module, learning_rate: float, weight_decay: float, fused: bool = False) -> torch.optim.AdamW:
    """Build AdamW for the parameters that learn.

    Biases, norms and logit_scale (fewer than two dimensions) do not decay, as in open_clip.

    Args:
        fused: one kernel for all parameters, for a GPU.
    """
    learning = [parameter for parameter in student.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in learning if parameter.ndim >= 2]
    others = [parameter for parameter in learning if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=fused or None)


def step_unless(optimizer: Any, bad: Tensor) -> None:
    """Take the optimizer's step unless ``bad`` is 1. A fused optimizer decides that on the device, without a wait.

    Args:
        optimizer: an optimizer, or Fabric's wrapper of one.
        bad: 0 or 1, float32 scalar on the device of the parameters.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if inner.defaults["fused"]:
        inner.found_inf = bad  # as torch's GradScaler tells it
        optimizer.step()
    elif not bad:
        optimizer.step()


class WeightAverage:
    """Exponential moving average of a module's parameters. Buffers, such as BatchNorm's statistics, are not averaged.

    After ``n`` updates the average moves by ``1 - min(decay, (1 + n) / (10 + n))``. Early averages move fast, so that
    the random initial weights are soon forgotten (the rule of TensorFlow's ExponentialMovingAverage and of timm).

    Args:
        module: module, already on its device.
        decay: below 1; 0.999 averages over about the last 1,000 steps.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self.updates = 0
        self._names = [name for name, _ in module.named_parameters()]
        self._live: list[Tensor] = list(module.parameters())
        self._average = [parameter.detach().clone() for parameter in self._live]

    def decay_at(self, updates: int) -> float:
        """Return the decay of the next update after ``updates`` updates."""
        return min(self._decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights of this step. Call after the optimizer's step."""
        torch._foreach_lerp_(self._average, self._live, 1 - self.decay_at(self.updates))
        self.updates += 1

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Swap the averaged weights into the module within the block, to measure or save it."""
        saved = [parameter.detach().clone() for parameter in self._live]
        self._copy(self._average, self._live)
        try:
            yield
        finally:
            self._copy(saved, self._live)

    def state(self) -> dict[str, Tensor]:
        """Return the averages by parameter name."""
        return dict(zip(self._names, self._average, strict=True))

    def load(self, state: dict[str, Tensor], updates: int) -> None:
        """Load a :meth:`state` that was taken after ``updates`` updates.

        Raises:
            KeyError: the state lacks a parameter.
        """
        self._copy([state[name] for name in self._names], self._average)
        self.updates = updates

    @staticmethod
    @torch.no_grad()
    def _copy(source: list[Tensor], target: list[Tensor]) -> None:
        for value, place in zip(source, target, strict=True):
            place.copy_(value)


def measured_weights(average: WeightAverage | None) -> contextlib.AbstractContextManager[None]:
    """Swap the weights to measure and ship into the student within the block: the average, if there is one."""
    return average.in_place() if average is not None else contextlib.nullcontext()
