"""The best epoch by a split that training never sees, and what a run writes for TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from teacher_cache.pipeline.evaluate.zero_shot.measure import zero_shot
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.settings.evaluate import ZeroShotConfig
from teacher_cache.pipeline.settings.recipes import RECIPES
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.errors import UsageError
from tests.commands import run_command
from tests.pipeline.train.train_work import make_student, measure, trace, train_config


@pytest.fixture(scope="module")
def run(photo_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six epochs, measured behind the second, fourth and sixth."""
    folder = tmp_path_factory.mktemp("selected")
    student = make_student(folder / "student.json")
    settings = {"epochs": 6, "select_split": "test", "select_every": 2, "learning_rate": 5e-3, "ema_decay": 0.5}
    train(train_config(photo_cache, student, folder / "run", **settings))
    return folder / "run"


def test_the_best_epoch_is_kept_and_says_what_it_was_chosen_on(run: Path) -> None:
    record = RunFolder(run).read()
    measured = {epoch.epoch: epoch.selection for epoch in record.epochs if epoch.selection is not None}
    assert list(measured) == [1, 3, 5]
    scores = {epoch: found.mean_recall for epoch, found in measured.items()}
    assert record.best is not None
    assert record.best.epoch == max(scores, key=lambda epoch: scores[epoch])
    assert (record.best.split, record.best.mean_recall) == ("test", max(scores.values()))
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"epoch-0006", f"best-epoch-{record.best.epoch + 1:04d}"}
    chosen = json.loads((run / record.best.checkpoint / "origin.json").read_text())["chosen"]
    assert chosen == {"epoch": record.best.epoch, "split": "test", "mean_recall": record.best.mean_recall}
    assert "chosen" not in json.loads((run / str(record.checkpoint) / "origin.json").read_text())


@pytest.mark.parametrize("which", ["last", "best"])
def test_evaluation_of_a_checkpoint_is_what_training_measured(run: Path, which: str) -> None:
    """By another path: from the saved (averaged) model."""
    record = RunFolder(run).read()
    assert record.best is not None
    result = measure(run, checkpoint=which)
    selection = record.epochs[record.best.epoch if which == "best" else -1].selection
    assert selection is not None
    assert result.student == selection.recalls
    values = [value for recalls in result.student.values() for value in recalls.values()]
    assert selection.mean_recall == pytest.approx(sum(values) / 6)
    assert result.chosen_on == ("test" if which == "best" else None)
    assert result.checkpoint == (record.best.checkpoint if which == "best" else "checkpoints/epoch-0006")


def test_the_table_says_what_a_checkpoint_was_chosen_on(run: Path) -> None:
    done = run_command("evaluate", "--run", run, "--split", "test", "--checkpoint", "best")
    assert done.returncode == 0, done.stderr
    assert ", chosen on test" in " ".join(done.stdout.split())


def test_zero_shot_measures_the_checkpoint_that_is_asked_for(photo_cache: Path, run: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 20), (200 * number, 90, 90)).save(tmp_path / name / "0.png")
    words = ("zero-shot", f"imagefolder:{tmp_path}", "--run", run, "--checkpoint", "best", "--device", "cpu")
    done = run_command(*words)
    assert done.returncode == 0, done.stderr
    assert ", chosen on test" in " ".join(done.stdout.split())
    last, best = (
        zero_shot(ZeroShotConfig(dataset=f"imagefolder:{tmp_path}", run=str(run), checkpoint=which, device="cpu"))
        for which in ("last", "best")
    )
    record = RunFolder(run).read()
    assert record.best is not None
    assert (last.checkpoint, last.chosen_on) == ("checkpoints/epoch-0006", None)
    assert (best.checkpoint, best.chosen_on) == (record.best.checkpoint, "test")


def test_what_cannot_be_selected(photo_cache: Path, run: Path, tmp_path: Path) -> None:
    made = RunFolder(run).read().config
    with pytest.raises(ValueError, match="select_split 'train' is the split to train on; name one it never sees"):
        train_config(photo_cache, made.student, tmp_path / "x", select_split="train")
    with pytest.raises(UsageError, match="no split 'dev'"):
        train(train_config(photo_cache, made.student, tmp_path / "x", select_split="dev"))
    assert not (tmp_path / "x").exists()
    train(train_config(photo_cache, made.student, tmp_path / "plain", epochs=1))
    with pytest.raises(UsageError, match="no best checkpoint; train with --select-split to have one"):
        measure(tmp_path / "plain", checkpoint="best")


def test_tensorboard_has_every_step_and_every_measurement(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    lines, record = trace(run), RunFolder(run).read()

    def series(name: str) -> dict[int, float]:
        return {event.step: event.value for event in events.Scalars(name)}

    steps = list(range(1, 25))
    names = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm", "logit_scale": "logit_scale"}
    names |= {f"loss/{name}": name for name in RECIPES["default"].losses}
    for name, field in names.items():
        assert list(series(name)) == steps
        assert list(series(name).values()) == pytest.approx([line[field] for line in lines], rel=1e-6)
    assert min(series("samples_per_second").values()) > 0
    assert all(0 <= share <= 1 for share in series("data_wait_share").values())
    measured = [epoch.selection for epoch in record.epochs if epoch.selection is not None]
    assert series("select/mean_recall") == pytest.approx(
        dict(zip((8, 16, 24), [found.mean_recall for found in measured], strict=True))
    )
    assert series("select/t2i_R@5")[24] == pytest.approx(measured[-1].recalls["t2i"]["R@5"])


def test_the_saved_model_is_the_average_and_the_raw_weights_go_on(photo_cache: Path, run: Path, tmp_path: Path) -> None:
    """A kept resume point shows both: its averages are the model's weights, its raw weights are others."""
    made = RunFolder(run).read().config
    folders: list[Path] = []

    class Stopped(Exception): ...

    def stop(at: object) -> None:
        if at.step == 3:  # type: ignore[attr-defined]
            raise Stopped

    settings = {"ema_decay": 0.9, "checkpoint_steps": 2}
    with pytest.raises(Stopped):
        train(train_config(photo_cache, made.student, tmp_path / "run", **settings), stop)
    folders = list((tmp_path / "run" / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-00000002"]
    model = load_file(folders[0] / "open_clip_model.safetensors")
    average = load_file(folders[0] / "resume" / "average.safetensors")
    raw = load_file(folders[0] / "resume" / "weights.safetensors")
    for name, value in model.items():
        assert torch.equal(value, average[f"model.{name}"]), name
    assert not torch.equal(raw["model.visual.proj"], average["model.visual.proj"])


def test_writing_a_checkpoint_is_no_wait_for_data(
    photo_cache: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three slow checkpoints in an epoch of four steps: its seconds hold them, its wait for data does not."""
    import teacher_cache.pipeline.train.checkpoints

    save = teacher_cache.pipeline.train.checkpoints.save_resume_point

    def slowly(*args: Any) -> None:
        time.sleep(2.0)
        save(*args)

    monkeypatch.setattr(teacher_cache.pipeline.train.checkpoints, "save_resume_point", slowly)
    made = RunFolder(run).read().config
    settings = {"epochs": 1, "checkpoint_steps": 1}
    record = train(train_config(photo_cache, made.student, tmp_path / "run", **settings)).record
    assert record.epochs[0].seconds > 6
    assert record.epochs[0].data_wait_share < 0.5
