"""Shipped students, factorised token embeddings, and starting from a checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from teacher_cache.pipeline.models.factorized import FactorizedEmbedding, factors_of, principal_directions
from teacher_cache.pipeline.models.student import (
    Student,
    build_student,
    load_initial,
    load_student,
    presets,
    save_student,
    student_config,
    student_tokenizer,
)
from teacher_cache.pipeline.models.text_length import can_shorten
from teacher_cache.storage.errors import UsageError
from tests.conftest import TINY_MODEL
from tests.pipeline.models.towers import PREPROCESS, build

TEXTS = ["a dog", "two brown dogs run over the wet grass", ""]
RANKED = {**TINY_MODEL, "token_embedding_rank": 6}


def saved(student: Student, folder: Path) -> Path:
    folder.mkdir()
    save_student(student, student.config, folder, {"test": True})
    return folder


def text_parameters(width: int, layers: int, embed_dim: int, rank: int | None, context: int = 77) -> int:
    """Of CLIP's text tower and logit_scale, counted by hand."""
    attention = 3 * width * width + 3 * width + width * width + width
    mlp = 2 * (4 * width * width) + 4 * width + width
    tokens = 49408 * width if rank is None else 49408 * rank + rank * width
    return tokens + context * width + layers * (attention + mlp + 4 * width) + 2 * width + width * embed_dim + 1


def vit_parameters(width: int, layers: int, embed_dim: int, patches: int = 7 * 7) -> int:
    blocks = text_parameters(width, layers, 0, 1, 0) - 49408 - width - 2 * width - 1
    return 3 * 32 * 32 * width + width + (patches + 1) * width + 4 * width + blocks + width * embed_dim


# trunks without their classifiers: published 4,652,008 and 6,092,072 parameters less 1,281,000 of the classifier,
# then a projection from their 1,280 channels to 512
LITE0, LITE2 = 4_652_008 - 1_281_000 + 1280 * 512, 6_092_072 - 1_281_000 + 1280 * 512
TEACHER = LITE2 + text_parameters(384, 6, 512, None)
COUNTS = {
    "effnet-lite0-t1": LITE0 + text_parameters(384, 1, 512, 20),
    "effnet-lite0-t1-176": LITE0 + text_parameters(384, 1, 512, 20),
    "effnet-lite0-t3": LITE0 + text_parameters(384, 3, 512, 80),
    "effnet-lite0-t3-128": LITE0 + text_parameters(384, 3, 512, 80),
    "effnet-lite0-t3-160": LITE0 + text_parameters(384, 3, 512, 80),
    "effnet-lite0-t3-176": LITE0 + text_parameters(384, 3, 512, 80),
    "effnet-lite2-t2": LITE2 + text_parameters(384, 2, 512, 80),
    "scenes-small": 1_952_477,
    "vit-s-32": vit_parameters(384, 6, 512) + text_parameters(256, 6, 512, None),
    "vit-s-32-128": vit_parameters(384, 6, 512, 4 * 4) + text_parameters(256, 6, 512, None),
    "vit-ti-32": vit_parameters(192, 6, 256) + text_parameters(128, 3, 256, None),
}


def test_every_preset_has_a_count_and_they_are_as_small_as_promised() -> None:
    assert set(COUNTS) == set(presets())
    assert student_config("ViT-B-32")["embed_dim"] == 512  # open_clip's own names are students too
    assert TEACHER == 35_312_833
    assert round(COUNTS["effnet-lite0-t3"] / 1e6, 1) == 13.6
    assert COUNTS["effnet-lite0-t1"] <= 0.2 * TEACHER
    assert COUNTS["effnet-lite2-t2"] <= 0.4 * TEACHER


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_a_preset_builds_runs_and_comes_back_from_its_checkpoint(name: str, tmp_path: Path) -> None:
    student = build(student_config(name), teacher_dim=512)
    assert student.num_parameters == COUNTS[name]
    tokens = torch.as_tensor(student_tokenizer(student.config)(TEXTS))
    pixels = torch.randn(2, 3, *student.preprocess.size, generator=torch.Generator().manual_seed(1))
    loaded, config = load_student(saved(student, tmp_path / "saved"))
    assert config == student_config(name)
    assert loaded.num_parameters == COUNTS[name]
    with torch.no_grad():
        first, second = student(pixels, tokens[:2]), loaded(pixels, tokens[:2])
    assert first.image.shape == (2, student.embed_dim)
    assert first.projected_text.shape == (2, 512)
    for before, after in zip(first, second, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("custom_text", [False, True])
def test_open_clip_loads_a_factorised_student_as_the_dense_model_of_the_same_function(
    tmp_path: Path, custom_text: bool
) -> None:
    config = {**RANKED, **({"custom_text": True} if custom_text else {})}
    student = build(config)
    assert can_shorten(student.model) is not custom_text
    # 49,408 rows of 6 instead of 32, and 6 x 32 more
    dense_count = build({key: config[key] for key in config if key != "token_embedding_rank"}).num_parameters
    assert dense_count - student.num_parameters == 49408 * 26 - 6 * 32
    folder = saved(student, tmp_path / "saved")
    dense = open_clip.create_model(f"local-dir:{folder}").eval()
    tower = dense.text if custom_text else dense
    assert type(tower.token_embedding) is torch.nn.Embedding
    tokens = torch.as_tensor(student_tokenizer(config)(TEXTS))
    assert tokens.shape == (3, 16)
    pixels = torch.randn(2, 3, 32, 32)
    loaded, loaded_config = load_student(folder)
    assert loaded_config == config == student_config(str(folder / "open_clip_config.json"))
    with torch.no_grad():
        wanted = F.normalize(dense.encode_text(tokens), dim=-1)
        for one in (student, loaded):
            for own in (one.encode_text(tokens), one.encode_text(one.shorten(tokens))):
                assert float((own * wanted).sum(-1).min()) > 0.999999
            assert torch.equal(one.encode_image(pixels), F.normalize(dense.encode_image(pixels), dim=-1))
    before, after = factors_of(student.model), factors_of(loaded.model)
    assert before is not None
    assert after is not None
    assert torch.equal(before.factors.weight, after.factors.weight)
    assert torch.equal(before.projection.weight, after.projection.weight)


def test_a_fresh_factorised_embedding_is_scaled_as_open_clips() -> None:
    torch.manual_seed(0)
    embedding = FactorizedEmbedding(2000, 24, 96)
    assert float(embedding.dense().std()) == pytest.approx(0.02, rel=0.03)
    tokens = torch.tensor([[0, 7], [1999, 7]])
    torch.testing.assert_close(embedding(tokens), embedding.dense()[tokens])


def test_principal_directions_are_those_of_a_singular_value_decomposition() -> None:
    rows = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.1, 12)
    counts = torch.randint(1, 100, (200,), generator=torch.Generator().manual_seed(1)).float()
    for weights in (None, counts):
        found = principal_directions(rows, 4, weights)
        scaled = rows if weights is None else rows * weights.sqrt()[:, None]
        wanted = torch.linalg.svd(scaled, full_matrices=False).Vh[:4].T
        torch.testing.assert_close(found.T @ found, torch.eye(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(found @ found.T, wanted @ wanted.T, atol=1e-4, rtol=0)
    assert torch.equal(found, principal_directions(rows, 4, counts))


@pytest.mark.parametrize("rank", [0, 32, -1, "6", 6.0, True, None])
def test_a_rank_that_cannot_be_is_refused(rank: Any) -> None:
    with pytest.raises(UsageError, match=rf"token_embedding_rank is {rank!r}, a whole number from 1 to 31 is wanted"):
        build({**TINY_MODEL, "token_embedding_rank": rank})


def test_factors_that_are_lost_damaged_or_out_of_step_are_refused(tmp_path: Path) -> None:
    folder = saved(build(RANKED), tmp_path / "saved")
    factors = folder / "token_embedding.safetensors"
    good = factors.read_bytes()
    factors.unlink()
    with pytest.raises(UsageError, match=r"token_embedding\.safetensors is missing"):
        load_student(folder)
    factors.write_bytes(good[:-100])
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_student(folder)
    state = load_file(saved(build(RANKED, seed=1), tmp_path / "other") / "token_embedding.safetensors")
    save_file(state, factors)
    with pytest.raises(UsageError, match=r"do not make up token_embedding\.weight in open_clip_model\.safetensors"):
        load_student(folder)
    factors.write_bytes(good)
    settings = json.loads((folder / "open_clip_config.json").read_text())
    (folder / "open_clip_config.json").write_text(json.dumps({**settings, "token_embedding_rank": 7}))
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_student(folder)
    del settings["token_embedding_rank"]  # the way out that the message names
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    assert factors_of(load_student(folder)[0].model) is None


@pytest.mark.parametrize("config", [TINY_MODEL, RANKED], ids=["dense", "factorised"])
def test_a_student_starts_from_a_checkpoint(config: dict[str, Any], tmp_path: Path) -> None:
    first = build({**config, "embed_dim": 12}, seed=1)
    folder = saved(first, tmp_path / "saved")
    second = build({**config, "embed_dim": 12}, seed=2)
    load_initial(second, str(folder))
    wanted = first.state_dict()
    assert {name for name in wanted if "projection.weight" in name} >= {"image_projection.weight"}
    assert second.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in second.state_dict().items())

    # of another teacher's width: the model is taken, the projections stay fresh
    third = build({**config, "embed_dim": 12}, seed=3, teacher_dim=24)
    fresh = third.image_projection.weight.detach().clone()  # type: ignore[union-attr,operator]
    load_initial(third, str(folder))
    assert torch.equal(third.image_projection.weight, fresh)  # type: ignore[arg-type]
    assert torch.equal(third.model.visual.proj, first.model.visual.proj)  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({**TINY_MODEL, "embed_dim": 12}, "embed_dim is 16 there and 12 in the student"),
        (
            {**TINY_MODEL, "text_cfg": {**TINY_MODEL["text_cfg"], "layers": 1}},
            "text_cfg.layers is 2 there and 1 in the student",
        ),
        (RANKED, "token_embedding_rank is not set there and 6 in the student"),
        ({**TINY_MODEL, "quick_gelu": True}, "quick_gelu is not set there and True in the student"),
    ],
)
def test_another_architecture_is_refused_by_name(config: dict[str, Any], found: str, tmp_path: Path) -> None:
    folder = saved(build(TINY_MODEL), tmp_path / "saved")
    student = build(config)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(UsageError, match=re.escape(f"{folder}: a checkpoint of another student: {found}. Train")):
        load_initial(student, str(folder))
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_pixels_scaled_in_another_way_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    folder = saved(build(TINY_MODEL), tmp_path / "saved")
    other = build_student(TINY_MODEL, {**PREPROCESS, "mean": [0.5, 0.5, 0.5]}, 16)
    with pytest.raises(UsageError, match=r"preprocess\.mean is \(0\.48, 0\.46, 0\.41\) there and \(0\.5, 0\.5, 0\.5\)"):
        load_initial(other, str(folder))
    with pytest.raises(UsageError, match="no student checkpoint here"):
        load_initial(other, str(tmp_path))
