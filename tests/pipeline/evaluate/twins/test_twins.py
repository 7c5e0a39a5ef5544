"""Twins: planted ones are found in every form of cache, lists of them are left out of training, mistakes are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageOps

from teacher_cache.pipeline.cli.app import app
from teacher_cache.pipeline.cli.report import _twins_parts
from teacher_cache.pipeline.evaluate.recall import recall_of_ranks
from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult
from teacher_cache.pipeline.evaluate.split import CachedTeacher, EvaluationSplit, embed
from teacher_cache.pipeline.evaluate.twins import find, near_rows
from teacher_cache.pipeline.evaluate.twins.find import Twins, find_twins
from teacher_cache.pipeline.evaluate.twins.near_rows import nearest_rows, usual_cosine
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.train import PixelsConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.pipeline.train.make_pixels import plan_pixels
from teacher_cache.storage.errors import CacheError, CacheIncompleteError, CacheMismatchError, UsageError
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import cache_digest, finish_known_cache, make_model_folder, plan_known_cache, write_photos
from tests.pipeline.train.train_work import make_student, measure, trace, train_config

PLANTED = {
    ("0000.jpg", "0032.jpg", "same bytes"),
    ("0001.jpg", "0033.jpg", "mirrored"),
    ("0002.jpg", "0034.jpg", "same picture"),
    ("0003.jpg", "0035.jpg", "same picture"),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs 0 to 31 to train on, and 32 to 39 to test on: four of them are twins; 5 and 39 are cut short."""
    root = write_photos(tmp_path_factory.mktemp("twins") / "photos", 40)
    name = "{}/images/{:04d}.jpg".format
    shutil.copy(name(root, 0), name(root, 32))
    ImageOps.mirror(Image.open(name(root, 1))).save(name(root, 33))
    Image.open(name(root, 2)).save(name(root, 34), quality=50)
    picture = Image.open(name(root, 3))
    picture.crop((0, 0, *(round(0.95 * side) for side in picture.size))).save(name(root, 35))
    for number in (5, 39):
        path = Path(name(root, number))
        path.write_bytes(path.read_bytes()[:-200])
    return root


def cached(photos: Path, teacher: Path, cache: Path, **changes: Any) -> str:
    settings: dict[str, Any] = {"batch_size": 8, "chunk_rows": 8, "device": "cpu", "max_problems": 9, **changes}
    dataset = settings.pop("dataset", f"flickr:{photos}")
    precompute(PrecomputeConfig(dataset=dataset, teacher=f"local-dir:{teacher}", cache=str(cache), **settings))
    return str(cache)


@pytest.fixture(scope="module")
def cache(photos: Path, tiny_teacher: Path) -> str:
    return cached(photos, tiny_teacher, photos.parent / "photos.cache")


@pytest.fixture(scope="module")
def listed(cache: str) -> str:
    """The list of the twins of ``cache``, by the command, with its page."""
    folder = Path(cache).parent
    out, page = str(folder / "twins.json"), str(folder / "twins.html")
    done = CliRunner().invoke(app, ["twins", cache, "--out", out, "--html", page])
    assert done.exit_code == 0, done.output
    assert "photos.cache, train: 4 of 31 images have a twin among 7 other images" in done.stdout
    assert "not compared: 2 images without an embedding" in done.stdout
    assert f"next: teacher-cache train --cache {cache} --exclude {out}" in done.stderr
    return out


def named(twins: Twins) -> set[tuple[str, str, str]]:
    return {(twin.sample_id, twin.twin, twin.kind) for twin in twins.twins}


@pytest.mark.parametrize("form", ["float16", "int8", "views", "parts"])
def test_planted_twins_are_found_in_every_form_of_cache(
    form: str, photos: Path, cache: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    own = {"int8": {"dtype": "int8"}, "views": {"views": 2}}.get(form)
    location = cache if own is None else cached(photos, tiny_teacher, tmp_path / "own.cache", **own)
    if form == "parts":
        for part in ("1/2", "2/2"):
            cached(photos, tiny_teacher, tmp_path / f"{part[0]}.cache", part=part, reuse=cache)
        location = f"{tmp_path}/*.cache"
    before = "" if form == "parts" else cache_digest(Path(location))
    twins = find_twins(location)
    assert named(twins) == PLANTED
    assert (twins.images, twins.others, twins.quarantined, twins.unread, twins.cut) == (31, 7, 2, 0, 0)
    assert named(find_twins(location, cache, against_split="test")) == PLANTED
    assert form != "float16" or named(find_twins(location, location)) == PLANTED  # not the images to learn from
    assert form == "parts" or cache_digest(Path(location)) == before


def test_images_without_splits_are_compared_with_another_cache(
    photos: Path, cache: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    loose = tmp_path / "loose"
    loose.mkdir()
    for number in (1, 7):
        ImageOps.mirror(Image.open(photos / "images" / f"{number:04d}.jpg")).save(loose / f"copy-{number}.png")
    other = cached(photos, tiny_teacher, tmp_path / "loose.cache", dataset=f"images:{loose}")
    found = {("0001.jpg", "copy-1.png", "mirrored"), ("0007.jpg", "copy-7.png", "mirrored")}
    assert named(find_twins(cache, other)) == found
    assert {pair[:2] for pair in named(find_twins(other, cache, against_split="train"))} == {
        (twin, own) for own, twin, _ in found
    }


def test_more_copies_than_are_listed_are_told(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("_MOST_NEAR", "_MISSES"):
        monkeypatch.setattr(find, limit, 1)
    stages = set[str]()
    twins = find_twins(cache, progress=lambda stage, done, total: stages.add(stage))
    assert (named(twins), twins.cut, stages) == (PLANTED, 4, {"compare rows", "compare pictures"})
    assert "4 other images have 16 twins or more, of which 16 are listed" in "\n".join(map(str, _twins_parts(twins)))


def test_pictures_that_cannot_be_read_are_counted_and_named(cache: str, tmp_path: Path) -> None:
    twins = find_twins(cache, image_root=str(tmp_path))
    assert named(twins) == {("0000.jpg", "0032.jpg", "same bytes")}  # told without the pictures
    assert twins.unread >= 3
    assert "Name their folder with --image-root" in str(twins.unread_first)


@pytest.mark.parametrize("spread", [0.05, 1.0])  # few dimensions hold nearly all of it, or none does
def test_the_nearest_rows_are_those_of_the_whole_product(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_rows, "_BLOCK_ROWS", 64)
    monkeypatch.setattr(near_rows, "_PRUNED_PAIRS", 100)
    draw = np.random.default_rng(0)
    values = draw.standard_normal((500, 300)) * np.where(np.arange(300) < 20, 1, spread)
    values[300:] = values[:200] + 0.3 * spread * draw.standard_normal((200, 300))
    rows = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)
    gallery: Any = SimpleNamespace(take=lambda tower, numbers: rows[:300][numbers])
    queries, numbers = rows[300:], np.arange(5, 300)
    found = nearest_rows(queries, gallery, numbers, 0.6, 3)
    cosines = queries.astype(np.float64) @ rows[numbers].astype(np.float64).T
    order = np.argsort(-cosines, axis=1)[:, :3]
    wanted = [(query, row) for query in range(200) for row in order[query] if cosines[query, row] >= 0.6]
    assert len(wanted) > 150
    assert list(zip(found.query.tolist(), found.row.tolist(), strict=True)) == [(q, int(r) + 5) for q, r in wanted]
    pairs = (queries.astype(np.float64) @ queries.astype(np.float64).T)[~np.eye(200, dtype=bool)]
    assert usual_cosine(queries) == pytest.approx(pairs.mean(), abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"against": "{stopped}"}, CacheIncompleteError, "1 of .* chunks"),
        ({"against": "{other}"}, CacheMismatchError, "teacher.weights_sha256: .* cannot be compared with"),
        ({"split": "dev"}, UsageError, "no split 'dev'; this cache has 'train' .32 images., 'test' .8 images."),
        ({"against_split": "train"}, UsageError, "'train' is the split to learn from"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(
    settings: dict[str, str], error: type[Exception], message: str, photos: Path, cache: str, tmp_path: Path
) -> None:
    stopped, other = str(tmp_path / "stopped.cache"), str(tmp_path / "other.cache")
    if settings.get("against") == "{stopped}":
        plan_known_cache(stopped)
        finish_known_cache(stopped, chunks=1)
    if settings.get("against") == "{other}":
        teacher = make_model_folder(tmp_path / "teacher", seed=1)
        cached(photos, teacher, Path(other), dataset=f"images:{photos}/images")
    with pytest.raises(error, match=message):
        find_twins(cache, **{name: value.format(stopped=stopped, other=other) for name, value in settings.items()})


def changed_list(listed: str, path: Path, **changes: Any) -> str:
    path.write_text(json.dumps(json.loads(Path(listed).read_text()) | changes))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples_sha256": "ab" * 32}, "of .*photos.cache, images abababababab, and .*photos.cache has the images"),
        ({"split": "dev"}, "a list of split 'dev', and the run learns from 'train'"),
        ({"twins": [{"sample_id": "nowhere.jpg"}]}, "no image has the sample_id 'nowhere.jpg'"),
        ({"twins": 3}, "no list of twins: teacher-cache twins .* writes one"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, cache: str, listed: str, tmp_path: Path
) -> None:
    exclude = changed_list(listed, tmp_path / "list.json", **changes)
    with pytest.raises((UsageError, CacheError), match=message):
        train(train_config(Path(cache), make_student(tmp_path / "s.json"), tmp_path / "run", exclude=exclude))


def test_listed_images_are_left_out_and_recorded(cache: str, listed: str, tmp_path: Path) -> None:
    student = make_student(tmp_path / "student.json")
    for out, exclude in (("all", None), ("rest", listed)):
        train(train_config(Path(cache), student, tmp_path / out, epochs=1, exclude=exclude))
    every, rest = (RunFolder(tmp_path / out).read() for out in ("all", "rest"))
    assert (every.train_images, every.excluded) == (31, None)
    assert rest.excluded is not None
    assert (rest.train_images, rest.excluded.images, rest.excluded.path) == (27, 4, listed)
    assert len(trace(tmp_path / "rest")) == 3  # of 27 images 3 batches of 8
    pixels = plan_pixels(PixelsConfig(cache=cache, student=str(student), out=str(tmp_path / "px"), exclude=listed))
    assert {*range(32)} - set(pixels.rows.tolist()) == {0, 1, 2, 3, 5}

    done = CliRunner().invoke(app, ["evaluate", "--run", str(tmp_path / "all"), "--device", "cpu", "--json"])
    assert "compare pictures: " in done.stderr
    assert "4 test images have a twin in training; without them: mean recall of the teacher" in done.stderr
    measured = EvaluateResult.model_validate_json(done.stdout)
    assert measured.learned_images == 1
    assert measured.twins is not None
    assert (measured.twins.images, measured.twins.unread) == (4, 0)
    split = EvaluationSplit.of(EmbeddingReader(cache), "test")
    images, texts = embed(split, CachedTeacher())
    owners = np.repeat(np.arange(3), 2)
    kept = EvaluationSplit(split.reader, "test", split.image_rows[4:], split.caption_rows[8:], owners, "", ())
    assert measured.twins.teacher == recall_of_ranks(kept.ranks(images[4:], texts[8:]))
    without = measure(tmp_path / "rest")
    assert (without.learned_images, without.twins and without.twins.images) == (0, 0)

    train(rest.config, resume=True)
    for exclude, message in (
        (None, r"exclude is None, the run has '.*twins.json .sha256"),
        (changed_list(listed, tmp_path / "less.json", twins=[]), r"exclude is '.*less.json .*, the run has '.*twins"),
    ):
        with pytest.raises(UsageError, match=rf"other settings: {message}"):  # the run is finished
            train(rest.config.model_copy(update={"exclude": exclude}), resume=True)


def test_the_page_has_both_pictures_of_each_pair(listed: str) -> None:
    page = Path(listed).with_suffix(".html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 8
    assert all(name in page for name in ("0000.jpg", "0032.jpg", "same bytes", "mirrored"))
    assert "<script" not in page
