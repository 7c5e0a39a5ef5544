"""A teacher of transformers: pixels, ids and features are the library's own; what cannot be one is said in a line."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from PIL import Image

from teacher_cache.pipeline.models.inherit.run import inherit
from teacher_cache.pipeline.models.teacher import LiveTeacher, is_surely, load_teacher
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings import names
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.student import InheritConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.format.identity import CacheIdentity
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import make_identity, write_photos
from tests.pipeline.models.transformers_folders import MAKE, SIDE, captions, make_clip

CAPTIONS = captions(1000)


@pytest.fixture(scope="module", params=MAKE)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKE[request.param](tmp_path_factory.mktemp("teachers") / request.param)


@pytest.fixture(scope="module")
def teacher(folder: Path) -> LiveTeacher:
    return load_teacher(f"transformers:{folder}", device="cpu")


@pytest.fixture(scope="module")
def library(folder: Path) -> tuple[Any, Any]:
    """Processor and model, as users of transformers load them."""
    from transformers import AutoModel, AutoProcessor

    return AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def pictures() -> dict[str, Image.Image]:
    """Of odd sizes and modes; by 43 x 32 the centre crop has an odd margin."""
    rng = np.random.default_rng(0)
    made = {}
    for height, width in ((50, 70), (32, 43), (43, 32), (301, 40), (20, 17), (32, 32)):
        made[f"{height} x {width}"] = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    colour = made["50 x 70"]
    alpha = colour.copy()
    alpha.putalpha(Image.fromarray(rng.integers(0, 256, (50, 70), np.uint8)))
    return made | {"grey": colour.convert("L"), "palette": colour.convert("P"), "transparent": alpha}


def of_library(library: tuple[Any, Any], pixels: Any, texts: list[str], length: int) -> tuple[torch.Tensor, ...]:
    processor, model = library
    ids = processor(text=texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    with torch.inference_mode():
        image = model.get_image_features(pixel_values=pixels).pooler_output
        text = model.get_text_features(input_ids=ids["input_ids"]).pooler_output
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def test_pixels_are_the_processors_bit_for_bit(teacher: LiveTeacher, library: tuple[Any, Any]) -> None:
    for name, image in pictures().items():
        theirs = library[0](images=image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(teacher.preprocess.transform(image), theirs), name
        shown = torch.from_numpy(teacher.preprocess.shown(image))[None]
        assert torch.equal(teacher.preprocess.normalized_batch(shown)[0], theirs), name


def test_ids_are_the_tokenizers(teacher: LiveTeacher, library: tuple[Any, Any]) -> None:
    length = 77 if teacher.tokenizer.name == "CLIPTokenizer" else 64
    ids = library[0](text=CAPTIONS, padding="max_length", truncation=True, max_length=length)["input_ids"]
    np.testing.assert_array_equal(teacher.tokenizer(CAPTIONS), ids)
    assert sum(len(set(row[-4:])) > 2 for row in ids) > 100, "captions must fill the context"
    lower = teacher.tokenizer([text.lower() for text in CAPTIONS])
    np.testing.assert_array_equal(lower, ids, "each of these families learned with lower case")
    assert teacher.tokenizer([]).shape == (0, length)


def test_another_process_makes_the_same_pixels_and_ids(teacher: LiveTeacher) -> None:
    """Decoding processes get both by pickle."""
    seen, tokenizer = pickle.loads(pickle.dumps((teacher.preprocess.without_torch(), teacher.tokenizer)))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8))
    np.testing.assert_array_equal(seen.shown(picture), teacher.preprocess.shown(picture))
    np.testing.assert_array_equal(tokenizer(["two dogs"]), teacher.tokenizer(["two dogs"]))


def test_the_identity_tells_teachers_apart(teacher: LiveTeacher, folder: Path, tmp_path: Path) -> None:
    name = folder.name
    identity = teacher.identity()
    bias = None if name == "clip" else pytest.approx(-12.9)
    assert (identity.name, identity.logit_bias) == (f"transformers:{name}", bias)
    assert identity.logit_scale == pytest.approx(1 / 0.07 if name == "clip" else np.exp(4.7), rel=1e-4)
    assert str(folder.parent) not in identity.model_dump_json()
    other_size = {"size": {"height": SIDE, "width": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    changed = {
        "moved": ({}, set()),
        "weights": ({"seed": 1}, {"teacher.weights_sha256"}),
        "mean": ({"image_mean": [0.4, 0.5, 0.6]}, {"preprocess.mean", "preprocess.probe"}),
        "squash": (other_size, {"preprocess.resize_mode", "preprocess.probe"} if name == "clip" else set()),
    }
    for change, (settings, fields) in changed.items():
        other = load_teacher(f"transformers:{MAKE[name](tmp_path / change, **settings)}", device="cpu")
        differences = identity_of(teacher).differences(identity_of(other))
        assert {item.field for item in differences} - {"preprocess.probe"} == fields - {"preprocess.probe"}, change


def identity_of(teacher: LiveTeacher) -> CacheIdentity:
    parts = {"teacher": teacher.identity(), "preprocess": teacher.preprocess.identity()}
    return make_identity().model_copy(update=parts | {"tokenizer": teacher.tokenizer_identity()})


def test_cached_rows_are_the_librarys(folder: Path, library: tuple[Any, Any], tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 12)
    cache = tmp_path / "a.cache"
    name = f"transformers:{folder}"
    precompute(PrecomputeConfig(dataset=f"flickr:{photos}", teacher=name, cache=str(cache), device="cpu", views=2))
    reader = EmbeddingReader(str(cache))
    assert {"transformers", "tokenizers"} <= reader.manifest.made_with.keys()
    assert not is_surely(name, None, reader.identity), "a folder is compared once it is loaded"
    images = [Image.open(photos / "images" / Path(uri).name) for uri in reader.samples["uri"].to_pylist()]
    texts = reader.captions["text"].to_pylist()
    pixels = library[0](images=images, return_tensors="pt")["pixel_values"]
    image, text = of_library(library, pixels, texts, reader.identity.tokenizer.context_length)
    for tower, live in (("image", image), ("text", text)):
        rows = torch.from_numpy(reader.take(tower, np.arange(len(live))).astype(np.float32))
        assert F.cosine_similarity(rows, live).min() > 0.9999


def test_the_recorded_crop_is_what_the_processor_shows(tmp_path: Path) -> None:
    """Of 43 columns the middle 32 begin at column 5, where Pillow's counterpart in open_clip begins at 6."""
    teacher = load_teacher(f"transformers:{make_clip(tmp_path / 'clip')}", device="cpu")
    columns = np.tile(np.arange(43, dtype=np.uint8)[None, :, None], (32, 1, 3))
    assert teacher.preprocess.shown(Image.fromarray(columns))[0, 0, 0] == 5
    assert teacher.preprocess.evaluation_crop(43, 32) == (0, 5, 32, 32, 0)
    assert teacher.preprocess.decoded_by("jpeg-scaled").evaluation_crop(43, 32) == (0, 6, 32, 32, 0)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_cannot_be_a_teacher_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    def said(name: str) -> str:
        settings = {"dataset": f"flickr:{photos}", "cache": str(tmp_path / "a.cache"), "device": "cpu"}
        with pytest.raises(UsageError) as refused:
            precompute(PrecomputeConfig(teacher=f"transformers:{name}", **settings))
        assert not (tmp_path / "a.cache").exists()
        assert "\n" not in str(refused.value)
        return str(refused.value)

    photos, folder = write_photos(tmp_path / "photos", 6), make_clip(tmp_path / "clip")
    files = ("config.json", "preprocessor_config.json", "tokenizer_config.json")
    config, pixels, tokens = (folder / name for name in files)
    sound = {path: path.read_text() for path in (config, pixels, tokens)}
    edit(pixels, size={"shortest_edge": 40})
    assert "image processor CLIPImageProcessor (size {'shortest_edge': 40}, crop" in said(str(folder))
    pixels.write_text(sound[pixels])
    edit(config, model_type="siglip2")
    assert "model_type 'siglip2' is none of clip, siglip. Name one, or a SigLIP 2 of one image size" in said(
        str(folder)
    )
    edit(config, model_type="mine", auto_map={"AutoModel": "mine.Mine"})
    assert "its model needs code of its own (auto_map), which is never run" in said(str(folder))
    config.write_text(sound[config])
    edit(pixels, auto_map={"AutoImageProcessor": "mine.Mine"})
    assert "its image processor needs code of its own" in said(str(folder))
    pixels.write_text(sound[pixels])
    edit(tokens, tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]})
    assert "its tokenizer needs code of its own" in said(str(folder))
    tokens.write_text(sound[tokens])
    weights = load_file(folder / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "its file lacks weights of 1 tensors, visual_projection.weight the first" in said(str(folder))
    assert "no config.json in" in said(str(photos))
    assert "nowhere. Name the folder of a transformers model, or its ORG/REPO" in said(str(tmp_path / "nowhere"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, and there is no local copy" in said("google/siglip-base-patch16-224")
    with pytest.raises(UsageError, match=r"only weights of open_clip's towers are inherited"):
        inherit(InheritConfig(teacher="transformers:a/b", student="vit-ti-32", out=str(tmp_path / "start")))
    for missing in ("transformers", "sentencepiece"):
        monkeypatch.setattr(names, "find_spec", lambda name, missing=missing: None if name == missing else name)
        wanted = rf"needs {missing}, which is not installed: .*pip install .*\[transformers\]'"
        assert re.search(wanted, said("google/siglip-base-patch16-224"))
