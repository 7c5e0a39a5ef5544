"""Teachers with the kinds of text towers that open_clip's configs have: ids, pixels and rows are open_clip's own."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from teacher_cache.pipeline.models.student import student_tokenizer
from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import TINY_MODEL, write_photos
from tests.pipeline.models.text_towers import KINDS, make_teacher, make_tokenizer
from tests.pipeline.models.transformers_folders import captions


@pytest.mark.parametrize("kind", KINDS)
def test_ids_pixels_and_cached_rows_are_open_clips(kind: str, tmp_path: Path) -> None:
    folder = make_teacher(kind, tmp_path / "teacher")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", pretrained_text=False)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    teacher = load_teacher(f"local-dir:{folder}", device="cpu")

    texts = captions(1000)
    ids = torch.as_tensor(teacher.tokenizer(texts))
    assert torch.equal(ids, tokenizer(texts))
    length = KINDS[kind][0].get("context_length", 77)
    assert teacher.tokenizer_identity().context_length == ids.shape[1] == length

    photos = write_photos(tmp_path / "photos", 10) / "images"
    images = sorted(photos.glob("*.jpg"))
    used = [" ".join(text.split()) for text in texts if text.strip()][:60]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        rows = [(f"photos/images/{images[row % 10].name}", text) for row, text in enumerate(used)]
        csv.writer(file).writerows([("path", "caption"), *rows])
    cache = str(tmp_path / "a.cache")
    precompute(
        PrecomputeConfig(
            dataset=f"table:{tmp_path / 'pairs.csv'}", teacher=f"local-dir:{folder}", cache=cache, device="cpu"
        )
    )
    reader = EmbeddingReader(cache)
    cached, stored = reader.captions["text"].to_pylist(), reader.samples["uri"].to_pylist()
    assert sorted(cached) == sorted(used)
    with torch.inference_mode():
        pixels = torch.stack([transform(Image.open(photos / Path(uri).name)) for uri in stored])
        live = {"image": model.encode_image(pixels), "text": model.encode_text(tokenizer(cached))}
    seen = [teacher.preprocess.transform(Image.open(photos / Path(uri).name)) for uri in stored]
    assert torch.equal(torch.stack(seen), pixels)
    for tower, features in live.items():
        rows_of = torch.from_numpy(reader.take(tower, np.arange(len(features))).astype(np.float32))  # type: ignore[arg-type]
        assert F.cosine_similarity(rows_of, features).min() > 0.9999, tower
    bias = KINDS[kind][2].get("init_logit_bias")
    assert reader.identity.teacher.logit_bias == bias
    if "init_logit_scale" in KINDS[kind][2]:
        assert reader.identity.teacher.logit_scale == pytest.approx(np.exp(4.7))


def test_a_students_tokenizer_of_transformers_is_the_one_that_its_config_names(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    text = {**TINY_MODEL["text_cfg"], "vocab_size": make_tokenizer("words", folder), "context_length": 20}
    text |= {"hf_tokenizer_name": str(folder), "tokenizer_kwargs": {"strip_sep_token": True}}
    texts = captions(50)
    wanted = open_clip.tokenizer.HFTokenizer(str(folder), context_length=20, strip_sep_token=True)(texts)
    assert torch.equal(student_tokenizer({**TINY_MODEL, "text_cfg": text})(texts), wanted)
    with pytest.raises(UsageError, match=r"tokenizer 'a/b': HF_HUB_OFFLINE is set, and there is no local copy"):
        student_tokenizer({**TINY_MODEL, "text_cfg": {**text, "hf_tokenizer_name": "a/b"}})
