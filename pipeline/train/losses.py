"""Distillation losses: pure functions of tensors, in float32 under any autocast.

Shapes: student ``u`` (images) and ``v`` (texts), teacher ``p`` and ``q``, all (batch, dim), L2-normalised, row
``i`` of each belonging to the same pair. ``logit_scale`` is the multiplier of cosines, after exp. A training
run is a weighted sum of the losses named in ``LOSSES``.

Losses that compare the student's features with each other (``contrastive``, ``relational``, ``relational_mse``) take
them in the student's own space, which is evaluated and shipped. Losses that compare them with the teacher's
(``feature``, ``cosine``, ``interactive``, ``queue``) take them projected to the teacher's width.

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

__all__ = [
    "LOSSES",
    "LossInputs",
    "TeacherQueue",
    "contrastive_loss",
    "cosine_loss",
    "feature_loss",
    "interactive_loss",
    "queue_loss",
    "relational_loss",
    "relational_mse_loss",
    "weighted_sum",
]


@dataclass(frozen=True)
class LossInputs:
    """The input of all losses for one batch.

    Attributes:
        student_image, student_text: (batch, student_dim), the student's own space, normalised.
        projected_image, projected_text: (batch, teacher_dim), the student in the teacher's space, normalised;
            the same tensors as above when the widths are equal.
        teacher_image, teacher_text: (batch, teacher_dim), normalised, from the cache.
        student_logit_scale: scalar tensor, after exp; trained.
        teacher_logit_scale: the teacher's, after exp.
        label_smoothing: label smoothing of the contrastive loss.
        temperature: divisor of the logits in the relational_mse loss.
        queue_image, queue_text: (queued, teacher_dim), normalised, the teacher's rows for the queue loss, those of this
            batch included; row ``i`` of both belongs to the same pair. None without a queue.
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
    temperature: float = 2.0
    queue_image: Tensor | None = None
    queue_text: Tensor | None = None


def _check(*tensors: Tensor) -> None:
    if len({tensor.shape[0] for tensor in tensors}) != 1:
        rows = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(f"rows differ ({rows}); student and cache are out of step")


def _check_widths(u: Tensor, v: Tensor, p: Tensor, q: Tensor) -> None:
    if u.shape != p.shape or v.shape != q.shape:
        raise ValueError(f"student {tuple(u.shape)}, {tuple(v.shape)}; teacher {tuple(p.shape)}, {tuple(q.shape)}")
    _check(u, v)


def _full(features: Tensor) -> Tensor:
    """Return features as float32, or as float64 if they are (gradient checks use it)."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _logits(images: Tensor, texts: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Return cosine times logit_scale, (images, texts), in float32 under any autocast."""
    with torch.autocast(images.device.type, enabled=False):
        return logit_scale * _full(images) @ _full(texts).T


def feature_loss(u: Tensor, v: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Return MSE(u, p) + MSE(v, q), element means: CLIP-KD's FD (Yang et al. 2024, eq. 4; weight 2000 there).

    Args:
        u, v: the student's features in the teacher's space.
        p, q: the teacher's.

    Returns:
        Scalar in [0, 8 / dim]; 0 when student and teacher agree.

    Raises:
        ValueError: shapes differ.
    """
    _check_widths(u, v, p, q)
    return F.mse_loss(_full(u), _full(p)) + F.mse_loss(_full(v), _full(q))


def cosine_loss(u: Tensor, v: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Return the mean over the rows of (1 - cos(u, p)) + (1 - cos(v, q)).

    For normalised rows this is ``feature`` times dim / 2, so its weight means the same at any width: weight 8 equals
    weight 4 x dim of ``feature``, 2048 at width 512. The cosine normalises the rows, so the norms of float16 targets
    (up to 5e-4 off) do not matter.

    Args:
        u, v: the student's features in the teacher's space.
        p, q: the teacher's.

    Returns:
        Scalar in [0, 4]; 0 when student and teacher agree.

    Raises:
        ValueError: shapes differ.
    """
    _check_widths(u, v, p, q)
    images = F.cosine_similarity(_full(u), _full(p), dim=1)
    texts = F.cosine_similarity(_full(v), _full(q), dim=1)
    return (1 - images).mean() + (1 - texts).mean()


def relational_loss(
    u: Tensor, v: Tensor, p: Tensor, q: Tensor, logit_scale: Tensor | float, teacher_logit_scale: float
) -> Tensor:
    """Return the cross-entropy of the student's image-text softmax against the teacher's, mean of both directions.

    This is open_clip's ``DistillClipLoss``, TinyCLIP's affinity mimicking and CLIP-KD's CRD. The widths of student and
    teacher may differ. The minimum is the mean entropy of the teacher's softmax, not 0; minus that entropy it is the
    KL divergence, with the same gradient.

    Returns:
        Scalar >= 0, in nats.

    Raises:
        ValueError: the numbers of rows differ.
    """
    _check(u, v, p, q)
    student = _logits(u, v, logit_scale)
    with torch.no_grad():
        teacher = _logits(p, q, teacher_logit_scale)
    per_image = F.cross_entropy(student, teacher.softmax(dim=1))
    per_text = F.cross_entropy(student.T, teacher.T.softmax(dim=1))
    return (per_image + per_text) / 2


def relational_mse_loss(
    u: Tensor,
    v: Tensor,
    p: Tensor,
    q: Tensor,
    logit_scale: Tensor | float,
    teacher_logit_scale: float,
    temperature: float = 2.0,
) -> Tensor:
    """Return MSE(softmax(s u vT / T), softmax(st p qT / T)), element mean: the guide's step 2, weight 0.1.

    As in the guide, one direction only: each image's probabilities over the texts of the batch. The widths of student
    and teacher may differ.

    Args:
        logit_scale, teacher_logit_scale: s and st.
        temperature: T > 0; 2 in the guide.

    Returns:
        Scalar in [0, 2 / batch]; 0 when all probabilities agree.

    Raises:
        ValueError: the numbers of rows differ.
    """
    _check(u, v, p, q)
    student = (_logits(u, v, logit_scale) / temperature).softmax(dim=1)
    with torch.no_grad():
        teacher = (_logits(p, q, teacher_logit_scale) / temperature).softmax(dim=1)
    return F.mse_loss(student, teacher)


def contrastive_loss(u: Tensor, v: Tensor, logit_scale: Tensor | float, label_smoothing: float = 0.0) -> Tensor:
    """Return CLIP's symmetric cross-entropy (Radford et al. 2021, fig. 3): each row's own pair against the batch.

    Args:
        label_smoothing: share of the target spread evenly over the batch.

    Returns:
        Scalar >= 0, in nats; ln(batch) when all cosines are equal.

    Raises:
        ValueError: the numbers of rows differ.
    """
    _check(u, v)
    logits = _logits(u, v, logit_scale)
    labels = torch.arange(len(logits), device=logits.device)
    per_image = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    per_text = F.cross_entropy(logits.T, labels, label_smoothing=label_smoothing)
    return (per_image + per_text) / 2


def interactive_loss(u: Tensor, v: Tensor, p: Tensor, q: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Return CLIP-KD's ICL (Yang et al. 2024): each student row picks its match among the teacher's other tower.

    The mean of two cross-entropies: student images against the teacher's texts, and student texts against the teacher's
    images. As in the paper and its code, the student is always the anchor. The temperature is the student's
    logit_scale, which contrastive trains too; the authors' code trains a separate one.

    Args:
        u, v: the student's features in the teacher's space.
        p, q: the teacher's.

    Returns:
        Scalar >= 0, in nats; ln(batch) when all cosines are equal.

    Raises:
        ValueError: shapes differ.
    """
    _check_widths(u, v, p, q)
    labels = torch.arange(len(u), device=u.device)
    per_image = F.cross_entropy(_logits(u, q, logit_scale), labels)
    per_text = F.cross_entropy(_logits(v, p, logit_scale), labels)
    return (per_image + per_text) / 2


def queue_loss(
    u: Tensor,
    v: Tensor,
    p: Tensor,
    q: Tensor,
    queue_image: Tensor,
    queue_text: Tensor,
    logit_scale: Tensor | float,
    teacher_logit_scale: float,
) -> Tensor:
    """Return the relational loss against a queue of cached teacher rows: more negatives for a small batch.

    Cross-entropy of softmax(s u queue_textT) against softmax(st p queue_textT), and of softmax(s v queue_imageT)
    against softmax(st q queue_imageT), mean; SEED's loss (Fang et al. 2021) across two towers. All rows are in the
    teacher's space, since the student's features of earlier batches are out of date. The minimum is the mean entropy of
    the teacher's softmaxes, not 0.

    Args:
        u, v: the student's features in the teacher's space.
        p, q: the teacher's.
        queue_image, queue_text: (queued, dim); push the batch's own rows before.

    Returns:
        Scalar >= 0, in nats.

    Raises:
        ValueError: shapes differ, or nothing is queued.
    """
    _check_widths(u, v, p, q)
    if queue_image.shape != queue_text.shape or queue_image.shape[1:] != p.shape[1:] or not len(queue_image):
        raise ValueError(
            f"queued images {tuple(queue_image.shape)} and texts {tuple(queue_text.shape)}: wanted as many of both, "
            f"at least one, {p.shape[1]} wide. Push the teacher's rows of a batch before its loss."
        )
    with torch.no_grad():
        teacher_image = _logits(p, queue_text, teacher_logit_scale).softmax(dim=1)
        teacher_text = _logits(q, queue_image, teacher_logit_scale).softmax(dim=1)
    per_image = F.cross_entropy(_logits(u, queue_text, logit_scale), teacher_image)
    per_text = F.cross_entropy(_logits(v, queue_image, logit_scale), teacher_text)
    return (per_image + per_text) / 2


def _student(batch: LossInputs) -> tuple[Tensor, Tensor]:
    return batch.student_image, batch.student_text


def _projected(batch: LossInputs) -> tuple[Tensor, Tensor]:
    return batch.projected_image, batch.projected_text


def _teacher(batch: LossInputs) -> tuple[Tensor, Tensor]:
    return batch.teacher_image, batch.teacher_text


def _scales(batch: LossInputs) -> tuple[Tensor, float]:
    return batch.student_logit_scale, batch.teacher_logit_scale


def _contrastive(batch: LossInputs) -> Tensor:
    return contrastive_loss(*_student(batch), batch.student_logit_scale, batch.label_smoothing)


def _cosine(batch: LossInputs) -> Tensor:
    return cosine_loss(*_projected(batch), *_teacher(batch))


def _feature(batch: LossInputs) -> Tensor:
    return feature_loss(*_projected(batch), *_teacher(batch))


def _interactive(batch: LossInputs) -> Tensor:
    return interactive_loss(*_projected(batch), *_teacher(batch), batch.student_logit_scale)


def _queue(batch: LossInputs) -> Tensor:
    if batch.queue_image is None or batch.queue_text is None:
        raise ValueError("the queue loss has no queue: set queue_rows, and give the batch the queue's rows")
    return queue_loss(*_projected(batch), *_teacher(batch), batch.queue_image, batch.queue_text, *_scales(batch))


def _relational(batch: LossInputs) -> Tensor:
    return relational_loss(*_student(batch), *_teacher(batch), *_scales(batch))


def _relational_mse(batch: LossInputs) -> Tensor:
    return relational_mse_loss(*_student(batch), *_teacher(batch), *_scales(batch), batch.temperature)


# by name in a run file; teacher_cache.pipeline.settings.recipes.LOSS_NAMES has the same names without torch
LOSSES: dict[str, Callable[[LossInputs], Tensor]] = {
    "contrastive": _contrastive,
    "cosine": _cosine,
    "feature": _feature,
    "interactive": _interactive,
    "queue": _queue,
    "relational": _relational,
    "relational_mse": _relational_mse,
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
        """Make an empty queue.

        Args:
            rows: maximum number of pairs, > 0.
            dim: width of the teacher's embeddings.
            device: device of the rows.

        Raises:
            ValueError: ``rows`` is below 1.
        """
        if rows < 1:
            raise ValueError(f"a queue of {rows} rows holds nothing; wanted at least 1")
        self.most_rows, self.dim = rows, dim
        self._device = torch.device(device)
        self._image = torch.empty(0, dim, device=self._device)
        self._text = torch.empty(0, dim, device=self._device)

    def __len__(self) -> int:
        """Return the number of pairs in the queue."""
        return len(self._image)

    def push(self, image: Tensor, text: Tensor) -> None:
        """Add pairs at the end, and remove the oldest beyond ``most_rows``.

        Tensors that ``rows()`` returned before are not changed, so a loss of an earlier step can still be
        differentiated.

        Args:
            image, text: (batch, dim), row ``i`` of both belongs to the same pair; detached here.

        Raises:
            ValueError: shapes differ, or are not ``dim`` wide.
        """
        self._require(image, text)
        self._image, self._text = self._joined(self._image, image), self._joined(self._text, text)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return images and texts, (pairs, dim) each, oldest first."""
        return self._image, self._text

    def state_dict(self) -> dict[str, Tensor]:
        """Return ``image`` and ``text``, as ``rows()``."""
        return {"image": self._image, "text": self._text}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load a ``state_dict()`` onto this queue's device.

        Raises:
            ValueError: the width differs, or there are more rows than this queue holds.
        """
        image, text = state["image"], state["text"]
        self._require(image, text)
        if len(image) > self.most_rows:
            raise ValueError(
                f"the saved queue holds {len(image)} rows, this one keeps {self.most_rows}. Resume with the queue_rows "
                "that the run was started with."
            )
        # copies: the state belongs to the caller
        self._image = image.detach().to(self._device, copy=True)
        self._text = text.detach().to(self._device, copy=True)

    def _require(self, image: Tensor, text: Tensor) -> None:
        if image.shape != text.shape or image.ndim != 2 or image.shape[1] != self.dim:
            raise ValueError(
                f"images {tuple(image.shape)} and texts {tuple(text.shape)}: wanted (pairs, {self.dim}) of both"
            )

    def _joined(self, held: Tensor, new: Tensor) -> Tensor:
        new = new.detach().to(self._device)[-self.most_rows :]
        newest = held[max(len(held) + len(new) - self.most_rows, 0) :]
        # a copy: saving a view would save the whole tensor
        return torch.cat([newest.to(new.dtype), new])
