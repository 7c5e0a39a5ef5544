"""One student of several teachers: their caches are joined by content, and nothing of a cache is touched."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from teacher_cache.pipeline.cli.app import app
from teacher_cache.pipeline.cli.train import _lines
from teacher_cache.pipeline.data.batches.pairs import PairOrder
from teacher_cache.pipeline.data.batches.targets import CachedTeacher, JoinedTeachers
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult, evaluate
from teacher_cache.pipeline.evaluate.several_teachers import measure_others
from teacher_cache.pipeline.evaluate.split import CachedTeacher as Cached
from teacher_cache.pipeline.evaluate.split import EvaluationSplit, embed
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.loop import TrainResult, train
from teacher_cache.storage.errors import CacheIncompleteError, CacheMismatchError, UsageError
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.several.joined_caches import join_caches, require_same_crops
from tests import train_process
from tests.conftest import DRAWN, cache_digest, make_known_cache, make_model_folder, plan_known_cache
from tests.pipeline.train.live_targets import LiveTeacherSource
from tests.pipeline.train.train_work import make_cache, make_student, measure, trace, train_config

LOSSES = {"contrastive": 1.0, "relational": 1.0, "feature": 2000.0, "queue": 0.5}


@dataclass
class Home:
    """Two views of 40 photographs, 32 to train on, by two teachers of the widths 16 and 24; a student of width 12.

    ``turned`` is by the second teacher, too: of all photographs in the reverse order but 0003.jpg, and without the
    second caption of 0005.jpg.
    """

    folder: Path
    first: Path
    second: Path
    turned: Path
    student: Path
    teachers: dict[str, Path]

    def config(self, name: str, **changes: Any) -> TrainConfig:
        changes = {"other_caches": (str(self.second),), **changes}
        return train_config(self.first, self.student, self.folder / name, **changes)


@pytest.fixture(scope="module")
def home(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("several")
    wide = make_model_folder(folder / "wide", seed=1, embed_dim=24, init_logit_scale=3.4)
    first = make_cache(folder, tiny_teacher, views=2)
    second, turned, photos = folder / "second.cache", folder / "turned.cache", folder / "photos"
    with (photos / "captions.txt").open() as file:
        lines = [(f"images/{line['image']}", line["caption"]) for line in csv.DictReader(file)]
    kept = [line for line in lines if "0003" not in line[0] and line[1] != "number 5 again"]
    with (photos / "turned.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "caption"), *reversed(kept)])
    for cache, dataset, chunk_rows in ((second, f"flickr:{photos}", 8), (turned, str(photos / "turned.csv"), 12)):
        settings: dict[str, Any] = {"batch_size": 8, "chunk_rows": chunk_rows, "device": "cpu", "views": 2}
        precompute(PrecomputeConfig(dataset=dataset, teacher=f"local-dir:{wide}", cache=str(cache), **settings))
    teachers = {str(first): tiny_teacher, str(second): wide}
    return Home(folder, first, second, turned, make_student(folder / "student.json"), teachers)


def test_several_cached_teachers_train_as_the_live_ones_do(home: Home) -> None:
    """20 steps from one seed with each source of targets, the random crops among them; float16's rounding shows."""
    digests = [cache_digest(cache) for cache in (home.first, home.second)]
    source = ImageSource(str(home.folder / "photos"))
    live = {cache: load_teacher(f"local-dir:{folder}", device="cpu") for cache, folder in home.teachers.items()}
    for name, make in (
        ("cached", None),
        ("live", lambda reader: LiveTeacherSource(live[reader.location], reader, source)),
    ):
        config = home.config(name, epochs=5, losses=LOSSES, queue_rows=48, captions_per_image=2)
        train(config, teacher_source=make)
    cached, running = trace(home.folder / "cached"), trace(home.folder / "live")
    assert len(running) == 20
    for one, other in zip(cached, running, strict=True):
        assert {name: one[name] for name in ("loss", *LOSSES)} == pytest.approx(
            {name: other[name] for name in ("loss", *LOSSES)}, rel=2e-3
        )
    assert cached != running
    assert running[-1]["loss"] < 0.95 * running[0]["loss"]
    assert digests == [cache_digest(cache) for cache in (home.first, home.second)]


def test_the_losses_with_each_teacher_are_averaged_by_the_weights(home: Home) -> None:
    """Each at its own logit scale: the first step of a run of both, told by those of runs of one each."""
    settings: dict[str, Any] = {"losses": {"relational": 1.0, "sigmoid": 0.1}, "epochs": 1, "batch_size": 32}
    alone = []
    for cache in (home.first, home.second):
        train(train_config(cache, home.student, home.folder / f"of-{cache.stem}", **settings))
        alone.append(trace(home.folder / f"of-{cache.stem}")[0])
    train(home.config("of-both", teacher_weights=(3.0, 1.0), **settings))
    (both,) = trace(home.folder / "of-both")
    assert abs(alone[0]["relational"] - alone[1]["relational"]) > 0.01
    for name in ("loss", "relational", "sigmoid"):
        assert both[name] == pytest.approx(0.75 * alone[0][name] + 0.25 * alone[1][name], rel=1e-5)


def test_a_batch_has_the_rows_of_its_own_images_and_captions_by_content(home: Home) -> None:
    """In whatever order the other cache has them: told by the second cache, which is in the first one's order."""
    first, second, turned = (EmbeddingReader(str(cache)) for cache in (home.first, home.second, home.turned))
    rows = first.row_set("train")
    with pytest.raises(UsageError) as refused:
        join_caches(first, [second, turned], rows)
    for told in (
        f"{turned.location}: of the 32 images of {first.location} that are asked for, 1 have no embedding in it, and "
        "of 1 others a caption is missing; the first is the image 0003.jpg (sha256 ",
        f"{first.location} is of flickr:{home.folder}/photos, {turned.location} is of table:",
    ):
        assert told.replace("is of table:", "of table:") in str(refused.value)
    with pytest.raises(UsageError, match=r"1 images of .* the first is the caption 'number 5 again' of the image 0005"):
        join_caches(first, [turned], row_set_of(first, [5]))
    joined = join_caches(first, [second, turned], rows, drop=True)
    assert sorted(set(first.image_rows("train")) - set(rows.numbers())) == [3, 5]
    order = PairOrder(first, rows, 6, 2, views=2, captions_per_image=2)
    sources = [CachedTeacher(reader) for reader in (first, second, turned)]
    batches = list(order.epoch(1))
    assert any(pairs.views.any() for pairs in batches)
    for pairs, wide in zip(batches, JoinedTeachers(sources, joined).targets(order.epoch(1)), strict=True):
        assert wide.text.shape == (6, 2, 16 + 24 + 24)
        (alone,) = sources[0].targets([pairs])
        for own, (a, b, c) in (
            (alone.image, wide.image.split([16, 24, 24], 1)),
            (alone.text, wide.text.split([16, 24, 24], 2)),
        ):
            assert torch.equal(a, own)
            torch.testing.assert_close(c, b, rtol=0, atol=2e-3)  # of other batches of the same teacher
    assert not np.array_equal(joined[1].images, joined[0].images)


def row_set_of(reader: EmbeddingReader, rows: list[int]) -> Any:
    kept = reader.row_set()
    for row in set(range(len(reader))) - set(rows):
        kept.remove(row)
    return kept


def test_images_that_another_teacher_lacks_are_refused_or_left_out_and_counted(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    config = home.config("lacking", other_caches=(str(home.turned),), epochs=1)
    with pytest.raises(UsageError, match=r"image 0003\.jpg .*--reuse .*turned\.cache, .*--set unmatched=drop\.$"):
        train(config)
    assert not Path(config.out).exists()
    record = train(config.model_copy(update={"unmatched": "drop", "batch_size": 31})).record
    assert (record.train_images, record.dropped_images, record.config.batch_size, record.steps) == (30, 2, 30, 1)
    assert "2 images of split 'train', or a caption of theirs, are not in" in caplog.text


def test_what_cannot_be_joined_is_refused_before_anything_is_written(home: Home, tmp_path: Path) -> None:
    copied, begun, strange = (tmp_path / name for name in ("copied.cache", "begun.cache", "strange.cache"))
    shutil.copytree(home.first, copied)
    plan_known_cache(begun)
    make_known_cache(strange, views=3)
    for cache, error, told in (
        (copied, UsageError, rf"{home.first} and {copied} are one and the same cache, manifest \w{{12}}"),
        (begun, CacheIncompleteError, "begun.cache"),
        (strange, UsageError, r"of the 32 images of .* 32 have no embedding in it.* first is the image 0000\.jpg"),
    ):
        config = home.config("refused", other_caches=(str(cache),), views=1, unmatched="drop")
        with pytest.raises(error, match=told):
            train(config)
        assert not Path(config.out).exists()
    for settings, told in (
        ({"other_caches": (str(home.first),)}, r"first\.cache is named twice|photos\.cache is named twice"),
        ({"teacher_weights": (1.0,)}, "teacher_weights has 1 weight for 2 caches"),
        ({"cache": ["a", "b"]}, "other_caches is set, and cache names several"),
    ):
        with pytest.raises(ValueError, match=told):
            TrainConfig.model_validate(home.config("refused").model_dump() | settings)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 7}, "seed is 0 in A and 7 in B"),
        ({"count": 2}, "count is 3 in A and 2 in B"),
        ({"scale": (0.5, 1.0)}, r"scale is \[0.3, 1.0\] in A and \[0.5, 1.0\] in B"),
        ({"count": 4}, None),
    ],
)
def test_other_crops_are_refused_and_more_of_the_same_are_not(change: dict[str, Any], told: str | None) -> None:
    def cache(location: str, **changes: Any) -> Any:
        return SimpleNamespace(location=location, identity=SimpleNamespace(views=DRAWN.model_copy(update=changes)))

    require_same_crops(cache("A"), cache("B", **change), 1)
    if told is None:
        return require_same_crops(cache("A"), cache("B", **change), 3)
    with pytest.raises(CacheMismatchError, match=rf"views: {told}\. .*--set views=1"):
        require_same_crops(cache("A"), cache("B", **change), 3)


def test_killed_at_a_step_it_goes_on_to_the_last_bit(home: Home) -> None:
    """Projections of the second teacher, queue and moments come back; every cache is told by its digest."""
    settings: dict[str, Any] = {"losses": LOSSES, "queue_rows": 48, "ema_decay": 0.9, "checkpoint_steps": 3}
    process = train_process.start(home.config("whole", **settings).model_dump(), out=home.folder / "whole.json")
    process.join(120)
    events = json.loads((home.folder / "whole.json").read_text())["events"]
    whole = RunFolder(home.folder / "whole").read()
    config = home.config("killed", **settings)
    killed = train_process.start(config.model_dump(), out=home.folder / "x.json", kill_at=events.index(["step", "7"]))
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL
    digests = tuple(EmbeddingReader(str(cache)).manifest.digest for cache in (home.first, home.second))
    assert RunFolder(config.out).read().manifest_digests == whole.manifest_digests == digests
    for others, told in (
        ((), "learned from 2 caches so far, and 1 are named"),
        ((str(home.turned),), "its manifest is"),
    ):
        with pytest.raises((UsageError, CacheMismatchError), match=told):
            train(config.model_copy(update={"other_caches": others}), resume=True)
    record = train(config, resume=True).record
    assert record.resumed_at == (6,)
    assert trace(home.folder / "killed") == trace(home.folder / "whole")
    left = [(home.folder / name / "checkpoints/epoch-0002/open_clip_model.safetensors") for name in ("killed", "whole")]
    assert left[0].read_bytes() == left[1].read_bytes()


def test_two_processes_and_parts_of_a_batch_train_as_one_whole_does(home: Home) -> None:
    settings: dict[str, Any] = {"epochs": 1, "losses": LOSSES, "queue_rows": 48, "captions_per_image": 2}
    settings["teacher_weights"] = (3.0, 1.0)
    train(home.config("one", **settings))
    train(home.config("two", devices=2, micro_batch=3, **settings))
    for two, one in zip(trace(home.folder / "two"), trace(home.folder / "one"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_each_teacher_is_measured_and_all_together(home: Home) -> None:
    """Together: the mean of both teachers' logits, here as a matrix."""
    digests = [cache_digest(cache) for cache in (home.first, home.second)]
    done = CliRunner().invoke(app, ["evaluate", "--cache", str(home.first), "--cache", str(home.second), "--json"])
    assert done.exit_code == 0, done.output
    result = EvaluateResult.model_validate_json(done.stdout)
    alone = [evaluate(EvaluateConfig(cache=str(cache))) for cache in (home.first, home.second)]
    (other,) = result.other_teachers
    assert [result.teacher, other.recall] == [measured.teacher for measured in alone]
    assert (other.cache, other.teacher_name) == (str(home.second), "local-dir:wide")
    logits: Any = 0.0
    for cache in (home.first, home.second):
        split = EvaluationSplit.of(EmbeddingReader(str(cache)), "test")
        images, captions = embed(split, Cached())
        logits = logits + split.reader.identity.teacher.logit_scale * (images @ captions.T).astype(np.float64)
    own = split.text_image == np.arange(len(logits))[:, None]
    best_own = np.where(own, logits, -np.inf)
    places = [(logits > best_own.max(axis=1, keepdims=True)).sum(axis=1), (logits > best_own.max(axis=0)).sum(axis=0)]
    assert result.together is not None
    for direction, at in zip(("i2t", "t2i"), places, strict=True):
        wanted = {f"R@{k}": pytest.approx(100 * (at < k).mean()) for k in (1, 5, 10)}
        assert result.together[direction] == wanted
    assert result.together not in [measured.teacher for measured in alone]
    assert digests == [cache_digest(cache) for cache in (home.first, home.second)]
    with pytest.raises(UsageError, match=r"turned\.cache: of the 32 images .*Or measure it by itself\.$"):
        measure_others(EvaluationSplit.of(split.reader, "train"), (images, captions), [str(home.turned)], "cpu")


def test_a_run_of_several_teachers_is_typed_measured_and_gone_on_with(home: Home) -> None:
    words = ["train", "--cache", str(home.first), "--cache", str(home.second), "--student", str(home.student)]
    words += ["--out", str(home.folder / "typed"), "--epochs", "1", "--batch-size", "8", "--set", "workers=0"]
    done = CliRunner().invoke(app, [*words, "--device", "cpu", "--set", "teacher_weights=[3,1]", "--json"])
    assert done.exit_code == 0, done.output
    record = RunFolder(home.folder / "typed").read()
    assert record.config.other_caches == (str(home.second),)
    assert record.teacher == "local-dir:tiny and local-dir:wide"
    assert "teachers: local-dir:tiny and local-dir:wide, 75% : 25%" in _lines(TrainResult("r", record))
    result = measure(home.folder / "typed")
    assert (result.cache, result.student is not None, result.together) == (str(home.first), True, None)
    again = CliRunner().invoke(app, ["train", "--resume", "--out", str(home.folder / "typed"), *words[1:5]])
    assert (again.exit_code, "is finished" in again.output) == (0, True)
