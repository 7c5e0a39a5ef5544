"""Token embedding as the product of two small matrices: (vocab, rank) times (rank, width).

CLIP's vocabulary has 49,408 tokens, and in a small student their embedding is most of the model: 19.0 of 24.5 million
parameters of a text tower with width 384 and 3 layers. Its rows lie close to a space of far fewer dimensions (ALBERT,
Lan et al. 2020, section 3.1).

The config of such a student has ``token_embedding_rank`` at its top level. open_clip does not know that key, so it gets
the config without it and builds the dense model; then this one submodule is replaced.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from teacher_cache.storage.errors import UsageError

RANK_KEY = "token_embedding_rank"
_INIT_STD = 0.02  # as in open_clip's dense token embedding


class FactorizedEmbedding(nn.Module):
    """Replacement for ``nn.Embedding(vocab_size, width)``.

    Attributes:
        factors: (vocab_size, rank), one row per token.
        projection: weight (width, rank). Its columns start orthonormal, so that a step on the factors changes the
            product by the same length.
    """

    def __init__(self, vocab_size: int, rank: int, width: int) -> None:
        super().__init__()
        self.factors = nn.Embedding(vocab_size, rank)
        self.projection = nn.Linear(rank, width, bias=False)
        nn.init.orthogonal_(self.projection.weight)
        nn.init.normal_(self.factors.weight, std=_INIT_STD * math.sqrt(width / rank))

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed int64 token ids of any shape: (..., width)."""
        embedded: Tensor = self.projection(self.factors(tokens))
        return embedded

    def dense(self) -> Tensor:
        """Return the (vocab_size, width) matrix of the equivalent ordinary embedding, detached."""
        return self.factors.weight.detach() @ self.projection.weight.detach().T


def factorize(model: nn.Module, rank: Any, what: str) -> None:
    """Replace the token embedding of an open_clip model by a factorised one with random weights.

    Raises:
        UsageError: the rank is no integer from 1 to the text tower's width - 1, or the tower has no such embedding.
            The message begins with ``what``.
    """
    tower = text_tower(model)
    embedding = getattr(tower, "token_embedding", None)
    if not isinstance(embedding, nn.Embedding):
        raise UsageError(
            f"{what}: {RANK_KEY} needs open_clip's own text tower, found {type(tower).__name__}; leave it out"
        )
    vocab_size, width = embedding.weight.shape
    if type(rank) is not int or not 0 < rank < width:
        raise UsageError(f"{what}: {RANK_KEY} is {rank!r}, a whole number from 1 to {width - 1} is wanted (width - 1)")
    tower.token_embedding = FactorizedEmbedding(vocab_size, rank, width)


def factors_of(model: nn.Module) -> FactorizedEmbedding | None:
    """Return the factorised token embedding of a model, if it has one."""
    embedding = getattr(text_tower(model), "token_embedding", None)
    return embedding if isinstance(embedding, FactorizedEmbedding) else None


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state for plain open_clip, with the product instead of the factors."""
    state: dict[str, Tensor] = dict(model.state_dict())
    embedding = factors_of(model)
    if embedding is not None:
        prefix = "" if text_tower(model) is model else "text."
        for name in embedding.state_dict():
            del state[f"{prefix}token_embedding.{name}"]
        state[f"{prefix}token_embedding.weight"] = embedding.dense()
    return state


def principal_directions(rows: Tensor, rank: int, weights: Tensor | None = None) -> Tensor:
    """Return the ``rank`` orthonormal directions that keep most of the rows' squared length.

    These are the right singular vectors of the (weighted) matrix, not centred, computed as eigenvectors of the small
    Gram matrix in float64 (Eckart and Young 1936).

    Args:
        rows: (n, width), with ``width`` >= ``rank``.
        weights: (n,), weight of each row's loss. Default: equal weights.

    Returns:
        (width, rank), in the dtype of ``rows``, strongest first. Each direction's largest element is positive.
    """
    exact = rows.double()
    weighted = exact if weights is None else exact * weights.double()[:, None]
    _, vectors = torch.linalg.eigh(weighted.T @ exact)  # eigenvalues ascend
    directions: Tensor = vectors[:, -rank:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    directions = directions * largest.sign()
    return directions.to(rows.dtype)


def text_tower(model: nn.Module) -> nn.Module:
    """Return the text tower of an open_clip model: ``model.text``, or the model itself if it is a CLIP."""
    tower = getattr(model, "text", None)
    return tower if isinstance(tower, nn.Module) else model
