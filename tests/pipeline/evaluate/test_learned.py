"""How many of the measured images a student learned from, and what evaluate says of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from teacher_cache.pipeline.cli.app import app
from teacher_cache.pipeline.evaluate.learned import count_learned, learned_words
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import AveragedRun
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.pipeline.train.train_work import make_cache, make_student, measure, train_config

run_cli = CliRunner()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A run that learned from photographs 0 to 31 of 40, and a cache of 24 to 43, 40 to 43 for testing."""
    home = tmp_path_factory.mktemp("learned")
    cache = make_cache(home, tiny_teacher)
    make_cache(home / "other", tiny_teacher, 20, 24)
    train(train_config(cache, make_student(home / "student.json"), home / "run", epochs=1))
    return home


def other(home: Path) -> str:
    return str(home / "other" / "photos.cache")


@pytest.mark.parametrize(
    ("elsewhere", "split", "count"), [(False, "test", 0), (False, "train", 32), (True, "test", 0), (True, "train", 8)]
)
def test_images_are_told_by_their_bytes_whatever_the_cache_and_the_split(
    home: Path, elsewhere: bool, split: str, count: int
) -> None:
    cache = {"cache": other(home)} if elsewhere else {}
    assert measure(home / "run", split=split, **cache).learned_images == count


def test_a_mean_learned_from_what_its_runs_learned_from(home: Path) -> None:
    record = RunFolder(home / "run").read()
    config = record.config.model_copy(update={"split": "test"})
    member = AveragedRun(run="b", checkpoint="c", weights_sha256="d", config=config)
    photos = EmbeddingReader(other(home)).samples["content_sha256"]
    assert count_learned(record, photos) == 8
    assert count_learned(record.model_copy(update={"averaged": (member,)}), photos) == 16


def test_a_cache_that_is_gone_or_replaced_leaves_it_unknown(home: Path, tmp_path: Path) -> None:
    record = RunFolder(home / "run").read()
    photos = EmbeddingReader(other(home))
    sha256 = photos.samples["content_sha256"]
    for cache in (str(tmp_path / "gone.cache"), other(home)):
        moved = record.model_copy(update={"config": record.config.model_copy(update={"cache": cache})})
        assert count_learned(moved, sha256, photos) is None
    shutil.copytree(home / "photos.cache", tmp_path / "copy")
    assert count_learned(moved, sha256, EmbeddingReader(str(tmp_path / "copy"))) == 8  # of the run's dataset


def test_the_title_says_it(home: Path) -> None:
    def title(*flags: str) -> str:
        shown = run_cli.invoke(app, ["evaluate", "--run", str(home / "run"), "--device", "cpu", *flags])
        assert shown.exit_code == 0, shown.output
        return " ".join(shown.stdout.partition("i2t")[0].split())

    assert title().endswith(": 8 images, 16 captions; checkpoint epoch-0001")
    assert title("--split", "train").endswith("; checkpoint epoch-0001; the student learned from 32 of them")
    learned = f", which learned from {home}/photos.cache; the student learned from 8 of them"
    assert title("--cache", other(home), "--split", "train").endswith(learned)


def test_what_is_not_known_is_said() -> None:
    assert learned_words(0, "them") == ""
    unknown = "whether the student learned from them is not known, since its own cache cannot be read"
    assert learned_words(None, "them") == unknown


def test_the_teacher_alone_has_no_intervals_to_read_and_a_student_by_name(home: Path) -> None:
    command = ["evaluate", "--cache", other(home), "--split", "test"]
    shown = run_cli.invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "few" not in shown.stderr
    assert shown.stderr.endswith(f"next: teacher-cache train --cache {other(home)} --student vit-ti-32 --out runs/a\n")
    found = json.loads(run_cli.invoke(app, [*command, "--json"]).stdout)
    assert (found["learned_images"], found["student"]) == (None, None)
    assert "few; read the 95 % intervals" in run_cli.invoke(app, [*command, "--run", str(home / "run")]).stderr
