"""Losses on values worked out by hand and against open_clip's own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, DistillClipLoss

from pipeline.losses import LOSSES, LossInputs, contrastive_loss, feature_loss, relational_loss, weighted_sum


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


def batch(dim: int = 24) -> LossInputs:
    u, v = (features(16, dim, seed).requires_grad_() for seed in (0, 1))
    p, q = (features(16, 24, seed) for seed in (2, 3))
    return LossInputs(u, v, p * 0.9, q * 0.9, p, q, torch.tensor(14.0), 30.0)


def test_widths_may_differ_where_only_logits_are_compared() -> None:
    narrow = batch(dim=8)
    for name in ("contrastive", "relational"):
        assert torch.isfinite(LOSSES[name](narrow))
    with pytest.raises(ValueError, match=r"student \(16, 8\), \(16, 8\); teacher \(16, 24\)"):
        feature_loss(narrow.student_image, narrow.student_text, narrow.teacher_image, narrow.teacher_text)


def test_rows_out_of_step_are_refused() -> None:
    u = features(4, 8, 0)
    with pytest.raises(ValueError, match="student and cache are out of step"):
        relational_loss(u, u, u[:3], u[:3], 1.0, 1.0)


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


def test_weighted_sum_adds_what_is_named() -> None:
    inputs = batch()
    total, parts = weighted_sum(inputs, {"contrastive": 1.0, "feature": 2000.0, "relational": 0.0})
    assert set(parts) == {"contrastive", "feature"}
    assert total.item() == pytest.approx(parts["contrastive"].item() + 2000 * parts["feature"].item(), rel=1e-6)
    total.backward()
    assert inputs.student_image.grad is not None
    assert inputs.student_image.grad.abs().sum() > 0
