"""``compare``: three teachers over one sample, a student of each and seed, and the refusals."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from teacher_cache.pipeline.cli.app import app
from teacher_cache.pipeline.evaluate.recall import mean_recall
from teacher_cache.pipeline.evaluate.retrieval import evaluate
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.report.charts import all_charts
from teacher_cache.pipeline.report.collect import collect_report
from teacher_cache.pipeline.settings.compare import CompareConfig
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.train.compare.result import Comparison
from teacher_cache.pipeline.train.compare.run import compare
from teacher_cache.storage.errors import CacheError, UsageError
from teacher_cache.storage.look.info import describe_cache
from tests.conftest import cache_digest, make_known_cache, make_model_folder, plan_known_cache, write_photos
from tests.pipeline.train.train_work import make_student

STEPS: dict[str, Any] = {"batch_size": 8, "workers": 0}


@dataclass
class Home:
    """Half of 60 photographs by three teachers of the widths 16, 24 and 16, and the student to train."""

    folder: Path
    caches: tuple[str, ...]
    student: str
    dataset: str

    def config(self, name: str, **changes: Any) -> CompareConfig:
        settings = {"caches": self.caches, "student": self.student, "out": str(self.folder / name), "epochs": 2}
        return CompareConfig(**{**settings, "seeds": 2, "train": STEPS, "device": "cpu", **changes})


@pytest.fixture(scope="module")
def home(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("compare")
    dataset = f"flickr:{write_photos(folder / 'photos', 60)}"
    wide = make_model_folder(folder / "wide", seed=1, embed_dim=24)
    other = make_model_folder(folder / "other", seed=2)
    teachers = {"a": tiny_teacher, "b": wide, "c": other}
    for name, teacher in teachers.items():
        encode(f"{dataset}?sample=50%", teacher, folder / f"{name}.cache")
    student = str(make_student(folder / "student.json"))
    return Home(folder, tuple(str(folder / f"{name}.cache") for name in teachers), student, dataset)


def encode(dataset: str, teacher: Path, cache: Path) -> str:
    settings: dict[str, Any] = {"batch_size": 8, "chunk_rows": 8, "device": "cpu"}
    precompute(PrecomputeConfig(dataset=dataset, teacher=f"local-dir:{teacher}", cache=str(cache), **settings))
    return str(cache)


@pytest.fixture(scope="module")
def compared(home: Home) -> Comparison:
    return compare(home.config("compared"))


def test_each_number_is_that_of_the_commands_it_stands_for(home: Home, compared: Comparison) -> None:
    digests = {cache: cache_digest(cache) for cache in home.caches}
    values = [one.student.value for one in compared.teachers]
    assert values == sorted(values, reverse=True)
    assert {one.cache for one in compared.teachers} == set(home.caches)
    for one in compared.teachers:
        runs = sorted(Path(home.folder / "compared").glob(f"{Path(one.cache).stem}-*"))
        assert len(runs) == len(one.students) == 2
        students = [evaluate(EvaluateConfig(run=str(run), split="test", device="cpu")) for run in runs]
        assert [mean_recall(each.student or {}) for each in students] == pytest.approx(one.students)
        assert mean_recall(students[0].teacher) == pytest.approx(one.recall)
        assert one.student.value == pytest.approx(sum(one.students) / 2)
        assert one.student.low <= one.student.value <= one.student.high
        info = describe_cache(one.cache)
        assert info.images_per_second
        assert info.captions_per_second
        images = 2 * info.layout.image_rows  # the sample is half of them
        seconds = images / info.images_per_second + 2 * info.layout.text_rows / info.captions_per_second
        assert (compared.encode_images, one.encode_seconds) == (images, pytest.approx(seconds))
    assert len(compared.pairs) == len(compared.neighbours) == 3
    assert compared.choice == compared.teachers[0].cache
    uncertain = {pair.worse for pair in compared.pairs if pair.better == compared.choice and not pair.certain}
    assert set(compared.rivals) == uncertain
    assert {cache: cache_digest(cache) for cache in home.caches} == digests


def test_what_is_finished_is_not_trained_again_and_the_same_comes_out(home: Home, compared: Comparison) -> None:
    logs = {log: log.stat().st_mtime_ns for log in Path(home.folder / "compared").glob("*/log.jsonl")}
    assert len(logs) == 6
    again = compare(home.config("compared"))
    assert {log: log.stat().st_mtime_ns for log in logs} == logs
    same = {"seconds", "date"}
    assert again.model_dump(exclude=same) == compared.model_dump(exclude=same)
    with pytest.raises(UsageError, match="cannot go on with other settings"):
        compare(home.config("compared", train={**STEPS, "learning_rate": 0.5}))


def test_the_command_shows_the_ranking_and_the_teacher_to_pay_for(home: Home, compared: Comparison) -> None:
    words = ["compare", *home.caches, "--student", home.student, "--out", str(home.folder / "compared")]
    words += ["--epochs", "2", "--seeds", "2", "--device", "cpu", "--set", "train.batch_size=8"]
    done = CliRunner().invoke(app, [*words, "--set", "train.workers=0"])
    assert done.exit_code == 0, done.output
    assert f"{'ahead: ' if compared.rivals else 'pay for '}{compared.choice}" in done.stdout
    for one in compared.teachers:
        assert {one.cache, f"{one.student.value:.1f}"} <= set(done.stdout.split())
    kept = json.loads((home.folder / "compared" / "comparison.json").read_text())
    assert kept["choice"] == compared.choice


def test_one_seed_says_that_nothing_is_certain(home: Home) -> None:
    result = compare(home.config("one", seeds=1, caches=home.caches[:2]))
    assert (result.pairs, len(result.teachers)) == ((), 2)
    assert (result.choice, result.rivals) == (result.teachers[0].cache, (result.teachers[1].cache,))


def test_what_cannot_be_compared_is_refused_by_name_and_nothing_is_written(home: Home, tmp_path: Path) -> None:
    first = home.caches[0]
    whole = encode(home.dataset, home.folder / "other", tmp_path / "whole.cache")
    make_known_cache(tmp_path / "known.cache")
    plan_known_cache(tmp_path / "unfinished.cache")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"caches": (first, whole)}, f"{first} and {whole} are over other images: samples_sha256"),
        ({"caches": (first, str(tmp_path / "known.cache"))}, "are over other images"),
        ({"caches": (first, str(tmp_path / "unfinished.cache"))}, "unfinished.cache"),
        ({"caches": (first, str(tmp_path / "none.cache"))}, "no cache here"),
        ({"caches": (first, first)}, "one and the same cache"),
        ({"measure_split": "train"}, "'train' is learned from and cannot be measured"),
        ({"measure_split": "dev"}, "dev"),
    ]
    for changes, message in cases:
        with pytest.raises((UsageError, CacheError)) as refused:
            compare(home.config("refused", **changes))
        assert message in str(refused.value)
    assert not (home.folder / "refused").exists()
    for settings, message in (
        ({"caches": (first,)}, "one cache has nothing to be compared with"),
        ({"train": {"seed": 1}}, "train.seed: the comparison sets it itself"),
        ({"train": {"epoch": 1}}, "epoch"),
        ({"init": ("a", "b")}, "2 init for 3 caches"),
    ):
        with pytest.raises(ValueError, match=message):
            home.config("refused", **settings)


def test_the_report_of_a_compared_cache_has_the_chart(home: Home, compared: Comparison) -> None:
    folder = str(home.folder / "compared")
    chart = all_charts(collect_report(home.caches[1], compared=folder, whole=False))["compared"]
    students = {row[0]: row[2] for row in chart.rows if row[1] == "its students"}
    assert students == {one.cache: one.student.value for one in compared.teachers}
    with pytest.raises(UsageError, match="and not "):
        collect_report(encode(home.dataset, home.folder / "wide", home.folder / "whole.cache"), compared=folder)
    with pytest.raises(UsageError, match=r"no comparison\.json here"):
        collect_report(home.caches[0], compared=str(home.folder))
