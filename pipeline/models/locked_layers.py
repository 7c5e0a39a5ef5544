"""Locked layers of an image tower: they keep their initial weights and need no backward pass."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from teacher_cache.storage.errors import UsageError


def lock_image_layers(model: nn.Module, unlocked_groups: int) -> list[nn.Module]:
    """Lock all but the last layer groups of an open_clip model's image tower.

    open_clip's own ``lock_image_tower`` chooses the parameters, as for ``--lock-image-unlocked-groups`` in its training
    (LiT: Zhai et al. 2022). A group is the stem or a block. In a timm trunk, timm's own matcher mostly puts the head
    into the last block's group; in open_clip's vision transformer the projection is a group of its own after the
    blocks. The locked groups are the first ones, so they need no gradients and keep no activations.

    Args:
        unlocked_groups: number of groups to train. 0 locks all of open_clip's own towers, and all but the projection
            of timm's.

    Returns:
        The outermost locked modules. They must stay in evaluation mode: their weights cannot adapt to changing batch
        norm statistics.

    Raises:
        UsageError: the tower has no such groups, or not more than that.
    """
    before = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tower: Any = model.visual
    try:
        # open_clip always locks attn_pool, although it comes last
        if unlocked_groups and getattr(tower, "attn_pool", None) is not None:
            raise AttributeError("its attentional pooler is in no group")
        with warnings.catch_warnings():
            # open_clip imports timm's groups from a deprecated place
            warnings.simplefilter("ignore", FutureWarning)
            tower.lock(unlocked_groups=unlocked_groups, freeze_bn_stats=False)
    # depending on the tower: an assertion, a missing group, a trunk without groups, or too old a timm
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
