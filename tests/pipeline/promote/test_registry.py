"""Champions and challengers: what is kept, who wins a race, how one goes back, and the gate between them."""

from __future__ import annotations

import json
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacher_cache.pipeline.deploy.record import Artefact, Deployment
from teacher_cache.pipeline.evaluate.intervals import bootstrap_share
from teacher_cache.pipeline.evaluate.recall import RetrievalRanks, recall_of_ranks, retention
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import CHECKPOINT_WEIGHTS
from teacher_cache.pipeline.promote.gate import compare, promote, roll_back
from teacher_cache.pipeline.promote.registry import Candidate, StudentRegistry
from teacher_cache.pipeline.settings.promote import PromoteConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.errors import CacheMismatchError, UsageError
from tests.conftest import make_model_folder
from tests.pipeline.cli.test_cli import run
from tests.pipeline.train.train_work import make_cache, make_student, train_config

FIELDS: dict[str, Any] = {
    "run": "runs/a",
    "checkpoint": "checkpoints/epoch-0001",
    "weights_sha256": "a" * 64,
    "deployed": None,
    "student": "vit-s-32",
    "student_parameters": 29_600_000,
    "teacher": "ViT-B-32",
    "cache": "f8k.cache",
    "cache_manifest_digest": "b" * 64,
    "settings": {"epochs": 3},
    "split": "test",
    "measured_on": "b" * 64,
    "images": 10,
    "captions": 50,
    "recalls": {"i2t": {"R@1": 50.0}, "t2i": {"R@1": 40.0}},
    "mean_recall": 45.0,
    "retention": 97.0,
    "retention_interval": None,
    "comparison": None,
    "passed": True,
    "reason": "the first",
}


def added(registry: StudentRegistry, count: int) -> list[Candidate]:
    return [registry.add(FIELDS | {"run": f"runs/{number}"}) for number in range(count)]


def test_an_empty_registry_has_no_champion(tmp_path: Path) -> None:
    registry = StudentRegistry(str(tmp_path / "students"))
    assert registry.champion() is None
    assert registry.candidates() == ()
    with pytest.raises(UsageError, match="no student was promoted yet"):
        registry.earlier_champion()
    with pytest.raises(UsageError, match="no student 3; there are none"):
        registry.candidate(3)
    assert not (tmp_path / "students").exists()


def test_a_registry_on_an_object_store(s3_location: str) -> None:
    registry = StudentRegistry(s3_location)
    first, second = added(registry, 2)
    registry.promote(first, None, "gate")
    with pytest.raises(UsageError, match="another student became champion meanwhile, where none was expected"):
        registry.promote(second, None, "gate")
    assert StudentRegistry(s3_location).champion() == first
    assert [each.number for each in registry.candidates()] == [1, 2]


@pytest.mark.parametrize("name", ["../../b/checkpoints/epoch-0001", "/etc", "checkpoints/..", "checkpoints/a/b", ""])
def test_a_registry_names_checkpoints_of_its_runs_alone(tmp_path: Path, name: str) -> None:
    registry = StudentRegistry(str(tmp_path))
    registry.promote(added(registry, 1)[0], None, "gate")
    (key,) = (tmp_path / "candidates").iterdir()
    key.write_text(json.dumps(json.loads(key.read_text()) | {"checkpoint": name}))
    with pytest.raises(UsageError, match=r"candidates/000001\.json: .*\ncheckpoint\n"):
        registry.champion()


def test_going_back_goes_back_through_what_reigned(tmp_path: Path) -> None:
    registry = StudentRegistry(str(tmp_path))
    one, two, three, four, _ = added(registry, 5)
    for now, before in ((one, None), (two, one), (three, two)):
        registry.promote(now, before, "gate")
    assert registry.earlier_champion() == two
    registry.promote(two, three, "rollback")
    assert registry.champion() == two
    assert registry.earlier_champion() == one
    registry.promote(four, two, "gate")
    assert registry.earlier_champion() == two
    assert registry.earlier_champion(3) == three  # taken back once, but it was champion
    with pytest.raises(UsageError, match="student 4 is the champion already"):
        registry.earlier_champion(4)
    with pytest.raises(UsageError, match="student 5 never was champion"):
        registry.earlier_champion(5)
    registry.promote(two, four, "rollback")
    registry.promote(one, two, "rollback")
    with pytest.raises(UsageError, match="student 1 has no champion before it"):
        registry.earlier_champion()


def test_of_many_at_once_one_is_promoted_and_each_candidate_kept(tmp_path: Path) -> None:
    """Threads that all decided against the same champion."""
    first = added(StudentRegistry(str(tmp_path)), 1)[0]
    StudentRegistry(str(tmp_path)).promote(first, None, "gate")
    outcomes: list[str] = []
    ready = threading.Barrier(8)

    def challenge() -> None:
        registry = StudentRegistry(str(tmp_path))
        ready.wait()
        mine = registry.add(FIELDS)
        try:
            registry.promote(mine, first, "gate")
            outcomes.append("promoted")
        except UsageError:
            outcomes.append("refused")

    threads = [threading.Thread(target=challenge) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["promoted", *["refused"] * 7]
    registry = StudentRegistry(str(tmp_path))
    assert [each.number for each in registry.candidates()] == list(range(1, 10))
    assert [each.number for each in registry.promotions()] == [1, 2]


def ranks(hits: np.ndarray, depth: int = 10) -> RetrievalRanks:
    """One caption an image; those hit are found first, the others not at all."""
    found = np.where(hits, 1, 0).astype(np.int32)
    return RetrievalRanks(found, found, depth)


def test_the_share_is_that_of_the_same_resamples() -> None:
    random = np.random.default_rng(0)
    champion, challenger = (ranks(random.random(200) < share) for share in (0.6, 0.5))
    text_image = np.arange(200)
    found = compare(challenger, champion, text_image, number=4, margin=2.0)
    assert found.share == retention(recall_of_ranks(challenger), recall_of_ranks(champion))["mean"]
    assert found.interval == bootstrap_share(challenger, champion, text_image).mean
    assert (found.champion, found.margin) == (4, 2.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 96 photographs and the runs of two students."""
    home = tmp_path_factory.mktemp("promotion")
    cache = make_cache(home, make_model_folder(home / "teacher"), 96)
    student = make_student(home / "student.json")
    for name, epochs, seed in (("a", 2, 0), ("b", 1, 1)):
        train(train_config(cache, student, home / name, epochs=epochs, seed=seed, batch_size=32))
    for name, images, first in (("other", 30, 500), ("grown", 120, 0)):
        cache = make_cache(home / name, home / "teacher", images, first)
        train(train_config(cache, student, home / name / "run", epochs=1, batch_size=8))
    return home


ACCEPTED = {"accept_mismatch": ("dataset",)}


def settings(home: Path, registry: Path, run: str, **more: Any) -> PromoteConfig:
    return PromoteConfig(
        run=str(home / run),
        registry=str(registry),
        **{"split": "train", "accept_learned": True, "workers": 0, "device": "cpu", "margin": 99.0, **more},
    )


def test_a_student_is_not_measured_on_what_it_learned_from(home: Path, tmp_path: Path) -> None:
    """By content, whatever the cache and the split are called; the champion's advantage is told."""
    other = str(home / "grown" / "photos.cache")  # its first 96 of 120 images are to learn from, among them all of a's
    fair = {"accept_learned": False}
    with pytest.raises(UsageError, match=r"a: the student learned from 77 of the 77 images of .*, split 'train'"):
        promote(settings(home, tmp_path, "a", **fair))
    with pytest.raises(UsageError, match=r"learned from 77 of the 96 images .* Measure on another --split or --cache;"):
        promote(settings(home, tmp_path, "a", cache=other, **fair))
    assert not StudentRegistry(str(tmp_path)).candidates()

    first = promote(settings(home, tmp_path, "grown/run", cache=other, split="test", **fair)).candidate
    assert first.learned_images == 0
    assert list(first.learned_lines()) == []
    promote(settings(home, tmp_path / "r", "grown/run"))
    on = {"cache": str(home / "photos.cache"), "split": "test"}
    second = promote(settings(home, tmp_path / "r", "a", **on, **fair)).candidate
    assert second.comparison is not None
    assert (second.learned_images, second.comparison.champion_learned_images) == (0, 19)
    (said,) = second.learned_lines()
    assert said == "champion 1 learned from 19 of these 19 images: the comparison favours it"


def test_without_the_students_own_cache_it_is_said_not_to_be_known(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "a", tmp_path / "a")
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    record["config"]["cache"] = str(tmp_path / "moved.cache")
    (tmp_path / "a" / "run.json").write_text(json.dumps(record))
    other = {"cache": str(home / "grown" / "photos.cache"), "split": "test"}
    one = promote(settings(tmp_path, tmp_path / "r", "a", accept_learned=False, **other)).candidate
    assert one.learned_images is None
    unknown = "whether the student learned from these 24 images is not known, since its own cache cannot be read"
    assert list(one.learned_lines()) == [unknown]
    # a copy of the dataset's cache tells as well
    with pytest.raises(UsageError, match="learned from 77 of the 77 images"):
        promote(settings(tmp_path, tmp_path / "s", "a", accept_learned=False, cache=str(home / "photos.cache")))


def test_the_first_is_promoted_the_next_is_measured_against_it(home: Path, tmp_path: Path) -> None:
    first = promote(settings(home, tmp_path, "a"))
    assert first.promotion is not None
    assert first.candidate.comparison is None
    assert first.candidate.reason == "the first: there was no champion to compare it with"
    assert first.candidate.settings["epochs"] == 2
    second = promote(settings(home, tmp_path, "b"))
    assert second.candidate.comparison is not None
    assert second.candidate.comparison.champion_recalls == first.candidate.recalls
    assert second.candidate.comparison.champion == 1
    with pytest.raises(UsageError, match="is the champion already, student 2"):
        promote(settings(home, tmp_path, "b"))
    earlier, promotion = roll_back(str(tmp_path))
    assert (earlier.number, promotion.before, promotion.kind) == (1, 2, "rollback")
    assert StudentRegistry(str(tmp_path)).champion() == first.candidate


def test_a_champion_of_another_dataset_is_refused_by_name(home: Path, tmp_path: Path) -> None:
    """Measured on the challenger's images alone, champion 1 of another dataset would always lose."""
    before = f"champion 1 was measured on {home}/photos.cache, split 'train'"
    assert promote(settings(home, tmp_path, "a")).candidate.measured_cache == f"{home}/photos.cache"
    with pytest.raises(CacheMismatchError) as refused:
        promote(settings(home, tmp_path, "other/run"))
    absent = f"77 of its 77 images are not among the 24 of {home}/other/photos.cache, split 'train'."
    assert str(refused.value).startswith(
        f"{tmp_path}: {before}: {absent} Measure both there: --cache {home}/photos.cache --split 'train'; "
    )
    assert len(StudentRegistry(str(tmp_path)).candidates()) == 1
    there = promote(settings(home, tmp_path, "other/run", cache=str(home / "photos.cache"))).candidate
    assert (there.images, there.measured_cache) == (77, f"{home}/photos.cache")
    assert there.comparison is not None
    assert there.comparison.other_images is None
    knowingly = promote(settings(home, tmp_path, "a", cache=str(home / "other" / "photos.cache"), **ACCEPTED)).candidate
    assert knowingly.comparison is not None
    assert knowingly.comparison.other_images == f"{before.replace('1', '2', 1)}: {absent}"


@pytest.mark.parametrize(("first", "second"), [("a", "grown/run"), ("grown/run", "a")])
def test_a_dataset_that_grew_is_the_same(home: Path, tmp_path: Path, first: str, second: str) -> None:
    promote(settings(home, tmp_path, first))
    comparison = promote(settings(home, tmp_path, second)).candidate.comparison
    assert comparison is not None
    assert comparison.other_images is None


def test_a_champion_whose_cache_is_gone_is_compared_knowingly(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "photos.cache", tmp_path / "copy")
    promote(settings(home, tmp_path / "r", "a", cache=str(tmp_path / "copy")))
    same = promote(settings(home, tmp_path / "r", "b")).candidate.comparison  # the manifest is the same
    assert same is not None
    shutil.rmtree(tmp_path / "copy")
    promote(settings(home, tmp_path / "r", "a", cache=str(home / "grown" / "photos.cache"), **ACCEPTED))


def test_a_run_that_is_still_trained_is_no_candidate(home: Path, tmp_path: Path) -> None:
    """Its checkpoints are replaced as it goes on: the champion's weights would be gone."""
    shutil.copytree(home / "a", tmp_path / "a")
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    del record["epochs"][1:]
    (tmp_path / "a" / "run.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"a: 1 of 2 epochs are trained\. Finish it by teacher-cache train --resume"):
        promote(settings(tmp_path, tmp_path / "r", "a"))
    assert not list(StudentRegistry(str(tmp_path / "r")).candidates())


def test_one_that_is_worse_is_kept_with_the_reason_and_the_champion_stays(home: Path, tmp_path: Path) -> None:
    """The students are barely trained, so that which of them is worse is decided by measuring."""
    found = {run: promote(settings(home, tmp_path / run, run)).candidate.mean_recall for run in ("a", "b")}
    worse, better = sorted(found, key=lambda run: found[run])
    assert found[worse] < found[better]
    promote(settings(home, tmp_path / "r", better))
    result = promote(settings(home, tmp_path / "r", worse, margin=0.0))
    assert result.promotion is None
    assert not result.candidate.passed
    comparison = result.candidate.comparison
    assert comparison is not None
    assert comparison.interval is not None
    assert f"interval {comparison.interval.low:.1f} to" in result.candidate.reason
    assert result.candidate.reason.endswith("whose lower end must be at least 100")
    registry = StudentRegistry(str(tmp_path / "r"))
    assert [each.passed for each in registry.candidates()] == [True, False]
    assert registry.champion() == registry.candidate(1)


def test_a_student_below_what_the_teacher_demands_is_rejected(home: Path, tmp_path: Path) -> None:
    result = promote(settings(home, tmp_path, "a", min_retention=1000.0))
    assert result.promotion is None
    assert result.candidate.reason.endswith("of the teacher's mean recall, at least 1000 % wanted")
    assert StudentRegistry(str(tmp_path)).champion() is None


def test_a_champion_that_is_gone_or_changed_is_named(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "a", tmp_path / "a")
    promote(settings(tmp_path, tmp_path / "r", "a"))
    weights = next((tmp_path / "a" / "checkpoints").glob("*/open_clip_model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UsageError, match="these are not the weights of student 1"):
        promote(settings(home, tmp_path / "r", "b"))
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(UsageError, match="student 1 of the registry was there, and is gone"):
        promote(settings(home, tmp_path / "r", "b"))
    assert len(StudentRegistry(str(tmp_path / "r")).candidates()) == 1


def test_a_deployed_folder_of_another_checkpoint_is_refused(home: Path, tiny_deployment: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Deploy this one first"):
        promote(settings(home, tmp_path, "a", deployed=str(tiny_deployment)))


def test_a_deployed_folder_of_this_checkpoint_goes_with_it(home: Path, tiny_deployment: Path, tmp_path: Path) -> None:
    made = tmp_path / "deployed"
    made.mkdir()
    weights = Artefact.of(RunFolder(home / "a").checkpoint_path() / CHECKPOINT_WEIGHTS)
    Deployment.read(tiny_deployment).model_copy(update={"weights": weights}).write(made)
    assert promote(settings(home, tmp_path, "a", deployed=str(made))).candidate.deployed == str(made)


def test_the_commands(home: Path, tmp_path: Path) -> None:
    flags = ("--registry", str(tmp_path / "r"), "--split", "train", "--accept-learned", "--device", "cpu")
    empty = run("students", "list", str(tmp_path / "r"), cwd=home)
    assert (empty.returncode, empty.stdout) == (0, "")
    assert "no student yet; teacher-cache students promote --run RUN" in empty.stderr
    runs = run("students", "list", ".", cwd=home)
    assert (runs.returncode, runs.stdout) == (2, "")
    assert re.search(r"\.: no registry of students, but a folder of training runs\. It holds [ab]\. ", runs.stderr)
    assert "report CACHE --run RUN shows runs" in runs.stderr
    first = run("students", "promote", "--run", "a", *flags, cwd=home)
    assert first.returncode == 0, first.stderr
    verdict, where, learned = first.stdout.splitlines()
    assert verdict.startswith(f"student 1 of {tmp_path / 'r'}: promoted: the first")
    assert where == f"measured on {home}/photos.cache, split 'train': 77 images, 154 captions"
    assert learned == "the student learned from 77 of these 77 images"
    second = run("students", "promote", "--run", "b", *flags, "--min-retention", "1000", "--json", cwd=home)
    assert second.returncode == 1
    assert json.loads(second.stdout)["promotion"] is None
    shown = run("students", "list", str(tmp_path / "r"), cwd=home)
    paragraphs = [line for line in shown.stdout.splitlines() if line[:1] in ("1", "2")]
    assert [line[:10].strip() for line in paragraphs] == ["2 rejected", "1 champion"]
    assert re.search(r"keeps .* 1000", shown.stdout)
    listed = json.loads(run("students", "list", str(tmp_path / "r"), "--json", cwd=home).stdout)
    assert listed["champion"] == 1
    assert [each["passed"] for each in listed["students"]] == [True, False]
    champion = run("students", "list", str(tmp_path / "r"), "--champion", cwd=home).stdout
    assert champion == f"{home}/a/checkpoints/epoch-0002\n"
    back = run("students", "rollback", str(tmp_path / "r"), cwd=home)
    assert (back.returncode, back.stdout) == (2, "")
    assert "student 1 has no champion before it" in back.stderr
