"""Named recipes: groups of ``TrainConfig`` settings, each with its source. No torch.

A recipe (``TrainConfig.recipe``) fills the settings that neither a flag nor the run file sets. A run records the
numbers, so a later change of the recipe does not affect it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

# names of teacher_cache.pipeline.train.losses.LOSSES, here so that checking a config needs no torch
LOSS_NAMES = (
    "contrastive",
    "cosine",
    "feature",
    "interactive",
    "queue",
    "relational",
    "relational_mse",
    "sigmoid",
    "sigmoid_relational",
)
# losses that compare each row with the teacher's row of the same tower, so that images alone are enough
IMAGE_LOSSES = ("cosine", "feature")
# losses that compare the student's features with the teacher's, which makes them interchangeable
TEACHER_SPACE_LOSSES = ("cosine", "feature", "interactive", "queue")
# losses that train a logit bias, which makes sigmoid(logit_scale x cosine + bias) a probability
SIGMOID_LOSSES = ("sigmoid", "sigmoid_relational")


@dataclass(frozen=True)
class Recipe:
    """Settings with the names of ``TrainConfig``. Explicit settings override them.

    Attributes:
        losses: weight of each named loss.
        learning_rate: peak, followed by cosine decay to 0.
        weight_decay: weight decay of AdamW.
        warmup_fraction: share of all steps with a rising learning rate.
        label_smoothing: label smoothing of the contrastive loss.
        temperature: temperature of the relational_mse loss.
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
"""The published guide, unchanged: MSE of image features + MSE of text features + 0.1 x MSE of the softmaxed logits.

AdamW 5e-4, weight decay 1e-4, cosine over 100 epochs without warm-up, T = 2. Label smoothing 0.1 is set, but
acts only on ``contrastive``, which its loss does not contain. These element-mean losses are small (feature is at most
8 / dim). AdamW's steps do not depend on their scale; clipping and weights against other losses do. Augmentation: random
crops, so use a cache of two views or more.
"""

CLIP_KD = Recipe(
    losses={"contrastive": 1.0, "relational": 1.0, "interactive": 1.0, "feature": 2000.0},
    learning_rate=1e-3,
    weight_decay=0.1,
    warmup_fraction=0.025,
)
"""CLIP-KD's unified method (Yang et al. 2024): task loss + CRD + ICL + 2000 x FD, as in the authors' scripts.

Published settings: AdamW 1e-3, weight decay 0.1, 10,000 warm-up steps of about 400,000 (32 epochs of CC3M + CC12M in
batches of 1,024). Teacher and student see the same random crops, so a cache of several views comes closest.
"""

MOBILECLIP = Recipe(
    losses={"contrastive": 0.25, "relational": 0.75},
    learning_rate=1e-3,
    weight_decay=0.2,
    warmup_fraction=0.005,
)
"""MobileCLIP's reinforced training (Vasu et al. 2024): (1 - lambda) x contrastive + lambda x distillation.

lambda = 0.75 as in the published script of MobileCLIP-B on DataCompDR-1B. For its S models and for DataCompDR-12M
lambda is 1: set ``losses = {relational = 1.0}``. Any other lambda is ``losses = {contrastive = 1 - lambda, relational =
lambda}``. relational differs from their KL by the teacher's entropy, a constant
(``teacher_cache.pipeline.train.losses``). The teacher's temperature is the cache's logit_scale (theirs is 100).
Published settings: AdamW 1e-3, weight decay 0.2, 1,000 warm-up steps of 200,000; 10 (1B) or 30 (12M) random resized
crops with RandAugment, and 5 synthetic captions per image, so use a cache of many views.
"""

RECIPES = {"default": DEFAULT, "guide": GUIDE, "clip-kd": CLIP_KD, "mobileclip": MOBILECLIP}

# settings that a recipe fills
RECIPE_SETTINGS = frozenset(field.name for field in fields(Recipe))


def in_teacher_space(losses: dict[str, float]) -> bool:
    """Return whether these losses train projections that make student and teacher rows comparable."""
    return any(losses.get(name, 0) > 0 for name in TEACHER_SPACE_LOSSES)


def trains_bias(losses: dict[str, float]) -> bool:
    """Return whether these losses train the student's logit bias, so that its sigmoids are probabilities."""
    return any(losses.get(name, 0) > 0 for name in SIGMOID_LOSSES)
