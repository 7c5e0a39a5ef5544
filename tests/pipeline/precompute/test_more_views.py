"""Caches of several views, and a new cache with more views that copies the rows of one with fewer."""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from PIL import Image

import teacher_cache.pipeline.precompute.run
from teacher_cache.pipeline.cli.app import app
from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.pipeline.precompute.encode import encode_chunks
from teacher_cache.pipeline.precompute.forecast import forecast
from teacher_cache.pipeline.precompute.plan import plan_precompute
from teacher_cache.pipeline.precompute.repair import repair
from teacher_cache.pipeline.precompute.run import PrecomputeResult, precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheCorruptError, CacheMismatchError, UsageError
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.look.info import describe_cache
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import make_model_folder, write_photos
from tests.pipeline.precompute.conftest import Rows, contents, forge, make_config, prove, settings
from tests.precompute_process import finish, start

IMAGES, PER_VIEW, TEXT = 20, 3, 5  # 20 images and 40 captions in chunks of 8
LOST = 6


class Home:
    """Photographs, one of which cannot be decoded; a cache of one view and one of three, made at once."""

    def __init__(self, root: Path, teacher: Path) -> None:
        self.root, self.teacher = root, f"local-dir:{teacher}"
        self.photos = write_photos(root / "photos", IMAGES)
        (self.photos / "images" / f"{LOST:04d}.jpg").write_bytes(b"not an image")
        self.one, self.three = root / "one", root / "three"
        self.make(self.one)
        self.make(self.three, views=3)

    def config(self, cache: Path, **changes: Any) -> PrecomputeConfig:
        return PrecomputeConfig(**self.settings(cache, **changes))

    def settings(self, cache: Path, **changes: Any) -> dict[str, Any]:
        return settings(self.photos, self.teacher, cache, **{"decode_threads": 2, **changes})

    def make(self, cache: Path, **changes: Any) -> PrecomputeResult:
        return precompute(self.config(cache, **changes))

    def copy(self, cache: Path, to: Path) -> Path:
        return shutil.copytree(cache, to)


@pytest.fixture(scope="module")
def home(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home"), tiny_teacher)


def states(cache: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time of change and bytes of every file, the journal included."""
    found = {}
    for path in cache.rglob("*"):
        if path.is_file():
            status = path.stat()
            found[path.relative_to(cache).as_posix()] = (status.st_ino, status.st_mtime_ns, path.read_bytes())
    return found


def test_only_the_missing_views_meet_the_teacher(home: Home, tmp_path: Path, taught: Counter[str]) -> None:
    """The teacher sees views 1 to 4 of each image: no view 0 and no caption."""
    dataset = f"flickr:{write_photos(tmp_path / 'photos', IMAGES)}"
    home.make(tmp_path / "one", dataset=dataset)
    before = states(tmp_path / "one")
    taught.clear()
    result = home.make(tmp_path / "five", dataset=dataset, views=5, reuse=str(tmp_path / "one"))
    assert taught == {"image": 4 * IMAGES}
    assert (result.views, result.rows_reused) == (5, {"image": IMAGES, "text": 2 * IMAGES})
    assert verify_cache(str(tmp_path / "five")).ok
    assert states(tmp_path / "one") == before


def test_it_equals_a_cache_of_three_views_at_once(home: Home, tmp_path: Path) -> None:
    home.make(tmp_path / "three", views=3, reuse=str(home.one))
    assert contents(tmp_path / "three") == contents(home.three)
    home.make(tmp_path / "two", views=2, reuse=str(home.one))
    home.make(tmp_path / "steps", views=3, reuse=str(tmp_path / "two"))
    assert contents(tmp_path / "steps") == contents(home.three)


def test_more_views_of_a_finished_cache_are_refused_with_the_command_that_makes_them(
    home: Home, tmp_path: Path
) -> None:
    cache, asked = home.copy(home.one, tmp_path / "c"), {"views": 3, "chunk_rows": None, "batch_size": None}
    before = states(cache)
    with pytest.raises(CacheMismatchError, match=r"views\.count: 1 in the cache, 3 asked for, and a cache never") as no:
        home.make(cache, **asked)
    with pytest.raises(CacheMismatchError, match=re.escape(str(no.value))):
        forecast(home.config(cache, **asked))
    assert states(cache) == before
    command = str(no.value).partition(": teacher-cache ")[2].replace("--cache NEW", f"--cache {tmp_path / 'new'}")
    done = CliRunner().invoke(
        app, [*shlex.split(command), "--device", "cpu", "--batch-size", "4", "--set", "chunk_rows=8"]
    )
    assert done.exit_code == 0, done.output
    assert contents(tmp_path / "new") == contents(home.three)


def test_more_views_of_an_unfinished_cache_are_refused(home: Home, tmp_path: Path) -> None:
    config = home.config(tmp_path / "c")
    plan_precompute(config, load_teacher(config.teacher, device="cpu"))
    with pytest.raises(CacheMismatchError, match=r"3 asked for, .* Leave --views out to finish it"):
        home.make(tmp_path / "c", views=3)


def test_zarr_shows_all_views(home: Home) -> None:
    group, reader = zarr.open_group(str(home.three / "targets.zarr"), mode="r"), EmbeddingReader(str(home.three))
    assert group["image/embedding"].shape == (IMAGES, 3, 16)
    rows = reader.image_rows()
    for view in range(3):
        for name in ("embedding", "norm", "view"):
            plain = np.asarray(group[f"image/{name}"])[rows, view]
            np.testing.assert_array_equal(reader.take("image", rows, view, array=name), plain)


def test_rows_of_many_views_in_one_call(home: Home) -> None:
    reader = EmbeddingReader(str(home.three))
    order = np.random.default_rng(0).permutation(3 * (IMAGES - 1))
    rows, views = np.tile(reader.image_rows(), 3)[order], np.repeat(np.arange(3), IMAGES - 1)[order]
    for name in ("embedding", "norm", "view"):
        one_by_one = [reader.take("image", rows[[at]], int(views[at]), array=name)[0] for at in range(len(rows))]
        np.testing.assert_array_equal(reader.take("image", rows, views, array=name), one_by_one)
    fresh = EmbeddingReader(str(home.three))
    fresh.take("image", rows, views)
    assert fresh.objects_read == 3 * PER_VIEW  # each chunk once
    assert len(fresh.take("image", rows[:0], views[:0])) == 0
    with pytest.raises(IndexError, match="image view 3 asked for, views are 0 to 2"):
        reader.take("image", rows[:2], np.array([0, 3]))
    with pytest.raises(IndexError, match="text view 1 asked for, views are 0 to 0"):
        reader.take("text", rows[:2], 1)
    with pytest.raises(ValueError, match=r"2 rows and views of shape \(3,\)"):
        reader.take("image", rows[:2], np.array([0, 1, 2]))
    with pytest.raises(CacheCorruptError, match=rf"image row {LOST}, view 2, was quarantined"):
        reader.take("image", np.array([3, LOST]), np.array([1, 2]))


def test_fewer_views_than_there_are_is_the_cache_as_it_is(home: Home) -> None:
    before = contents(home.three)
    for views in (1, 2, 3, None):
        result = home.make(home.three, views=views)
        assert (result.views, result.chunks_encoded, result.replaced_manifest_digest) == (3, 0, None)
    assert contents(home.three) == before


@pytest.mark.parametrize(
    ("field", "changes", "said"),
    [
        ("scale", {"crop_scale": (0.5, 1.0)}, r"\[0.3, 1.0\] in the cache, \[0.5, 1.0\] asked for"),
        ("ratio", {"crop_ratio": (1.0, 1.0)}, r"\[0.75, 1.3333333333333333\] in the cache, \[1.0, 1.0\]"),
        ("flip", {"crop_flip": 0.0}, "0.5 in the cache, 0.0 asked for"),
        ("seed", {"view_seed": 1}, "0 in the cache, 1 asked for"),
    ],
)
def test_other_crops_than_the_caches_are_refused_by_name(
    home: Home, field: str, changes: dict[str, Any], said: str
) -> None:
    before = contents(home.three)
    for views in (None, 2, 3):
        with pytest.raises(CacheMismatchError, match=rf"views\.{field}: {said}"):
            home.make(home.three, views=views, **changes)
    assert contents(home.three) == before


def test_new_views_are_drawn_as_those_of_the_reused_cache(home: Home, tmp_path: Path) -> None:
    """Settings left out are those of the cache that --reuse names, not the defaults."""
    changes: dict[str, Any] = {"crop_scale": (0.5, 0.9), "crop_flip": 0.0, "view_seed": 3}
    home.make(tmp_path / "two", views=2, **changes)
    home.make(tmp_path / "c", views=3, reuse=str(tmp_path / "two"))
    home.make(tmp_path / "whole", views=3, **changes)
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")
    shares = []
    reader = EmbeddingReader(str(tmp_path / "c"))
    for row in reader.image_rows():
        with Image.open(home.photos / "images" / f"{row:04d}.jpg") as image:
            width, height = image.size
        boxes = reader.take("image", np.array([row, row]), np.array([1, 2]), array="view")
        shares += [box[2] * box[3] / (width * height) for box in boxes]
        assert not boxes[:, 4].any()
    assert 0.49 < min(shares) < 0.7 < max(shares) < 0.91


def test_crop_settings_without_random_crops_are_bad_usage(home: Home, tmp_path: Path) -> None:
    for views in (None, 1):
        with pytest.raises(UsageError, match=r"crop_scale, .* there are none in 1 view: ask for --views 2"):
            home.make(tmp_path / "c", views=views, crop_scale=(0.5, 1.0))
    for span in ((0.0, 1.0), (0.5, 0.4), (0.5, 1.5)):
        with pytest.raises(ValueError, match="0 < least <= greatest <= 1 is required"):
            home.config(tmp_path / "c", views=2, crop_scale=span)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("moment", ["decode", "teacher", "targets.zarr/image/norm/c/1", "commits/image/v2"])
def test_killed_while_it_copies_and_encodes(home: Home, moment: str, tmp_path: Path) -> None:
    asked, out = {"views": 3, "reuse": str(home.one)}, tmp_path / "out.json"
    events = finish(start(home.settings(tmp_path / "whole", **asked), out=out), out)["events"]
    places = [number for number, (kind, key) in enumerate(events) if moment == kind or key.startswith(moment)]
    at = random.Random(f"2026 {moment}").choice(places)
    process = start(home.settings(tmp_path / "c", **asked), out=tmp_path / "killed.json", kill_at=at)
    process.join(120)
    assert process.exitcode == -9, f"event {at} of {len(events)} never came"
    found = finish(start(home.settings(tmp_path / "c", **asked), out=out), out)
    assert "error" not in found, found
    assert contents(tmp_path / "c") == contents(home.three), events[at]


def test_a_row_that_fails_in_one_view_is_counted_once_and_not_trained_on(home: Home, tmp_path: Path) -> None:
    cache = tmp_path / "c"
    config = home.config(cache, views=3)
    teacher = load_teacher(config.teacher, device="cpu")
    encode = teacher.model.encode_image
    calls = Counter[str]()

    def overflow(pixels: Any) -> Any:
        features = encode(pixels)
        calls["batches"] += len(pixels) == 4  # not the one zero image that the teacher is proven with
        # rows 0 to 3 of view 1, then of view 2: the views of the same images take turns
        if calls["batches"] in (2, 3):
            features = features.clone()
            features[2] = float("inf")
        return features

    pending = plan_precompute(config, teacher)
    teacher.model.encode_image = overflow
    encode_chunks(config, teacher, pending)
    result = teacher_cache.pipeline.precompute.run.seal_and_summarize(str(cache), len(pending), 1.0)
    assert (result.quarantined, result.problems) == (2, {"not-finite": 1, "undecodable-image": 1})
    reader = EmbeddingReader(str(cache))
    assert [(row.row, row.reason) for row in reader.quarantined] == [(2, "not-finite"), (LOST, "undecodable-image")]
    assert sorted(reader.quarantined_in(0)) == [LOST]
    assert sorted(reader.quarantined_in(2)) == [2, LOST]
    assert len(reader.image_rows()) == IMAGES - 2
    assert len(reader.take("image", np.array([2]), 0)) == 1  # view 0 of it is there
    info = describe_cache(str(cache))
    assert (info.images_encoded, info.images_quarantined) == (IMAGES - 2, 2)
    report = verify_cache(str(cache))
    assert (report.ok, report.quarantined) == (True, 2)


def test_an_untransformable_image_is_that_in_every_view(tiny_teacher: Path, tmp_path: Path) -> None:
    """One pixel by 600 shrinks to nothing where the longest side decides, though a crop of it could be made."""
    teacher = make_model_folder(tmp_path / "padding")
    described = json.loads((teacher / "open_clip_config.json").read_text())
    described["preprocess_cfg"]["resize_mode"] = "longest"
    (teacher / "open_clip_config.json").write_text(json.dumps(described))
    photos = write_photos(tmp_path / "photos", 8)
    Image.new("RGB", (1, 600)).save(photos / "images" / "0003.jpg")
    result = precompute(make_config(photos, teacher, tmp_path / "c", views=3))
    assert (result.problems, result.quarantined) == ({"untransformable-image": 1}, 1)
    reader = EmbeddingReader(str(tmp_path / "c"))
    assert [sorted(reader.quarantined_in(view)) for view in range(3)] == [[3], [3], [3]]
    assert prove(tmp_path / "c", f"local-dir:{teacher}", sample=24).ok


def test_the_proof_covers_every_view(home: Home) -> None:
    proof = prove(home.three, home.teacher)
    assert proof.ok, proof.wrong
    assert (proof.images_compared, proof.quarantined_checked, proof.captions_compared) == (3 * (IMAGES - 1), 3, 40)
    assert proof.least_cosine is not None
    assert proof.least_cosine > 0.99999
    few = prove(home.three, home.teacher, sample=12)
    assert few.images_compared + few.quarantined_checked == 12


def test_crops_that_are_not_their_embeddings_are_found(home: Home, tmp_path: Path) -> None:
    """Mirrored boxes, boxes of a neighbour, and one that no image has."""

    def flip(rows: Rows) -> None:
        for view in (1, 2):
            rows["image", view]["view"][:, 4] = 1 - rows["image", view]["view"][:, 4]

    wrong = prove(forge(home.three, tmp_path / "flipped", flip), home.teacher).wrong
    assert {row.view for row in wrong} == {1, 2}
    assert len(wrong) > 19  # of 38; a few look much the same either way

    def shift(rows: Rows) -> None:
        for view in (1, 2):
            rows["image", view]["view"][12, 0] += 1000

    found = prove(forge(home.three, tmp_path / "shifted", shift), home.teacher).wrong
    assert [(row.view, row.row) for row in found] == [(1, 12), (2, 12)]
    assert "reaches beyond" in found[0].what


def test_damaged_views_come_back_to_the_same_bytes(home: Home, tmp_path: Path) -> None:
    cache = home.copy(home.three, tmp_path / "c")
    before = contents(cache)
    damaged = ChunkRef("image", 2, 1)
    (cache / damaged.object_keys()["view"]).write_bytes(b"damaged")
    (cache / ChunkRef("image", 1, 0).commit_key).unlink()
    (cache / "targets.zarr/image/norm/zarr.json").write_bytes(b"{}")
    names = {finding.key for finding in verify_cache(str(cache)).findings}
    assert {damaged.object_keys()["view"], "commits/image/v1/000000.json"} <= names
    with pytest.raises(CacheCorruptError):
        EmbeddingReader(str(cache)).take("image", np.arange(3), 2)
    result = repair(str(cache), teacher=home.teacher, device="cpu")
    assert (result.ok, result.chunks_encoded, result.replaced_manifest_digest) == (True, 2, None)
    assert contents(cache) == before


def test_the_command(home: Home, tmp_path: Path) -> None:
    arguments = (f"--set={name}={value}" for name, value in home.settings(tmp_path / "c").items())
    made = CliRunner().invoke(app, ["precompute", *arguments, "--views", "3", "--set", "crop_scale=[0.3, 1]"])
    assert made.exit_code == 0, made.output
    assert f"{IMAGES} images in 3 views and 40 captions" in made.output
    assert contents(tmp_path / "c") == contents(home.three)
