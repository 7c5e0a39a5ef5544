"""A teacher is the open_clip model it names, proven, or an error that says what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from teacher_cache.pipeline.data.images.preprocess import Preprocess
from teacher_cache.pipeline.models.device import resolve_device
from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.pipeline.settings.names import open_clip_tags
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.format.identity import PreprocessIdentity
from tests.conftest import make_identity, make_model_folder

CLIP = Preprocess((32, 32), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))


def test_embeddings_equal_open_clips(tiny_teacher: Path) -> None:
    teacher = load_teacher(f"local-dir:{tiny_teacher}", device="cpu")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tiny_teacher}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_teacher}")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    pixels, tokens = transform(image)[None], tokenizer(["a dog on a horse"])
    assert torch.equal(teacher.preprocess.transform(image), pixels[0])
    with torch.no_grad():
        for encoded, raw in (
            (teacher.encode_images(pixels), model.eval().encode_image(pixels)),
            (teacher.encode_texts(tokens), model.encode_text(tokens)),
        ):
            assert encoded.embedding.dtype == np.float16
            np.testing.assert_allclose(encoded.norm, raw.norm(dim=-1), rtol=1e-6)
            np.testing.assert_allclose(encoded.embedding * encoded.norm[:, None], raw, atol=2e-3)
    assert teacher.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)


def test_identity_follows_weights_not_names(tiny_teacher: Path, tmp_path: Path) -> None:
    moved = make_model_folder(tmp_path / "moved", seed=0)
    other = make_model_folder(tmp_path / "other", seed=1)
    quick = make_model_folder(tmp_path / "quick", seed=0, quick_gelu=True)
    here, there, else_, gelu = (
        load_teacher(f"local-dir:{path}", device="cpu").identity() for path in (tiny_teacher, moved, other, quick)
    )
    assert here.weights_sha256 == there.weights_sha256 == gelu.weights_sha256
    assert else_.weights_sha256 != here.weights_sha256
    assert (here.activation, gelu.activation) == ("GELU", "QuickGELU")
    assert (here.name, there.name, here.embed_dim) == ("local-dir:tiny", "local-dir:moved", 16)


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16", "fp16"])
def test_lower_precision_stays_close(tiny_teacher: Path, precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    exact = load_teacher(f"local-dir:{tiny_teacher}", device="cpu")
    lower = load_teacher(f"local-dir:{tiny_teacher}", device="cpu", precision=precision)  # type: ignore[arg-type]
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    a, b = exact.encode_images(pixels).embedding.astype(float), lower.encode_images(pixels).embedding.astype(float)
    assert ((a * b).sum(axis=1) > 0.999).all()
    assert not np.array_equal(a, b)
    assert lower.identity().precision == precision
    assert ("fp16 is many times slower than fp32 on a CPU" in capsys.readouterr().err) == (precision == "fp16")


@pytest.mark.parametrize(
    ("capabilities", "warned"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, False),
        ({"avx512_bf16": False, "amx_bf16": True}, False),
        ({"neon": True, "bf16": True}, False),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, True),
    ],
)
def test_bf16_is_warned_of_on_a_cpu_that_emulates_it(
    tiny_teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    capabilities: dict[str, bool],
    warned: bool,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    for precision in ("fp32", "bf16", "pure_bf16"):
        load_teacher(f"local-dir:{tiny_teacher}", device="cpu", precision=precision)  # type: ignore[arg-type]
    lines = [line for line in capsys.readouterr().err.splitlines() if "emulated" in line]
    assert lines == [
        f"warning: precision {precision} is emulated and slower than fp32 on this CPU, which has neither AVX512-BF16 "
        "nor AMX"
        for precision in ("bf16", "pure_bf16")
        if warned
    ]


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-32", None, "needs --pretrained, one of .*openai.*; without weights it would be random"),
        (
            "ViT-B-32",
            "no-such-tag",
            "--pretrained 'no-such-tag' is no tag of it and no file. Give one of openai",
        ),
        ("local-dir:/nowhere", None, "no open_clip_config.json in /nowhere"),
        ("local-dir:/nowhere", "openai", "brings its own weights"),
        ("bundled:nothing", None, "Write .* or bundled:scenes"),
        ("ftp:x", None, "Write an open_clip name, hf-hub:ORG/REPO, local-dir:PATH"),
    ],
)
def test_what_cannot_be_a_teacher(name: str, pretrained: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_teacher(name, pretrained, device="cpu")


def test_the_tags_in_open_clips_source_are_those_that_it_knows() -> None:
    for model in open_clip.list_models():
        if not model.endswith("-quickgelu"):
            assert open_clip_tags(model) == open_clip.list_pretrained_tags_by_model(model), model
    assert open_clip_tags("ViT-B-32-quickgelu") is None  # asked when it is loaded


def test_a_model_folder_without_weights_is_no_teacher(tiny_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text((tiny_teacher / "open_clip_config.json").read_text())
    with pytest.raises(UsageError, match=r"cannot be loaded: Required pretrained weights"):
        load_teacher(f"local-dir:{tmp_path}", device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_an_error() -> None:
    with pytest.raises(UsageError, match="device 'cuda:3' asked for, but this machine has 0 CUDA devices"):
        resolve_device("cuda:3")
    with pytest.raises(UsageError, match="device 'gpu' is not known"):
        resolve_device("gpu")
    assert resolve_device("auto").type == "cpu"


@pytest.mark.parametrize(
    ("mode", "width", "height", "crop"),
    [
        ("shortest", 64, 48, (0, 5 * 64 / 42, 48, 32 * 64 / 42, 0)),
        ("shortest", 30, 90, (30, 0, 30, 30, 0)),
        ("shortest", 64, 64, (0, 0, 64, 64, 0)),
        ("longest", 64, 48, (-8, 0, 64, 64, 0)),
        ("squash", 64, 48, (0, 0, 48, 64, 0)),
    ],
)
def test_evaluation_crop_by_hand(mode: str, width: int, height: int, crop: tuple[float, ...]) -> None:
    preprocess = Preprocess(CLIP.size, CLIP.mean, CLIP.std, resize_mode=mode)
    assert preprocess.evaluation_crop(width, height) == pytest.approx(crop)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("source", [(60, 100), (101, 57), (33, 33), (20, 90)])
def test_the_recorded_crop_is_the_region_that_the_transform_shows(
    mode: str, size: tuple[int, int], source: tuple[int, int]
) -> None:
    """Pillow resizes the recorded box itself, sub-pixel edges included: the same picture where there is image."""
    preprocess = Preprocess(size, (0.0,) * 3, (1.0,) * 3, resize_mode=mode)
    y, x = np.mgrid[0 : source[0], 0 : source[1]]
    waves = [127 + 120 * np.sin(x / 9), 127 + 120 * np.sin(y / 7), 127 + 120 * np.sin((x + y) / 11)]
    image = Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))
    top, left, height, width, _ = preprocess.evaluation_crop(*image.size)
    seen = preprocess.transform(image).numpy()
    # pixel rows and columns of the input whose centre lies well inside the image
    rows = top + (np.arange(size[0]) + 0.5) * height / size[0]
    columns = left + (np.arange(size[1]) + 0.5) * width / size[1]
    margin_y, margin_x = 2.5 * max(1, height / size[0]), 2.5 * max(1, width / size[1])
    inside_y = np.flatnonzero((rows > margin_y) & (rows < source[0] - margin_y))
    inside_x = np.flatnonzero((columns > margin_x) & (columns < source[1] - margin_x))
    assert len(inside_y)
    assert len(inside_x)
    # where the box leaves the image (padding), only the part inside can be resized again
    in_box = [round(value) for value in (-left * size[1] / width, -top * size[0] / height)]
    if mode == "longest":
        inner = (round(source[1] * size[1] / width), round(source[0] * size[0] / height))
        again = np.zeros((size[0], size[1], 3))
        part = np.asarray(image.resize(inner, Image.Resampling.BICUBIC)) / 255
        again[in_box[1] : in_box[1] + inner[1], in_box[0] : in_box[0] + inner[0]] = part
    else:
        box = (left, top, left + width, top + height)
        again = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, box=box)) / 255
    difference = np.abs(seen.transpose(1, 2, 0) - again)[np.ix_(inside_y, inside_x)]
    assert difference.max() < 3 / 255


@pytest.mark.parametrize("size", [(32, 32), (224, 224)])
def test_the_probe_tells_preprocessing_apart(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rule that caches are compared with, at the size that real teachers have."""
    identity = make_identity()

    def differs(a: PreprocessIdentity, b: PreprocessIdentity) -> bool:
        probes = [
            identity.model_copy(update={"preprocess": make_identity().preprocess.model_copy(update={"probe": p})})
            for p in (a.probe, b.probe)
        ]
        return probes[0].differences(probes[1]) != []

    base = Preprocess(size, CLIP.mean, CLIP.std)
    here = base.identity()
    assert not differs(here, base.identity())
    assert differs(here, Preprocess(size, CLIP.mean, CLIP.std, interpolation="bilinear").identity())
    assert differs(here, Preprocess(size, CLIP.mean, CLIP.std, resize_mode="squash").identity())
    transform = base.transform
    # one pixel to the left; and no low-pass before shrinking
    monkeypatch.setattr(Preprocess, "transform", lambda self, image: transform(image).roll(1, dims=2))
    assert differs(here, base.identity())
    nearest = Image.Resampling.NEAREST
    monkeypatch.setattr(
        Preprocess,
        "transform",
        lambda self, image: transform(image.resize((image.width // 2, image.height // 2), nearest)),
    )
    assert differs(here, base.identity())
    # what pillow-simd does: one level off here and there
    off = torch.zeros(3, *size)
    off[:, ::7, ::5] = 1 / 255 / torch.tensor(CLIP.std).reshape(3, 1, 1)
    monkeypatch.setattr(Preprocess, "transform", lambda self, image: transform(image) + off)
    assert not differs(here, base.identity())
