"""The teacher's rows of labelled images from a cache: the second time no teacher, the same numbers, nothing else's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
from PIL import Image

from teacher_cache.pipeline.evaluate.retrieval import evaluate
from teacher_cache.pipeline.evaluate.zero_shot import cache as zero_shot_cache
from teacher_cache.pipeline.evaluate.zero_shot import measure as zero_shot_module
from teacher_cache.pipeline.evaluate.zero_shot.measure import ZeroShotResult, zero_shot
from teacher_cache.pipeline.models.teacher import is_surely, load_teacher
from teacher_cache.pipeline.precompute import executors as executors_module
from teacher_cache.pipeline.precompute.repair import repair
from teacher_cache.pipeline.precompute.sample_proof import prove_sample
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig, ZeroShotConfig
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig, ProofConfig
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheIncompleteError, CacheMismatchError, CacheNotFoundError, UsageError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.manifest_file import read_manifest
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import TINY_MODEL, cache_digest, make_identity, make_model_folder
from tests.pipeline.data.dataset_files import save_image, write_tar
from tests.pipeline.data.datasets.test_labelled import write_mnist

Measure = Callable[..., ZeroShotResult]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three classes of 4, 3 and 2 pictures."""
    root = tmp_path / "pictures"
    for number, (name, count) in enumerate((("cat", 4), ("guinea_pig", 3), ("dog", 2))):
        for index in range(count):
            save_image(root / name / f"{index}.png", 70 * number + 9 * index)
    return root


@pytest.fixture
def measure(pictures: Path, tiny_teacher: Path, tmp_path: Path) -> Measure:
    """Zero-shot with the tiny teacher, of the pictures, from a cache; settings may say otherwise."""

    def run(**settings: Any) -> ZeroShotResult:
        config = {
            "dataset": f"imagefolder:{pictures}",
            "teacher": f"local-dir:{tiny_teacher}",
            "cache": str(tmp_path / "c"),
            "device": "cpu",
            **settings,
        }
        return zero_shot(ZeroShotConfig(**config))

    return run


@pytest.fixture
def no_teacher(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes the building of a teacher an error from here on."""

    def forbid() -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("a teacher was loaded")

        for module in (executors_module, zero_shot_module, zero_shot_cache):
            monkeypatch.setattr(module, "load_teacher", fail)
        monkeypatch.setattr("open_clip.create_model", fail)

    return forbid


def numbers(result: ZeroShotResult) -> dict[str, Any]:
    return result.model_dump(include={"teacher", "images", "classes", "prompts", "undecodable", "lost_images"})


def test_the_second_time_no_teacher_and_the_same_numbers(measure: Measure, no_teacher: Callable[[], None]) -> None:
    live = measure(cache=None, prompts="cifar10")
    first = measure(prompts="cifar10")
    assert (live.teacher_ran, first.teacher_ran) == (True, True)
    no_teacher()
    again = measure(prompts="cifar10")
    assert not again.teacher_ran
    assert numbers(live) == numbers(first) == numbers(again)
    assert len(again.prompts) == 18
    # without naming a teacher: the one that the cache is of
    alone = measure(prompts="cifar10", teacher=None)
    assert numbers(alone) == numbers(again)
    assert alone.teacher_name == first.teacher_name == "local-dir:tiny"
    with pytest.raises(AssertionError, match="a teacher was loaded"):
        measure(prompts="cifar10", cache=None)  # so that the trap is known to work


def test_another_teacher_is_refused_by_its_weights(
    measure: Measure, tiny_teacher: Path, tmp_path: Path, pictures: Path
) -> None:
    same_name = tmp_path / "copy" / "tiny"
    shutil.copytree(tiny_teacher, same_name)
    measure(teacher=f"local-dir:{same_name}")
    assert not measure().teacher_ran  # the same weights from another folder
    other = make_model_folder(tmp_path / "other" / "tiny", seed=1)
    with pytest.raises(CacheMismatchError, match=r"c: this cache is not the one asked for\. .*teacher\.weights_sha256"):
        measure(teacher=f"local-dir:{other}")
    shutil.copy(other / "open_clip_model.safetensors", same_name / "open_clip_model.safetensors")
    with pytest.raises(CacheMismatchError, match=r"teacher\.weights_sha256"):
        measure(teacher=f"local-dir:{same_name}")
    config = (same_name / "open_clip_config.json").read_text()
    shutil.copy(tiny_teacher / "open_clip_model.safetensors", same_name / "open_clip_model.safetensors")
    (same_name / "open_clip_config.json").write_text(config.replace('"shortest"', '"squash"'))
    with pytest.raises(CacheMismatchError, match=r"preprocess\.resize_mode: .shortest. in the cache, .squash. "):
        measure(teacher=f"local-dir:{same_name}")


def test_other_images_or_prompts_are_refused(measure: Measure, pictures: Path) -> None:
    measure()
    with pytest.raises(CacheMismatchError, match=r"dataset\.captions: 9 in the cache, 21 asked for.*Name another --ca"):
        measure(templates="simple")
    templates = pictures.parent / "t.txt"
    templates.write_text("a photo of a {}.\na photo of the {}.\na bad photo of a {}.\n")
    with pytest.raises(CacheMismatchError, match=r"one asked for\. dataset\.captions_sha256: [^;]*asked for\. N"):
        measure(templates=str(templates))
    save_image(pictures / "cat" / "0.png", 201)
    with pytest.raises(CacheMismatchError, match=r"one asked for\. dataset\.samples_sha256: [^;]*asked for\. N"):
        measure()


def test_no_cache_and_no_teacher(measure: Measure) -> None:
    with pytest.raises(CacheNotFoundError, match="no cache here"):
        measure(teacher=None)
    with pytest.raises(UsageError, match="nothing to measure"):
        measure(teacher=None, cache=None)


def test_a_cache_that_was_stopped_is_finished(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(cache=str(tmp_path / "whole"))

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(executors_module, "encode_shared", stop)
        with pytest.raises(KeyboardInterrupt):
            measure()
    with pytest.raises(CacheIncompleteError, match="0 of 2 chunks"):
        measure(teacher=None)
    assert numbers(measure()) == numbers(whole)


def begin(measure: Measure, monkeypatch: pytest.MonkeyPatch, made_with: dict[str, Any], **settings: Any) -> None:
    """Leave a cache that was planned with these settings of precompute, and nothing encoded."""
    with monkeypatch.context() as patch:
        patch.setattr(executors_module, "encode_shared", lambda *args: 0)
        patch.setattr(zero_shot_cache, "PrecomputeConfig", lambda **mine: PrecomputeConfig(**mine, **made_with))
        with pytest.raises(CacheIncompleteError):
            measure(**settings)


def test_batches_of_the_asked_size_unless_the_cache_has_begun_with_another(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(measure, monkeypatch, {}, batch_size=3)
    assert read_manifest(open_files(str(tmp_path / "c"))).layout.batch_rows == 3
    assert measure(batch_size=5).teacher_ran
    assert read_manifest(open_files(str(tmp_path / "c"))).layout.batch_rows == 3
    assert not measure(batch_size=5).teacher_ran


def test_a_compressed_cache_that_has_begun_is_finished_as_one(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(measure, monkeypatch, {"compress": True})
    assert measure().teacher_ran
    assert read_manifest(open_files(str(tmp_path / "c"))).layout.compressor == "blosc"


def test_a_cache_that_was_begun_with_another_decoder_is_finished_with_it(
    measure: Measure, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("simplejpeg", reason="the extra fastjpeg is not installed")
    for path in pictures.glob("*/*.png"):
        with Image.open(path) as image:
            image.convert("RGB").save(path.with_suffix(".jpg"))
        path.unlink()

    begin(measure, monkeypatch, {"decoder": "jpeg-scaled"}, batch_size=3)
    assert measure().teacher_ran
    assert read_manifest(open_files(str(tmp_path / "c"))).identity.preprocess.decoder == "jpeg-scaled"


def test_a_cache_is_finished_and_proven_in_the_precision_that_it_has(
    measure: Measure, tmp_path: Path, no_teacher: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(measure, monkeypatch, {"precision": "bf16"})
    first = measure()
    reader = EmbeddingReader(str(tmp_path / "c"))
    assert (first.teacher_ran, reader.identity.teacher.precision) == (True, "bf16")
    measure(cache=str(tmp_path / "whole"))
    whole = EmbeddingReader(str(tmp_path / "whole"))
    assert whole.identity.teacher.precision == "fp32"
    assert not np.array_equal(*(each.take("image", each.image_rows()) for each in (reader, whole)))

    other = make_model_folder(tmp_path / "other" / "tiny", seed=1)
    with pytest.raises(CacheMismatchError) as refused:
        measure(teacher=f"local-dir:{other}")
    assert "teacher.weights_sha256" in str(refused.value)
    assert "precision" not in str(refused.value)
    with monkeypatch.context() as patch:  # one that is told only when it is loaded
        patch.setattr(zero_shot_cache, "is_surely", lambda *args: False)
        assert not measure().teacher_ran
    no_teacher()
    assert numbers(measure()) == numbers(first)


def test_images_that_cannot_be_used_are_named_the_same_way(measure: Measure, pictures: Path) -> None:
    # the first image of all, which the prompts are kept with, and a file that is not there
    (pictures / "cat" / "00.png").symlink_to(pictures / "gone.png")
    (pictures / "cat" / "000.png").write_bytes(b"no picture")
    live = measure(cache=None)
    first, again = measure(), measure()
    assert numbers(live) == numbers(first) == numbers(again)
    assert (again.images, again.undecodable_images, again.lost_images) == (9, 1, 1)
    assert "cat/00.png" in again.undecodable[0]
    assert again.undecodable[1].startswith("cat/000.png: not an image")


def test_labels_are_the_datasets_not_the_caches(
    measure: Measure, tmp_path: Path, pictures: Path, no_teacher: Callable[[], None]
) -> None:
    """A label that was mended in the tars counts at once; the images and prompts are as before."""
    tar = tmp_path / "wds" / "0.tar"
    (tmp_path / "wds").mkdir()
    (tmp_path / "wds" / "classnames.txt").write_text("cat\ndog\n")
    data = [path.read_bytes() for path in sorted(pictures.glob("*/*.png"))]

    def write(labels: str) -> None:
        members = [(f"{n}.cls", label) for n, label in enumerate(labels)]
        write_tar(tar, [*members, *((f"{n}.png", each) for n, each in enumerate(data))])

    write("010101010")
    first = measure(dataset=f"webdataset:{tmp_path / 'wds'}")
    no_teacher()
    write("101010101")
    swapped = measure(dataset=f"webdataset:{tmp_path / 'wds'}")
    assert first.teacher is not None
    assert swapped.teacher is not None
    assert swapped.teacher["top-1"] == pytest.approx(100 - first.teacher["top-1"])


def test_it_is_an_ordinary_cache_and_no_pairs(measure: Measure, tmp_path: Path, tiny_teacher: Path) -> None:
    cache, teacher = str(tmp_path / "c"), f"local-dir:{tiny_teacher}"
    before = measure()
    assert verify_cache(cache).ok
    proof = prove_sample(ProofConfig(cache=cache, sample=9, teacher=teacher, device="cpu"))
    assert (proof.images_compared, proof.captions_compared, proof.ok) == (9, 9, True)
    # its tables come back from the dataset, prompts and all, and its rows from the teacher
    whole = cache_digest(cache)
    for path in ("captions/000000.parquet", "samples/000000.parquet", "targets.zarr/text/embedding/c/0/0"):
        (tmp_path / "c" / path).unlink()
    repair(cache, teacher=teacher, device="cpu")
    assert cache_digest(cache) == whole
    assert numbers(measure()) == numbers(before)
    with pytest.raises(UsageError, match=r"8 of 9 images have no caption\. This cache is of labelled images"):
        evaluate(EvaluateConfig(cache=str(tmp_path / "c"), split=""))
    with pytest.raises(UsageError, match=r"8 of 9 images have no caption\. This cache is of labelled images"):
        train(TrainConfig(cache=str(tmp_path / "c"), student="scenes-small", out=str(tmp_path / "r"), split=""))


def test_torchvisions_arrays_are_cached_too(measure: Measure, tmp_path: Path, no_teacher: Callable[[], None]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (20, 28, 28)).astype(np.uint8)
    root = write_mnist(tmp_path, pixels, [number % 10 for number in range(20)])
    settings = {"dataset": f"torchvision:MNIST:{root}", "prompts": "mnist"}
    live = measure(**settings, cache=None)
    measure(**settings)
    no_teacher()
    again = measure(**settings)
    assert numbers(again) == numbers(live)
    assert (again.images, again.teacher_ran) == (20, False)
    raw = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    data = bytearray(raw.read_bytes())
    data[-1] ^= 1  # one pixel of one image
    raw.write_bytes(bytes(data))
    with pytest.raises(CacheMismatchError, match=r"one asked for\. dataset\.samples_sha256: "):
        measure(**settings)


def test_a_teacher_is_told_by_its_files_without_being_built(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for name in ("bundled:scenes", f"local-dir:{tiny_teacher}"):  # the first one's file is float16
        teacher = load_teacher(name, device="cpu")
        mine = {
            "teacher": teacher.identity(),
            "preprocess": teacher.preprocess.identity(),
            "tokenizer": teacher.tokenizer_identity(),
        }
        found[name] = make_identity().model_copy(update=mine)
    other = make_model_folder(tmp_path / "tiny", text_cfg={**TINY_MODEL["text_cfg"], "context_length": 8})
    monkeypatch.setattr(open_clip, "create_model", None)
    for name, identity in found.items():
        assert is_surely(name, None, identity)
        assert not any(is_surely(other, None, identity) for other in found if other != name)
        half = identity.teacher.model_copy(update={"precision": "bf16"})
        assert is_surely(name, None, identity.model_copy(update={"teacher": half}))
    assert not is_surely(f"local-dir:{other}", None, identity)
    assert not is_surely("local-dir:/nowhere", None, identity)
    # a tag is a name for one file of weights; a file may be another one tomorrow
    tagged = identity.teacher.model_copy(update={"name": "ViT-B-32", "pretrained": "openai"})
    identity = identity.model_copy(update={"teacher": tagged})
    assert is_surely("ViT-B-32", "openai", identity)
    assert not is_surely("ViT-B-32", "laion2b_s34b_b79k", identity)
    weights = tmp_path / "weights.pt"
    weights.touch()
    tagged = tagged.model_copy(update={"pretrained": str(weights)})
    assert not is_surely("ViT-B-32", str(weights), identity.model_copy(update={"teacher": tagged}))
