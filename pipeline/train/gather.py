"""Messages between ranks: features, so that each computes the loss of the joined batch, and when to stop."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from teacher_cache.pipeline.models.device import mark


def gather_features(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Join the rows of all ranks, in the order of ranks; differentiable. A single process gets its own tensors back.

    Each rank then computes the loss of the joined batch, and DistributedDataParallel (DDP) gives each parameter the
    gradient that one process would compute for that batch:

    - Let L be the loss of the joined batch, f_r the features of rank r, W the number of ranks. One process gets
      dL/dparameter = sum over r of dL/df_r x df_r/dparameter.
    - Each rank has all of dL/df, but only its own df_r/dparameter: it contributes one term of the sum.
    - DDP divides the sum of the terms by W. So the gradient that flows back to a rank's own rows must be multiplied
      by W: backward adds up the gradients of all W ranks, which are equal.
    - A parameter that acts after the gather, such as logit_scale, has its whole gradient on every rank. The average of
      W equal gradients is that gradient, without a factor.

    So the loss and the learning rate need no scaling. Where the ranks' losses differ, the gradient is that of their
    mean. ``torch.distributed.nn`` has such a gather too, now deprecated.

    Every rank must pass the same number of tensors, of the same shapes and dtypes: a short last batch on one rank would
    hang the others. Backward communicates too, so it must run on all ranks or on none.

    Args:
        tensors: (rows, ...) each: the features and all that they are compared with, such as the teacher's rows. A
            tensor without a gradient costs no communication in backward.

    Returns:
        (W x rows, ...) each, rows of rank 0 first. The same tensors if there is one rank.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensors
    gathered = _Gather.apply(*tensors)
    return tuple(gathered)


class StopVote:
    """Vote of all ranks on the step behind which they stop. A GPU's host does not wait for its latest step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: tuple[Tensor, torch.cuda.Event | None] | None = None

    def __call__(self, stop: bool) -> bool:
        """Cast this rank's vote, and return whether any rank voted to stop in the last call.

        All ranks call it equally often, and get the same answer.
        """
        vote = torch.full((1,), float(stop), device=self._device)
        dist.all_reduce(vote, dist.ReduceOp.MAX)
        last, self._last = self._last, (vote.to("cpu", non_blocking=True), mark(self._device))
        if last is None:
            return False
        votes, counted = last
        if counted is not None:
            counted.synchronize()
        return bool(votes)


class _Gather(torch.autograd.Function):
    """One graph node for all tensors, so that its collectives run in the same order on every rank."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.rows = [len(tensor) for tensor in tensors]
        joined = []
        for number, tensor in enumerate(tensors):
            parts = [
                torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())
            ]
            dist.all_gather(parts, tensor.contiguous())
            joined.append(torch.cat(parts))
            if not ctx.needs_input_grad[number]:
                ctx.mark_non_differentiable(joined[-1])
        return tuple(joined)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        own: list[Tensor | None] = []
        for number, (rows, gradient) in enumerate(zip(ctx.rows, gradients, strict=True)):
            if not ctx.needs_input_grad[number]:
                own.append(None)
                continue
            # a copy: all_reduce works in place; not every backend has reduce-scatter
            total = gradient.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(total)
            first = dist.get_rank() * rows
            own.append(total[first : first + rows])
        return tuple(own)
