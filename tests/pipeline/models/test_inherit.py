"""Students that begin with their teacher's weights, and trunks from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from teacher_cache.pipeline.models.factorized import factors_of
from teacher_cache.pipeline.models.inherit.run import InheritResult, inherit, inherit_weights, token_counts
from teacher_cache.pipeline.models.inherit.shrink import choose_layers, most_important, residual_importance
from teacher_cache.pipeline.models.student import (
    Student,
    build_student,
    load_initial,
    load_student,
    student_config,
    student_tokenizer,
)
from teacher_cache.pipeline.models.teacher import LiveTeacher, load_teacher
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.run_file import load_config
from teacher_cache.pipeline.settings.student import InheritConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.commands import run_command
from tests.conftest import TINY_MODEL, make_model_folder, shared
from tests.pipeline.models.lite0 import captions_by_image, lite0_weights

VISION, TEXT = TINY_MODEL["vision_cfg"], TINY_MODEL["text_cfg"]
WIDE: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {**VISION, "layers": 4, "width": 48},
    "text_cfg": {**TEXT, "layers": 4, "width": 48, "heads": 3},
}
TRUNK = {
    "timm_model_name": "tf_efficientnet_lite0",
    "timm_model_pretrained": False,
    "timm_pool": "",
    "timm_proj": "linear",
}
TEXTS = ["a dog", "two brown dogs run over the wet grass", ""]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("teacher") / "wide", **WIDE)


def teacher_at(folder: Path) -> LiveTeacher:
    return load_teacher(f"local-dir:{folder}", device="cpu")


def fresh(config: dict[str, Any], teacher: LiveTeacher, teacher_dim: int = 24) -> Student:
    torch.manual_seed(1)
    return build_student(config, teacher.preprocess.to_config(), teacher_dim).eval()


def features(model: Any, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        image, text = model.encode_image(pixels), model.encode_text(open_clip.tokenize(TEXTS, context_length=16))
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def write(path: Path, config: dict[str, Any]) -> str:
    path.write_text(json.dumps(config))
    return str(path)


def test_layers_lie_at_even_distances_with_the_first_and_the_last() -> None:
    assert choose_layers(6, 3, None, "text") == (0, 2, 5)
    assert choose_layers(12, 6, None, "image") == (0, 2, 4, 6, 8, 11)
    assert choose_layers(4, 4, None, "text") == (0, 1, 2, 3)
    assert choose_layers(6, 1, None, "text") == (0,)
    assert choose_layers(6, 2, (1, 4), "text") == (1, 4)
    with pytest.raises(UsageError, match=r"--text-layers 1,4: 2 layers, but the student's text tower has 3"):
        choose_layers(6, 3, (1, 4), "text")
    with pytest.raises(UsageError, match=r"--image-layers 1,6: the teacher's image tower has layers 0 to 5"):
        choose_layers(6, 2, (1, 6), "image")


def test_importance_is_the_norm_each_matrix_counting_alike() -> None:
    # columns 1 and 2 of a large matrix, column 0 of a small one
    large, small = torch.tensor([[0.0, 30.0, 40.0]]), torch.tensor([[0.3, 0.0, 0.0], [0.4, 0.0, 0.0]])
    torch.testing.assert_close(residual_importance([large, small]), torch.tensor([1.0, 0.36, 0.64]).double())
    assert most_important(torch.tensor([1.0, 0.36, 0.64]), 2).tolist() == [0, 2]
    assert most_important(torch.tensor([5.0, 5.0, 5.0]), 2).tolist() == [0, 1]


def test_an_equal_student_becomes_the_teacher(wide: Path) -> None:
    teacher = teacher_at(wide)
    student = fresh(WIDE, teacher)
    parts = inherit_weights(student, teacher)
    assert not any(part.random for part in parts)
    wanted = teacher.model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in student.model.state_dict().items())


def hide(name: str, value: Tensor, target: Tensor, stream: Tensor, hidden: Tensor, head_channels: Tensor) -> None:
    """Copy a parameter of a narrow model into the channels of a wide one that it is hidden in."""
    if name.endswith("in_proj_weight"):
        target.view(3, 48, 48)[:, head_channels[:, None], stream] = value.view(3, 32, 32)
    elif name.endswith("in_proj_bias"):
        target.view(3, 48)[:, head_channels] = value.view(3, 32)
    elif name.endswith("out_proj.weight"):
        target[stream[:, None], head_channels] = value
    elif name.endswith("c_fc.weight"):
        target[hidden[:, None], stream] = value
    elif name.endswith("c_fc.bias"):
        target[hidden] = value
    elif name.endswith("c_proj.weight"):
        target[stream[:, None], hidden] = value
    elif name.endswith(("token_embedding.weight", "positional_embedding")):
        target[:, stream] = value
    elif name == "logit_scale":
        target.copy_(value)
    else:  # (width, ...): norms, biases, class embedding, patches, projections
        target[stream] = value


def test_layers_and_embedding_of_a_narrow_teacher_hidden_in_a_wide_one_are_found(wide: Path, tmp_path: Path) -> None:
    """A wide teacher with all but some channels, heads and layers at zero computes what its student should."""
    torch.manual_seed(3)
    narrow_config = {**WIDE, "vision_cfg": {**VISION, "layers": 2}, "text_cfg": {**TEXT, "layers": 2}}
    narrow = open_clip.create_model(
        f"local-dir:{make_model_folder(tmp_path / 'narrow', seed=5, **narrow_config)}"
    ).eval()
    for parameter in narrow.parameters():  # norms and biases that matter
        if parameter.ndim == 1:
            nn.init.normal_(parameter.data, std=0.5)
    teacher = teacher_at(wide)
    stream = torch.tensor([*range(3, 19), *range(30, 46)])
    hidden = torch.randperm(192, generator=torch.Generator().manual_seed(0))[:128].sort().values
    head_channels = (torch.tensor([0, 2])[:, None] * 16 + torch.arange(16)).flatten()
    state = {name: torch.zeros_like(value) for name, value in teacher.model.state_dict().items()}
    for name, value in narrow.state_dict().items():
        # layers 1 and 2 of the wide teacher are the narrow one's two
        target = state[name.replace("resblocks.1.", "resblocks.2.").replace("resblocks.0.", "resblocks.1.")]
        hide(name, value, target, stream, hidden, head_channels)
    teacher.model.load_state_dict(state)
    student = fresh(narrow_config, teacher)
    parts = inherit_weights(student, teacher, text_layers=(1, 2), image_layers=(1, 2))
    assert [part.layers for part in parts if part.layers] == [(1, 2), (1, 2)]
    assert sum(part.parameters for part in parts) == student.num_parameters
    for name, value in student.model.state_dict().items():
        assert torch.equal(value, narrow.state_dict()[name]), name


def test_a_narrower_embedding_keeps_cosines_and_knows_the_way_back(wide: Path) -> None:
    teacher = teacher_at(wide)
    # a teacher whose two projections reach 10 of their 24 dimensions only
    basis = torch.linalg.qr(torch.randn(24, 10, generator=torch.Generator().manual_seed(0)))[0]
    with torch.no_grad():
        teacher.model.text_projection.copy_(teacher.model.text_projection @ basis @ basis.T)  # type: ignore[operator,union-attr]
        teacher.model.visual.proj.copy_(teacher.model.visual.proj @ basis @ basis.T)  # type: ignore[operator,union-attr]
    student = fresh({**WIDE, "embed_dim": 10}, teacher)
    parts = inherit_weights(student, teacher)
    assert {part.part: part.source for part in parts}["text projection"] == "teacher, its 10 principal directions of 24"
    assert sum(part.parameters for part in parts) == student.num_parameters
    image, text = features(teacher.model)
    own_image, own_text = features(student)
    torch.testing.assert_close(own_image @ own_text.T, image @ text.T, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(F.normalize(student.text_projection(own_text), dim=-1), text, atol=1e-5, rtol=0)
        torch.testing.assert_close(F.normalize(student.image_projection(own_image), dim=-1), image, atol=1e-5, rtol=0)


def test_frequent_tokens_keep_their_embedding_best(wide: Path) -> None:
    teacher = teacher_at(wide)
    counts = token_counts(["a dog", "a dog runs"], open_clip.get_tokenizer("ViT-B-32"), 49408)
    tokens = open_clip.tokenize(["a dog runs"])[0, :5]
    # begin, a, dog, runs, end; what pads behind the end does not count
    assert counts[tokens].tolist() == [2, 2, 2, 1, 2]
    assert int(counts.sum()) == 9
    losses = []
    dense = teacher.model.token_embedding.weight  # type: ignore[union-attr]
    for given in (None, counts * 1_000_000):
        student = fresh({**WIDE, "token_embedding_rank": 6}, teacher)
        parts = inherit_weights(student, teacher, counts=given)
        factors = factors_of(student.model)
        assert factors is not None
        lost = (factors.dense() - dense).square()
        losses.append((float(lost[tokens].mean()), float(lost.mean())))
        assert (
            ("all tokens alike" in parts[1].source) is (given is None) if parts[1].part == "token embedding" else True
        )
    (alike_used, alike_all), (weighted_used, weighted_all) = losses
    assert weighted_used < alike_used / 100  # five tokens fit into six directions
    assert weighted_all > alike_all  # and the rest pays
    total = float(dense.square().mean())  # type: ignore[operator]
    singular = torch.linalg.svdvals(dense.double())  # type: ignore[arg-type]
    wanted = float(singular[6:].square().sum() / singular.square().sum())
    assert alike_all / total == pytest.approx(wanted, rel=1e-4)  # Eckart and Young: no six directions lose less


def test_patches_and_captions_of_another_size_fit(wide: Path) -> None:
    teacher = teacher_at(wide)
    vision = {**WIDE["vision_cfg"], "patch_size": 16, "image_size": 64}
    student = fresh({**WIDE, "vision_cfg": vision, "text_cfg": {**WIDE["text_cfg"], "context_length": 9}}, teacher)
    parts = {part.part: part for part in inherit_weights(student, teacher)}
    assert "patches resampled from 8 to 16" in parts["image transformer"].source
    positions = teacher.model.positional_embedding
    assert torch.equal(student.model.positional_embedding, positions[:9])  # type: ignore[arg-type,index]
    # 4 x 4 patches before and after: an enlarged picture looks the same to enlarged patches
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pixels = F.interpolate(F.avg_pool2d(pixels, 4), size=32, mode="bicubic")
    with torch.no_grad():
        before = F.normalize(teacher.model.encode_image(pixels), dim=-1)  # type: ignore[operator]
        after = student.encode_image(F.interpolate(pixels, size=64, mode="bicubic"))
    assert float((before * after).sum(-1).min()) > 0.95


@pytest.mark.parametrize(
    ("changes", "part", "reason"),
    [
        ({"text_cfg": {**TEXT, "layers": 5}}, "text tower", "layers is 5, the teacher's only 4"),
        ({"text_cfg": {**TEXT, "width": 64, "heads": 4}}, "text tower", "width is 64, the teacher's only 48"),
        ({"text_cfg": {**TEXT, "heads": 4}}, "text tower", "heads of 8 channels, the teacher's have 16"),
        ({"text_cfg": {**TEXT, "context_length": 20}}, "text tower", "its captions have 20 tokens, the teacher's 16"),
        ({"text_cfg": {**TEXT, "vocab_size": 100}}, "text tower", "its tokens are others: 100 of CLIP"),
        ({"text_cfg": {**TEXT, "ls_init_value": 0.1}}, "text tower", "ls_1.gamma is (32,), the teacher's not there"),
        ({"vision_cfg": {**VISION, "mlp_ratio": 8.0}}, "image tower", "mlp_width is 256, the teacher's only 192"),
        ({"vision_cfg": {**TRUNK, "image_size": 32}}, "image tower", "VisionTransformer, not tf_efficientnet_lite0"),
        ({"embed_dim": 30}, "text projection", "the teacher's has another form"),
    ],
)
def test_what_does_not_fit_stays_random_and_says_why(
    changes: dict[str, Any], part: str, reason: str, wide: Path
) -> None:
    teacher = teacher_at(wide)
    config = {**WIDE, "vision_cfg": VISION, "text_cfg": TEXT, **changes}
    student = fresh(config, teacher)
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    parts = inherit_weights(student, teacher)
    found = next(one for one in parts if one.part == part)
    assert found.random
    assert reason in found.source
    assert sum(one.parameters for one in parts) == student.num_parameters
    changed = [name for name, value in student.model.state_dict().items() if not torch.equal(value, before[name])]
    tower = {"text tower": ("token_", "positional_", "transformer", "ln_final", "text_"), "image tower": ("visual.",)}
    assert changed
    assert not [name for name in changed if name.startswith(tower.get(part, ("text_projection",)))]


def lite0_folder(path: Path, **changes: Any) -> Path:
    return make_model_folder(path, **{**WIDE, "vision_cfg": {**TRUNK, "image_size": 64}, **changes})


def test_the_same_family_of_trunk_is_copied_and_another_is_not(tmp_path: Path) -> None:
    teacher = teacher_at(lite0_folder(tmp_path / "teacher"))
    config = {**WIDE, "embed_dim": 12, "vision_cfg": {**TRUNK, "image_size": 64}}
    student = fresh(config, teacher)
    parts = {part.part: part for part in inherit_weights(student, teacher)}
    assert parts["image trunk"].source == "teacher tf_efficientnet_lite0"
    assert parts["image trunk"].parameters == 3_371_008  # the published 4,652,008 without the classifier's 1,281,000
    trunk = teacher.model.visual.trunk.state_dict()  # type: ignore[union-attr,operator]
    mine = student.model.visual.trunk.state_dict()  # type: ignore[union-attr,operator]
    assert all(torch.equal(value, trunk[name]) for name, value in mine.items())
    head = teacher.model.visual.head.proj.weight.detach()  # type: ignore[union-attr,operator]
    with torch.no_grad():
        back = student.image_projection.weight @ student.model.visual.head.proj.weight  # type: ignore[union-attr,operator]
    # what is best kept of two random projections of 24 dimensions by 12 of them
    assert 0.2 < float((back - head).square().sum() / head.square().sum()) < 0.5
    other = fresh(
        {**config, "vision_cfg": {**config["vision_cfg"], "timm_model_name": "tf_efficientnet_lite1"}}, teacher
    )
    found = inherit_weights(other, teacher)[0]
    assert (found.part, found.random) == ("image tower", True)
    assert "the teacher's is tf_efficientnet_lite0, not tf_efficientnet_lite1" in found.source
    assert "--trunk-weights" in found.source


def test_an_inherited_folder_is_a_checkpoint_that_says_where_it_is_from(
    wide: Path, make_photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(EmbeddingReader, "captions")  # a table in memory: it may have fifty million rows
    cache, out = str(tmp_path / "c"), tmp_path / "new" / "start"
    precompute(PrecomputeConfig(dataset=f"flickr:{make_photos(20)}", teacher=f"local-dir:{wide}", cache=cache))
    config = {**WIDE, "embed_dim": 12, "text_cfg": TEXT, "token_embedding_rank": 6}
    given = InheritConfig(
        teacher=f"local-dir:{wide}",
        student=write(tmp_path / "s.json", config),
        out=str(out),
        text_layers="1,3",  # type: ignore[arg-type]
        cache=cache,
    )
    result = inherit(given)
    origin = json.loads((out / "origin.json").read_text())["inherited"]
    assert origin["weights_sha256"] == teacher_at(wide).weights_sha256
    assert origin["cache_manifest_digest"] == json.loads((Path(cache) / "manifest.json").read_text())["digest"]
    assert [part["layers"] for part in origin["parts"]] == [[0, 1, 2, 3], None, None, [1, 3], None, None]
    assert InheritResult(**origin, out=str(out)) == result
    assert sorted(path.name for path in out.parent.iterdir()) == ["start"]
    loaded, loaded_config = load_student(out)
    assert loaded_config == config
    assert sum(part.parameters for part in result.parts) == result.parameters == loaded.num_parameters
    # training starts from it, projections to the teacher included
    student = fresh(config, teacher_at(wide))
    load_initial(student, str(out))
    wanted = loaded.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in student.state_dict().items())
    with pytest.raises(UsageError, match="is there already"):
        inherit(given)
    # the same command again gives the same bytes
    again = inherit(given.model_copy(update={"out": str(tmp_path / "again")}))
    assert again.parts == result.parts
    for file in ("open_clip_model.safetensors", "token_embedding.safetensors", "projection.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (out / file).read_bytes()


def test_quick_gelu_of_the_teacher_becomes_the_students(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "quick", quick_gelu=True)
    out = tmp_path / "out"
    result = inherit(
        InheritConfig(teacher=f"local-dir:{folder}", student=write(tmp_path / "s.json", TINY_MODEL), out=str(out))
    )
    assert result.notes == (
        f"quick_gelu is True, as in the teacher: train --student {out}/open_clip_config.json with it",
    )
    for mine, theirs in zip(features(load_student(out)[0]), features(teacher_at(folder).model), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


def test_settings_that_cannot_be_used_are_refused(wide: Path, tmp_path: Path) -> None:
    def run(**settings: Any) -> None:
        config = {"teacher": f"local-dir:{wide}", "student": student, "out": str(tmp_path / "out"), **settings}
        inherit(load_config(InheritConfig, "inherit", None, config))

    student = write(tmp_path / "s.json", {**WIDE, "text_cfg": TEXT})
    alien = {"embed_dim": 30, "vision_cfg": {**VISION, "layers": 9}, "text_cfg": {**TEXT, "layers": 9}}
    for settings, message in (
        ({"text_layers": "3,1"}, "layers must differ and ascend, not 3,1"),
        ({"text_layers": "a"}, "--text-layers: 'a' is not a whole number"),
        ({"text_layers": "0,1,2"}, "3 layers, but the student's text tower has 2"),
        ({"trunk_weights": "absent.pth"}, r"trunk weights 'absent\.pth': no such file; give a file or package:effic"),
        ({"trunk_weights": "package:x"}, "package:x is not known; there is package:efficientnet-lite0"),
        ({"student": "absent"}, "student 'absent' is not known"),
        ({"teacher": "local-dir:/absent"}, "absent"),
    ):
        with pytest.raises(UsageError, match=message):
            run(**settings)
    trunk = tmp_path / "t.safetensors"
    save_file({"x": torch.zeros(1)}, trunk)
    with pytest.raises(UsageError, match="image tower is VisionTransformer, not a timm model"):
        run(trunk_weights=str(trunk))
    student = write(tmp_path / "alien.json", {**alien, "text_cfg": {**TEXT, "layers": 9}})
    with pytest.raises(UsageError, match="--text-layers: the teacher's text tower does not fit: layers is 9"):
        run(text_layers=",".join(map(str, range(9))))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".partial*"))


def test_the_command_says_what_is_inherited_and_what_is_random(wide: Path, tmp_path: Path) -> None:
    student = write(tmp_path / "s.json", {**WIDE, "vision_cfg": {**TRUNK, "image_size": 32}, "token_embedding_rank": 6})
    words = ("student", "inherit", "--teacher", f"local-dir:{wide}", "--student", student, "--out", tmp_path / "a")
    done = run_command(*words)
    assert done.returncode == 0, done.stderr
    assert re.search(r"image tower +3,401,728  random: the teacher's is VisionTransformer", done.stdout)
    assert re.search(r"token embedding +296,736  teacher, rank 6 of 48: [\d.]+% of its squared norm", done.stdout)
    assert re.search(r"text transformer +[\d,]+  teacher layers 0, 1, 2, 3 of 4\n", done.stdout)
    assert "; 3,401,728 of them random" in done.stdout
    done = run_command(*words)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.real_data
def test_a_student_of_13_6_million_begins_near_its_teacher(tmp_path: Path) -> None:
    folder = shared("teacher-flickr8k")
    names = set((shared("flickr8k") / "dev.txt").read_text().split())
    captions = [caption for name, five in captions_by_image().items() if name in names for caption in five][::50]
    out = tmp_path / "start"
    result = inherit(
        InheritConfig(
            teacher=f"local-dir:{folder}", student="effnet-lite0-t3", out=str(out), trunk_weights=lite0_weights()
        )
    )
    assert (result.parameters, result.teacher_parameters) == (13_560_065, 35_312_833)
    assert {part.part for part in result.parts if part.random} == {"image projection"}
    teacher, (student, config) = teacher_at(folder), load_student(out)
    tokens = torch.as_tensor(student_tokenizer(config)(captions))
    with torch.no_grad():
        wanted = F.normalize(teacher.model.encode_text(tokens), dim=-1)  # type: ignore[operator]
        own = student.encode_text(student.shorten(tokens))
        other = fresh(student_config("effnet-lite0-t3"), teacher, 512).encode_text(tokens)
    assert len(captions) == 100
    assert float((own * wanted).sum(-1).mean()) > 0.4
    assert abs(float((other * wanted).sum(-1).mean())) < 0.1
    # each caption's features are nearest to the teacher's of the same caption
    assert float(((own @ wanted.T).argmax(1) == torch.arange(100)).float().mean()) > 0.8

    # rank 80 spent on the tokens that captions have
    train = [five[0] for name, five in captions_by_image().items() if name not in names]
    weighted = fresh(config, teacher, 512)
    inherit_weights(weighted, teacher, counts=token_counts(train, student_tokenizer(config), 49408))
    with torch.no_grad():
        better = weighted.encode_text(weighted.shorten(tokens))
    assert float((better * wanted).sum(-1).mean()) > float((own * wanted).sum(-1).mean()) + 0.05
