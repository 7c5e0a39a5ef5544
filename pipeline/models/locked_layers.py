"""Layers of an image tower that keep the weights they begin with, and what that spares: their backward pass."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from teacher_cache.storage.errors import UsageError

__all__ = ["lock_image_layers"]


def lock_image_layers(model: nn.Module, unlocked_groups: int) -> list[nn.Module]:
    """Lock all but the last layer groups of an open_clip model's image tower.

    Parameters are chosen by open_clip's own ``lock_image_tower``, the setting ``--lock-image-unlocked-groups`` of its
    training (LiT: Zhai et al. 2022). A group is the stem, or a block: the last one of a timm trunk, by timm's own
    matcher, mostly with the head behind it; behind those of open_clip's vision transformer there is the projection's.
    Since the locked groups are the first ones, no gradient is computed within them and none of their activations is
    kept.

    Args:
        unlocked_groups: that go on learning; 0 locks open_clip's own towers whole, of timm's all but the projection.

    Returns:
        The outermost locked modules. They have to stay in evaluation mode, so that their batch norms use the
        statistics that they came with: statistics that moved on would change what weights that cannot follow mean.

    Raises:
        UsageError: the tower has no such groups, or no more than that.
    """
    before = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tower: Any = model.visual
    try:
        # open_clip locks one, which comes last, whatever is unlocked
        if unlocked_groups and getattr(tower, "attn_pool", None) is not None:
            raise AttributeError("its attentional pooler is in no group")
        with warnings.catch_warnings():
            # open_clip takes timm's groups from where they used to be
            warnings.simplefilter("ignore", FutureWarning)
            tower.lock(unlocked_groups=unlocked_groups, freeze_bn_stats=False)
    # by tower: an assertion, a group that is not there, a trunk that names none, a lock that timm is too old for
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise UsageError(
            f"lock_image_unlocked_groups {unlocked_groups}: {type(tower).__name__} cannot be locked in part: "
            f"{type(error).__name__}: {error}. Use 0, which locks all of it, or leave the setting out."
        ) from error
    if all(parameter.requires_grad for parameter in before):
        raise UsageError(
            f"lock_image_unlocked_groups {unlocked_groups} locks nothing: the image tower has no more groups than "
            "that. Lower it, or leave it out."
        )
    return _outermost_locked(tower)


def _outermost_locked(module: nn.Module) -> list[nn.Module]:
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return [module]
    return [locked for child in module.children() for locked in _outermost_locked(child)]
