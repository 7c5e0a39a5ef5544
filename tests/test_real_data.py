"""Real photographs and a real teacher, where they are at hand: the cache says what open_clip says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from teacher_cache.pipeline.data.datasets.samples import load_samples
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec
from teacher_cache.pipeline.evaluate.retrieval import evaluate
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.check.verify import verify_cache
from tests.conftest import shared

pytestmark = pytest.mark.real_data

IMAGES = 120


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """The first dev photographs of Flickr8k in its own form, and as many for training; links, not copies."""
    source = shared("flickr8k")
    root = tmp_path / "flickr8k"
    (root / "images").mkdir(parents=True)
    wanted: set[str] = set()
    for split in ("train", "dev"):
        names = (source / f"{split}.txt").read_text().split()[:IMAGES]
        (root / f"{split}.txt").write_text("\n".join(names) + "\n")
        wanted |= set(names)
    heading, *lines = (source / "captions.txt").read_text().splitlines()
    kept = [line for line in lines if line.split(",", 1)[0] in wanted]
    (root / "captions.txt").write_text("\n".join([heading, *kept]) + "\n")
    for name in wanted:
        (root / "images" / name).symlink_to(source / "images" / name)
    return root


def test_flickr8k_is_read_whole() -> None:
    root = shared("flickr8k")
    found, digests = load_samples(DatasetSpec.parse(f"flickr:{root}"))
    splits = [sample.split for sample in found.samples]
    assert (splits.count("train"), splits.count("dev"), len(splits)) == (6000, 1000, 7000)
    assert (found.num_captions, len(found.problems)) == (35000, 0)
    assert len(set(digests)) > 6900  # the published set holds a few pictures twice


def test_the_main_job_on_photographs(photographs: Path, tmp_path: Path) -> None:
    """Recall from the cache equals recall by open_clip alone, on the same photographs, without any of our code."""
    teacher = shared("teacher-flickr8k")
    cache = str(tmp_path / "f8k.cache")
    result = precompute(
        PrecomputeConfig(dataset=f"flickr:{photographs}", teacher=f"local-dir:{teacher}", cache=cache, device="cpu")
    )
    assert (result.images, result.captions, result.problems) == (2 * IMAGES, 10 * IMAGES, {})
    assert verify_cache(cache).ok
    found = evaluate(EvaluateConfig(cache=cache, split="dev"))
    assert (found.images, found.captions) == (IMAGES, 5 * IMAGES)

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{teacher}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{teacher}")
    names = (photographs / "dev.txt").read_text().split()
    captions: dict[str, list[str]] = {name: [] for name in names}
    for line in (photographs / "captions.txt").read_text().splitlines()[1:]:
        name, caption = line.split(",", 1)
        if name in captions:
            captions[name].append(caption.strip().strip('"').replace('""', '"'))
    texts = [caption for name in names for caption in captions[name]]
    images = []
    texts_encoded = []
    with torch.inference_mode():
        for start in range(0, IMAGES, 20):
            pixels = [transform(Image.open(photographs / "images" / name)) for name in names[start : start + 20]]
            images.append(model.eval().encode_image(torch.stack(pixels), normalize=True))
        for start in range(0, len(texts), 50):
            texts_encoded.append(model.encode_text(tokenizer(texts[start : start + 50]), normalize=True))
    scores = (torch.cat(images) @ torch.cat(texts_encoded).T).numpy()
    image_of = np.repeat(np.arange(IMAGES), 5)
    for k in (1, 5, 10):
        i2t = np.mean([k_best_holds(scores[row], k, np.flatnonzero(image_of == row)) for row in range(IMAGES)])
        t2i = np.mean([k_best_holds(scores[:, column], k, image_of[[column]]) for column in range(len(texts))])
        # storage in float16 may turn one near tie
        assert found.teacher["i2t"][f"R@{k}"] == pytest.approx(100 * i2t, abs=100 / IMAGES + 0.01)
        assert found.teacher["t2i"][f"R@{k}"] == pytest.approx(100 * t2i, abs=100 / len(texts) + 0.01)
    assert found.teacher["t2i"]["R@1"] > 30

    run = str(tmp_path / "run")
    student = tmp_path / "student.json"
    student.write_text(
        json.dumps(
            {
                "embed_dim": 64,
                "vision_cfg": {"image_size": 64, "layers": 1, "width": 64, "head_width": 32, "patch_size": 32},
                "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
            }
        )
    )
    train(TrainConfig(cache=cache, student=str(student), out=run, epochs=2, batch_size=40, device="cpu", workers=1))
    measured = evaluate(EvaluateConfig(run=run, split="dev", workers=1))
    assert measured.teacher == found.teacher
    assert measured.student is not None
    assert measured.retention is not None


def k_best_holds(scores: np.ndarray, k: int, positives: np.ndarray) -> bool:
    return bool(np.isin(np.argsort(-scores, kind="stable")[:k], positives).any())
