"""``deterministic = true`` sets what torch, cuDNN and cuBLAS need to repeat their bits, for the run alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.train.loop import StepProgress, train
from tests.pipeline.train.train_work import make_student, trace, train_config

Switches = tuple[bool, bool, bool, str | None]


def switches() -> Switches:
    cudnn = torch.backends.cudnn
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark, workspace


@pytest.mark.parametrize("before", [None, ":16:8"])
def test_the_switches_are_on_during_the_run_and_two_runs_are_equal(
    photo_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    if before is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", before)
    student = make_student(tmp_path / "student.json", patch_dropout=0.5)
    seen: set[Switches] = set()

    def progress(at: StepProgress) -> None:
        seen.add(switches())

    for name in ("one", "two"):  # 20 steps
        train(train_config(photo_cache, student, tmp_path / name, epochs=5, deterministic=True), progress)
        assert switches() == (False, False, True, before)
    assert seen == {(True, True, False, before or ":4096:8")}  # the user's own is as good
    assert len(trace(tmp_path / "one")) == 20
    assert trace(tmp_path / "one") == trace(tmp_path / "two")
    assert RunFolder(tmp_path / "one").read().config.deterministic


def test_the_switches_are_put_back_behind_an_error(photo_cache: Path, tmp_path: Path) -> None:
    def progress(at: StepProgress) -> None:
        raise ValueError(f"switches {switches()}")

    before = switches()
    config = train_config(photo_cache, make_student(tmp_path / "s.json"), tmp_path / "run", deterministic=True)
    with pytest.raises(ValueError, match=r"switches \(True, True, False, ':4096:8'\)"):
        train(config, progress)
    assert switches() == before
