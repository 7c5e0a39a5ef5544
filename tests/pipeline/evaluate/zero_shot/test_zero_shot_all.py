"""All datasets of CLIP's table by one command: a row for each, also where one cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from teacher_cache.pipeline.cli.evaluate import _datasets_table
from teacher_cache.pipeline.data.datasets.prompts import prompt_set
from teacher_cache.pipeline.evaluate.zero_shot import all_datasets as zero_shot_all_module
from teacher_cache.pipeline.evaluate.zero_shot import cache as zero_shot_cache
from teacher_cache.pipeline.evaluate.zero_shot.all_datasets import CLIP_DATASETS, zero_shot_all
from teacher_cache.pipeline.evaluate.zero_shot.measure import ZeroShotResult, zero_shot
from teacher_cache.pipeline.settings.evaluate import ZeroShotConfig
from teacher_cache.storage.errors import CacheMismatchError, UsageError
from tests.conftest import make_model_folder
from tests.pipeline.cli.test_cli import run
from tests.pipeline.data.dataset_files import birdsnap, hateful_memes, kinetics700, save_image, ucf101
from tests.pipeline.data.datasets.test_labelled import write_mnist

MEASURES = {
    "birdsnap": "top-1",
    "hateful_memes": "ROC AUC",
    "kinetics700": "mean of top-1 and top-5",
    "mnist": "top-1",
    "pets": "mean per class",
    "ucf101": "top-1",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The four published forms, arrays of torchvision, class folders of two splits, and a dataset that is none."""
    root = tmp_path / "datasets"
    for write in (birdsnap, ucf101, hateful_memes, kinetics700):
        (root / write.__name__).mkdir(parents=True)
        write(root / write.__name__)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28)).astype(np.uint8)
    write_mnist(root / "mnist", pixels, [7, 0, 9])
    for split in ("train", "test"):
        save_image(root / "pets" / split / "beagle" / f"{split}.png", 90)
        save_image(root / "pets" / split / "pug" / f"{split}.png", 20)
    for folder in ("dtd", "holidays", ".hidden"):
        (root / folder).mkdir()
    return root


def test_clips_table_has_27_datasets_with_prompts() -> None:
    assert len(CLIP_DATASETS) == 27
    assert all(prompt_set(name).templates for name in CLIP_DATASETS)


def test_one_command_measures_every_dataset_that_is_there(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = f"local-dir:{make_model_folder(tmp_path / 'teacher')}"
    done = run(
        "zero-shot", "--all", str(root), "--teacher", teacher, "--cache", "caches", "--device", "cpu", cwd=tmp_path
    )
    assert done.returncode == 1, done.stderr  # dtd has no images
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    assert lines["hateful_memes"][1:5] == ["2", "2", "ROC", "AUC"]
    assert lines["birdsnap"][1:4] == ["2", "500", "top-1"]
    assert lines["pets"][1:3] == ["2", "37"]  # of the test split alone
    assert lines["dtd"][1:5] == ["-", "-", "not", "measured"]
    assert "6 of 27 datasets" in done.stdout
    assert "dtd: not measured: " in done.stderr
    assert "birdsnap: left out: 1 image, the first: images/Osprey/3.jpg" in done.stderr
    assert "not there: caltech101, cars, cifar10, " in done.stderr
    assert "no dataset of CLIP's table: holidays" in done.stderr
    # the second time no teacher runs
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zero_shot_cache, "load_teacher", None)
    again = zero_shot_all(ZeroShotConfig(dataset=str(root), all=True, cache="caches", device="cpu"))
    rows = {row.name: row for row in again.rows}
    assert {name: row.measure for name, row in rows.items() if not row.problem} == MEASURES
    assert (again.ok, len(again.missing)) == (False, 27 - 7)
    assert not any(rows[name].result.teacher_ran for name in MEASURES)
    assert [lines[name][-1] for name in MEASURES] == [f"{rows[name].teacher:.1f}" for name in MEASURES]
    assert lines["mean"][-1] == f"{np.mean([rows[name].teacher for name in MEASURES]):.1f}"
    # each row is what the dataset alone measures
    alone = ZeroShotConfig(
        dataset=f"imagefolder:{root / 'pets'}", prompts="pets", split="test", cache="caches/pets.cache", device="cpu"
    )
    assert rows["pets"].teacher == zero_shot(alone).teacher["mean per class"]
    clips = rows["kinetics700"].result.teacher
    assert rows["kinetics700"].teacher == (clips["top-1"] + clips["top-5"]) / 2


def test_the_mean_is_over_the_measured_datasets(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(config: ZeroShotConfig, progress: None) -> ZeroShotResult:
        top = {"pets": 80.0, "mnist": 40.0}.get(config.prompts)
        if top is None:
            raise {"ucf101": CacheMismatchError, "birdsnap": PermissionError}.get(config.prompts, UsageError)("no way")
        teacher, student = ({"top-1": 1.0, "top-5": 99.0, "mean per class": top * part} for part in (1, 0.5))
        return ZeroShotResult(
            **{"dataset": config.dataset, "images": 2, "classes": 10, "prompts": ("a",), "undecodable": ()},
            **{"undecodable_images": 0, "teacher": teacher, "student": student, "chance": {}, "seconds": 1},
            **dict.fromkeys(("teacher_name", "cache", "run")),
        )

    monkeypatch.setattr(zero_shot_all_module, "zero_shot", measured)
    result = zero_shot_all(ZeroShotConfig(dataset=str(root), all=True, teacher="ViT-B-32"))
    assert {row.name for row in result.rows if row.problem == "no way"} == set(MEASURES) - {"pets", "mnist"} | {"dtd"}
    rows = {row.name: (row.teacher, row.student, row.share) for row in (*result.rows, result.mean)}
    assert rows["pets"] == (80, 40, 50)
    assert rows["mnist"] == (1, 1, 100)
    assert rows["mean"] == (40.5, 20.5, pytest.approx(100 * 20.5 / 40.5))
    table = list(_datasets_table(result).lines(None))
    assert table[0].endswith("2 of 27 datasets, in percent")
    assert table[-1].split() == ["mean", "-", "-", "40.5", "20.5", "50.6"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"split": "test"}, "--split with --all: each dataset has its own"),
        ({"class_names": "a.json"}, "--class-names with --all"),
        ({"dataset": "gone"}, "--all gone: no such folder"),
        ({"cache": "one"}, "--cache one is one cache; with --all name a folder"),
        ({"dataset": "one"}, "no folder of a dataset in it; it holds no folders. Name them birdsnap, caltech101"),
        ({"teacher": None}, "nothing to measure"),
        ({"run": "gone"}, "gone: no run here"),
    ],
)
def test_settings_that_do_not_suit_all_datasets(
    settings: dict[str, str | None], said: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match=said):
        zero_shot_all(ZeroShotConfig(**{"dataset": str(root), "all": True, "teacher": "ViT-B-32", **settings}))
