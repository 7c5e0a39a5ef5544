"""Features of all ranks on every rank, so that a loss sees the joined batch of all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather_features"]


def gather_features(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Join the rows of every rank, in the order of ranks; differentiable. One process gets its own tensors back.

    With it each rank computes the loss of the joined batch, and DistributedDataParallel gives each parameter the
    gradient that one process would compute of that batch. Why:

    - Let L be the loss of the joined batch, f_r the features of rank r, W the number of ranks. One process gets
      dL/dparameter = sum over r of dL/df_r x df_r/dparameter.
    - Each rank has all of dL/df, but only its own df_r/dparameter: it contributes one term of the sum.
    - DDP averages: it divides the sum of the terms by W. So what flows back from the joined rows to a rank's own is
      multiplied by W: here by adding up the gradients of all W ranks, which are equal.
    - A parameter that acts after the gather, as logit_scale does, has all of its gradient on every rank, and the
      average of W equal gradients is that gradient. No factor there.

    So nothing else is scaled: not the loss, not the learning rate. Where the ranks' losses differ, the gradient is that
    of their mean. ``torch.distributed.nn`` has such a gather too, now deprecated.

    Every rank must call it alike: as many tensors, of the same shapes and dtypes; a last short batch on one rank would
    hang the others. Backward communicates too, so it must run on all ranks or on none.

    Args:
        tensors: (rows, ...) each. All that is compared with the features belongs in here, the teacher's rows too. A
            tensor that needs no gradient, as theirs, costs no communication in backward.

    Returns:
        (W x rows, ...) each, rows of rank 0 first; the very tensors given where torch.distributed is not initialised or
        has one rank.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensors
    gathered = _Gather.apply(*tensors)
    return tuple(gathered)


class _Gather(torch.autograd.Function):
    """All tensors in one node of the graph: its collectives then run in the same order on every rank."""

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
            # a copy, for the sum is made in place; all-reduce, for not every backend has reduce-scatter
            total = gradient.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(total)
            first = dist.get_rank() * rows
            own.append(total[first : first + rows])
        return tuple(own)
