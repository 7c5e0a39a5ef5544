"""What a retraining ships, what stands in the way of it, and what begins with the champion's weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.flows.markdown import retraining_text
from teacher_cache.pipeline.cli.champions import retrain_lines
from teacher_cache.pipeline.deploy.record import DeploymentError
from teacher_cache.pipeline.promote.retrain import retrain
from tests.conftest import make_model_folder
from tests.pipeline.promote.retrain_work import add_photos, make_home, settings

SHIP: dict[str, Any] = {"ship": True, "deploy": {"int8": False, "rounds": 1}}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path)


def test_a_student_that_fails_its_gate_is_kept_as_rejected(
    home: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise DeploymentError("image.int8.onnx: 2 points lost, 1 at most are wanted")

    monkeypatch.setattr("teacher_cache.pipeline.deploy.run.deploy", refuse)
    done = retrain(settings(home, tiny_teacher, ship=True))
    assert (done.outcome, done.champion) == ("rejected", None)
    assert done.candidate is not None
    assert done.candidate.reason == "could not be shipped: image.int8.onnx: 2 points lost, 1 at most are wanted"
    again = retrain(settings(home, tiny_teacher, ship=True))
    assert again.outcome == "nothing-new"
    (notice,) = again.look.notices
    assert notice.startswith("student 1 was rejected, since it could not be shipped: image.int8.onnx: 2")
    assert notice.endswith(f"promote --run {home}/home/runs/0001 --deployed FOLDER")


def test_what_was_deployed_before_a_kill_is_promoted_and_not_made_again(home: Path, tiny_teacher: Path) -> None:
    retrain(settings(home, tiny_teacher, **SHIP))
    shutil.rmtree(home / "home" / "students")  # as a kill leaves it between the two
    done = retrain(settings(home, tiny_teacher, **SHIP))
    assert done.candidate is not None
    assert done.candidate.deployed == f"{home}/home/deployed/0001"
    assert (home / "home" / "deployed" / "0001" / "deploy.json").exists()
    assert [path.name for path in (home / "home" / "deployed").iterdir()] == ["0001"]


def test_what_was_deployed_of_another_student_is_not_promoted(home: Path, tiny_teacher: Path) -> None:
    retrain(settings(home, tiny_teacher, **SHIP))
    for name in ("caches", "runs", "students"):
        shutil.rmtree(home / "home" / name)
    add_photos(home, 900, 1)
    done = retrain(settings(home, tiny_teacher, **SHIP))
    assert done.candidate is not None
    assert done.candidate.deployed == f"{home}/home/deployed/0001-2"


def test_what_was_promoted_without_being_shipped_is_said_once_it_is_to_be(home: Path, tiny_teacher: Path) -> None:
    """After a trial with ``--no-ship``: the verdict stands, and how to ship it is told, by the flow too."""
    promoted = retrain(settings(home, tiny_teacher))
    assert promoted.look.notices == retrain(settings(home, tiny_teacher)).look.notices == ()
    done = retrain(settings(home, tiny_teacher, **SHIP))
    assert (done.outcome, done.look.judged) == ("nothing-new", promoted.candidate)
    deploy = f"teacher-cache deploy --run {home}/home/runs/0001 --out FOLDER"
    wanted = f"student 1 was promoted without being shipped. Ship it by {deploy}"
    assert wanted in retrain_lines(done)
    assert wanted in retraining_text(done.outcome, done.look, done.encoded, done.candidate)


def test_a_champion_of_other_pixels_is_not_begun_with(home: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    """A teacher of another mean and std: the same architecture, whose weights would see other pixels."""
    first = retrain(settings(home, tiny_teacher))
    other = make_model_folder(tmp_path / "other")
    config = other / "open_clip_config.json"
    config.write_text(config.read_text().replace("[0.48, 0.46, 0.41]", "[0.5, 0.5, 0.5]"))
    second = retrain(settings(home, other))
    assert (first.outcome, second.outcome) == ("promoted", "promoted")
    assert second.candidate is not None
    assert second.candidate.settings["init"] is None
