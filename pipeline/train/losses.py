"""Distillation losses: pure functions of one batch, in float32 under any autocast.

Shapes: student ``u`` (images) and ``v`` (texts), teacher ``p`` and ``q``, all (batch, dim), L2-normalised, row
``i`` of each belonging to the same pair. ``s`` and ``st`` are the multipliers of cosines, after exp. A training run
is a weighted sum of the losses named in ``LOSSES``. Losses that are cross-entropies are in nats.

Losses that compare the student's features with each other (``contrastive``, ``relational``, ``relational_mse``,
``sigmoid``, ``sigmoid_relational``) take them in the student's own space, which is evaluated and shipped. Losses that
compare them with the teacher's (``feature``, ``cosine``, ``interactive``, ``queue``) take them projected to the
teacher's width.

MobileCLIP's loss (Vasu et al. 2024, "Multi-Modal Reinforced Training") is ``(1 - lambda) * contrastive + lambda *
relational``. Theirs is the KL divergence from the teacher's softmax, ``relational`` the cross-entropy. They differ by
the entropy of the teacher's softmax, a constant of the batch, so the gradients are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""Images and texts, (rows, dim) each; row ``i`` of both belongs to the same pair.

Images alone, a tuple of one, for the losses ``teacher_cache.pipeline.settings.recipes.IMAGE_LOSSES``.
"""


@dataclass(frozen=True)
class LossInputs:
    """The input of all losses for one batch; features are normalised.

    Attributes:
        student: the student's features in its own space, (batch, student_dim).
        projected: the student's in the teacher's space, (batch, teacher_dim); the same when the widths are equal.
        teacher: the teacher's, (batch, teacher_dim), from the cache.
        student_logit_scale: scalar tensor, after exp; trained.
        teacher_logit_scale: the teacher's, after exp.
        label_smoothing: label smoothing of the contrastive loss.
        temperature: divisor of the logits in the relational_mse loss.
        queue: the teacher's rows for the queue loss, those of this batch included. None without a queue.
        student_logit_bias: added to the student's logits by the sigmoid losses; scalar, trained.
        teacher_logit_bias: the teacher's.

    Raises:
        ValueError: shapes differ, so student and cache are out of step.
    """

    student: Pair
    projected: Pair
    teacher: Pair
    student_logit_scale: Tensor
    teacher_logit_scale: float
    label_smoothing: float = 0.0
    temperature: float = 2.0
    queue: Pair | None = None
    student_logit_bias: Tensor | float = 0.0
    teacher_logit_bias: float = 0.0

    def __post_init__(self) -> None:
        """Check shapes once for all losses."""
        own, projected, teacher = (
            [tuple(rows.shape) for rows in two] for two in (self.student, self.projected, self.teacher)
        )
        if own[0] != own[-1] or projected != teacher or teacher[0] != teacher[-1] or own[0][0] != teacher[0][0]:
            raise ValueError(
                f"student {own}, projected {projected}, teacher {teacher}: student and cache are out of step"
            )


def _full(features: Tensor) -> Tensor:
    """Return features as float32, or as float64 if they are (gradient checks use it)."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _logits(images: Tensor, texts: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Return cosine times logit_scale, (images, texts), in float32 under any autocast."""
    with torch.autocast(images.device.type, enabled=False):
        return logit_scale * _full(images) @ _full(texts).T


@torch.no_grad()
def _teacher_logits(images: Tensor, texts: Tensor, logit_scale: float) -> Tensor:
    return _logits(images, texts, logit_scale)


def _cross_entropy(logits: Pair, targets: Pair, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean of two cross-entropies, of images and of texts."""
    per_image, per_text = (
        F.cross_entropy(predicted, target, label_smoothing=label_smoothing)
        for predicted, target in zip(logits, targets, strict=True)
    )
    return (per_image + per_text) / 2


def _own_pairs(logits: Tensor) -> Pair:
    """Return the target that matches each row with its own pair, for both directions."""
    labels = torch.arange(len(logits), device=logits.device)
    return labels, labels


def feature(batch: LossInputs) -> Tensor:
    """Return MSE(u, p) + MSE(v, q), element means: CLIP-KD's FD (Yang et al. 2024, eq. 4; weight 2000 there).

    In [0, 8 / dim]; 0 when student and teacher agree. MSE(u, p) for images alone.
    """
    towers = zip(batch.projected, batch.teacher, strict=True)
    return torch.stack([F.mse_loss(_full(own), _full(taught)) for own, taught in towers]).sum()


def cosine(batch: LossInputs) -> Tensor:
    """Return the mean over the rows of (1 - cos(u, p)) + (1 - cos(v, q)).

    For normalised rows this is ``feature`` times dim / 2, so its weight means the same at any width: weight 8 equals
    weight 4 x dim of ``feature``, 2048 at width 512. The cosine normalises the rows, so the norms of float16 targets
    (up to 5e-4 off) do not matter. In [0, 4]; 0 when student and teacher agree. 1 - cos(u, p) for images alone.
    """
    towers = zip(batch.projected, batch.teacher, strict=True)
    cosines = [F.cosine_similarity(_full(own), _full(taught), dim=1) for own, taught in towers]
    return torch.stack([(1 - cosine).mean() for cosine in cosines]).sum()


def relational(batch: LossInputs) -> Tensor:
    """Return the cross-entropy of the student's image-text softmax against the teacher's, mean of both directions.

    This is open_clip's ``DistillClipLoss``, TinyCLIP's affinity mimicking and CLIP-KD's CRD. The widths of student and
    teacher may differ. The minimum is the mean entropy of the teacher's softmax, not 0; minus that entropy it is the
    KL divergence, with the same gradient.
    """
    student = _logits(*batch.student, batch.student_logit_scale)
    teacher = _teacher_logits(*batch.teacher, batch.teacher_logit_scale)
    return _cross_entropy((student, student.T), (teacher.softmax(dim=1), teacher.T.softmax(dim=1)))


def relational_mse(batch: LossInputs) -> Tensor:
    """Return MSE(softmax(s u vT / T), softmax(st p qT / T)), element mean: the guide's step 2, weight 0.1.

    As in the guide, one direction only: each image's probabilities over the texts of the batch, at temperature T, 2 in
    the guide. The widths of student and teacher may differ. In [0, 2 / batch]; 0 when all probabilities agree.
    """
    student = _logits(*batch.student, batch.student_logit_scale) / batch.temperature
    teacher = _teacher_logits(*batch.teacher, batch.teacher_logit_scale) / batch.temperature
    return F.mse_loss(student.softmax(dim=1), teacher.softmax(dim=1))


def contrastive(batch: LossInputs) -> Tensor:
    """Return CLIP's symmetric cross-entropy (Radford et al. 2021, fig. 3): each row's own pair against the batch.

    Label smoothing spreads a share of the target evenly over the batch. ln(batch) when all cosines are equal.
    """
    logits = _logits(*batch.student, batch.student_logit_scale)
    return _cross_entropy((logits, logits.T), _own_pairs(logits), batch.label_smoothing)


def interactive(batch: LossInputs) -> Tensor:
    """Return CLIP-KD's ICL (Yang et al. 2024): each student row picks its match among the teacher's other tower.

    The mean of two cross-entropies: student images against the teacher's texts, and student texts against the teacher's
    images. As in the paper and its code, the student is always the anchor. The temperature is the student's
    logit_scale, which contrastive trains too; the authors' code trains a separate one. ln(batch) when all cosines are
    equal.
    """
    u, v = batch.projected
    p, q = batch.teacher
    logits = _logits(u, q, batch.student_logit_scale), _logits(v, p, batch.student_logit_scale)
    return _cross_entropy(logits, _own_pairs(u))


def queue(batch: LossInputs) -> Tensor:
    """Return the relational loss against a queue of cached teacher rows: more negatives for a small batch.

    Cross-entropy of softmax(s u queue_textT) against softmax(st p queue_textT), and of softmax(s v queue_imageT)
    against softmax(st q queue_imageT), mean; SEED's loss (Fang et al. 2021) across two towers. All rows are in the
    teacher's space, since the student's features of earlier batches are out of date. The minimum is the mean entropy of
    the teacher's softmaxes, not 0.
    """
    assert batch.queue is not None, "the settings give the queue loss a queue"
    images, texts = batch.queue
    u, v = batch.projected
    p, q = batch.teacher
    student = _logits(u, texts, batch.student_logit_scale), _logits(v, images, batch.student_logit_scale)
    teacher = (
        _teacher_logits(p, texts, batch.teacher_logit_scale).softmax(dim=1),
        _teacher_logits(q, images, batch.teacher_logit_scale).softmax(dim=1),
    )
    return _cross_entropy(student, teacher)


def sigmoid(batch: LossInputs) -> Tensor:
    """Return SigLIP's loss (Zhai et al. 2023, arXiv 2303.15343): each of batch x batch pairs is a match or is none.

    -log sigmoid(+-(s u vT + bias)), + for a row's own pair, summed over all pairs and divided by the batch; open_clip's
    ``SigLipLoss``. batch x ln 2 when all logits are 0.
    """
    logits = _logits(*batch.student, batch.student_logit_scale) + batch.student_logit_bias
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def sigmoid_relational(batch: LossInputs) -> Tensor:
    """Return the KL divergence from the teacher's to the student's probability that a pair matches.

    The probability is sigmoid(s u vT + bias), of the teacher at its own scale and bias. Summed over all batch x batch
    pairs and divided by the batch, as ``sigmoid``. >= 0; 0 when all probabilities agree. The widths may differ.
    """
    student = _logits(*batch.student, batch.student_logit_scale) + batch.student_logit_bias
    teacher = _teacher_logits(*batch.teacher, batch.teacher_logit_scale) + batch.teacher_logit_bias
    match = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    none = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return (match + none).sum() / len(student)


# by name in a run file; teacher_cache.pipeline.settings.recipes.LOSS_NAMES has the same names without torch
LOSSES: dict[str, Callable[[LossInputs], Tensor]] = {
    loss.__name__: loss
    for loss in (
        contrastive,
        cosine,
        feature,
        interactive,
        queue,
        relational,
        relational_mse,
        sigmoid,
        sigmoid_relational,
    )
}


def weighted_sum(batch: LossInputs, weights: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the training loss, and each named loss before weighting (detached, for the log)."""
    parts = {name: LOSSES[name](batch) for name, weight in weights.items() if weight > 0}
    total = torch.stack([weights[name] * value for name, value in parts.items()]).sum()
    return total, {name: value.detach() for name, value in parts.items()}


class TeacherQueue:
    """A first-in, first-out queue of the last ``rows`` pairs of teacher embeddings.

    Its rows never become stale: the teacher does not change, unlike the momentum encoder of MoCo (He et al. 2020). With
    several ranks each pushes the gathered rows of all ranks, so that all queues are equal.

    A step pushes its own teacher rows, then reads ``rows()``, so that the match of every pair is in the queue.
    """

    def __init__(self, rows: int, dim: int, device: torch.device | str = "cpu") -> None:
        self._most_rows = rows
        self._image = self._text = torch.empty(0, dim, device=device)

    def push(self, image: Tensor, text: Tensor) -> None:
        """Add pairs, (batch, dim) each, at the end, and remove the oldest beyond the queue's length.

        Tensors that ``rows()`` returned before are not changed, so a loss of an earlier step can still be
        differentiated.
        """
        self._image, self._text = (
            torch.cat([held, new.detach()])[-self._most_rows :]
            for held, new in ((self._image, image), (self._text, text))
        )

    def rows(self) -> Pair:
        """Return images and texts, (pairs, dim) each, oldest first; row ``i`` of both belongs to the same pair."""
        return self._image, self._text

    def state_dict(self) -> dict[str, Tensor]:
        """Return ``image`` and ``text``, as ``rows()``."""
        return {"image": self._image, "text": self._text}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load a ``state_dict()`` onto this queue's device."""
        self._image, self._text = (state[name].to(self._image.device) for name in ("image", "text"))
