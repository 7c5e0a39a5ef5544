"""A trained student at another image size, as a run of its own."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from click.testing import CliRunner

from teacher_cache.pipeline.cli.app import app
from teacher_cache.pipeline.deploy.record import Artefact, Deployment
from teacher_cache.pipeline.models.derive.average import mean
from teacher_cache.pipeline.models.derive.resize import resize
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import CHECKPOINT_WEIGHTS, checkpoint_image_size
from teacher_cache.pipeline.models.student import Student, load_student
from teacher_cache.pipeline.promote.gate import promote
from teacher_cache.pipeline.settings.promote import PromoteConfig
from teacher_cache.pipeline.settings.student import MeanConfig, ResizeConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.errors import UsageError
from tests.pipeline.models.test_locked_layers import begin
from tests.pipeline.train.train_work import make_student, measure, train_config

run_cli = CliRunner()

OWN, LARGER = 32, 48


@pytest.fixture(scope="module")
def home(photo_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the runs ``a`` and ``b`` of a convolutional student at 32 pixels, and ``vit``."""
    folder = tmp_path_factory.mktemp("resize")
    start = begin(folder)
    for seed, name in enumerate("ab"):
        train(train_config(photo_cache, out=folder / name, epochs=1, seed=seed, **start))
    train(train_config(photo_cache, make_student(folder / "vit.json"), folder / "vit", epochs=1))
    return folder


def at(home: Path, name: str, out: Path, size: int = LARGER) -> Path:
    resize(ResizeConfig(run=str(home / name), image_size=size, out=str(out)))
    return out


def student_of(run: Path) -> Student:
    return load_student(RunFolder(run).checkpoint_path())[0]


def test_the_weights_are_those_and_the_images_are_larger(home: Path, tmp_path: Path) -> None:
    out = at(home, "a", tmp_path / "larger")
    one, other = student_of(home / "a"), student_of(out)
    assert (one.preprocess.size, other.preprocess.size) == ((OWN, OWN), (LARGER, LARGER))
    before, after = one.state_dict(), other.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    pixels = torch.randn(2, 3, LARGER, LARGER, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(one.encode_image(pixels), other.encode_image(pixels))
    model = open_clip.create_model(f"local-dir:{RunFolder(out).checkpoint_path()}", weights_only=True)
    assert model.visual.image_size == (LARGER, LARGER)


def test_it_is_a_run_that_says_what_it_is_of(photo_cache: Path, home: Path, tmp_path: Path) -> None:
    out = at(home, "a", tmp_path / "larger")
    record, before = RunFolder(out).read(), RunFolder(home / "a").read()
    assert record.finished
    assert record.resized is not None
    assert (record.resized.run, record.resized.image_size) == (str(home / "a"), (OWN, OWN))
    assert (record.student_parameters, record.epochs) == (before.student_parameters, before.epochs)
    origin = json.loads((RunFolder(out).checkpoint_path() / "origin.json").read_text())
    assert origin["resized"]["run"] == str(home / "a")
    seen: list[int] = []
    encode = Student.encode_image

    def watched(self: Student, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(pixels.shape[-1])
        return encode(self, pixels)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Student, "encode_image", watched)
        result = measure(out)
    assert set(seen) == {LARGER}
    page = tmp_path / "report.html"
    shown = run_cli.invoke(app, ["report", str(photo_cache), "--run", str(out), "--out", str(page)])
    assert shown.exit_code == 0, shown.output
    assert f"<dd>32 x 32 pixels in <bdi>{home / 'a'}</bdi></dd>" in page.read_text()
    assert result.student is not None


def test_of_a_mean_too(home: Path, tmp_path: Path) -> None:
    mean(MeanConfig(runs=(str(home / "a"), str(home / "b")), out=str(tmp_path / "mean")))
    resize(ResizeConfig(run=str(tmp_path / "mean"), image_size=LARGER, out=str(tmp_path / "larger")))
    record = RunFolder(tmp_path / "larger").read()
    assert len(record.averaged) == 2
    assert checkpoint_image_size(RunFolder(tmp_path / "larger").checkpoint_path()) == (LARGER, LARGER)


def test_what_cannot_be_resized_is_left_as_it_is(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(
        UsageError, match=r"image_size 44: no multiple of this student's patches of 8 pixels\. Choose 40"
    ):
        at(home, "vit", out, 44)
    with pytest.raises(UsageError, match="image_size 32: the student has that size already"):
        at(home, "a", out, OWN)
    record = RunFolder(home / "a").read()
    (tmp_path / "stopped").mkdir()
    RunFolder(tmp_path / "stopped").write(record.model_copy(update={"epochs": ()}))
    with pytest.raises(UsageError, match=r"0 of 1 epochs are trained\. Finish it by"):
        at(tmp_path, "stopped", out)
    assert not out.exists()
    with pytest.raises(UsageError, match="is there already"):
        at(home, "a", home / "b")


@pytest.mark.parametrize("size", [16, LARGER])
def test_a_transformers_positions_are_interpolated_and_nothing_else(home: Path, tmp_path: Path, size: int) -> None:
    out = at(home, "vit", tmp_path / "other", size)
    one, other = student_of(home / "vit"), student_of(out)
    before, after = one.state_dict(), other.state_dict()
    name = "model.visual.positional_embedding"
    assert before.keys() == after.keys()
    assert {key for key in before if not torch.equal(before[key], after[key])} == {name}
    token, grid = before[name][:1], before[name][1:].unflatten(0, (4, 4)).movedim(-1, 0)[None]
    wanted = torch.nn.functional.interpolate(grid, size=(size // 8,) * 2, mode="bicubic", antialias=True)
    assert torch.equal(after[name][:1], token)
    assert torch.allclose(after[name][1:], wanted[0].movedim(0, -1).flatten(0, 1), atol=1e-6)
    record = RunFolder(out).read()
    assert record.resized is not None
    assert record.resized.interpolated == ("visual.positional_embedding",)
    assert record.student_parameters == other.num_parameters != one.num_parameters
    assert measure(out).student is not None
    model = open_clip.create_model(f"local-dir:{RunFolder(out).checkpoint_path()}", weights_only=True)
    assert model.visual.image_size == (size, size)


def test_a_transformer_learns_on_at_its_full_size(photo_cache: Path, home: Path, tmp_path: Path) -> None:
    checkpoint = RunFolder(at(home, "vit", tmp_path / "larger")).checkpoint_path()
    config = train_config(
        photo_cache, checkpoint / "open_clip_config.json", tmp_path / "on", init=str(checkpoint), epochs=1
    )
    before, after = student_of(tmp_path / "larger"), (train(config), student_of(tmp_path / "on"))[1]
    assert after.preprocess.size == (LARGER, LARGER)
    name = "model.visual.positional_embedding"
    assert not torch.equal(before.state_dict()[name], after.state_dict()[name])


def test_the_best_checkpoint_is_still_said_to_be_chosen(photo_cache: Path, home: Path, tmp_path: Path) -> None:
    start = begin(tmp_path)
    train(train_config(photo_cache, out=tmp_path / "run", epochs=3, select_split="test", **start))
    best = RunFolder(tmp_path / "run").read().best
    assert best is not None
    record = resize(
        ResizeConfig(run=str(tmp_path / "run"), image_size=LARGER, out=str(tmp_path / "b"), checkpoint="best")
    )
    assert record.checkpoint == best.checkpoint
    weights = load_student(tmp_path / "run" / best.checkpoint)[0].state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in student_of(tmp_path / "b").state_dict().items())
    found = measure(tmp_path / "b")
    assert (found.chosen_on, found.checkpoint) == ("test", best.checkpoint)
    origin = json.loads((RunFolder(tmp_path / "b").checkpoint_path() / "origin.json").read_text())
    assert (origin["step"], origin["chosen"]["epoch"]) == (4 * (best.epoch + 1), best.epoch)
    with pytest.raises(
        UsageError, match="is a run at another image size and has one checkpoint; take --checkpoint last"
    ):
        resize(ResizeConfig(run=str(tmp_path / "b"), image_size=OWN, out=str(tmp_path / "c"), checkpoint="best"))
    common = {"registry": str(tmp_path / "students"), "device": "cpu", "workers": 0}
    with pytest.raises(UsageError, match="was chosen on split 'test', which flatters it there"):
        promote(PromoteConfig(run=str(tmp_path / "b"), split="test", **common))
    train(train_config(photo_cache, out=tmp_path / "other", epochs=1, seed=1, select_split="test", **start))
    at(tmp_path, "other", tmp_path / "o")
    mean(MeanConfig(runs=(str(tmp_path / "o"), str(tmp_path / "b")), out=str(tmp_path / "mean")))
    made = RunFolder(tmp_path / "mean").read()
    assert (made.chosen_on("last"), made.resized) == ("test", None)
    at(tmp_path, "run", tmp_path / "last")
    assert measure(tmp_path / "last").chosen_on is None


def test_a_registry_takes_it_for_another_student(home: Path, tiny_deployment: Path, tmp_path: Path) -> None:
    """Its weights are the champion's, to the byte; what it sees is not."""
    out = at(home, "a", tmp_path / "larger")
    common = {"registry": str(tmp_path / "students"), "split": "test", "device": "cpu", "workers": 0, "margin": 99.0}
    promote(PromoteConfig(run=str(home / "a"), **common))
    with pytest.raises(UsageError, match="is the champion already, student 1"):
        promote(PromoteConfig(run=str(home / "a"), **common))
    made = tmp_path / "deployed"
    made.mkdir()
    weights = Artefact.of(RunFolder(out).checkpoint_path() / CHECKPOINT_WEIGHTS)
    Deployment.read(tiny_deployment).model_copy(update={"weights": weights}).write(made)
    with pytest.raises(UsageError, match=r"which sees 32 x 32 pixels, and .* sees 48 x 48. Deploy this one first"):
        promote(PromoteConfig(run=str(out), deployed=str(made), **common))
    found = promote(PromoteConfig(run=str(out), **common)).candidate
    assert found.comparison is not None
    assert found.comparison.champion == 1
    assert "very weights" not in found.reason


def test_the_command(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "larger"
    shown = run_cli.invoke(app, ["student", "resize", str(home / "a"), "--image-size", str(LARGER), "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    assert f"{out}: {home / 'a'} at 48 x 48 pixels, before 32 x 32;" in shown.stdout.replace("\n", " ")
    again = run_cli.invoke(app, ["student", "resize", str(home / "a"), "--image-size", str(LARGER), "--out", str(out)])
    assert again.exit_code != 0
