"""A student learns from the cache alone, whatever its width, and its checkpoint is an open_clip model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from teacher_cache.pipeline.data.batches.pairs import PairOrder
from teacher_cache.pipeline.evaluate.recall import retrieval_recall
from teacher_cache.pipeline.evaluate.retrieval import evaluate
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.student import load_student
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train import losses
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.errors import CacheMismatchError, UsageError
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.commands import run_command
from tests.conftest import TINY_MODEL, make_model_folder
from tests.pipeline.train.train_work import make_cache, make_student, measure, trace
from tests.pipeline.train.train_work import train_config as config


@pytest.fixture
def student_file(tmp_path: Path) -> Path:
    return make_student(tmp_path / "narrow.json")


@pytest.fixture
def cache(tiny_teacher: Path, tmp_path: Path) -> Path:
    """40 photographs by the tiny teacher: 32 to train on, 8 to test on."""
    return make_cache(tmp_path, tiny_teacher)


@pytest.mark.parametrize("embed_dim", [12, 16])
def test_losses_fall_whether_or_not_the_widths_agree(cache: Path, tmp_path: Path, embed_dim: int) -> None:
    student = make_student(tmp_path / "student.json", embed_dim)
    settings = config(cache, student, tmp_path / "run", epochs=12, losses={"feature": 100.0, "relational": 1.0})
    record = train(settings).record
    assert record.steps == 12 * 4
    first, last = record.epochs[0], record.epochs[-1]
    assert last.parts["feature"] < 0.7 * first.parts["feature"]
    assert last.parts["relational"] < first.parts["relational"]
    lines = trace(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 49))
    assert lines[-1]["learning_rate"] < 1e-5


def test_training_repeats_itself(cache: Path, student_file: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(config(cache, student_file, tmp_path / name, seed=seed))
    assert trace(tmp_path / "a") == trace(tmp_path / "b") != trace(tmp_path / "c")


def test_no_teacher_is_imported_built_or_needed(student_file: Path, tmp_path: Path) -> None:
    """A script of its own, in which every import and every model built is watched; the teacher's files are gone.

    It has no ``if __name__ == "__main__"``: workers do not run it again.
    """
    teacher = make_model_folder(tmp_path / "teacher")
    cache = make_cache(tmp_path, teacher, 20)
    shutil.rmtree(teacher)
    code = """
import sys
import open_clip
import open_clip.model
built = []
for kind in (open_clip.model.CLIP, open_clip.model.CustomTextCLIP, open_clip.CoCa):
    def watched(self, embed_dim, *args, init=kind.__init__, **kwargs):
        built.append(embed_dim)
        init(self, embed_dim, *args, **kwargs)
    kind.__init__ = watched
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.loop import train
train(TrainConfig.model_validate_json(sys.argv[1]))
assert "teacher_cache.pipeline.models.teacher" not in sys.modules, "the teacher's module was imported"
assert "teacher_cache.pipeline.precompute.run" not in sys.modules
assert built == [12], f"models of these widths were built: {built}"
"""
    settings = config(cache, student_file, tmp_path / "run", workers=1)
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, str(script), settings.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


def test_checkpoint_is_an_open_clip_model(cache: Path, student_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    record = train(config(cache, student_file, run)).record
    folder = RunFolder(run).checkpoint_path()
    assert folder.name == "epoch-0002"
    assert [path.name for path in folder.parent.iterdir()] == ["epoch-0002"]
    origin = json.loads((folder / "origin.json").read_text())
    digest = EmbeddingReader(str(cache)).manifest.digest
    assert origin["cache_manifest_digest"] == record.cache_manifest_digest == digest
    assert (record.teacher, record.train_images) == ("local-dir:tiny", 32)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    student, _ = load_student(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == record.student_parameters
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.eval().encode_image(pixels, normalize=True), student.encode_image(pixels))
        projected = student(pixels, open_clip.tokenize(["a", "b"], context_length=16)).projected_image
    assert projected.shape == (2, 16)
    # the student sees its teacher's colours at its own size
    photo = Image.fromarray((np.arange(41 * 57 * 3) % 251).astype(np.uint8).reshape(41, 57, 3))
    assert torch.equal(transform(photo), student.preprocess.transform(photo))
    assert student.preprocess.mean == pytest.approx((0.48, 0.46, 0.41))
    assert not any(path.suffix in {".pt", ".pth", ".bin", ".pkl"} for path in run.rglob("*"))


def test_every_pair_is_an_image_and_one_of_its_captions(cache: Path) -> None:
    reader = EmbeddingReader(str(cache))
    rows = reader.image_rows("train")
    image_of = reader.captions["image_row"].to_numpy()
    picks = set()
    for epoch in range(6):
        pairs = list(PairOrder(reader, rows, 8, 2, seed=0).epoch(epoch))
        seen = np.concatenate([pair.image_rows for pair in pairs])
        captions = np.concatenate([pair.caption_rows for pair in pairs])[:, 0]
        assert sorted(seen) == list(rows)
        np.testing.assert_array_equal(image_of[captions], seen)
        picks |= set(captions.tolist())
        # any step can be the first one again
        again = list(PairOrder(reader, rows, 8, 2, seed=0).epoch(epoch, 3))
        np.testing.assert_array_equal(again[0].image_rows, pairs[3].image_rows)
        np.testing.assert_array_equal(again[0].caption_rows, pairs[3].caption_rows)
    assert len(picks) > 55  # of 64 captions; each epoch draws anew


def test_several_captions_of_an_image_are_different_ones_while_they_last(cache: Path) -> None:
    reader = EmbeddingReader(str(cache))
    rows = reader.image_rows("train")
    image_of = reader.captions["image_row"].to_numpy()

    def captions(each: int) -> NDArray[np.int64]:
        pairs = PairOrder(reader, rows, 8, 2, seed=0, captions_per_image=each).epoch(1)
        found = [(image_of[pair.caption_rows] - pair.image_rows[:, None], pair.caption_rows) for pair in pairs]
        assert not any(strangers.any() for strangers, _ in found)
        return np.concatenate([drawn for _, drawn in found])

    one, two, three = captions(1), captions(2), captions(3)
    assert (one.shape, two.shape, three.shape) == ((32, 1), (32, 2), (32, 3))
    assert set(np.diff(two).ravel().tolist()) == {1, -1}  # each image has two, and either may come first
    np.testing.assert_array_equal(one, two[:, :1])
    np.testing.assert_array_equal(three, two[:, [0, 1, 0]])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda batch: batch.student[0].sum() * float("nan"), "loss is nan .*"),
        # the root of 0: a finite loss with an infinite slope
        (lambda batch: (batch.student[0] * 0).abs().sum().sqrt(), "the gradient's norm is nan"),
    ],
)
def test_what_is_not_a_number_names_the_rows(
    cache: Path,
    student_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    loss: Any,
    message: str,
) -> None:
    monkeypatch.setitem(losses.LOSSES, "feature", loss)
    with pytest.raises(FloatingPointError, match=rf"step 1: {message}\. Image rows \[\d+, .*\], caption rows \["):
        train(config(cache, student_file, tmp_path / "run", losses={"feature": 1.0}))
    (fields,) = [vars(record)["fields"] for record in caplog.records if vars(record).get("event") == "not finite"]
    assert len(fields["image_rows"]) == len(fields["caption_rows"]) == 8
    assert "rows" not in fields  # in other events first, and one past the last


def test_what_cannot_be_trained(cache: Path, student_file: Path, tmp_path: Path) -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(UsageError, match=message):
            train(config(cache, changes.pop("student", student_file), tmp_path / "run", **changes))
        assert not (tmp_path / "run").exists()

    refused(r"no split 'val'; this cache has 'train' \(32 images\), 'test' \(8 images\)", split="val")
    refused(r"student 'no-such' is not known\. Presets are .*vit-s-32", student="no-such")
    (tmp_path / "half.json").write_text('{"embed_dim": 4}')
    refused("it lacks vision_cfg, text_cfg", student=tmp_path / "half.json")
    (tmp_path / "typo.json").write_text(json.dumps({**TINY_MODEL, "vision_cfg": {"widht": 3}}))
    refused("this student cannot be loaded: .*widht", student=tmp_path / "typo.json")
    train(config(cache, student_file, tmp_path / "run"))
    with pytest.raises(UsageError, match="holds a run already"):
        train(config(cache, student_file, tmp_path / "run"))


@pytest.mark.parametrize(
    ("splits", "settings", "split", "batch_size"),
    [
        ({"train": 300, "test": 60}, {}, "train", 256),
        ({"train": 60, "test": 10}, {}, "train", 60),
        ({"train": 61, "test": 10}, {"devices": 2}, "train", 60),
        ({"": 60}, {}, "", 60),
        ({"": 60}, {"split": None}, "", 60),  # as a flow gives it
        ({"val": 60}, {"batch_size": 20}, "val", 20),
    ],
)
def test_the_settings_are_fitted_to_the_cache(
    splits: dict[str, int], settings: dict[str, Any], split: str, batch_size: int
) -> None:
    fitted = TrainConfig(cache="c", student="s", out="o", **settings).fitted(splits, splits.__getitem__)
    assert (fitted.split, fitted.batch_size) == (split, batch_size)
    assert fitted.fitted(splits, splits.__getitem__) == fitted


@pytest.mark.parametrize(
    ("splits", "settings", "message"),
    [
        ({"": 1}, {}, "^c has 1 image; training needs 2"),
        ({"train": 1}, {}, "c: split 'train' has 1 image; training needs 2"),
        ({"train": 3}, {"devices": 4}, "c: split 'train' has 3 images; training needs 4"),
        ({"val": 60}, {"select_split": "val"}, "select_split 'val' is the split to train on"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(splits: dict[str, int], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig(cache="c", student="s", out="o", **settings).fitted(splits, splits.__getitem__)


def test_a_plain_table_is_trained_on_and_measured_without_a_split(
    make_photos: Callable[..., Path], tiny_teacher: Path, student_file: Path, tmp_path: Path
) -> None:
    """The first dataset of a newcomer: paths and captions. No flag names a split, or a batch."""
    lines = [f"images/{number:04d}.jpg,picture {number}" for number in range(12)]
    table = make_photos(12) / "pairs.csv"
    table.write_text("\n".join(["path,caption", *lines]) + "\n")
    teacher, cache = f"local-dir:{tiny_teacher}", str(tmp_path / "plain.cache")
    precompute(PrecomputeConfig(dataset=f"table:{table}", teacher=teacher, cache=cache, device="cpu"))
    flags = ("--cache", cache, "--student", student_file, "--out", tmp_path / "run", "--epochs", 2, "--device", "cpu")
    done = run_command("train", *flags, "--set", "workers=0")
    assert done.returncode == 0, done.stderr
    whole = "there is no split 'train'; the student learns from all its images. To measure on others, precompute with"
    assert f"warning: {cache}: {whole} ?holdout=10%" in done.stderr
    assert f"warning: {cache}: fewer images than a batch of 256: batches of 12\n" in done.stderr
    record = RunFolder(tmp_path / "run").read()
    assert (record.config.split, record.config.batch_size, record.steps) == ("", 12, 2)
    again = TrainConfig(cache=cache, student=str(student_file), out=str(tmp_path / "run"), epochs=2, device="cpu")
    assert train(again, resume=True).record == record
    assert done.stderr.endswith(f"next: teacher-cache evaluate --run {tmp_path}/run\n")
    shown = " ".join(run_command("evaluate", "--run", tmp_path / "run").stdout.split())  # the title wraps
    assert "plain.cache: 12 images, 12 captions; checkpoint epoch-0002; the student learned from 12 of them" in shown
    assert measure(tmp_path / "run", split=None).learned_images == 12
    with pytest.raises(UsageError) as refused:
        measure(tmp_path / "run")
    advice = "add ?holdout=10% behind the dataset to set a part aside"
    assert str(refused.value) == f"{cache}: no split 'test'; this cache has '' (12 images): {advice}"


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_moved_are_named(cache: Path, student_file: Path, tmp_path: Path, workers: int) -> None:
    """By one line, whoever decodes; and the run folder is free for the corrected command."""
    (tmp_path / "photos").rename(tmp_path / "moved")
    settings = config(cache, student_file, tmp_path / "run", workers=workers)
    wanted = r"^row \d+ \(\d{4}.jpg\): .*photos/images/.* this one gone\? .* Name their folder with --image-root.$"
    with pytest.raises(OSError, match=wanted):
        train(settings)
    train(settings.model_copy(update={"image_root": str(tmp_path / "moved")}))


@pytest.mark.parametrize("workers", [0, 1])
def test_another_image_under_the_same_name_is_refused(
    cache: Path, student_file: Path, tmp_path: Path, workers: int
) -> None:
    images = tmp_path / "photos" / "images"
    shutil.copy(images / "0001.jpg", images / "0002.jpg")
    with pytest.raises(CacheMismatchError, match=r"row 2 \(0002.jpg\): .*not the image that the cache was made of"):
        train(config(cache, student_file, tmp_path / "run", workers=workers))


def test_bf16_trains_and_workers_change_nothing(cache: Path, student_file: Path, tmp_path: Path) -> None:
    for name, workers in (("a", 0), ("b", 2)):
        train(config(cache, student_file, tmp_path / name, workers=workers, precision="bf16"))
    assert trace(tmp_path / "a") == trace(tmp_path / "b")
    exact = train(config(cache, student_file, tmp_path / "exact")).record
    assert trace(tmp_path / "a")[-1]["loss"] == pytest.approx(exact.epochs[-1].loss, rel=0.2)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_equals_a_naive_one(
    cache: Path, student_file: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    # the folder of the run is enough, wherever it is asked from
    monkeypatch.chdir(tmp_path)
    train(config(Path(cache.name), student_file, run, workers=workers))
    monkeypatch.chdir("/")
    result = evaluate(EvaluateConfig(run=str(run), split="test", workers=workers))
    student, model_config = load_student(RunFolder(run).checkpoint_path())
    tokenizer = open_clip.get_tokenizer(f"local-dir:{RunFolder(run).checkpoint_path()}", context_length=16)
    reader = EmbeddingReader(str(cache))
    paths = [tmp_path / "photos" / uri for uri in reader.samples["uri"].to_pylist()[32:]]
    with torch.no_grad():
        transform = student.preprocess.transform
        image = student.encode_image(torch.stack([transform(Image.open(path)) for path in paths])).numpy()
        text = student.encode_text(tokenizer(reader.captions["text"].to_pylist()[64:])).numpy()
    assert result.student == retrieval_recall(image, text, np.repeat(np.arange(8), 2))
    assert (result.images, result.captions, result.quarantined) == (8, 16, 0)
    assert model_config["embed_dim"] == 12
    assert result.retention is not None
    assert result.retention["i2t"]["R@10"] == pytest.approx(
        100 * result.student["i2t"]["R@10"] / result.teacher["i2t"]["R@10"]
    )


def test_the_teachers_recall_needs_no_torch(cache: Path) -> None:
    code = (
        "import sys; from teacher_cache.pipeline.settings.evaluate import EvaluateConfig; from teacher_cache.pipeline.evaluate.retrieval import evaluate; "  # noqa: E501
        "r = evaluate(EvaluateConfig(cache=sys.argv[1])); assert r.student is None and r.retention is None; "
        "bad = {'torch', 'open_clip'} & set(sys.modules); sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(cache)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
