"""The mean of runs that began at the same weights, as a run of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import EvaluateConfig, SoupConfig
from pipeline.evaluate import evaluate
from pipeline.metrics import mean_recall
from pipeline.promote import PromoteConfig, promote
from pipeline.runs import CHECKPOINT_WEIGHTS, RunFolder
from pipeline.soup import mean_student, soup
from pipeline.student import build_student, load_student, save_student
from pipeline.train import train
from pipeline.weights_digest import digest_tensors
from storage.errors import UsageError
from tests.conftest import TINY_MODEL
from tests.pipeline.train_work import make_cache, make_student, train_config

run_cli = CliRunner()


@pytest.fixture(scope="module")
def runs(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs start, a, b and c, the last three begun at the first, and other, begun elsewhere."""
    folder = tmp_path_factory.mktemp("soup")
    cache, student = make_cache(folder, tiny_teacher), make_student(folder / "student.json")
    # a factorised embedding, whose factors are what is averaged, not their product
    student.write_text(json.dumps({**json.loads(student.read_text()), "token_embedding_rank": 4}))
    train(train_config(cache, student, folder / "start", epochs=1))
    begun = {"init": str(RunFolder(folder / "start").checkpoint_path()), "learning_rate": 5e-3}
    for seed, name in enumerate("abc", start=1):
        train(train_config(cache, student, folder / name, seed=seed, **begun))
    train(train_config(cache, student, folder / "other", seed=1))
    return folder


def state_of(run: Path) -> dict[str, torch.Tensor]:
    return load_student(RunFolder(run).checkpoint_path())[0].state_dict()


def mixed(runs: Path, names: str, out: Path) -> Path:
    soup(SoupConfig(runs=tuple(str(runs / name) for name in names), out=str(out)))
    return out


def test_every_weight_is_the_mean_of_the_runs(runs: Path, tmp_path: Path) -> None:
    made = state_of(mixed(runs, "abc", tmp_path / "mean"))
    states = [state_of(runs / name) for name in "abc"]
    for name, value in made.items():
        each = torch.stack([state[name].double() for state in states])
        assert torch.equal(value, each.mean(0).to(value.dtype)), name
        if value.ndim > 1:
            assert not torch.equal(each[0], each[1]), name  # else a mean shows nothing
    factors = [name for name in made if "token_embedding.factors" in name]
    assert factors  # of the embedding, and not of its product alone


def test_the_mean_is_a_run_that_says_what_it_is_of(runs: Path, tmp_path: Path) -> None:
    out = mixed(runs, "ab", tmp_path / "mean")
    record, first = RunFolder(out).read(), RunFolder(runs / "a").read()
    assert [Path(each.run).name for each in record.averaged] == ["a", "b"]
    assert [each.config.seed for each in record.averaged] == [1, 2]
    assert (record.steps, record.finished, record.epochs) == (2 * first.steps, True, ())
    assert record.seconds == first.seconds + RunFolder(runs / "b").read().seconds
    assert record.cache_manifest_digest == first.cache_manifest_digest
    origin = json.loads((out / str(record.checkpoint) / "origin.json").read_text())
    assert [Path(each["run"]).name for each in origin["averaged"]] == ["a", "b"]
    assert origin["teacher"] == record.teacher
    # open_clip loads it, with nothing of ours
    model = open_clip.create_model(f"local-dir:{RunFolder(out).checkpoint_path()}", weights_only=True)
    assert sum(weight.numel() for weight in model.parameters()) > 0


def test_it_is_measured_begun_from_and_never_trained_on(runs: Path, tmp_path: Path) -> None:
    out = mixed(runs, "ab", tmp_path / "mean")
    result = evaluate(EvaluateConfig(run=str(out), split="test", workers=0))
    assert result.checkpoint == "checkpoints/mean"
    assert result.student is not None
    assert list((out / "evaluations").iterdir())
    made = RunFolder(out).read().config
    with pytest.raises(UsageError, match=r"is the mean of 2 runs, and has no steps to go on with.*--init .*mean"):
        train(made, resume=True)
    begun = made.model_copy(update={"init": str(RunFolder(out).checkpoint_path()), "out": str(tmp_path / "on")})
    assert train(begun).record.initial_weights_sha256 == digest_tensors(state_of(out))


def test_a_report_shows_it_and_a_registry_names_its_runs(runs: Path, tmp_path: Path) -> None:
    out = mixed(runs, "ab", tmp_path / "mean")
    found = evaluate(EvaluateConfig(run=str(out), split="test", workers=0))
    page = tmp_path / "report.html"
    shown = run_cli.invoke(
        app, ["report", str(runs / "photos.cache"), "--run", str(out), "--run", str(runs / "a"), "--out", str(page)]
    )
    assert shown.exit_code == 0, shown.output
    assert ">mean<" in page.read_text()
    config = PromoteConfig(run=str(out), registry=str(tmp_path / "students"), split="test", device="cpu")
    candidate = promote(config).candidate
    assert candidate.mean_recall == pytest.approx(mean_recall(found.student or {}))
    assert [Path(run).name for run in candidate.averaged] == ["a", "b"]
    stored = json.loads(run_cli.invoke(app, ["students", str(tmp_path / "students"), "--json"]).stdout)
    assert stored["students"][0]["averaged"] == list(candidate.averaged)


def test_a_batch_norm_has_the_mean_of_the_statistics_and_a_count_of_its_own(tmp_path: Path) -> None:
    """In a small convolutional trunk, whose statistics are told apart by hand."""
    config = {
        **TINY_MODEL,
        "vision_cfg": {"timm_model_name": "resnet10t", "timm_model_pretrained": False, "image_size": 32},
    }
    seen = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    folders = []
    for value in (1.0, 4.0):
        student = build_student(config, seen, TINY_MODEL["embed_dim"])
        for module in student.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_var is not None
                assert module.num_batches_tracked is not None
                module.running_var.fill_(value)
                module.num_batches_tracked.fill_(int(value))
        folder = tmp_path / str(value)
        folder.mkdir()
        save_student(student, config, folder, {})
        folders.append(folder)
    norms = [module for module in mean_student(folders).modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert norm.running_var is not None
        assert torch.all(norm.running_var == 2.5)
        assert norm.num_batches_tracked == 1


def test_the_mean_of_what_began_apart_is_refused(runs: Path, tmp_path: Path) -> None:
    for name in ("other", "start"):
        apart = SoupConfig(runs=(str(runs / "a"), str(runs / name)), out=str(tmp_path / "mean"))
        with pytest.raises(UsageError, match=r"one began at weights .*, the other at weights .*--init"):
            soup(apart)
    assert not (tmp_path / "mean").exists()
    shas = {name: RunFolder(runs / name).read().initial_weights_sha256 for name in ("a", "b", "c", "other")}
    assert len({shas["a"], shas["b"], shas["c"]}) == 1
    assert shas["other"] not in (None, shas["a"])


def test_runs_of_an_older_version_are_told_apart_by_their_init(runs: Path, tmp_path: Path) -> None:
    def older(name: str, **config: Any) -> Path:
        shutil.copytree(runs / name, tmp_path / name)
        record = json.loads((tmp_path / name / "run.json").read_text())
        del record["initial_weights_sha256"], record["averaged"]
        record["config"].update(config)
        (tmp_path / name / "run.json").write_text(json.dumps(record))
        return tmp_path / name

    a, b = older("a"), older("b")
    assert len(soup(SoupConfig(runs=(str(a), str(b)), out=str(tmp_path / "mean"))).averaged) == 2
    c = older("c", init="elsewhere")
    with pytest.raises(UsageError, match=r"one began at --init elsewhere, the other at --init .*epoch-0001"):
        soup(SoupConfig(runs=(str(a), str(c)), out=str(tmp_path / "no")))
    other = older("other")
    with pytest.raises(UsageError, match="does not say at which weights it began"):
        soup(SoupConfig(runs=(str(other), str(a)), out=str(tmp_path / "no")))


def test_what_has_no_mean(runs: Path, tmp_path: Path) -> None:
    def refused(match: str, *names: Path | str, out: str = "no") -> None:
        with pytest.raises(UsageError, match=match):
            soup(SoupConfig(runs=tuple(str(runs / name) for name in names), out=str(tmp_path / out)))

    refused("two runs or more are wanted", "a")
    refused(r"/a: is named twice", "a", "b", "a/../a")
    refused("no run here", "a", tmp_path / "nothing")
    mean = mixed(runs, "ab", tmp_path / "mean")
    refused(r"is a mean itself; name the runs that it is the mean of: .*/a .*/b", mean, "c")
    refused("is there already", "a", "c", out="mean")

    def changed(name: str, field: str, value: Any) -> Path:
        shutil.copytree(runs / "b", tmp_path / name)
        record = json.loads((tmp_path / name / "run.json").read_text())
        record[field] = value
        (tmp_path / name / "run.json").write_text(json.dumps(record))
        return tmp_path / name

    refused(r"0 of 2 epochs are trained\. Finish it by teacher-cache train --resume", "a", changed("1", "epochs", []))
    refused("one learned from .* with manifest 000000000000", "a", changed("2", "cache_manifest_digest", "0" * 64))
    refused("students of other architectures have no mean", "a", changed("3", "student_config", {"embed_dim": 3}))
    assert {path.name for path in tmp_path.iterdir()} == {"mean", "1", "2", "3"}


def test_the_command(runs: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pipeline.cli",
        "soup",
        str(runs / "a"),
        str(runs / "b"),
        "--out",
        str(tmp_path / "m"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the mean of 2 runs" in done.stdout
    assert (tmp_path / "m" / "checkpoints" / "mean" / CHECKPOINT_WEIGHTS).exists()
    again = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (2, "")
    assert "is there already" in again.stderr
    made = subprocess.run([*command[:-1], str(tmp_path / "n"), "--json"], capture_output=True, text=True)
    assert [Path(each["run"]).name for each in json.loads(made.stdout)["averaged"]] == ["a", "b"]


def test_a_damaged_checkpoint_is_named(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "b", tmp_path / "b")
    path = RunFolder(tmp_path / "b").checkpoint_path() / CHECKPOINT_WEIGHTS
    save_file({name: value for name, value in load_file(path).items() if "visual" not in name}, path)
    with pytest.raises(UsageError, match=str(tmp_path / "b")):
        soup(SoupConfig(runs=(str(runs / "a"), str(tmp_path / "b")), out=str(tmp_path / "mean")))
    assert not (tmp_path / "mean").exists()
