"""Crops are drawn once, stored, and replayed to the pixels that the teacher saw, at anybody's resolution."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import RandomResizedCrop

from teacher_cache.pipeline.data.batches.cached_samples import CachedSamples
from teacher_cache.pipeline.data.batches.inputs import InputLoader
from teacher_cache.pipeline.data.batches.pairs import PairOrder, stored_crops
from teacher_cache.pipeline.data.batches.student_images import StudentImages
from teacher_cache.pipeline.data.batches.targets import CachedTeacher
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images.preprocess import Preprocess
from teacher_cache.pipeline.data.images.views import Crop, crop_shown, draw_crop
from teacher_cache.pipeline.evaluate.retrieval import evaluate
from teacher_cache.pipeline.models.teacher import LiveTeacher, load_teacher
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.format.identity import ViewsIdentity
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.pipeline.train.live_targets import LiveTeacherSource
from tests.pipeline.train.train_work import make_cache, make_student, trace, train_config

POLICY = ViewsIdentity(policy="random-resized-crop", count=5, scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5, seed=0)
VIEWS = 4


def digest(number: int) -> str:
    return f"{number:064x}"


def test_a_draw_depends_on_seed_content_and_view_alone() -> None:
    first = draw_crop(POLICY, digest(1), 1, 640, 480)
    assert draw_crop(POLICY.model_copy(update={"count": 2}), digest(1), 1, 640, 480) == first
    others = [
        draw_crop(POLICY.model_copy(update={"seed": 1}), digest(1), 1, 640, 480),
        draw_crop(POLICY, digest(2), 1, 640, 480),
        draw_crop(POLICY, digest(1), 2, 640, 480),
    ]
    assert len({first, *others}) == 4
    with pytest.raises(ValueError, match="view 0 is not drawn"):
        draw_crop(POLICY, digest(1), 0, 640, 480)


def test_draws_never_change() -> None:
    """As on 2026-11-24: a lost chunk of any cache has to come back with its own crops."""
    drawn = [draw_crop(POLICY, digest(number), view, 500, 375).as_row() for number in (7, 8) for view in (1, 2)]
    assert drawn == [(68, 22, 281, 223, 0), (12, 49, 318, 341, 0), (17, 102, 354, 311, 1), (75, 220, 251, 248, 1)]


def test_crops_are_distributed_as_torchvisions() -> None:
    """Area, aspect, place and flip of many draws against torchvision's own generator and algorithm."""
    width, height, count = 500, 375, 4000
    torch.manual_seed(0)
    canvas = torch.zeros(1, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(canvas, [0.3, 1.0], [3 / 4, 4 / 3]) for _ in range(count)], np.float64
    )
    crops = [draw_crop(POLICY, digest(number), 1, width, height) for number in range(count)]
    ours = np.array([crop.as_row()[:4] for crop in crops])

    def shown(boxes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        top, left, box_height, box_width = boxes.T
        area = box_height * box_width / (height * width)
        free = np.stack([top / np.maximum(height - box_height, 1), left / np.maximum(width - box_width, 1)])
        return np.stack([area, np.log(box_width / box_height), *free])

    for mine, other in zip(shown(ours), shown(theirs), strict=True):
        # the largest distance of two empirical distributions: above 0.045 once in 1,000 pairs of 4,000 equal draws
        both = np.sort(np.concatenate([mine, other]))
        distance = np.abs(
            np.searchsorted(np.sort(mine), both, "right") - np.searchsorted(np.sort(other), both, "right")
        ).max()
        assert distance / count < 0.045
    assert 0.46 < np.mean([crop.flip for crop in crops]) < 0.54
    assert all(crop.fits(width, height) for crop in crops)


@pytest.mark.parametrize(
    ("width", "height", "box"),
    # no box of these shares and ratios fits into a strip: torchvision's central crop of the nearest ratio
    [(1, 600, (299, 0, 1, 1)), (4000, 30, (0, 1980, 30, 40)), (30, 4000, (1980, 0, 40, 30)), (1, 1, (0, 0, 1, 1))],
)
def test_strips_get_the_central_crop(width: int, height: int, box: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    assert RandomResizedCrop.get_params(torch.zeros(1, height, width), [0.3, 1.0], [3 / 4, 4 / 3]) == box
    assert draw_crop(POLICY, digest(3), 1, width, height).as_row()[:4] == box


def test_a_box_survives_float32() -> None:
    """Of a strip of 2^27 pixels no box is moved by the rounding of what is stored."""
    for number in range(50):
        crop = draw_crop(POLICY.model_copy(update={"ratio": (1.0, 1e9)}), digest(number), 1, 2**27 + 12345, 1)
        assert Crop.from_row(np.array(crop.as_row(), np.float32)) == crop
        assert crop.fits(2**27 + 12345, 1)


@pytest.mark.parametrize("row", [(0, 0, 10.5, 10, 0), (0, -1, 10, 10, 0), (0, 0, 0, 10, 0), (0, 0, 9, 9, 2)])
def test_what_is_no_crop_is_refused(row: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="is no box of whole pixels"):
        Crop.from_row(row)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA"])
@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
def test_replay_is_crop_resize_mirror_by_hand(mode: str, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (70, 90, 3)).astype(np.uint8)).convert(mode)
    preprocess = Preprocess(size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    crop = Crop(11, 7, 40, 61, True)
    seen = image.crop((7, 11, 7 + 61, 11 + 40)).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = np.asarray(ImageOps.mirror(seen).convert("RGB"), np.float32) / 255
    expected = ((pixels - (0.5, 0.4, 0.3)) / (0.2, 0.3, 0.4)).transpose(2, 0, 1)
    shown = preprocess.normalized(crop_shown(image, crop, preprocess))
    np.testing.assert_allclose(shown.numpy(), expected, atol=1e-5)
    with pytest.raises(ValueError, match="reaches beyond the 90 x 70 pixels"):
        crop_shown(image, Crop(40, 0, 31, 10, False), preprocess)


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> LiveTeacher:
    return load_teacher(f"local-dir:{tiny_teacher}", device="cpu")


@pytest.fixture(scope="module")
def home(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 photographs, 32 to train on, in a cache of VIEWS views by the tiny teacher."""
    root = tmp_path_factory.mktemp("views")
    make_cache(root, tiny_teacher, views=VIEWS)
    return root


def training(home: Path, out: Path, **changes: Any) -> TrainConfig:
    student = make_student(out.parent / "student.json")
    return train_config(home / "photos.cache", student, out, **{"epochs": 5, **changes})


def test_each_cached_row_is_the_teachers_of_its_stored_crop(home: Path, tiny_teacher: Path) -> None:
    """open_clip's own model on pixels cut by Pillow from the stored box; the images' neighbours do no harm."""
    reader = EmbeddingReader(str(home / "photos.cache"))
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tiny_teacher}")
    rows = np.arange(40)
    seen, cosines = Counter[float](), []
    for view in range(VIEWS):
        boxes = reader.take("image", rows, view, array="view")
        cached = reader.take("image", rows, view).astype(np.float32)
        for row, box, embedding in zip(rows, boxes, cached, strict=True):
            with Image.open(home / "photos" / "images" / f"{row:04d}.jpg") as image:
                image.load()
            if view:
                top, left, height, width, flip = box
                image = image.crop((left, top, left + width, top + height)).resize((32, 32), Image.Resampling.BICUBIC)
                image = ImageOps.mirror(image) if flip else image
                seen[flip] += 1
            with torch.no_grad():
                live = model.eval().encode_image(transform(image)[None], normalize=True)[0].numpy()
            cosines.append(float(live @ embedding))
    assert min(cosines) > 0.999
    assert min(seen.values()) > 30  # of 120: mirrored ones are among them
    # and the crop matters: another view's row is another
    first, second = (reader.take("image", rows, view).astype(np.float32) for view in (0, 1))
    assert (first * second).sum(axis=1).min() < 0.99


@pytest.mark.parametrize("size", [32, 48])
def test_the_student_sees_the_region_that_the_teacher_saw(home: Path, teacher: LiveTeacher, size: int) -> None:
    """At its own resolution; at the teacher's, the live teacher on the student's pixels gives the cached row."""
    reader = EmbeddingReader(str(home / "photos.cache"))
    mine = Preprocess((size, size), teacher.preprocess.mean, teacher.preprocess.std)
    pairs = list(PairOrder(reader, reader.image_rows("train"), 8, 4, seed=1).epoch(2))
    source = ImageSource(str(home / "photos"))
    loader = InputLoader(reader, teacher.tokenizer, StudentImages(reader, source, mine), workers=1).epoch(pairs)
    views: Counter[int] = Counter()
    for pair, (pixels, tokens) in zip(pairs, loader, strict=True):
        assert pixels.shape == (8, 3, size, size)
        views.update(pair.views.tolist())
        (targets,) = CachedTeacher(reader).targets([pair])
        if size == 32:
            assert (teacher.image_features(pixels) * targets.image).sum(1).min() > 0.999
            assert (teacher.text_features(tokens[:, 0]) * targets.text[:, 0]).sum(1).min() > 0.999
        else:
            # the same region at another resolution: shrunk to the teacher's, the same colours but for the resampling
            small = torch.nn.functional.interpolate(pixels, (32, 32), mode="bilinear", antialias=True)
            crops = stored_crops(reader, pair.image_rows, pair.views)
            images = StudentImages(reader, ImageSource(str(home / "photos")), teacher.preprocess)
            records = CachedSamples(reader, kept_chunks=1).records(pair.image_rows)
            seen = torch.stack([images.see(image, crop) for image, crop in zip(records, crops, strict=True)])
            assert (small - seen).abs().mean() < 0.1 < (small - seen.roll(1, 0)).abs().mean()
    assert set(views) == set(range(VIEWS))


def test_an_images_views_come_by_turns(home: Path) -> None:
    """All of them before any comes again, and anew for another seed."""
    reader = EmbeddingReader(str(home / "photos.cache"))
    rows = reader.image_rows("train")

    def seen(seed: int, epoch: int) -> dict[int, int]:
        pairs = PairOrder(reader, rows, 8, 2, seed).epoch(epoch)
        return {int(row): int(view) for pair in pairs for row, view in zip(pair.image_rows, pair.views, strict=True)}

    epochs = [seen(3, epoch) for epoch in range(2 * VIEWS)]
    for row in rows.tolist():
        order = [views[row] for views in epochs]
        assert sorted(order[:VIEWS]) == sorted(order[VIEWS:]) == list(range(VIEWS))
    assert len(set(epochs[0].values())) == VIEWS  # not all images at the same view
    assert seen(3, 0) == epochs[0] != seen(4, 0)
    # a run that goes on in mid-epoch sees the same views
    last = list(PairOrder(reader, rows, 8, 2, 3).epoch(1, 3))
    assert {int(row): int(view) for row, view in zip(last[0].image_rows, last[0].views, strict=True)}.items() <= epochs[
        1
    ].items()


def test_with_one_view_it_is_the_evaluation_crop_and_the_record_says_so(
    home: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    several = train(training(home, tmp_path / "several", epochs=1)).record
    assert several.view == "the 4 stored crops by turns, the evaluation crop among them"
    cache = make_cache(tmp_path, tiny_teacher)
    one = train(training(tmp_path, tmp_path / "one", epochs=1)).record
    assert one.view == "evaluation crop (the cache has one view)"
    reader = EmbeddingReader(str(cache))
    pairs = list(PairOrder(reader, reader.image_rows("train"), 8, 4, seed=0).epoch(3))
    assert not any(pair.views.any() for pair in pairs)
    read = reader.objects_read
    assert stored_crops(reader, pairs[0].image_rows, pairs[0].views) == [None] * 8
    assert reader.objects_read == read  # there is nothing to look up


def test_live_and_cached_teacher_train_the_same(home: Path, teacher: LiveTeacher, tmp_path: Path) -> None:
    """20 steps from one seed with each source of targets: equal losses but for the rounding to float16."""
    source = ImageSource(str(home / "photos"))
    losses = {"contrastive": 1.0, "relational": 1.0, "feature": 2000.0}
    traces = {}
    for name, make in (("cached", None), ("live", lambda reader: LiveTeacherSource(teacher, reader, source))):
        train(training(home, tmp_path / name, losses=losses, captions_per_image=2), teacher_source=make)
        traces[name] = trace(tmp_path / name)
    assert len(traces["live"]) == 20
    for cached, live in zip(traces["cached"], traces["live"], strict=True):
        # 2^-11 of each stored number, over 20 steps
        assert cached["loss"] == pytest.approx(live["loss"], rel=2e-3)
        assert cached["feature"] == pytest.approx(live["feature"], rel=2e-3)
    assert traces["cached"] != traces["live"]  # they are two sources, and float16 shows
    assert traces["live"][-1]["loss"] < 0.95 * traces["live"][0]["loss"]


def test_parity_fails_where_the_crops_are_not_the_same(home: Path, teacher: LiveTeacher, tmp_path: Path) -> None:
    """What the test above would see if the live teacher looked at the evaluation crop instead of the stored one."""

    class Careless(LiveTeacherSource):
        def targets(self, batches: Any) -> Any:
            return super().targets(replace(pairs, views=np.zeros_like(pairs.views)) for pairs in batches)

    source = ImageSource(str(home / "photos"))
    first = []
    for name, make in (("cached", None), ("careless", lambda reader: Careless(teacher, reader, source))):
        settings = training(home, tmp_path / name, epochs=1, losses={"feature": 2000.0})
        train(settings, teacher_source=make)
        first.append(trace(tmp_path / name)[0]["loss"])
    assert abs(first[0] - first[1]) > 2e-3 * first[0]


def test_evaluation_looks_at_the_evaluation_crop(home: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    """The teacher's recall with four views is that with one."""
    caches = make_cache(tmp_path, tiny_teacher), home / "photos.cache"
    one, four = (evaluate(EvaluateConfig(cache=str(cache))) for cache in caches)
    assert one.teacher == four.teacher
