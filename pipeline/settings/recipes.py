"""Named recipes: settings of ``TrainConfig`` that belong together, each with its source. No torch.

A recipe fills the settings that neither a flag nor the run file gives (``TrainConfig.recipe``); what is recorded of a
run are the numbers, so that a recipe may change without changing what a run says of itself.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = [
    "CLIP_KD",
    "DEFAULT",
    "GUIDE",
    "LOSS_NAMES",
    "MOBILECLIP",
    "RECIPES",
    "RECIPE_SETTINGS",
    "TEACHER_SPACE_LOSSES",
    "Recipe",
    "in_teacher_space",
]

# those of teacher_cache.pipeline.train.losses.LOSSES: a config is checked, and a flow deployed, without torch
LOSS_NAMES = ("contrastive", "cosine", "feature", "interactive", "queue", "relational", "relational_mse")
# those that compare the student's features with the teacher's, so that either can stand for the other
TEACHER_SPACE_LOSSES = ("cosine", "feature", "interactive", "queue")


@dataclass(frozen=True)
class Recipe:
    """Settings as ``TrainConfig`` names them; every one of them can be set over the recipe's.

    Attributes:
        losses: weight of each named loss.
        learning_rate: peak; cosine to 0 from there.
        weight_decay: AdamW's.
        warmup_fraction: share of all steps with a rising learning rate.
        label_smoothing: of the contrastive loss.
        temperature: of the relational_mse loss.
    """

    losses: dict[str, float]
    learning_rate: float
    weight_decay: float
    warmup_fraction: float
    label_smoothing: float = 0.0
    temperature: float = 2.0


DEFAULT = Recipe(
    losses={"cosine": 8.0, "relational": 1.0, "interactive": 0.3},
    learning_rate=1e-3,
    weight_decay=0.1,
    warmup_fraction=0.05,
)
"""Cosine to the teacher on both towers, 8 x (1 - cos), beside relational 1 and interactive 0.3.

At width 512 that is CLIP-KD's feature weight (8 x cosine = 2048 x feature), but it stays the same at every width.
relational's targets are at the teacher's own logit_scale. Views: the crops of the cache; one view is enough.
"""

GUIDE = Recipe(
    losses={"feature": 1.0, "relational_mse": 0.1},
    learning_rate=5e-4,
    weight_decay=1e-4,
    warmup_fraction=0.0,
    label_smoothing=0.1,
    temperature=2.0,
)
"""The published how-to to the letter: MSE of image features + MSE of text features + 0.1 x MSE of the softmaxed logits.

AdamW 5e-4, weight decay 1e-4, cosine over 100 epochs without warm-up, T = 2. Label smoothing 0.1 is set as asked and
acts on ``contrastive``, which the guide's loss does not contain: it takes effect when that loss is given a weight.
These element-mean losses are small (feature is at most 8 / dim); AdamW's steps do not depend on that, clipping and
weights against other losses do. Augmentation: random crops, so a cache of two views or more.
"""

CLIP_KD = Recipe(
    losses={"contrastive": 1.0, "relational": 1.0, "interactive": 1.0, "feature": 2000.0},
    learning_rate=1e-3,
    weight_decay=0.1,
    warmup_fraction=0.025,
)
"""CLIP-KD's unified method (Yang et al. 2024): task loss + CRD + ICL + 2000 x FD, as in the authors' scripts.

There AdamW 1e-3, weight decay 0.1, 10,000 warm-up steps of about 400,000 (32 epochs of CC3M + CC12M in batches of
1,024). They train on random crops that teacher and student both see, so a cache of several views comes nearest.
"""

MOBILECLIP = Recipe(
    losses={"contrastive": 0.25, "relational": 0.75},
    learning_rate=1e-3,
    weight_decay=0.2,
    warmup_fraction=0.005,
)
"""MobileCLIP's reinforced training (Vasu et al. 2024): (1 - lambda) x contrastive + lambda x distillation.

lambda = 0.75, the published script's of MobileCLIP-B on DataCompDR-1B; for its S models and for DataCompDR-12M lambda
is 1: set ``losses = {relational = 1.0}``. Any other lambda is ``losses = {contrastive = 1 - lambda, relational =
lambda}``. relational differs from their KL by the teacher's entropy, a constant
(``teacher_cache.pipeline.train.losses``). The teacher's temperature is the cache's logit_scale (theirs is 100). There
AdamW 1e-3, weight decay 0.2, 1,000 warm-up steps of 200,000. Augmentation there: 10 (1B) or 30 (12M) random resized
crops with RandAugment, and 5 synthetic captions an image, so a cache of many views.
"""

RECIPES: dict[str, Recipe] = {
    "default": DEFAULT,
    "guide": GUIDE,
    "clip-kd": CLIP_KD,
    "mobileclip": MOBILECLIP,
}

# the settings that a recipe fills
RECIPE_SETTINGS = frozenset(field.name for field in fields(Recipe))


def in_teacher_space(losses: dict[str, float]) -> bool:
    """Check whether these losses train projections by which student and teacher rows can be compared."""
    return any(losses.get(name, 0) > 0 for name in TEACHER_SPACE_LOSSES)
