"""The mean of runs that began at the same weights, as a run of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

from teacher_cache.pipeline.cli.app import app
from teacher_cache.pipeline.evaluate.recall import mean_recall
from teacher_cache.pipeline.models.derive.average import mean, mean_student
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import CHECKPOINT_WEIGHTS
from teacher_cache.pipeline.models.student import build_student, load_student, save_student
from teacher_cache.pipeline.models.weights import digest_tensors
from teacher_cache.pipeline.promote.gate import promote
from teacher_cache.pipeline.settings.promote import PromoteConfig
from teacher_cache.pipeline.settings.student import MeanConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.errors import UsageError
from tests.commands import run_command
from tests.conftest import TINY_MODEL
from tests.pipeline.train.train_work import make_student, measure, train_config

run_cli = CliRunner()


@pytest.fixture(scope="module")
def runs(photo_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs start, a, b and c, the last three begun at the first, and other, begun at a."""
    folder = tmp_path_factory.mktemp("mean")
    cache, student = photo_cache, make_student(folder / "student.json")
    # a factorised embedding, whose factors are what is averaged, not their product
    student.write_text(json.dumps({**json.loads(student.read_text()), "token_embedding_rank": 4}))
    train(train_config(cache, student, folder / "start", epochs=1))
    begun = {"init": str(RunFolder(folder / "start").checkpoint_path()), "learning_rate": 5e-3}
    for seed, name in enumerate("abc", start=1):
        train(train_config(cache, student, folder / name, seed=seed, **begun))
    elsewhere = {**begun, "init": str(RunFolder(folder / "a").checkpoint_path())}
    train(train_config(cache, student, folder / "other", seed=4, **elsewhere))
    return folder


def state_of(run: Path) -> dict[str, torch.Tensor]:
    return load_student(RunFolder(run).checkpoint_path())[0].state_dict()


def mixed(runs: Path, names: str, out: Path) -> Path:
    mean(MeanConfig(runs=tuple(str(runs / name) for name in names), out=str(out)))
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
    result = measure(out)
    assert result.checkpoint == "checkpoints/mean"
    assert result.student is not None
    assert list((out / "evaluations").iterdir())
    made = RunFolder(out).read().config
    with pytest.raises(UsageError, match=r"is the mean of 2 runs, and has no steps to go on with.*--init .*mean"):
        train(made, resume=True)
    begun = made.model_copy(update={"init": str(RunFolder(out).checkpoint_path()), "out": str(tmp_path / "on")})
    assert train(begun).record.initial_weights_sha256 == digest_tensors(state_of(out))


def test_a_report_shows_it_and_a_registry_names_its_runs(photo_cache: Path, runs: Path, tmp_path: Path) -> None:
    out = mixed(runs, "ab", tmp_path / "mean")
    found = measure(out)
    page = tmp_path / "report.html"
    shown = run_cli.invoke(
        app, ["report", str(photo_cache), "--run", str(out), "--run", str(runs / "a"), "--out", str(page)]
    )
    assert shown.exit_code == 0, shown.output
    html = page.read_text()
    assert ">mean<" in html
    assert f"<dd>2 runs: <bdi>{runs / 'a'}</bdi>, <bdi>{runs / 'b'}</bdi></dd>" in html
    assert "of all runs together: 16 steps" in html
    assert "0 of 2" not in html
    config = PromoteConfig(run=str(out), registry=str(tmp_path / "students"), split="test", device="cpu")
    candidate = promote(config).candidate
    assert candidate.mean_recall == pytest.approx(mean_recall(found.student or {}))
    assert [Path(run).name for run in candidate.averaged] == ["a", "b"]
    stored = json.loads(run_cli.invoke(app, ["students", "list", str(tmp_path / "students"), "--json"]).stdout)
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


def refused(match: str, out: Path, *runs: Path) -> None:
    with pytest.raises(UsageError, match=match):
        mean(MeanConfig(runs=tuple(map(str, runs)), out=str(out)))


def edited(run: Path, to: Path, **fields: Any) -> Path:
    """A copy of a run with other fields in its record, or, given as None, without them; those of config are merged."""
    shutil.copytree(run, to)
    record = json.loads((to / "run.json").read_text())
    for name, value in fields.items():
        if value is None:
            del record[name]
        else:
            record[name] = {**record[name], **value} if name == "config" else value
    (to / "run.json").write_text(json.dumps(record))
    return to


def test_the_mean_of_what_began_apart_is_refused(runs: Path, tmp_path: Path) -> None:
    no = tmp_path / "no"
    refused(
        r"one began at --init .*a/.*, the other at --init .*start/.*, with weights .* and .*",
        no,
        runs / "a",
        runs / "other",
    )
    # random weights are the same for the same seed, and still no start for a mean
    refused(r"/start: began at random weights.*--init .*start/checkpoints/epoch-0001", no, runs / "a", runs / "start")
    starts = {name: RunFolder(runs / name).read().initial_weights_sha256 for name in ("a", "b", "c", "other")}
    assert starts["a"] == starts["b"] == starts["c"] == digest_tensors(state_of(runs / "start"))
    assert starts["other"] == digest_tensors(state_of(runs / "a"))
    changed = edited(runs / "b", tmp_path / "changed", initial_weights_sha256="0" * 64)
    refused(
        "what lies there was changed meanwhile, or has no projections to this teacher's width", no, runs / "a", changed
    )
    assert not no.exists()


def test_runs_of_an_older_version_are_told_apart_by_their_init(runs: Path, tmp_path: Path) -> None:
    a, b = (edited(runs / name, tmp_path / name, initial_weights_sha256=None, averaged=None) for name in "ab")
    for others in ((a, b), (runs / "a", b)):
        out = tmp_path / f"mean of {others[0].parent.name}"
        assert len(mean(MeanConfig(runs=tuple(map(str, others)), out=str(out))).averaged) == 2
    c = edited(runs / "c", tmp_path / "c", initial_weights_sha256=None, config={"init": "elsewhere"})
    for other in (a, runs / "a"):
        refused("older versions did not record the weights, and the names are not the same", tmp_path / "no", other, c)


def test_what_has_no_mean(runs: Path, tmp_path: Path) -> None:
    no, a, b, c = tmp_path / "no", runs / "a", runs / "b", runs / "c"
    alone = run_command("student", "mean", a)
    only = f"runs: a mean is of two runs or more, found only {a}; name others that began at the same --init"
    assert alone.stderr == f"error: mean: {only}; out is missing: give --out\n"
    refused(r"/a: the very weights of .*/a, which would count double", no, a, b, runs / "b" / ".." / "a")
    shutil.copytree(b, tmp_path / "copy")
    refused(r"/copy: the very weights of .*/b, which would count double", no, a, b, tmp_path / "copy")
    refused("no run here", no, a, tmp_path / "nothing")
    mean = mixed(runs, "ab", tmp_path / "mean")
    refused(r"is a mean itself; name the runs that it is the mean of: .*/a .*/b", no, mean, c)
    refused("is there already", mean, a, c)
    unfinished = edited(b, tmp_path / "unfinished", epochs=[])
    refused(r"0 of 2 epochs are trained\. Finish it by teacher-cache train --resume", no, a, unfinished)
    elsewhere = edited(b, tmp_path / "elsewhere", cache_manifest_digest="0" * 64)
    refused("one learned from .* with manifest 000000000000", no, a, elsewhere)
    assert not no.exists()
    assert not list(tmp_path.glob(".partial-*"))


def test_another_student_or_a_damaged_checkpoint_is_named(runs: Path, tmp_path: Path) -> None:
    def changed(name: str) -> tuple[Path, Path]:
        shutil.copytree(runs / "b", tmp_path / name)
        return tmp_path / name, RunFolder(tmp_path / name).checkpoint_path()

    no = tmp_path / "no"
    torn, checkpoint = changed("torn")
    weights = load_file(checkpoint / CHECKPOINT_WEIGHTS)
    save_file({name: value for name, value in weights.items() if "visual" not in name}, checkpoint / CHECKPOINT_WEIGHTS)
    refused(rf"student {checkpoint} cannot be loaded: .*visual", no, runs / "a", torn)
    gone, checkpoint = changed("gone")
    (checkpoint / CHECKPOINT_WEIGHTS).unlink()
    refused(f"{checkpoint}: no student checkpoint here", no, runs / "a", gone)
    other, checkpoint = changed("other")
    wider = make_student(tmp_path / "wider.json", embed_dim=14)
    student = build_student(json.loads(wider.read_text()), load_student(checkpoint)[0].preprocess.to_config(), 16)
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    save_student(student, student.config, checkpoint, {})
    refused(rf"{checkpoint}: another student than that of .*embed_dim is 14 there and 12 in", no, runs / "a", other)
    assert not no.exists()


def test_the_command(runs: Path, tmp_path: Path) -> None:
    words = ("student", "mean", runs / "a", runs / "b", "--json", "--out")
    done = run_command(*words[:-2], "--out", tmp_path / "m")
    assert done.returncode == 0, done.stderr
    assert "the mean of 2 runs" in done.stdout
    assert (tmp_path / "m" / "checkpoints" / "mean" / CHECKPOINT_WEIGHTS).exists()
    again = run_command(*words, tmp_path / "m")
    assert (again.returncode, again.stdout) == (2, "")
    assert "is there already" in again.stderr
    made = run_command(*words, tmp_path / "n")
    assert [Path(each["run"]).name for each in json.loads(made.stdout)["averaged"]] == ["a", "b"]


@pytest.mark.parametrize("way", ["checkpoints", "checkpoint", "record"])
def test_a_run_of_somebody_else_removes_nothing_outside(runs: Path, tmp_path: Path, way: str) -> None:
    """Training removes old checkpoints: by a link, or a name in the record, they would be anybody's folders."""
    run, home = tmp_path / "run", tmp_path / "home"
    shutil.copytree(runs / "a", run)
    (home / "resume").mkdir(parents=True)
    record = RunFolder(run).read()
    assert record.checkpoint is not None
    if way == "record":
        text = (run / "run.json").read_text()
        (run / "run.json").write_text(text.replace(f'"{record.checkpoint}"', '"../home"'))
    else:
        folder = run / ("checkpoints" if way == "checkpoints" else record.checkpoint)
        shutil.rmtree(folder)
        folder.symlink_to(home)
    with pytest.raises(UsageError, match="is a link, and a training removes" if way != "record" else "checkpoint"):
        train(record.config.model_copy(update={"out": str(run)}), resume=True)
    assert (home / "resume").is_dir()


def test_a_run_that_begins_again_writes_behind_no_link(runs: Path, tmp_path: Path) -> None:
    run, home = tmp_path / "run", tmp_path / "home"
    (home / "mine").mkdir(parents=True)
    run.mkdir()
    record = RunFolder(runs / "a").read().model_copy(update={"checkpoint": None, "best": None})
    RunFolder(run).write(record)
    (run / "checkpoints").symlink_to(home)
    RunFolder(run).start(record)
    assert not (run / "checkpoints").exists()
    assert (home / "mine").is_dir()
