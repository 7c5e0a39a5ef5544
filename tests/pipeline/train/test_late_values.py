"""A step's values are read while a GPU works on the next step: nothing is lost by it, and nothing bad is learned.

Here on a CPU, whose steps are told to be unfinished until they are waited for.
"""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from teacher_cache.pipeline.data.batches.pairs import Pairs
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.student import load_student
from teacher_cache.pipeline.train import loop, losses
from teacher_cache.pipeline.train.log.step_values import LateValues
from teacher_cache.pipeline.train.loop import StepProgress, train
from teacher_cache.pipeline.train.optimizer import adamw
from teacher_cache.pipeline.train.step import TrainStep
from tests.pipeline.train.train_work import make_student, trace, train_config

LOSSES = {"relational": 1.0, "feature": 50.0}


@pytest.fixture
def never_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LateValues, "ready", False)


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return make_student(tmp_path / "student.json", patch_dropout=0.5)


def test_values_are_read_one_step_late_and_none_is_lost(
    photo_cache: Path, student: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log, epochs and weights are those of a run that reads each step at once, to the last bit."""
    settings: dict[str, Any] = {"losses": LOSSES, "checkpoint_steps": 3, "micro_batch": 5, "ema_decay": 0.9}
    train(train_config(photo_cache, student, tmp_path / "at once", **settings))
    request.getfixturevalue("never_ready")
    order: list[tuple[str, int]] = []
    take = TrainStep.__call__

    def taken(self: TrainStep, step: int, *inputs: Any) -> LateValues:
        order.append(("launched", step + 1))
        return take(self, step, *inputs)

    monkeypatch.setattr(TrainStep, "__call__", taken)
    train(train_config(photo_cache, student, tmp_path / "late", **settings), lambda at: order.append(("read", at.step)))
    # step 3 is read before its checkpoint, step 4 before the next epoch
    turns = "l1 l2 r1 l3 r2 r3 l4 r4 l5 l6 r5 r6 l7 l8 r7 r8"
    assert " ".join(f"{kind[0]}{step}" for kind, step in order) == turns
    assert trace(tmp_path / "late") == trace(tmp_path / "at once")
    late, at_once = (RunFolder(tmp_path / name).read() for name in ("late", "at once"))
    assert [(epoch.loss, epoch.parts) for epoch in late.epochs] == [
        (epoch.loss, epoch.parts) for epoch in at_once.epochs
    ]
    one, other = (
        load_student(tmp_path / name / "checkpoints" / "epoch-0002")[0].state_dict() for name in ("late", "at once")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


class Spy(TrainStep):
    """Keeps the rows of each step, and what the bad one began with."""

    bad_step = 5
    rows: list[np.ndarray[Any, Any]]
    before: tuple[Any, Any]
    seen: Spy

    def __call__(self, step: int, pixels: Any, tokens: Any, targets: Any, pairs: Pairs) -> LateValues:
        if step == 0:
            self.rows, Spy.seen = [], self
        self.rows.append(pairs.image_rows)
        if step + 1 == self.bad_step:
            self.before = copy.deepcopy(self.state())
        return super().__call__(step, pixels, tokens, targets, pairs)

    def state(self) -> tuple[Any, Any]:
        return list(self._student.parameters()), self._optimizer.optimizer.state_dict()["state"]


@pytest.mark.usefixtures("never_ready")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("finite_loss", [True, False])
def test_a_bad_step_that_is_read_late_moves_nothing_and_names_its_own_rows(
    photo_cache: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: bool, finite_loss: bool
) -> None:
    """The next step is launched before, and does not move weights or moments either. No checkpoint has any of it."""
    steps, cosine = [0], losses.cosine

    def loss(batch: losses.LossInputs) -> torch.Tensor:
        steps[0] += 1
        if steps[0] != Spy.bad_step:
            return cosine(batch)
        # the root of 0: an infinite slope
        return (batch.student[0] * 0).abs().sum().sqrt() if finite_loss else cosine(batch) * float("nan")

    monkeypatch.setitem(losses.LOSSES, "cosine", loss)
    monkeypatch.setattr(loop, "TrainStep", Spy)
    monkeypatch.setattr(loop, "adamw", lambda *settings: adamw(*settings[:-1], fused))
    run = tmp_path / "run"
    with pytest.raises(FloatingPointError) as told:
        train(train_config(photo_cache, student, run, losses={"cosine": 8.0}, checkpoint_steps=2))
    assert len(Spy.seen.rows) == Spy.bad_step + 1
    what = "the gradient's norm is nan" if finite_loss else "loss is nan"
    assert str(told.value).startswith(f"step {Spy.bad_step}: {what}")
    assert f"Image rows {Spy.seen.rows[Spy.bad_step - 1].tolist()}, " in str(told.value)
    (weights, moments), (weights_before, moments_before) = Spy.seen.state(), Spy.seen.before
    assert all(torch.equal(now, before) for now, before in zip(weights, weights_before, strict=True))
    for number, tensors in moments_before.items():
        assert all(torch.equal(moments[number][name], value) for name, value in tensors.items())
        assert float(tensors["step"]) == Spy.bad_step - 1
    assert (RunFolder(run).read().steps, len(trace(run))) == (4, 4)


@pytest.mark.usefixtures("never_ready")
def test_a_bad_step_is_not_saved_by_the_checkpoint_behind_it(
    photo_cache: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, cosine = [0], losses.cosine

    def loss(batch: losses.LossInputs) -> torch.Tensor:
        steps[0] += 1
        return cosine(batch) * (float("inf") if steps[0] == 3 else 1.0)

    monkeypatch.setitem(losses.LOSSES, "cosine", loss)
    with pytest.raises(FloatingPointError, match=r"^step 3: loss is inf"):
        train(train_config(photo_cache, student, tmp_path / "run", losses={"cosine": 8.0}, checkpoint_steps=1))
    assert (RunFolder(tmp_path / "run").read().steps, steps[0]) == (2, 3)


@pytest.mark.usefixtures("never_ready")
def test_stopped_before_a_step_was_read_it_reads_and_saves_it(photo_cache: Path, student: Path, tmp_path: Path) -> None:
    def stopped(at: StepProgress) -> None:
        if at.step == 2:  # read when step 3 was launched
            signal.raise_signal(signal.SIGINT)

    config = train_config(photo_cache, student, tmp_path / "run", losses=LOSSES)
    with pytest.raises(KeyboardInterrupt):
        train(config, stopped)
    assert (RunFolder(config.out).read().steps, len(trace(Path(config.out)))) == (3, 3)
    train(config, resume=True)
    train(train_config(photo_cache, student, tmp_path / "whole", losses=LOSSES))
    assert trace(Path(config.out)) == trace(tmp_path / "whole")
