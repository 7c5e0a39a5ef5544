"""A dataset encoded in parts, by processes that share no store: read as one, it is the cache of the whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from teacher_cache.pipeline.cli.app import app
from teacher_cache.pipeline.data.datasets.records import Problem, SampleSet, WholeList
from teacher_cache.pipeline.data.datasets.samples import list_samples
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec, check_dataset
from teacher_cache.pipeline.precompute.lost_samples import require_few_problems
from teacher_cache.pipeline.precompute.plan import PlanSettings
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.errors import CacheError, UsageError
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import cache_digest
from tests.pipeline.train.train_work import make_student, measure, trace, train_config

PARTS = 3


def part_config(whole: Path, teacher: Path, cache: Path, part: str, **changes: Any) -> PrecomputeConfig:
    """One part of the photographs of ``photo_cache``, whose rows are copied."""
    dataset = EmbeddingReader(str(whole)).manifest.source.dataset
    settings = {"batch_size": 8, "chunk_rows": 8, "device": "cpu", "reuse": str(whole), **changes}
    return PrecomputeConfig(dataset=dataset, teacher=f"local-dir:{teacher}", cache=str(cache), part=part, **settings)


@pytest.fixture(scope="module")
def parts(photo_cache: Path, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three caches, of 13, 13 and 14 of the 40 photographs."""
    folder = tmp_path_factory.mktemp("parts")
    for number in range(1, PARTS + 1):
        precompute(part_config(photo_cache, tiny_teacher, folder / f"{number}.cache", f"{number}/{PARTS}"))
    return folder


def said(*words: object) -> str:
    done = CliRunner().invoke(app, [*map(str, words)], prog_name="teacher-cache")
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_parts_are_the_whole(photo_cache: Path, parts: Path) -> None:
    one, several = EmbeddingReader(str(photo_cache)), EmbeddingReader(f"{parts}/*.cache")
    assert [part.manifest.layout.image_rows for part in several.parts.members] == [13, 13, 14]
    assert several.samples.equals(one.samples)
    assert several.captions.equals(one.captions)
    np.testing.assert_array_equal(several.take("image", np.arange(40)), one.take("image", np.arange(40)))
    np.testing.assert_array_equal(several.take("text", np.arange(80)), one.take("text", np.arange(80)))
    assert several.identity.dataset.splits == one.identity.dataset.splits
    assert several.lookup(image_sha256=one.samples["content_sha256"].to_pylist()[30:]).image_rows.tolist() == [
        *range(30, 40)
    ]


def test_one_cache_is_copied_from_parts(photo_cache: Path, tiny_teacher: Path, parts: Path, tmp_path: Path) -> None:
    config = part_config(photo_cache, tiny_teacher, tmp_path / "one.cache", "1/1", reuse=f"{parts}/*.cache")
    assert precompute(config).rows_reused == {"image": 40, "text": 80}
    assert cache_digest(tmp_path / "one.cache" / "targets.zarr") == cache_digest(photo_cache / "targets.zarr")


def test_a_student_learns_the_same_from_parts(photo_cache: Path, parts: Path, tmp_path: Path) -> None:
    """The same rows in the same order give the same bits; no part is changed."""
    student, before = make_student(tmp_path / "student.json"), cache_digest(parts)
    for name, cache in (("one", photo_cache), ("several", Path(f"{parts}/*.cache"))):
        train(train_config(cache, student, tmp_path / name))
    one, several = ([(line["step"], line["loss"]) for line in trace(tmp_path / name)] for name in ("one", "several"))
    assert one == several
    recalls = [measure(tmp_path / name).model_dump()["student"] for name in ("one", "several")]
    assert recalls[0] == recalls[1]
    assert cache_digest(parts) == before


def test_commands_take_a_pattern(photo_cache: Path, parts: Path, tmp_path: Path) -> None:
    pattern = f"{parts}/*.cache"
    info = json.loads(said("info", pattern, "--json"))
    assert (info["parts"], info["layout"]["image_rows"], info["chunks"]) == (3, 40, 6 + 12)
    assert "3 caches, read as one" in said("info", pattern)
    stats = [json.loads(said("stats", cache, "--json"))["true_pairs"] for cache in (pattern, photo_cache)]
    assert stats[0] == stats[1]
    for name, cache in (("one", photo_cache), ("several", pattern)):
        said("export", cache, "--out", tmp_path / name, "--captions", "all")
    exported = [np.load(tmp_path / name / "text_emb" / "text_emb_0.npy") for name in ("one", "several")]
    np.testing.assert_array_equal(*exported)
    assert said("look", pattern, "0039.jpg").replace(pattern, "") == said("look", photo_cache, "0039.jpg").replace(
        str(photo_cache), ""
    )


def test_verify_names_the_damaged_part_and_pictures_in_several(
    photo_cache: Path, tiny_teacher: Path, parts: Path, tmp_path: Path
) -> None:
    pattern = f"{parts}/*.cache"
    report = json.loads(said("verify", pattern, "--json"))
    assert (report["ok"], report["images"], report["repeated"]) == (True, 40, [])
    copies = tmp_path / "parts"
    shutil.copytree(parts, copies)
    precompute(part_config(photo_cache, tiny_teacher, copies / "4.cache", "4/20"))  # 2 photographs of the first part
    again = json.loads(said("verify", f"{copies}/*.cache", "--json"))["repeated"]
    assert [line.replace(f"{copies}/", "") for line in again] == [
        "0006.jpg of 1.cache and 0006.jpg of 4.cache",
        "0007.jpg of 1.cache and 0007.jpg of 4.cache",
    ]
    chunk = next((copies / "2.cache" / "targets.zarr").rglob("c/1/*"))
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    done = CliRunner().invoke(app, ["verify", f"{copies}/*.cache", "--json"], prog_name="teacher-cache")
    findings = json.loads(done.stdout)["findings"]
    assert done.exit_code == 1
    assert {finding["key"].partition("/")[0] for finding in findings} == {"2.cache"}


def test_chunks_have_the_size_that_suits_the_whole(photo_cache: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    config = part_config(photo_cache, tiny_teacher, tmp_path / "a.cache", "2/3", chunk_rows=None)
    identity = EmbeddingReader(str(photo_cache)).identity
    listed = list_samples(DatasetSpec.parse(config.dataset))
    assert (len(listed.samples), listed.whole) == (13, WholeList(40, 80, ()))
    layout = PlanSettings.of(config).layout(identity, "cpu", whole=WholeList(100_000, 500, ()))
    assert (layout.image_chunk_rows, layout.text_chunk_rows) == (4096, 64)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("flickr:{photos}?part=4/3", "part='4/3' is no part"),
        ("flickr:{photos}?part=0/3", "is no part"),
        ("labelled:{photos}?part=1/3", "share the prompts of all classes"),
    ],
)
def test_what_is_no_part_is_refused(photo_cache: Path, dataset: str, message: str) -> None:
    photos = DatasetSpec.parse(EmbeddingReader(str(photo_cache)).manifest.source.dataset).root
    with pytest.raises(UsageError, match=message):
        check_dataset(dataset.format(photos=photos))


def test_more_parts_than_images_and_another_part_are_refused(photo_cache: Path, tiny_teacher: Path) -> None:
    dataset = EmbeddingReader(str(photo_cache)).manifest.source.dataset
    with pytest.raises(UsageError, match="40 images cannot be cut into 41 parts"):
        list_samples(DatasetSpec.parse(f"{dataset}?part=1/41"))
    with pytest.raises(ValidationError, match="part"):
        part_config(photo_cache, tiny_teacher, Path("a.cache"), "half")


def test_the_list_is_judged_for_every_part_and_counted_in_the_first(photo_cache: Path, tiny_teacher: Path) -> None:
    """3 % of the list have no caption: no part is refused for them; a broken tar stops every part."""
    samples = list_samples(DatasetSpec.parse(EmbeddingReader(str(photo_cache)).manifest.source.dataset)).samples

    def judge(part: str, *problems: Problem) -> int:
        config = part_config(photo_cache, tiny_teacher, Path("a.cache"), part)
        spec = DatasetSpec.parse(config.dataset)
        assert spec.part is not None
        cut = spec.part.of(SampleSet("flickr", "photos", samples * 30, [*problems]))
        require_few_problems(config, spec, cut)
        return len(cut.problems)

    bare = [Problem("no-caption", f"{number}.jpg", "no caption names it", lost_image=True) for number in range(36)]
    assert [judge(f"{number}/100", *bare) for number in (1, 2)] == [36, 0]
    for number in (1, 2):
        with pytest.raises(CacheError, match="cannot be read to the end"):
            judge(f"{number}/100", Problem("broken-file", "7.tar", "cut short", lost_image=False))


def test_a_run_goes_on_from_another_folder_and_missing_parts_are_told(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However the pattern is written; and a cache cannot be written to one."""
    monkeypatch.chdir(parts.parent)
    relative = EmbeddingReader(f"{parts.name}/*.cache")
    assert relative.manifest.digest == EmbeddingReader(f"{parts}/*").manifest.digest
    shutil.copytree(parts, tmp_path / "some")
    shutil.rmtree(tmp_path / "some" / "2.cache")
    capsys.readouterr()
    EmbeddingReader(f"{tmp_path}/some/*.cache")
    assert "1 part of the dataset missing: 2" in capsys.readouterr().err
    with pytest.raises(UsageError, match="one cache is wanted here"):
        precompute(PrecomputeConfig(dataset="scenes:s", teacher="bundled:scenes", cache=f"{parts}/*.cache"))
