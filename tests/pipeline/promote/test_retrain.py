"""Retraining from end to end on a dataset that changes: what is done, what is not done, and what a crash costs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import teacher_cache.pipeline.promote.gate
import teacher_cache.pipeline.promote.retrain
from teacher_cache.flows.markdown import retraining_text
from teacher_cache.pipeline.cli.champions import retrain_lines
from teacher_cache.pipeline.data.datasets import samples
from teacher_cache.pipeline.models.teacher import Encoded, LiveTeacher
from teacher_cache.pipeline.promote.registry import StudentRegistry
from teacher_cache.pipeline.promote.retrain import Retraining, RetrainResult, retrain
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.errors import CacheCorruptError, UsageError
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import make_model_folder
from tests.pipeline.promote.retrain_work import add_photos, make_home, settings


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path)


def test_new_data_is_learned_and_nothing_new_is_nothing_done(
    home: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digested: list[str] = []
    digest = samples._digest
    with monkeypatch.context() as patched:
        patched.setattr(samples, "_digest", lambda *sample: (digested.append(""), digest(*sample))[1])
        first = retrain(settings(home, tiny_teacher))
    assert len(digested) == 64  # the look at the dataset and precompute read each file once
    assert (first.outcome, first.champion, first.look.changes) == ("promoted", 1, None)
    assert first.encoded is not None
    assert first.encoded.rows_reused == {"image": 0, "text": 0}

    before = {path: path.stat().st_mtime_ns for path in (home / "home").rglob("*")}
    with monkeypatch.context() as patched:
        patched.setattr(teacher_cache.pipeline.promote.retrain, "precompute", None)  # would be called in vain
        patched.setattr(teacher_cache.pipeline.promote.retrain, "promote", None)
        again = retrain(settings(home, tiny_teacher))
    assert (again.outcome, again.encoded, again.run, again.champion) == ("nothing-new", None, None, 1)
    assert again.candidate == first.candidate
    assert {path: path.stat().st_mtime_ns for path in (home / "home").rglob("*")} == before

    add_photos(home, 900, 5)
    second = retrain(settings(home, tiny_teacher))
    assert second.look.changes is not None
    assert second.look.changes.model_dump() == {
        "new_images": 5,
        "removed_images": 0,
        "new_captions": 10,
        "removed_captions": 0,
    }
    assert second.encoded is not None
    assert second.encoded.rows_reused == {"image": 64, "text": 128}
    assert second.candidate is not None
    assert second.candidate.comparison is not None
    assert second.candidate.comparison.champion == 1
    assert second.candidate.settings["init"] == f"{home}/home/runs/0001/checkpoints/epoch-0001"
    assert EmbeddingReader(f"{home}/home/caches/0001.cache").samples.num_rows == 64
    assert retrain(settings(home, tiny_teacher)).outcome == "nothing-new"


def test_layers_are_locked_where_there_is_a_champion_to_begin_with(home: Path, tiny_teacher: Path) -> None:
    lock = {"epochs": 1, "batch_size": 16, "workers": 0, "lock_image_unlocked_groups": 2}
    first = retrain(settings(home, tiny_teacher, train=lock))
    assert first.candidate is not None
    assert first.candidate.settings["lock_image_unlocked_groups"] is None
    assert retrain(settings(home, tiny_teacher, train=lock)).outcome == "nothing-new"
    add_photos(home, 900, 2)
    second = retrain(settings(home, tiny_teacher, train=lock))
    assert second.candidate is not None
    assert second.candidate.settings["lock_image_unlocked_groups"] == 2
    with pytest.raises(UsageError, match="lock_image_unlocked_groups"):
        Retraining(settings(home, tiny_teacher, train={**lock, "lock_image_unlocked_groups": -1}))


def test_a_package_that_shipping_needs_is_missed_before_anything_is_encoded(
    home: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "teacher_cache.pipeline.deploy.record.find_spec", lambda name: None if name == "onnx" else find_spec(name)
    )
    with pytest.raises(UsageError, match=r"deploy needs onnx, which is not installed: .*pip install .*\[deploy\]"):
        Retraining(settings(home, tiny_teacher, ship=True))
    Retraining(settings(home, tiny_teacher, ship=False))


def test_a_size_that_the_student_cannot_take_costs_no_encoding(home: Path, tiny_teacher: Path) -> None:
    small = {"epochs": 1, "batch_size": 16, "workers": 0, "train_image_size": 24}
    with pytest.raises(UsageError, match=r"train_image_size 24: this student takes images of 32 x 32 pixels"):
        Retraining(settings(home, tiny_teacher, train=small))
    assert not (home / "home").exists()


def test_a_rejected_challenger_is_not_tried_again(home: Path, tiny_teacher: Path) -> None:
    retrain(settings(home, tiny_teacher))
    add_photos(home, 900, 2)
    rejected = retrain(settings(home, tiny_teacher, min_retention=10_000.0))
    assert (rejected.outcome, rejected.champion) == ("rejected", 1)
    assert rejected.candidate is not None
    assert "10000 % wanted" in rejected.candidate.reason
    again = retrain(settings(home, tiny_teacher))
    assert (again.outcome, again.candidate) == ("nothing-new", rejected.candidate)
    # other settings are another student
    other = retrain(settings(home, tiny_teacher, train={"epochs": 2, "batch_size": 16, "workers": 0}))
    assert (other.outcome, other.encoded, other.run) == ("promoted", None, f"{home}/home/runs/0002-2")


@pytest.mark.parametrize(
    ("step", "function"),
    [
        ("plan", "storage.write.writer.write_manifest"),  # the manifest is what a plan writes last
        ("encode", "storage.write.writer.EmbeddingWriter.seal"),
        ("verify", "pipeline.promote.retrain.verify_cache"),
        ("train", "pipeline.train.loop.train"),
        ("measure", "pipeline.promote.gate.measure"),
        # between the candidate's record and the pointer
        ("promote", "pipeline.promote.registry.StudentRegistry.promote"),
    ],
)
def test_broken_off_anywhere_it_goes_on(
    home: Path, tiny_teacher: Path, step: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("gone")

    with monkeypatch.context() as patched:
        patched.setattr(f"teacher_cache.{function}", fail)
        with pytest.raises(ConnectionError):
            retrain(settings(home, tiny_teacher))
    done = retrain(settings(home, tiny_teacher))
    assert done.outcome == "promoted"
    assert (done.encoded is None) == (step not in ("plan", "encode"))
    assert done.run == f"{home}/home/runs/0001"
    assert StudentRegistry(f"{home}/home/students").champion() == done.candidate
    assert [path.name for path in (home / "home" / "caches").iterdir()] == ["0001.cache"]


def test_a_dataset_that_is_mostly_gone_is_no_new_data(home: Path, tiny_teacher: Path) -> None:
    """A share that is not mounted must not become a champion."""
    retrain(settings(home, tiny_teacher))
    for image in sorted((home / "photos" / "images").iterdir())[:40]:
        image.unlink()
    with pytest.raises(UsageError, match=r"40 of 64 images .* are gone.*max_removed"):
        retrain(settings(home, tiny_teacher))
    assert [path.name for path in (home / "home" / "caches").iterdir()] == ["0001.cache"]
    small = {"epochs": 1, "batch_size": 4, "workers": 0}
    assert retrain(settings(home, tiny_teacher, max_removed=70.0, train=small)).outcome == "promoted"


def test_wrong_settings_cost_no_encoding(home: Path, tiny_teacher: Path) -> None:
    table = home / "photos" / "pairs.csv"
    table.write_text("path,caption\nimages/0000.jpg,a picture\n")
    for wrong, said in (
        ({"train": {"epochs": 0}}, "epochs"),
        ({"student": "no-such-student"}, "no-such-student"),
        ({"split": "tset"}, r"no split 'tset' \(split\); there are 'train', 'test'"),
        (
            {"dataset": f"table:{table}", "split": "test"},
            r"no split 'test' \(split\); there are none: add \?holdout=10% behind the dataset to set a part aside",
        ),
        ({"dataset": f"images:{home}/photos/images"}, "no captions, and students are compared by their recall of capt"),
        ({"home": "s3://bucket/home"}, "local folder"),
        ({"deploy": {"rounds": 0}}, "rounds"),
        ({"precompute": {"crop_flip": 2}}, "precompute: crop_flip: must be 1 or less, not 2"),
        ({"precompute": {"views": 2}}, "precompute: views: set by retraining itself"),
        ({"train": {"out": "x"}}, "train: out: set by retraining itself"),
    ):
        with pytest.raises(UsageError, match=said):
            retrain(settings(home, tiny_teacher, **wrong))
    assert not (home / "home").exists()


def test_the_command_takes_a_run_file(
    home: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from teacher_cache.pipeline.cli.app import main

    (home / "retrain.toml").write_text(
        f"""
        [retrain]
        dataset = "flickr:{home}/photos"
        teacher = "local-dir:{tiny_teacher}"
        home = "{home}/home"
        student = "{home}/student.json"
        split = "train"
        device = "cpu"
        ship = false
        [retrain.train]
        epochs = 1
        batch_size = 16
        workers = 0
        """
    )

    def run(*flags: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["teacher-cache", "students", "retrain", f"{home}/retrain.toml", *flags])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().out

    code, said = run()
    assert code == 0
    assert "64 of 64 images and 128 of 128 captions encoded" in said
    assert said.endswith("champion: student 1\n")
    code, said = run("--json")
    assert (code, json.loads(said)["outcome"]) == (0, "nothing-new")
    add_photos(home, 900, 1)
    code, said = run("--min-retention", "10000")
    assert code == 1
    assert "1 new image, 0 gone, 2 new captions, 0 gone" in said
    assert "1 of 65 images and 2 of 130 captions encoded, the others copied" in said
    assert "student 2" in said
    assert said.endswith("champion: student 1\n")
    code, said = run("--dtype", "int8", "--margin", "99")
    assert code == 0
    assert f"{home}/home/caches/0002.cache: no row of it can be copied: it has dtype float16, not int8." in said
    assert "65 of 65 images and 130 of 130 captions encoded" in said
    assert EmbeddingReader(f"{home}/home/caches/0003.cache").identity.targets.dtype == "int8"
    code, said = run("--decoder", "jpg")
    assert code == 2


def test_a_cache_that_does_not_verify_teaches_nobody(
    home: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = teacher_cache.pipeline.promote.retrain.precompute

    def damaged(config: PrecomputeConfig, *others: Any) -> Any:
        made = encode(config, *others)
        chunk = next(
            path for path in Path(config.cache).rglob("targets.zarr/image/embedding/c/*/*/*") if path.is_file()
        )
        data = bytearray(chunk.read_bytes())
        data[5] ^= 1
        chunk.write_bytes(data)
        return made

    with monkeypatch.context() as patched:
        patched.setattr(teacher_cache.pipeline.promote.retrain, "precompute", damaged)
        with pytest.raises(CacheCorruptError, match="teacher-cache repair"):
            retrain(settings(home, tiny_teacher))
    with pytest.raises(CacheCorruptError, match="teacher-cache repair"):
        retrain(settings(home, tiny_teacher))
    assert StudentRegistry(f"{home}/home/students").candidates() == ()


def test_caches_that_moved_do_not_pass_an_old_run_off_as_new(home: Path, tiny_teacher: Path) -> None:
    retrain(settings(home, tiny_teacher))
    add_photos(home, 900, 3)
    moved = retrain(settings(home, tiny_teacher, caches=f"{home}/elsewhere/"))
    assert moved.outcome in ("promoted", "rejected")
    assert moved.run == f"{home}/home/runs/0002"
    assert moved.candidate is not None
    assert moved.candidate.cache == f"{home}/elsewhere/0002.cache"
    assert moved.candidate.cache_manifest_digest == EmbeddingReader(f"{home}/elsewhere/0002.cache").manifest.digest
    assert retrain(settings(home, tiny_teacher, caches=f"{home}/elsewhere")).outcome == "nothing-new"


def test_a_student_with_the_champions_weights_is_kept_as_rejected(home: Path, tiny_teacher: Path) -> None:
    retrain(settings(home, tiny_teacher, start="scratch"))
    add_photos(home, 900, 2, "test")  # behind all others, so that the rows of the training split stay where they are
    done = retrain(settings(home, tiny_teacher, start="scratch"))
    assert (done.outcome, done.champion) == ("rejected", 1)
    assert done.candidate is not None
    assert done.candidate.reason == "the very weights of champion 1"
    assert retrain(settings(home, tiny_teacher, start="scratch")).outcome == "nothing-new"


def test_a_home_is_the_same_from_any_folder(home: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    assert retrain(settings(home, tiny_teacher, home="home")).outcome == "promoted"
    monkeypatch.chdir("/")
    assert retrain(settings(home, tiny_teacher)).outcome == "nothing-new"
    add_photos(home, 900, 1)
    assert retrain(settings(home, tiny_teacher)).outcome in ("promoted", "rejected")


def test_weights_that_changed_cost_the_encoding_of_everything(home: Path, tmp_path: Path) -> None:
    teacher = make_model_folder(tmp_path / "teacher")
    retrain(settings(home, teacher))
    shutil.rmtree(teacher)
    make_model_folder(teacher, seed=1)
    add_photos(home, 900, 1)
    done = retrain(settings(home, teacher))
    assert done.encoded is not None
    assert done.encoded.rows_reused == {"image": 0, "text": 0}


def test_int8_is_made_kept_and_copied_and_float16_is_left_with_a_word(home: Path, tiny_teacher: Path) -> None:
    retrain(settings(home, tiny_teacher))
    other = retrain(settings(home, tiny_teacher, dtype="int8"))
    assert other.look.notices == (
        f"{home}/home/caches/0001.cache: no row of it can be copied: it has dtype float16, not int8. "
        "To copy its rows, set dtype to float16.",
    )
    assert other.encoded is not None
    assert other.encoded.rows_reused == {"image": 0, "text": 0}
    assert (other.look.cache, other.run) == (f"{home}/home/caches/0002.cache", f"{home}/home/runs/0002")
    assert EmbeddingReader(other.look.cache).identity.targets.dtype == "int8"
    # each is of the dataset as it is; left out, the newest one counts
    for same in ({"dtype": "int8"}, {"dtype": "float16"}, {}):
        assert retrain(settings(home, tiny_teacher, **same)).outcome == "nothing-new"

    add_photos(home, 900, 5, "test")  # behind all others, so that whole chunks stay what they are
    grown = retrain(settings(home, tiny_teacher))
    assert (grown.look.reuse, grown.look.notices) == (other.look.cache, ())
    assert grown.encoded is not None
    assert grown.encoded.rows_reused == {"image": 64, "text": 128}
    old, new = EmbeddingReader(other.look.cache), EmbeddingReader(grown.look.cache)
    assert new.identity.targets.dtype == "int8"
    for ref, commit in old.commits().items():
        assert new.commits()[ref].objects == commit.objects
    # the newest of that dtype, whatever was made since
    back = retrain(settings(home, tiny_teacher, dtype="float16"))
    assert back.look.reuse == f"{home}/home/caches/0001.cache"
    assert back.encoded is not None
    assert back.encoded.rows_reused == {"image": 64, "text": 128}


def test_the_decoder_and_views_of_the_cache_before_are_kept(home: Path, tiny_teacher: Path) -> None:
    pytest.importorskip("simplejpeg", reason="the extra fastjpeg is not installed")
    first = retrain(settings(home, tiny_teacher, decoder="jpeg-scaled", views=2))
    second = retrain(settings(home, tiny_teacher, dtype="int8"))
    assert (len(first.look.notices), len(second.look.notices)) == (0, 1)
    identity = EmbeddingReader(second.look.cache).identity
    assert (identity.preprocess.decoder, identity.views.count, identity.targets.dtype) == ("jpeg-scaled", 2, "int8")
    third = retrain(settings(home, tiny_teacher, dtype="float16", decoder="pillow"))
    assert "it has dtype int8, not float16 and decoder jpeg-scaled, not pillow. To" in third.look.notices[0]
    identity = EmbeddingReader(third.look.cache).identity
    assert (identity.preprocess.decoder, identity.views.count, identity.targets.dtype) == (None, 2, "float16")


def test_crops_are_drawn_as_in_the_cache_before_so_that_its_views_are_copied(
    home: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = LiveTeacher.encode_images

    def counted(self: LiveTeacher, pixels: torch.Tensor) -> Encoded:
        seen.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(LiveTeacher, "encode_images", counted)
    drawn = {"crop_scale": [0.6, 0.9], "view_seed": 7}
    first = retrain(settings(home, tiny_teacher, views=2, precompute={**drawn, "batch_size": 4}))
    views = EmbeddingReader(first.look.cache).identity.views
    assert (views.count, views.scale, views.seed, views.flip) == (2, (0.6, 0.9), 7, 0.5)
    assert EmbeddingReader(first.look.cache).manifest.layout.batch_rows == 4
    for more in ({}, {"precompute": drawn}, {"precompute": {"batch_size": 8}}):
        assert retrain(settings(home, tiny_teacher, **more)).outcome == "nothing-new"
    add_photos(home, 900, 5)
    second = retrain(settings(home, tiny_teacher))
    assert second.look.crops == {
        "crop_scale": [0.6, 0.9],
        "crop_ratio": [3 / 4, 4 / 3],
        "crop_flip": 0.5,
        "view_seed": 7,
    }
    assert sum(seen) == 2 * (64 + 5)
    assert EmbeddingReader(second.look.cache).identity.views == views
    third = retrain(settings(home, tiny_teacher, precompute={"crop_scale": [0.3, 1.0]}))
    assert third.look.cache != second.look.cache
    assert sum(seen) == 2 * (64 + 5) + 69  # all crops of the new size, and no evaluation crop
    views = EmbeddingReader(third.look.cache).identity.views
    assert (views.count, views.scale, views.seed) == (2, (0.3, 1.0), 7)


def test_what_was_begun_goes_on_as_it_began(home: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags that are left out at the second call are those of the cache that the first one began."""
    retrain(settings(home, tiny_teacher))

    def fail(*_: Any) -> None:
        raise ConnectionError("gone")

    with monkeypatch.context() as patched:
        patched.setattr("teacher_cache.storage.write.writer.EmbeddingWriter.seal", fail)
        with pytest.raises(ConnectionError):
            retrain(settings(home, tiny_teacher, dtype="int8", views=2))
    done = retrain(settings(home, tiny_teacher))
    caches = f"{home}/home/caches"
    assert (done.look.cache, done.look.dtype, done.look.views) == (f"{caches}/0002.cache", "int8", 2)
    assert done.look.notices == (
        f"{caches}/0001.cache: no row of it can be copied: it has dtype float16, not int8. "
        "To copy its rows, set dtype to float16.",
    )
    assert EmbeddingReader(done.look.cache).identity.targets.dtype == "int8"


def test_another_teacher_stores_rows_as_the_newest_cache_does(home: Path, tiny_teacher: Path) -> None:
    caches = f"{home}/home/caches"
    retrain(settings(home, tiny_teacher))
    retrain(settings(home, tiny_teacher, dtype="int8", views=2, precision="bf16"))
    other = Retraining(settings(home, tiny_teacher, precision="fp16")).look()
    assert (other.cache, other.dtype, other.views) == (f"{caches}/0003.cache", "int8", 2)
    assert (other.reuse, other.notices) == (None, ())
    # the first teacher again, once data have changed
    add_photos(home, 900, 1)
    back = Retraining(settings(home, tiny_teacher)).look()
    assert (back.cache, back.dtype, back.views) == (f"{caches}/0003.cache", "int8", 2)
    assert back.notices == (
        f"{caches}/0001.cache: no row of it can be copied: it has dtype float16, not int8. "
        "To copy its rows, set dtype to float16.",
    )
    asked = Retraining(settings(home, tiny_teacher, dtype="float16")).look()
    assert (asked.dtype, asked.reuse, asked.notices) == ("float16", f"{caches}/0001.cache", ())


def test_a_newest_cache_that_cannot_be_read_is_named(home: Path, tiny_teacher: Path) -> None:
    retrain(settings(home, tiny_teacher, views=2))
    newest = home / "home" / "caches" / "0002.cache"
    newest.mkdir()
    fresh = Retraining(settings(home, tiny_teacher)).look()  # of one that was never planned nothing is said
    assert fresh.notices == ()
    (newest / "manifest.json").write_text("{")
    for more, views, instead in (
        ({}, 2, f"those of {home}/home/caches/0001.cache are taken"),
        ({"precision": "bf16"}, 2, f"those of {home}/home/caches/0001.cache are taken"),
        ({"caches": f"{home}/moved"}, 1, "the defaults are taken"),
    ):
        if "caches" in more:
            shutil.copytree(newest, home / "moved" / "0002.cache")
        found = Retraining(settings(home, tiny_teacher, **more)).look()
        assert found.views == views
        (notice,) = found.notices
        assert "0002.cache" in notice
        assert notice.endswith(f"where dtype, decoder and views are left out, {instead}.")
        told = RetrainResult(
            outcome="nothing-new", look=found, encoded=None, run=None, candidate=None, champion=None, seconds=0.0
        )
        assert retrain_lines(told)[0] == notice
        assert notice in retraining_text("nothing-new", found, None, None)


def test_one_at_a_time(home: Path, tiny_teacher: Path) -> None:
    ready = "import sys; from teacher_cache.pipeline.models.run_folder import RunFolder\n"
    ready += "with RunFolder(sys.argv[1]).locked(): print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", ready, f"{home}/home"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UsageError, match="home: is being written by process"):
            retrain(settings(home, tiny_teacher))
        other.communicate("\n")
    assert not (home / "home" / "caches").exists()
