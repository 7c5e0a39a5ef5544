"""Losses on values worked out by hand, by numpy in float64, and against open_clip's own."""

from __future__ import annotations

import io
import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, DistillClipLoss
from torch import Tensor

from teacher_cache.pipeline.settings.recipes import LOSS_NAMES, in_teacher_space
from teacher_cache.pipeline.train.losses import (
    LOSSES,
    LossInputs,
    TeacherQueue,
    contrastive_loss,
    cosine_loss,
    feature_loss,
    interactive_loss,
    queue_loss,
    relational_loss,
    relational_mse_loss,
    weighted_sum,
)


def features(rows: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_feature_by_hand() -> None:
    u, v = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    p, q = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]])
    assert feature_loss(u, v, p, q).item() == pytest.approx(1.0)  # (1 + 1) / 2 values, and 0
    assert feature_loss(p, q, p, q).item() == 0


def test_contrastive_by_hand() -> None:
    eye = torch.eye(2)
    # logits [[2, 0], [0, 2]]: -ln(e^2 / (e^2 + 1)) in each row and column
    expected = math.log(1 + math.exp(-2))
    assert contrastive_loss(eye, eye, 2.0).item() == pytest.approx(expected, abs=1e-6)
    # smoothing 0.2 moves 0.1 of the target to the wrong pair, whose log-probability is 2 lower
    assert contrastive_loss(eye, eye, 2.0, 0.2).item() == pytest.approx(expected + 0.1 * 2, abs=1e-6)


def test_contrastive_of_equal_cosines_is_the_log_of_the_batch() -> None:
    same = torch.ones(8, 4) / 2
    assert contrastive_loss(same, same, 50.0).item() == pytest.approx(math.log(8), abs=1e-5)


def test_relational_by_hand() -> None:
    eye, flat = torch.eye(2), torch.ones(2, 2) / math.sqrt(2)
    # the student is undecided: ln 2 whatever the teacher says
    assert relational_loss(flat, flat, eye, eye, 10.0, 3.0).item() == pytest.approx(math.log(2), abs=1e-6)
    # student = teacher: the entropy of (s, 1 - s)
    s = 1 / (1 + math.exp(-3.0))
    entropy = -(s * math.log(s) + (1 - s) * math.log(1 - s))
    assert relational_loss(eye, eye, eye, eye, 3.0, 3.0).item() == pytest.approx(entropy, abs=1e-6)


def test_losses_equal_open_clips() -> None:
    u, v, p, q = (features(32, 24, seed) for seed in range(4))
    scale, teacher_scale = torch.tensor(14.3), 52.0
    contrastive, relational = DistillClipLoss()(u, v, scale, p, q, torch.tensor(teacher_scale))
    assert relational_loss(u, v, p, q, scale, teacher_scale).item() == pytest.approx(relational.item(), abs=1e-6)
    assert contrastive_loss(u, v, scale).item() == pytest.approx(contrastive.item(), abs=1e-6)
    assert contrastive_loss(u, v, scale).item() == pytest.approx(ClipLoss()(u, v, scale).item(), abs=1e-6)


EYE, SWAPPED = torch.eye(2), torch.eye(2).flip(0)


def test_cosine_by_hand() -> None:
    u, q = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
    # images: cosines 1 and 0.6 against the first axis; texts: opposite, and equal
    p, v = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert cosine_loss(u, v, p, q).item() == pytest.approx((0 + 0.4) / 2 + (2 + 0) / 2, abs=1e-6)
    assert cosine_loss(u, q, u, q).item() == pytest.approx(0, abs=1e-6)


def test_cosine_of_unit_rows_is_half_the_width_times_feature() -> None:
    u, v, p, q = (features(6, 24, seed) for seed in range(4))
    assert cosine_loss(u, v, p, q).item() == pytest.approx(12 * feature_loss(u, v, p, q).item(), rel=1e-5)


def test_relational_mse_by_hand() -> None:
    flat = torch.ones(2, 2) / math.sqrt(2)
    # teacher's logits 6 on the diagonal; T = 2 makes 3 of it; the undecided student says 1/2 everywhere
    s = 1 / (1 + math.exp(-3.0))
    assert relational_mse_loss(flat, flat, EYE, EYE, 10.0, 6.0, 2.0).item() == pytest.approx((s - 0.5) ** 2, abs=1e-7)
    assert relational_mse_loss(EYE, EYE, EYE, EYE, 6.0, 6.0, 2.0).item() == 0
    # both images choose the first text; by texts instead of by images all would be undecided
    u, v = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), EYE
    wrong = ((1 - s - s) ** 2 + (s - (1 - s)) ** 2) / 4  # the second row, the wrong way round
    assert relational_mse_loss(u, v, EYE, EYE, 6.0, 6.0, 2.0).item() == pytest.approx(wrong, abs=1e-7)


def test_interactive_by_hand() -> None:
    # the student's own towers disagree, but each picks the teacher's row of its pair: no more than ln(1 + e^-s)
    right = math.log(1 + math.exp(-5.0))
    assert interactive_loss(EYE, SWAPPED, SWAPPED, EYE, 5.0).item() == pytest.approx(right, abs=1e-6)
    # images against the teacher's texts right, texts against its images wrong: that one costs s more
    assert interactive_loss(EYE, EYE, SWAPPED, EYE, 5.0).item() == pytest.approx(right + 5.0 / 2, abs=1e-6)


def test_queue_by_hand() -> None:
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    texts, images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0]] * 3)
    # image: teacher's logits over the queued texts (2, 0, 0), the student's (0, 3, 3); texts: all alike, ln 3
    most, least = math.exp(2) / (math.exp(2) + 2), 1 / (math.exp(2) + 2)
    norm = math.log(1 + 2 * math.exp(3))
    image = most * norm + 2 * least * (norm - 3)
    found = queue_loss(other, one, one, one, images, texts, 3.0, 2.0).item()
    assert found == pytest.approx((image + math.log(3)) / 2, abs=1e-6)


def batch(dim: int = 24) -> LossInputs:
    u, v = (features(16, dim, seed).requires_grad_() for seed in (0, 1))
    p, q, more_p, more_q = (features(16, 24, seed) for seed in (2, 3, 4, 5))
    queue = torch.cat([more_p, p]), torch.cat([more_q, q])
    return LossInputs(u, v, p * 0.9, q * 0.9, p, q, torch.tensor(14.0), 30.0, 0.1, 2.0, *queue)


def doubles(rows: int = 5, student_dim: int = 4, teacher_dim: int = 6, queued: int = 8) -> LossInputs:
    """A batch in float64 where every tensor is another."""
    shapes = [(rows, student_dim)] * 2 + [(rows, teacher_dim)] * 4 + [(queued, teacher_dim)] * 2
    rng = np.random.default_rng(0)
    u, v, pu, pv, p, q, qi, qt = (F.normalize(torch.from_numpy(rng.standard_normal(shape)), dim=1) for shape in shapes)
    scale = torch.tensor(3.7, dtype=torch.float64)
    return LossInputs(u, v, pu, pv, p, q, scale, 6.1, 0.15, 1.7, qi, qt)


def log_softmax(logits: np.ndarray[Any, Any], axis: int) -> np.ndarray[Any, Any]:
    return logits - np.log(np.exp(logits).sum(axis=axis, keepdims=True))


def by_numpy(batch: LossInputs) -> dict[str, float]:
    """Each loss again, as its formula is written in the papers."""
    a = {f.name: np.asarray(value) for f in fields(batch) if isinstance(value := getattr(batch, f.name), Tensor)}
    u, v, pu, pv = a["student_image"], a["student_text"], a["projected_image"], a["projected_text"]
    p, q, qi, qt = a["teacher_image"], a["teacher_text"], a["queue_image"], a["queue_text"]
    s, st, eps, temperature = (
        float(a["student_logit_scale"]),
        batch.teacher_logit_scale,
        batch.label_smoothing,
        batch.temperature,
    )
    n = len(u)
    target = np.full((n, n), eps / n) + np.eye(n) * (1 - eps)
    student, teacher = s * u @ v.T, st * p @ q.T

    def cross(log_found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], axis: int) -> float:
        return float(-(wanted * log_found).sum(axis=axis).mean())

    return {
        "contrastive": (cross(log_softmax(student, 1), target, 1) + cross(log_softmax(student, 0), target, 0)) / 2,
        "cosine": float(np.mean([2 - pu[i] @ p[i] - pv[i] @ q[i] for i in range(n)])),
        "feature": float(((pu - p) ** 2).mean() + ((pv - q) ** 2).mean()),
        "interactive": (
            cross(log_softmax(s * pu @ q.T, 1), np.eye(n), 1) + cross(log_softmax(s * pv @ p.T, 1), np.eye(n), 1)
        )
        / 2,
        "queue": (
            cross(log_softmax(s * pu @ qt.T, 1), np.exp(log_softmax(st * p @ qt.T, 1)), 1)
            + cross(log_softmax(s * pv @ qi.T, 1), np.exp(log_softmax(st * q @ qi.T, 1)), 1)
        )
        / 2,
        "relational": (
            cross(log_softmax(student, 1), np.exp(log_softmax(teacher, 1)), 1)
            + cross(log_softmax(student, 0), np.exp(log_softmax(teacher, 0)), 0)
        )
        / 2,
        "relational_mse": float(
            (
                (np.exp(log_softmax(student / temperature, 1)) - np.exp(log_softmax(teacher / temperature, 1))) ** 2
            ).mean()
        ),
    }


def single(batch: LossInputs) -> LossInputs:
    """The same in float32."""
    tensors = {f.name: value.float() for f in fields(batch) if isinstance(value := getattr(batch, f.name), Tensor)}
    return replace(batch, **tensors)


def test_every_loss_is_its_formula() -> None:
    exact = by_numpy(doubles())
    assert set(exact) == set(LOSSES)
    for name, loss in LOSSES.items():
        assert loss(doubles()).item() == pytest.approx(exact[name], abs=1e-12), name
        assert loss(single(doubles())).item() == pytest.approx(exact[name], rel=1e-5), name


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    inputs = doubles()
    students = ("student_image", "student_text", "projected_image", "projected_text", "student_logit_scale")

    def value(*tensors: Tensor) -> Tensor:
        return LOSSES[name](replace(inputs, **dict(zip(students, tensors, strict=True))))

    leaves = tuple(getattr(inputs, field).clone().requires_grad_() for field in students)
    assert torch.autograd.gradcheck(value, leaves)


@pytest.mark.parametrize(
    ("name", "student"),
    [("relational", "student_image"), ("relational_mse", "student_image"), ("queue", "projected_image")],
)
def test_a_softmax_target_gets_no_gradient(name: str, student: str) -> None:
    """A loss must not fall by moving what is to be reached."""
    leaves = {field: getattr(doubles(), field).clone().requires_grad_() for field in (student, "teacher_image")}
    LOSSES[name](replace(doubles(), **leaves)).backward()
    assert leaves["teacher_image"].grad is None
    assert leaves[student].grad is not None


def test_agreement_is_zero_or_the_least_there_is() -> None:
    """feature, cosine, relational_mse are 0; relational is the teacher's entropy, with no gradient left."""
    base = doubles(student_dim=6)
    p, q = base.teacher_image, base.teacher_text
    u = p.clone().requires_grad_()
    scale = torch.tensor(base.teacher_logit_scale, dtype=torch.float64)
    agreed = replace(
        base, student_image=u, student_text=q, projected_image=u, projected_text=q, student_logit_scale=scale
    )
    for name in ("feature", "cosine", "relational_mse"):
        assert LOSSES[name](agreed).item() == pytest.approx(0, abs=1e-15)
    for name in ("relational", "queue"):
        (gradient,) = torch.autograd.grad(LOSSES[name](agreed), u)
        assert gradient.abs().max() < 1e-15
        moved = replace(agreed, student_image=q.roll(1, 0), projected_image=q.roll(1, 0))
        assert LOSSES[name](moved) > LOSSES[name](agreed) + 0.1


def test_mobileclips_loss_is_a_mix_of_contrastive_and_relational() -> None:
    """Its KL is ours less the teacher's entropy: another value, the same gradient."""
    lam, inputs = 0.75, doubles()
    u = inputs.student_image.clone().requires_grad_()
    inputs = replace(inputs, student_image=u, label_smoothing=0.0)
    student = inputs.student_logit_scale * u @ inputs.student_text.T
    teacher = inputs.teacher_logit_scale * inputs.teacher_image @ inputs.teacher_text.T
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


def test_widths_may_differ_where_only_logits_are_compared() -> None:
    narrow = batch(dim=8)
    for loss in LOSSES.values():
        assert torch.isfinite(loss(narrow))
    confused = replace(narrow, projected_image=narrow.student_image, projected_text=narrow.student_text)
    for name in ("cosine", "feature", "interactive", "queue"):
        with pytest.raises(ValueError, match=r"student \(16, 8\), \(16, 8\); teacher \(16, 24\)"):
            LOSSES[name](confused)


def test_rows_out_of_step_are_refused() -> None:
    u = features(4, 8, 0)
    with pytest.raises(ValueError, match="student and cache are out of step"):
        relational_loss(u, u, u[:3], u[:3], 1.0, 1.0)
    with pytest.raises(ValueError, match="student and cache are out of step"):
        relational_mse_loss(u, u, u[:3], u[:3], 1.0, 1.0)


def test_a_queue_loss_without_a_queue_is_refused() -> None:
    with pytest.raises(ValueError, match="set queue_rows"):
        LOSSES["queue"](replace(batch(), queue_image=None))
    u = features(4, 8, 0)
    with pytest.raises(ValueError, match=r"queued images \(0, 8\) and texts \(0, 8\).*Push the teacher's rows"):
        queue_loss(u, u, u, u, u[:0], u[:0], 1.0, 1.0)
    with pytest.raises(ValueError, match=r"queued images \(4, 8\) and texts \(3, 8\)"):
        queue_loss(u, u, u, u, u, u[:3], 1.0, 1.0)


def test_losses_are_float32_under_autocast() -> None:
    inputs = batch()
    # autocast would make the products of these bfloat16
    plain = {name: loss(inputs).item() for name, loss in LOSSES.items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert (inputs.student_image @ inputs.student_text.T).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        mixed = {name: loss(inputs) for name, loss in LOSSES.items()}
    for name, value in mixed.items():
        assert value.dtype == torch.float32
        assert value.item() == plain[name]
    # features that are bfloat16 already are widened before anything is computed of them
    tensors = {f.name: value for f in fields(inputs) if isinstance(value := getattr(inputs, f.name), Tensor)}
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items() if tensor.ndim == 2}
    widened = {name: tensor.float() for name, tensor in halves.items()}
    for name, loss in LOSSES.items():
        found = loss(replace(inputs, **halves))
        assert found.dtype == torch.float32
        assert found.item() == loss(replace(inputs, **widened)).item(), name


def test_weighted_sum_adds_what_is_named() -> None:
    inputs = batch()
    total, parts = weighted_sum(inputs, {"contrastive": 1.0, "feature": 2000.0, "relational": 0.0})
    assert set(parts) == {"contrastive", "feature"}
    assert total.item() == pytest.approx(parts["contrastive"].item() + 2000 * parts["feature"].item(), rel=1e-6)
    total.backward()
    assert inputs.student_image.grad is not None
    assert inputs.student_image.grad.abs().sum() > 0


def pairs(first: int, count: int, dim: int = 3) -> tuple[Tensor, Tensor]:
    """Rows that say which they are; a text is its image's negative."""
    image = torch.arange(first, first + count).float()[:, None].expand(count, dim)
    return image, -image


def test_a_queue_keeps_the_last_pairs_in_order() -> None:
    queue = TeacherQueue(5, 3)
    assert (len(queue), queue.rows()[0].shape) == (0, (0, 3))
    held = []
    for first, count in ((0, 2), (2, 2), (4, 3), (7, 1), (8, 9)):
        queue.push(*pairs(first, count))
        image, text = queue.rows()
        assert torch.equal(text, -image)
        held.append(image[:, 0].int().tolist())
    assert held == [[0, 1], [0, 1, 2, 3], [2, 3, 4, 5, 6], [3, 4, 5, 6, 7], [12, 13, 14, 15, 16]]
    assert queue.rows()[0].is_contiguous()


def test_a_queue_goes_on_from_its_state() -> None:
    straight, first, second = (TeacherQueue(5, 3) for _ in range(3))
    for queue in (straight, first):
        queue.push(*pairs(0, 4))
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    assert saved.tell() < 4_000  # the rows alone
    second.load_state_dict(torch.load(io.BytesIO(saved.getvalue())))
    for queue in (straight, second):
        queue.push(*pairs(4, 3))
    assert all(torch.equal(a, b) for a, b in zip(straight.rows(), second.rows(), strict=True))
    with pytest.raises(ValueError, match=r"holds 5 rows, this one keeps 4\. Resume with the queue_rows"):
        TeacherQueue(4, 3).load_state_dict(straight.state_dict())


def test_a_queue_refuses_what_is_not_pairs_of_its_width() -> None:
    with pytest.raises(ValueError, match="a queue of 0 rows"):
        TeacherQueue(0, 3)
    queue = TeacherQueue(4, 3)
    with pytest.raises(ValueError, match=r"images \(2, 3\) and texts \(1, 3\): wanted \(pairs, 3\)"):
        queue.push(pairs(0, 2)[0], pairs(0, 1)[1])
    with pytest.raises(ValueError, match=r"wanted \(pairs, 3\)"):
        queue.push(*pairs(0, 2, dim=4))


def test_pushing_before_the_step_is_differentiated_changes_no_gradient() -> None:
    inputs, queue = doubles(), TeacherQueue(8, 6)
    queue.push(inputs.teacher_image, inputs.teacher_text)
    assert queue.rows()[0].dtype == torch.float64
    gradients = []
    for later in (False, True):
        u = inputs.projected_image.clone().requires_grad_()
        image, text = queue.rows()
        loss = LOSSES["queue"](replace(inputs, projected_image=u, queue_image=image, queue_text=text))
        if later:
            queue.push(inputs.teacher_text, inputs.teacher_image)
        gradients.append(torch.autograd.grad(loss, u)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_a_loss_in_the_teachers_space_moves_the_projections(name: str) -> None:
    """And no other does: a student that is trained by none of them cannot stand beside its teacher row by row."""
    projected = doubles()
    rows = projected.projected_image.requires_grad_(), projected.projected_text.requires_grad_()
    scale = projected.student_logit_scale.clone().requires_grad_()
    total, _ = weighted_sum(
        replace(projected, student_logit_scale=scale, student_image=projected.student_image.clone().requires_grad_()),
        {name: 1.0},
    )
    slopes = torch.autograd.grad(total, rows, allow_unused=True, materialize_grads=True)
    assert {bool(slope.any()) for slope in slopes} == {in_teacher_space({name: 1.0})}
    assert not in_teacher_space({name: 0.0})
