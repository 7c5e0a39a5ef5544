"""AdamW and its learning rate over a run."""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = ["adamw", "learning_rate_share"]


def learning_rate_share(step: int, total_steps: int, warmup_fraction: float) -> float:
    """Share of the peak learning rate at a step, the first being 0: linear warm-up, then cosine to 0."""
    warmup = math.ceil(total_steps * warmup_fraction)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total_steps - warmup, 1)))


def adamw(student: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW of what learns; biases, norms and logit_scale (fewer than two dimensions) do not decay, as in open_clip."""
    learning = [parameter for parameter in student.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in learning if parameter.ndim >= 2]
    others = [parameter for parameter in learning if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-6)
