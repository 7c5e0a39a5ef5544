"""Losses on values worked out by hand, by numpy in float64, and against open_clip's own."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import DistillClipLoss, SigLipLoss
from torch import Tensor

from teacher_cache.pipeline.settings.recipes import LOSS_NAMES, in_teacher_space
from teacher_cache.pipeline.train.losses import LOSSES, LossInputs, Pair, TeacherQueue, weighted_sum


def features(rows: int, dim: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def of(u: Tensor, v: Tensor, p: Tensor, q: Tensor, s: float = 1.0, st: float = 1.0, **more: Any) -> LossInputs:
    """A batch of a student of its teacher's width."""
    return LossInputs((u, v), (u, v), (p, q), torch.tensor(s), st, **more)


EYE, SWAPPED, FLAT = torch.eye(2), torch.eye(2).flip(0), torch.ones(2, 2) / math.sqrt(2)
FIRST, SECOND = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
THREE = 1 / (1 + math.exp(-3.0))  # the softmax of logits that are 3 apart
DECIDED = THREE * math.log(2 * THREE) + (1 - THREE) * math.log(2 * (1 - THREE))
ALIKE = torch.ones(8, 4) / 2
BY_HAND: list[tuple[str, LossInputs, float]] = [
    ("feature", of(FIRST, SECOND, SECOND, SECOND), 1.0),  # (1 + 1) / 2 values, and 0
    # images: cosines 1 and 0.6 against the first axis; texts: opposite, and equal
    ("cosine", of(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), EYE, FIRST.repeat(2, 1), -EYE * torch.tensor([1, -1])), 1.2),
    # logits [[2, 0], [0, 2]]: -ln(e^2 / (e^2 + 1)) in each row and column
    ("contrastive", of(EYE, EYE, EYE, EYE, 2.0), math.log(1 + math.exp(-2))),
    # smoothing 0.2 moves 0.1 of the target to the wrong pair, whose log-probability is 2 lower
    ("contrastive", of(EYE, EYE, EYE, EYE, 2.0, label_smoothing=0.2), math.log(1 + math.exp(-2)) + 0.1 * 2),
    ("contrastive", of(ALIKE, ALIKE, ALIKE, ALIKE, 50.0), math.log(8)),
    # the student is undecided: ln 2 whatever the teacher says
    ("relational", of(FLAT, FLAT, EYE, EYE, 10.0, 3.0), math.log(2)),
    # student = teacher: the entropy of (s, 1 - s)
    ("relational", of(EYE, EYE, EYE, EYE, 3.0, 3.0), -(THREE * math.log(THREE) + (1 - THREE) * math.log(1 - THREE))),
    # teacher's logits 6 on the diagonal; T = 2 makes 3 of it; the undecided student says 1/2 everywhere
    ("relational_mse", of(FLAT, FLAT, EYE, EYE, 10.0, 6.0), (THREE - 0.5) ** 2),
    # both images choose the first text; by texts instead of by images all would be undecided
    ("relational_mse", of(FIRST.repeat(2, 1), EYE, EYE, EYE, 6.0, 6.0), 2 * (1 - 2 * THREE) ** 2 / 4),
    # the student's own towers disagree, but each picks the teacher's row of its pair: no more than ln(1 + e^-s)
    ("interactive", of(EYE, SWAPPED, SWAPPED, EYE, 5.0), math.log(1 + math.exp(-5.0))),
    # images against the teacher's texts right, texts against its images wrong: that one costs s more
    ("interactive", of(EYE, EYE, SWAPPED, EYE, 5.0), math.log(1 + math.exp(-5.0)) + 5.0 / 2),
    # logits [[1, -1], [-1, 1]]: all four pairs are right by 1, and a row has two of them
    ("sigmoid", of(EYE, EYE, EYE, EYE, 2.0, student_logit_bias=-1.0), 2 * math.log(1 + math.exp(-1))),
    # the own pairs are right by 2, the others undecided
    ("sigmoid", of(EYE, EYE, EYE, EYE, 2.0), math.log(1 + math.exp(-2)) + math.log(2)),
    # the student is undecided about each pair, the teacher of its own pairs only: logit 3
    ("sigmoid_relational", of(EYE, EYE, EYE, EYE, 0.0, 3.0), DECIDED),
    # with bias -3 it is undecided of the own pairs, and certain of the others
    ("sigmoid_relational", of(EYE, EYE, EYE, EYE, 0.0, 3.0, teacher_logit_bias=-3.0), DECIDED),
    ("sigmoid_relational", of(EYE, EYE, EYE, EYE, 3.0, 3.0, student_logit_bias=-3.0, teacher_logit_bias=-3.0), 0.0),
    # image: teacher's logits over the queued texts (2, 0, 0), the student's (0, 3, 3); texts: all alike, ln 3
    (
        "queue",
        of(SECOND, FIRST, FIRST, FIRST, 3.0, 2.0, queue=(FIRST.repeat(3, 1), torch.cat([FIRST, SECOND, SECOND]))),
        (math.log(1 + 2 * math.exp(3)) - 2 * 3 / (math.exp(2) + 2) + math.log(3)) / 2,
    ),
]


@pytest.mark.parametrize(("name", "inputs", "value"), BY_HAND)
def test_by_hand(name: str, inputs: LossInputs, value: float) -> None:
    bound = 1e-7 if name == "relational_mse" else 1e-5 if value == math.log(8) else 1e-6
    assert LOSSES[name](inputs).item() == pytest.approx(value, abs=bound)


def test_losses_equal_open_clips() -> None:
    u, v, p, q = (features(32, 24, seed) for seed in range(4))
    inputs = of(u, v, p, q, 14.3, 52.0)
    contrastive, relational = DistillClipLoss()(u, v, inputs.student_logit_scale, p, q, torch.tensor(52.0))
    assert LOSSES["relational"](inputs).item() == pytest.approx(relational.item(), abs=1e-6)
    assert LOSSES["contrastive"](inputs).item() == pytest.approx(contrastive.item(), abs=1e-6)
    scale, bias = inputs.student_logit_scale, torch.tensor(-9.3)
    sigmoid = SigLipLoss()(u, v, scale, bias)
    assert LOSSES["sigmoid"](replace(inputs, student_logit_bias=bias)).item() == pytest.approx(sigmoid.item(), rel=1e-6)


def test_cosine_of_unit_rows_is_half_the_width_times_feature() -> None:
    inputs = of(*(features(6, 24, seed) for seed in range(4)))
    assert LOSSES["cosine"](inputs).item() == pytest.approx(12 * LOSSES["feature"](inputs).item(), rel=1e-5)
    u, v = inputs.teacher
    assert LOSSES["cosine"](of(u, v, u, v)).item() == pytest.approx(0, abs=1e-6)


def doubles(rows: int = 5, student_dim: int = 4, teacher_dim: int = 6, queued: int = 8) -> LossInputs:
    """A batch in float64 where every tensor is another."""
    shapes = [(rows, student_dim)] * 2 + [(rows, teacher_dim)] * 4 + [(queued, teacher_dim)] * 2
    rng = np.random.default_rng(0)
    u, v, pu, pv, p, q, qi, qt = (F.normalize(torch.from_numpy(rng.standard_normal(shape)), dim=1) for shape in shapes)
    scale = torch.tensor(3.7, dtype=torch.float64)
    bias = torch.tensor(-1.3, dtype=torch.float64)
    return LossInputs((u, v), (pu, pv), (p, q), scale, 6.1, 0.15, 1.7, (qi, qt), bias, -2.1)


def log_softmax(logits: np.ndarray[Any, Any], axis: int) -> np.ndarray[Any, Any]:
    return logits - np.log(np.exp(logits).sum(axis=axis, keepdims=True))


def by_numpy(batch: LossInputs) -> dict[str, float]:
    """Each loss again, as its formula is written in the papers."""
    assert batch.queue is not None
    (u, v), (pu, pv), (p, q), (qi, qt) = (
        tuple(each.numpy() for each in two) for two in (batch.student, batch.projected, batch.teacher, batch.queue)
    )
    s, st, t = float(batch.student_logit_scale), batch.teacher_logit_scale, batch.temperature
    n = len(u)
    eye = np.eye(n)
    target = np.full((n, n), batch.label_smoothing / n) + eye * (1 - batch.label_smoothing)
    student, teacher = s * u @ v.T, st * p @ q.T

    def cross(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], axis: int = 1) -> float:
        return float(-(wanted * log_softmax(found, axis)).sum(axis=axis).mean())

    def softmax(logits: np.ndarray[Any, Any], axis: int = 1) -> np.ndarray[Any, Any]:
        return np.exp(log_softmax(logits, axis))

    def match(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return 1 / (1 + np.exp(-logits))

    own, taught = match(student + float(batch.student_logit_bias)), match(teacher + batch.teacher_logit_bias)
    kl = taught * np.log(taught / own) + (1 - taught) * np.log((1 - taught) / (1 - own))
    return {
        "contrastive": (cross(student, target) + cross(student, target, 0)) / 2,
        "cosine": float(np.mean([2 - pu[i] @ p[i] - pv[i] @ q[i] for i in range(n)])),
        "feature": float(((pu - p) ** 2).mean() + ((pv - q) ** 2).mean()),
        "interactive": (cross(s * pu @ q.T, eye) + cross(s * pv @ p.T, eye)) / 2,
        "queue": (cross(s * pu @ qt.T, softmax(st * p @ qt.T)) + cross(s * pv @ qi.T, softmax(st * q @ qi.T))) / 2,
        "relational": (cross(student, softmax(teacher)) + cross(student, softmax(teacher, 0), 0)) / 2,
        "sigmoid": -float(np.log(np.where(eye == 1, own, 1 - own)).sum() / n),
        "sigmoid_relational": float(kl.sum() / n),
        "relational_mse": float(((softmax(student / t) - softmax(teacher / t)) ** 2).mean()),
    }


def cast(batch: LossInputs, dtype: torch.dtype) -> LossInputs:
    """The same with features of another type."""
    assert batch.queue is not None
    u, p, t, queue = (
        (two[0].to(dtype), two[1].to(dtype)) for two in (batch.student, batch.projected, batch.teacher, batch.queue)
    )
    return replace(batch, student=u, projected=p, teacher=t, queue=queue)


def test_every_loss_is_its_formula() -> None:
    exact = by_numpy(doubles())
    assert set(exact) == set(LOSSES)
    for name, loss in LOSSES.items():
        assert loss(doubles()).item() == pytest.approx(exact[name], abs=1e-12), name
        assert loss(cast(doubles(), torch.float32)).item() == pytest.approx(exact[name], rel=1e-5), name


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    inputs = doubles()

    def value(u: Tensor, v: Tensor, pu: Tensor, pv: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        learned = {"student_logit_scale": scale, "student_logit_bias": bias}
        return LOSSES[name](replace(inputs, student=(u, v), projected=(pu, pv), **learned))

    leaves = (
        *inputs.student,
        *inputs.projected,
        inputs.student_logit_scale,
        torch.as_tensor(inputs.student_logit_bias),
    )
    assert torch.autograd.gradcheck(value, tuple(leaf.clone().requires_grad_() for leaf in leaves))


@pytest.mark.parametrize("name", ["relational", "relational_mse", "queue", "sigmoid_relational"])
def test_a_teachers_target_gets_no_gradient(name: str) -> None:
    """A loss must not fall by moving what is to be reached."""
    inputs = doubles()
    for leaf in (*inputs.student, *inputs.projected, *inputs.teacher):
        leaf.requires_grad_()
    LOSSES[name](inputs).backward()
    assert [leaf.grad for leaf in inputs.teacher] == [None, None]
    moved = inputs.projected if name == "queue" else inputs.student
    assert all(leaf.grad is not None for leaf in moved)


def test_agreement_is_zero_or_the_least_there_is() -> None:
    """relational is the teacher's entropy, with no gradient left; those that are 0 are named."""
    base = doubles(student_dim=6)
    p, q = base.teacher
    u = p.clone().requires_grad_()
    scale = torch.tensor(base.teacher_logit_scale, dtype=torch.float64)
    bias = torch.tensor(base.teacher_logit_bias, dtype=torch.float64)
    agreed = replace(base, student=(u, q), projected=(u, q), student_logit_scale=scale, student_logit_bias=bias)
    for name in ("feature", "cosine", "relational_mse", "sigmoid_relational"):
        assert LOSSES[name](agreed).item() == pytest.approx(0, abs=1e-15)
    for name in ("relational", "queue"):
        (gradient,) = torch.autograd.grad(LOSSES[name](agreed), u)
        assert gradient.abs().max() < 1e-15
        moved = replace(agreed, student=(q.roll(1, 0), q), projected=(q.roll(1, 0), q))
        assert LOSSES[name](moved) > LOSSES[name](agreed) + 0.1


def test_mobileclips_loss_is_a_mix_of_contrastive_and_relational() -> None:
    """Its KL is ours less the teacher's entropy: another value, the same gradient."""
    lam, inputs = 0.75, doubles()
    u, v = inputs.student[0].clone().requires_grad_(), inputs.student[1]
    inputs = replace(inputs, student=(u, v), label_smoothing=0.0)
    student = inputs.student_logit_scale * u @ v.T
    teacher = inputs.teacher_logit_scale * inputs.teacher[0] @ inputs.teacher[1].T
    labels = torch.arange(len(u))
    clip = (F.cross_entropy(student, labels) + F.cross_entropy(student.T, labels)) / 2
    rows, columns = (
        F.kl_div(a.log_softmax(1), b.softmax(1), reduction="batchmean")
        for a, b in ((student, teacher), (student.T, teacher.T))
    )
    theirs = (1 - lam) * clip + lam * (rows + columns) / 2
    ours, _ = weighted_sum(inputs, {"contrastive": 1 - lam, "relational": lam})
    entropy = sum(-(b.softmax(1) * b.log_softmax(1)).sum(1).mean() for b in (teacher, teacher.T)) / 2
    assert ours.item() == pytest.approx((theirs + lam * entropy).item(), abs=1e-12)
    wanted, found = (torch.autograd.grad(loss, u, retain_graph=True)[0] for loss in (theirs, ours))
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


def test_rows_or_widths_out_of_step_are_refused() -> None:
    """Only the student's own space may have another width than the teacher's."""
    u, narrow = features(4, 8, 0), features(4, 6, 0)
    assert LossInputs((narrow, narrow), (u, u), (u, u), torch.tensor(1.0), 1.0)
    for student, projected, teacher in (
        ((u, u), (u, u), (u[:3], u[:3])),
        ((u, u[:3]), (u, u), (u, u)),
        ((u[:3], u[:3]), (u, u), (u, u)),
        ((u, u), (u, u[:3]), (u, u[:3])),
        ((narrow, narrow), (narrow, narrow), (u, u)),
    ):
        with pytest.raises(ValueError, match=r"student \[.*, projected .*, teacher .*: student and cache are out of"):
            LossInputs(student, projected, teacher, torch.tensor(1.0), 1.0)


def test_losses_are_float32_under_autocast() -> None:
    inputs = cast(doubles(), torch.float32)
    plain = {name: loss(inputs).item() for name, loss in LOSSES.items()}
    with torch.autocast("cpu", torch.bfloat16):
        # autocast makes a product bfloat16 if it is let
        assert (inputs.student[0] @ inputs.student[1].T).dtype == torch.bfloat16
        mixed = {name: loss(inputs) for name, loss in LOSSES.items()}
    for name, value in mixed.items():
        assert value.dtype == torch.float32
        assert value.item() == plain[name]
    # features that are bfloat16 already are widened before anything is computed of them
    halves = cast(inputs, torch.bfloat16)
    for name, loss in LOSSES.items():
        found = loss(halves)
        assert found.dtype == torch.float32
        assert found.item() == loss(cast(halves, torch.float32)).item(), name


def test_weighted_sum_adds_what_is_named() -> None:
    inputs = doubles()
    u = inputs.student[0].requires_grad_()
    total, parts = weighted_sum(inputs, {"contrastive": 1.0, "feature": 2000.0, "relational": 0.0})
    assert set(parts) == {"contrastive", "feature"}
    assert total.item() == pytest.approx(parts["contrastive"].item() + 2000 * parts["feature"].item(), rel=1e-6)
    total.backward()
    assert u.grad is not None
    assert u.grad.abs().sum() > 0


def pairs(first: int, count: int) -> Pair:
    """Rows that say which they are; a text is its image's negative."""
    image = torch.arange(first, first + count).float()[:, None].expand(count, 3)
    return image, -image


def test_a_queue_keeps_the_last_pairs_in_order_and_goes_on_from_its_state() -> None:
    queue = TeacherQueue(5, 3)
    assert queue.rows()[0].shape == (0, 3)
    held = []
    for first, count in ((0, 2), (2, 2), (4, 3), (7, 1), (8, 9)):
        queue.push(*pairs(first, count))
        resumed = TeacherQueue(5, 3)
        resumed.load_state_dict(queue.state_dict())
        queue = resumed
        image, text = queue.rows()
        assert torch.equal(text, -image)
        held.append(image[:, 0].int().tolist())
    assert held == [[0, 1], [0, 1, 2, 3], [2, 3, 4, 5, 6], [3, 4, 5, 6, 7], [12, 13, 14, 15, 16]]


def test_pushing_before_the_step_is_differentiated_changes_no_gradient() -> None:
    inputs, queue = doubles(), TeacherQueue(8, 6)
    queue.push(*inputs.teacher)
    assert queue.rows()[0].dtype == torch.float64
    gradients = []
    for later in (False, True):
        u = inputs.projected[0].clone().requires_grad_()
        loss = LOSSES["queue"](replace(inputs, projected=(u, inputs.projected[1]), queue=queue.rows()))
        if later:
            queue.push(*reversed(inputs.teacher))
        gradients.append(torch.autograd.grad(loss, u)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_a_loss_in_the_teachers_space_moves_the_projections(name: str) -> None:
    """And no other does: a student that is trained by none of them cannot stand beside its teacher row by row."""
    inputs = doubles()
    for leaf in (*inputs.student, *inputs.projected, inputs.student_logit_scale):
        leaf.requires_grad_()
    total, _ = weighted_sum(inputs, {name: 1.0})
    slopes = torch.autograd.grad(total, inputs.projected, allow_unused=True, materialize_grads=True)
    assert {bool(slope.any()) for slope in slopes} == {in_teacher_space({name: 1.0})}
    assert not in_teacher_space({name: 0.0})
