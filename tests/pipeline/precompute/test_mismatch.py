"""A cache that is not the one asked for is refused, field by field, for appending and for training."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.pipeline.evaluate.retrieval import evaluate
from teacher_cache.pipeline.models.student import load_student
from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.pipeline.precompute.plan import plan_precompute
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.errors import CacheMismatchError, UsageError
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.format.identity import CacheIdentity
from teacher_cache.storage.format.manifest_file import read_manifest
from teacher_cache.storage.write.plan import plan_cache
from tests.conftest import TINY_MODEL, cache_digest, make_model_folder, write_photos
from tests.pipeline.precompute.conftest import make_config

Change = Callable[[Path, Path], dict[str, Any] | None]
"""Changes a copy of the photographs and of the teacher; returns other settings, if that is the change."""

STUDENT = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


def edit_teacher(teacher: Path, part: str, **changes: Any) -> None:
    path = teacher / "open_clip_config.json"
    described = json.loads(path.read_text())
    described[part].update(changes)
    path.write_text(json.dumps(described))


def other_weights(photos: Path, teacher: Path) -> None:
    shutil.rmtree(teacher)
    make_model_folder(teacher, seed=1)


def other_activation(photos: Path, teacher: Path) -> None:
    edit_teacher(teacher, "model_cfg", quick_gelu=True)


def other_image_size(photos: Path, teacher: Path) -> None:
    shutil.rmtree(teacher)
    make_model_folder(teacher, vision_cfg={**TINY_MODEL["vision_cfg"], "image_size": 40})


def other_tokens(photos: Path, teacher: Path) -> None:
    edit_teacher(
        teacher, "model_cfg", text_cfg={**TINY_MODEL["text_cfg"], "tokenizer_kwargs": {"clean": "canonicalize"}}
    )


def other_caption(photos: Path, teacher: Path) -> None:
    path = photos / "captions.txt"
    path.write_text(path.read_text().replace("number 3 again", "number three again"))


def other_order(photos: Path, teacher: Path) -> None:
    """The first two images change places."""
    path = photos / "train.txt"
    first, second, *rest = path.read_text().splitlines()
    path.write_text("\n".join([second, first, *rest]) + "\n")


def other_picture(photos: Path, teacher: Path) -> None:
    (photos / "images" / "0001.jpg").write_bytes((photos / "images" / "0002.jpg").read_bytes())


# field -> how a user comes to ask for another value of it
REAL: dict[str, Change] = {
    "teacher.weights_sha256": other_weights,
    "teacher.activation": other_activation,
    "teacher.precision": lambda photos, teacher: {"precision": "bf16"},
    "preprocess.image_size": other_image_size,
    "preprocess.interpolation": lambda photos, teacher: edit_teacher(
        teacher, "preprocess_cfg", interpolation="bilinear"
    ),
    "preprocess.resize_mode": lambda photos, teacher: edit_teacher(teacher, "preprocess_cfg", resize_mode="squash"),
    "preprocess.mean": lambda photos, teacher: edit_teacher(teacher, "preprocess_cfg", mean=[0.5, 0.5, 0.5]),
    "preprocess.std": lambda photos, teacher: edit_teacher(teacher, "preprocess_cfg", std=[0.3, 0.3, 0.3]),
    "tokenizer.probe_sha256": other_tokens,
    "dataset.captions_sha256": other_caption,
    "dataset.samples_sha256": other_picture,
}
# what is said of the rows instead of a digest
SAME_IMAGES = "other captions or splits, or the same ones in another order or of other kinds"
ROWS = {
    "dataset.captions_sha256": SAME_IMAGES,
    "dataset.samples_sha256": "1 image with other bytes, the first: 0001.jpg",
}
# every field that is proven, and a value that the small cache does not have
ANY: dict[str, Any] = {
    "teacher.weights_sha256": "f" * 64,
    "teacher.architecture": {"embed_dim": 16, "layers": 99},
    "teacher.activation": "QuickGELU",
    "teacher.embed_dim": 17,
    "teacher.precision": "fp16",
    "teacher.logit_scale": 99.5,
    "teacher.logit_bias": -10.0,
    "preprocess.image_size": [33, 33],
    "preprocess.mean": [0.1, 0.2, 0.3],
    "preprocess.std": [0.9, 0.8, 0.7],
    "preprocess.interpolation": "nearest",
    "preprocess.resize_mode": "longest",
    "preprocess.fill_color": 7,
    "preprocess.antialias": False,
    "preprocess.probe": "AAAA",
    "preprocess.decoder": "jpeg-scaled",
    "tokenizer.name": "HFTokenizer",
    "tokenizer.context_length": 64,
    "tokenizer.probe_sha256": "e" * 64,
    "views.policy": "random-resized-crop",
    "views.count": 5,
    "views.scale": [0.5, 1.0],
    "views.ratio": [1.0, 1.0],
    "views.flip": 0.0,
    "views.seed": 7,
    "targets.dtype": "int8",
    "targets.normalized": False,
    "dataset.images": 11,
    "dataset.captions": 26,
    "dataset.splits": {"train": 1},
    "dataset.samples_sha256": "d" * 64,
    "dataset.captions_sha256": "c" * 64,
    "dataset.caption_kinds": {"real": 20},
}
NAMES_ONLY = {"teacher.name", "teacher.pretrained", "dataset.kind"}


class Made:
    """A small cache, its photographs and its teacher."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.photos = write_photos(folder / "photos", 10)
        self.teacher = make_model_folder(folder / "teacher")
        self.cache = folder / "c"
        precompute(self.config(self.photos, self.teacher))
        self.identity = read_manifest(LocalFiles(str(self.cache))).identity
        self.student = folder / "student.json"
        self.student.write_text(json.dumps(STUDENT))

    def config(self, photos: Path, teacher: Path, **changes: Any) -> PrecomputeConfig:
        return make_config(photos, teacher, self.cache, **changes)

    def changed(self, change: Change, folder: Path, **changes: Any) -> PrecomputeConfig:
        photos, teacher = shutil.copytree(self.photos, folder / "photos"), shutil.copytree(self.teacher, folder / "t")
        return self.config(photos, teacher, **changes | (change(photos, teacher) or {}))

    def training(self, out: Path, **changes: Any) -> TrainConfig:
        settings = {"epochs": 1, "batch_size": 4, "device": "cpu", "workers": 0, **changes}
        return TrainConfig(cache=str(self.cache), student=str(self.student), out=str(out), **settings)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


def plan(config: PrecomputeConfig) -> None:
    plan_precompute(config, load_teacher(config.teacher, None, "cpu", config.precision))


def value(identity: CacheIdentity, field: str) -> str:
    """The value of a field as messages have it: a digest by its first 12 digits."""
    part, _, name = field.partition(".")
    shown = json.dumps(identity.fields()[part].get(name), sort_keys=True)
    return f'"{shown[1:13]}"' if re.fullmatch('"[0-9a-f]{64}"', shown) else shown


def require_named(said: str, field: str, found: CacheIdentity, wanted: CacheIdentity) -> None:
    """Field and both values are in the message, a long one shortened."""
    if field == "preprocess.probe":
        assert "preprocess.probe: these pixels of the probe images in the cache, others asked for" in said
        return
    have = value(found, field)
    shown = re.escape(have) if len(have) <= 120 else rf"{re.escape(have[:100])}\.\.\. \(sha256 [0-9a-f]{{8}}\)"
    assert re.search(rf"{re.escape(field)}: {shown} in the cache, {re.escape(value(wanted, field))} asked for", said)


def other(identity: CacheIdentity, field: str, value: Any) -> dict[str, Any]:
    """The fields of an identity, one of them with another value."""
    part, _, name = field.partition(".")
    fields = identity.fields()
    fields[part][name] = value
    return fields


def test_all_fields_are_tried() -> None:
    parts = CacheIdentity.model_fields
    fields = {f"{part}.{name}" for part in parts for name in parts[part].annotation.model_fields}  # type: ignore[union-attr]
    assert set(ANY) | NAMES_ONLY == fields
    assert set(REAL) <= set(ANY)


@pytest.mark.parametrize("field", REAL)
def test_appending_is_refused_and_nothing_written(made: Made, field: str, tmp_path: Path) -> None:
    """precompute into the cache, with one thing changed as a user would change it."""
    before = cache_digest(made.cache)
    plan(made.changed(REAL[field], tmp_path, cache=str(tmp_path / "other")))
    wanted = read_manifest(LocalFiles(str(tmp_path / "other"))).identity
    with pytest.raises(CacheMismatchError) as caught:
        plan(made.changed(REAL[field], tmp_path / "again"))
    said = str(caught.value)
    assert said.startswith(f"{made.cache}: ")
    if field in ROWS:
        assert f"lists 10 images, this cache holds 10: {ROWS[field]}. To make a cache of the dataset as it is, " in said
        assert f"--reuse {made.cache} --cache NEW" in said
    else:
        assert f"{field}: {value(made.identity, field)} in the cache, {value(wanted, field)} asked for" in said
        assert "Encode to a new path" in said
    assert cache_digest(made.cache) == before
    # training on the cache with the other one expected is refused the same way
    with pytest.raises(CacheMismatchError, match=re.escape(field)):
        train(made.training(tmp_path / "run", expect=str(tmp_path / "other")))
    assert not (tmp_path / "run").exists()


# views can be added to a cache of one; test_more_views has which are refused then
@pytest.mark.parametrize("field", [field for field in ANY if not field.startswith("views.")])
def test_appending_is_refused_for_every_field(made: Made, field: str) -> None:
    """Those too that no setting of today can change, such as antialias, dtype and normalisation."""
    manifest, before = read_manifest(LocalFiles(str(made.cache))), cache_digest(made.cache)
    wanted = CacheIdentity.model_validate(other(made.identity, field, ANY[field]))
    with pytest.raises(CacheMismatchError) as caught:
        plan_cache(str(made.cache), wanted, manifest.layout, manifest.source, {}, {})
    said = str(caught.value)
    require_named(said, field, made.identity, wanted)
    assert "Encode to a new path" in said
    assert cache_digest(made.cache) == before


def test_other_row_order_is_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(CacheMismatchError) as caught:
        plan(made.changed(other_order, tmp_path))
    assert SAME_IMAGES in str(caught.value)


@pytest.mark.parametrize("field", ANY)
def test_training_is_refused_for_every_field(made: Made, field: str, tmp_path: Path) -> None:
    """The expected identity comes from what ``info --json`` printed, with one field changed."""
    fields = other(made.identity, field, ANY[field])
    (tmp_path / "wanted.json").write_text(json.dumps({"identity": fields}))
    config = made.training(tmp_path / "run", expect=str(tmp_path / "wanted.json"))
    with pytest.raises(CacheMismatchError) as caught:
        train(config)
    said = str(caught.value)
    require_named(said, field, made.identity, CacheIdentity.model_validate(fields))
    assert "--set accept_mismatch=FIELD" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("field", sorted(NAMES_ONLY))
def test_names_alone_are_no_mismatch(made: Made, field: str) -> None:
    fields = other(made.identity, field, "another name")
    assert made.identity.differences(CacheIdentity.model_validate(fields)) == []


def test_an_accepted_mismatch_is_recorded_in_the_run_and_the_checkpoint(made: Made, tmp_path: Path) -> None:
    fields = made.identity.fields()
    fields["teacher"]["precision"] = "bf16"
    fields["dataset"]["images"] = 11
    (tmp_path / "wanted.json").write_text(json.dumps({"identity": fields}))
    expect = str(tmp_path / "wanted.json")
    with pytest.raises(CacheMismatchError, match=r"dataset\.images: 10 in the cache, 11 asked for\. "):
        train(made.training(tmp_path / "run", expect=expect, accept_mismatch=("teacher.precision",)))
    result = train(made.training(tmp_path / "run", expect=expect, accept_mismatch=("teacher.precision", "dataset")))
    lines = [
        'teacher.precision: "fp32" in the cache, "bf16" asked for',
        "dataset.images: 10 in the cache, 11 asked for",
    ]
    assert list(result.record.accepted_mismatches) == lines
    checkpoint = tmp_path / "run" / str(result.record.checkpoint)
    origin = json.loads((checkpoint / "origin.json").read_text())
    assert origin["accepted_mismatches"] == lines
    assert origin["identity"] == made.identity.model_dump(mode="json")
    load_student(checkpoint)
    # a run and a checkpoint are something to expect in their turn
    for place in (tmp_path / "run", checkpoint, made.cache):
        train(made.training(tmp_path / f"like-{place.name}", expect=str(place)))


def test_a_field_that_does_not_exist_cannot_be_accepted(made: Made, tmp_path: Path) -> None:
    config = made.training(tmp_path / "run", expect=str(made.cache), accept_mismatch=("teacher.precison",))
    with pytest.raises(
        UsageError, match=r"teacher\.precison: no field of an identity; there are dataset\.caption_kinds"
    ):
        train(config)


@pytest.mark.parametrize("content", [None, "{", "{}", '{"identity": {}}', "[1]", "[" * 100_000])
def test_an_expectation_that_is_none_is_bad_usage(made: Made, content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "wanted.json").write_text(content)
    with pytest.raises(UsageError, match=r"wanted\.json: no "):
        train(made.training(tmp_path / "run", expect=str(tmp_path / "wanted.json")))


def test_a_student_is_measured_on_any_dataset_by_its_teacher(made: Made, tmp_path: Path) -> None:
    train(made.training(tmp_path / "run"))
    other = made.config(write_photos(tmp_path / "p", 15), made.teacher, cache=str(tmp_path / "other"))
    precompute(other)
    settings: dict[str, Any] = {"cache": other.cache, "run": str(tmp_path / "run"), "device": "cpu", "workers": 0}
    result = evaluate(EvaluateConfig(**settings))
    assert (result.images, result.split) == (3, "test")
    assert (result.cache, result.learned_from) == (other.cache, str(made.cache.resolve()))
    assert "dataset.images: 15 in the cache, 10 asked for" in result.accepted_mismatches
    precompute(other.model_copy(update={"cache": str(tmp_path / "bf16"), "precision": "bf16"}))
    with pytest.raises(CacheMismatchError, match=r'bf16" in the cache, "fp32" asked for\. .* of the same teacher and'):
        evaluate(EvaluateConfig(**{**settings, "cache": str(tmp_path / "bf16")}))
