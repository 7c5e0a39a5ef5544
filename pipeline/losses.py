"""Distillation losses: pure functions of tensors, in float32 under any autocast.

Shapes: student ``u`` (images) and ``v`` (texts), teacher ``p`` and ``q``, all (batch, dim), L2-normalised, row
``i`` of each belonging to the same pair. ``logit_scale`` is the multiplier of cosines, after exp. A training
run is a weighted sum of the losses named in ``LOSSES``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LOSSES", "LossInputs", "contrastive_loss", "feature_loss", "relational_loss", "weighted_sum"]


@dataclass(frozen=True)
class LossInputs:
    """One batch as every loss sees it.

    Attributes:
        student_image, student_text: (batch, student_dim), the student's own space, normalised.
        projected_image, projected_text: (batch, teacher_dim), the student in the teacher's space, normalised;
            the same tensors as above when the widths are equal.
        teacher_image, teacher_text: (batch, teacher_dim), normalised, from the cache.
        student_logit_scale: scalar tensor, after exp; trained.
        teacher_logit_scale: the teacher's, after exp.
        label_smoothing: of the contrastive loss.
    """

    student_image: Tensor
    student_text: Tensor
    projected_image: Tensor
    projected_text: Tensor
    teacher_image: Tensor
    teacher_text: Tensor
    student_logit_scale: Tensor
    teacher_logit_scale: float
    label_smoothing: float = 0.0


def _check(*tensors: Tensor) -> None:
    if len({tensor.shape[0] for tensor in tensors}) != 1:
        rows = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(f"rows differ ({rows}); student and cache are out of step")


def _logits(images: Tensor, texts: Tensor, logit_scale: Tensor | float) -> Tensor:
    """(images, texts): cosine times logit_scale, in float32 whatever autocast says."""
    with torch.autocast(images.device.type, enabled=False):
        return logit_scale * images.float() @ texts.float().T


def feature_loss(u: Tensor, v: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """MSE(u, p) + MSE(v, q), element means: CLIP-KD's FD (Yang et al. 2024, eq. 4), there with weight 2000.

    Args:
        u, v: the student's features in the teacher's space.
        p, q: the teacher's.

    Returns:
        Scalar in [0, 8 / dim]; 0 when student and teacher agree.

    Raises:
        ValueError: shapes differ.
    """
    if u.shape != p.shape or v.shape != q.shape:
        raise ValueError(f"student {tuple(u.shape)}, {tuple(v.shape)}; teacher {tuple(p.shape)}, {tuple(q.shape)}")
    _check(u, v)
    return F.mse_loss(u.float(), p.float()) + F.mse_loss(v.float(), q.float())


def relational_loss(
    u: Tensor, v: Tensor, p: Tensor, q: Tensor, logit_scale: Tensor | float, teacher_logit_scale: float
) -> Tensor:
    """Cross-entropy of the student's image-text softmax against the teacher's, both directions, mean.

    open_clip's ``DistillClipLoss``, TinyCLIP's affinity mimicking, CLIP-KD's CRD. The widths of student and
    teacher may differ. At its least it is the mean entropy of the teacher's softmax, not 0.

    Returns:
        Scalar >= 0, in nats.
    """
    _check(u, v, p, q)
    student = _logits(u, v, logit_scale)
    with torch.no_grad():
        teacher = _logits(p, q, teacher_logit_scale)
    per_image = F.cross_entropy(student, teacher.softmax(dim=1))
    per_text = F.cross_entropy(student.T, teacher.T.softmax(dim=1))
    return (per_image + per_text) / 2


def contrastive_loss(u: Tensor, v: Tensor, logit_scale: Tensor | float, label_smoothing: float = 0.0) -> Tensor:
    """CLIP's symmetric cross-entropy (Radford et al. 2021, fig. 3): each row's own pair against the batch.

    Args:
        label_smoothing: share of the target spread evenly over the batch.

    Returns:
        Scalar >= 0, in nats; ln(batch) when all cosines are equal.
    """
    _check(u, v)
    logits = _logits(u, v, logit_scale)
    labels = torch.arange(len(logits), device=logits.device)
    per_image = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    per_text = F.cross_entropy(logits.T, labels, label_smoothing=label_smoothing)
    return (per_image + per_text) / 2


def _contrastive(batch: LossInputs) -> Tensor:
    return contrastive_loss(batch.student_image, batch.student_text, batch.student_logit_scale, batch.label_smoothing)


def _feature(batch: LossInputs) -> Tensor:
    return feature_loss(batch.projected_image, batch.projected_text, batch.teacher_image, batch.teacher_text)


def _relational(batch: LossInputs) -> Tensor:
    return relational_loss(
        batch.student_image,
        batch.student_text,
        batch.teacher_image,
        batch.teacher_text,
        batch.student_logit_scale,
        batch.teacher_logit_scale,
    )


# the name in a run file -> the loss of one batch; feature acts in the teacher's space, the others in the student's
LOSSES: dict[str, Callable[[LossInputs], Tensor]] = {
    "contrastive": _contrastive,
    "feature": _feature,
    "relational": _relational,
}


def weighted_sum(batch: LossInputs, weights: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """The training loss, and each named loss before weighting (detached, for the log)."""
    parts = {name: LOSSES[name](batch) for name, weight in weights.items() if weight > 0}
    total = torch.stack([weights[name] * value for name, value in parts.items()]).sum()
    return total, {name: value.detach() for name, value in parts.items()}
