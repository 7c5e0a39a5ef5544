"""Pruning of a transformer tower to fewer layers and a smaller width.

This is TinyCLIP's manual weight inheritance (Wu et al. 2023, section 3.2): evenly spaced layers; heads and channels by
importance, here the L2 norm of their weights. The kept parts stay in order.

Pure functions of tensors with the names of open_clip's own towers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teacher_cache.storage.errors import UsageError


@dataclass(frozen=True)
class TowerShape:
    """Sizes of a transformer.

    Attributes:
        width: channels of the residual stream.
        mlp_width: hidden channels of each MLP.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int

    @property
    def head_width(self) -> int:
        """Number of channels per attention head."""
        return self.width // self.heads


def tower_shape(transformer: Any) -> TowerShape | None:
    """Return the sizes of open_clip's ``Transformer``. None: another class, or with other blocks."""
    blocks = getattr(transformer, "resblocks", None)
    if blocks is None or not len(blocks) or not isinstance(getattr(blocks[0], "attn", None), nn.MultiheadAttention):
        return None
    first = blocks[0]
    return TowerShape(first.attn.embed_dim, len(blocks), first.attn.num_heads, first.mlp.c_fc.out_features)


def choose_layers(available: int, wanted: int, chosen: tuple[int, ...] | None, tower: str) -> tuple[int, ...]:
    """Choose the layers of the teacher for the student, counted from 0, ascending.

    The layers are evenly spaced from the first to the last, halves rounded down: 3 of 6 are 0, 2, 5. A single layer is
    the first one, the only one that has learned to read embeddings. ``chosen`` is the user's choice instead.

    Raises:
        UsageError: the choice has another number of layers than the student, or a layer that the teacher lacks.
    """
    if chosen is None:
        if wanted == 1:
            return (0,)
        return tuple(index * (available - 1) // (wanted - 1) for index in range(wanted))
    flag = f"--{tower}-layers {','.join(map(str, chosen))}"
    if len(chosen) != wanted:
        raise UsageError(f"{flag}: {len(chosen)} layers, but the student's {tower} tower has {wanted}")
    if any(not 0 <= layer < available for layer in chosen):
        raise UsageError(f"{flag}: the teacher's {tower} tower has layers 0 to {available - 1}")
    return chosen


def most_important(scores: Tensor, keep: int) -> Tensor:
    """Return the indices of the ``keep`` highest scores, ascending. Of equal scores the first ones win."""
    return torch.sort(scores, descending=True, stable=True).indices[:keep].sort().values


def residual_importance(matrices: Iterable[Tensor]) -> Tensor:
    """Return the squared L2 norm of the weights that write to or read from each channel of the residual stream.

    The matrices, (n, width) each, have the same weight: each is first divided by its Frobenius norm, else the token
    embedding alone would decide. The result, (width,) float64, sums to their number.
    """
    return torch.stack([_share(matrix.double().square().sum(0)) for matrix in matrices]).sum(0)


def most_important_channels(
    state: dict[str, Tensor], layers: tuple[int, ...], around: list[Tensor], keep: int
) -> Tensor:
    """Return the channels of the residual stream to keep, ascending: by the chosen blocks and what is around them.

    Args:
        around: other matrices that write to or read from the stream, (n, width) each.
    """
    matrices = [*around]
    for layer in layers:
        block = f"transformer.resblocks.{layer}."
        matrices += [state[block + name] for name in ("attn.in_proj_weight", "mlp.c_fc.weight")]
        matrices += [state[block + name].T for name in ("attn.out_proj.weight", "mlp.c_proj.weight")]
    return most_important(residual_importance(matrices), keep)


def shrink_blocks(
    state: dict[str, Tensor], old: TowerShape, new: TowerShape, layers: tuple[int, ...], channels: Tensor
) -> dict[str, Tensor]:
    """Return the blocks of the smaller tower.

    Each block keeps whole heads and MLP channels, chosen by the norm of their weights on the kept channels.

    Args:
        state: tensors of the larger tower, whose sizes are ``old``. Both have the same head width.
        layers: layer of the larger tower for each of the smaller.
        channels: (new.width,) kept channels of the residual stream.

    Returns:
        Tensors of ``transformer.resblocks.*``; plain copies if nothing is cut.
    """
    smaller: dict[str, Tensor] = {}
    for number, layer in enumerate(layers):
        block = f"transformer.resblocks.{layer}."
        own = {name.removeprefix(block): value for name, value in state.items() if name.startswith(block)}
        # (3, heads, head_width, width): queries, keys, values
        read = own.pop("attn.in_proj_weight").view(3, old.heads, old.head_width, old.width)[..., channels]
        read_bias = own.pop("attn.in_proj_bias").view(3, old.heads, old.head_width)
        write = own.pop("attn.out_proj.weight")[channels].view(-1, old.heads, old.head_width)
        heads = most_important(_norm(read, 1) + _norm(write, 1), new.heads)
        hidden_in = own.pop("mlp.c_fc.weight")[:, channels]
        hidden_out = own.pop("mlp.c_proj.weight")[channels]
        hidden = most_important(_norm(hidden_in, 0) + _norm(hidden_out, 1), new.mlp_width)
        shrunk = {
            "attn.in_proj_weight": read[:, heads].reshape(3 * new.width, new.width),
            "attn.in_proj_bias": read_bias[:, heads].reshape(3 * new.width),
            "attn.out_proj.weight": write[:, heads].reshape(new.width, new.width),
            "mlp.c_fc.weight": hidden_in[hidden],
            "mlp.c_fc.bias": own.pop("mlp.c_fc.bias")[hidden],
            "mlp.c_proj.weight": hidden_out[:, hidden],
            # norms, layer scales and biases of the residual stream: one value per channel
            **{name: value[channels] for name, value in own.items()},
        }
        smaller.update({f"transformer.resblocks.{number}.{name}": value.clone() for name, value in shrunk.items()})
    return smaller


def _norm(weights: Tensor, keep: int) -> Tensor:
    """Return the squared L2 norm over all dimensions but one, as a share of the total."""
    return _share(weights.double().square().transpose(0, keep).flatten(1).sum(1))


def _share(squares: Tensor) -> Tensor:
    return squares / squares.sum().clamp_min(torch.finfo(torch.float64).tiny)
