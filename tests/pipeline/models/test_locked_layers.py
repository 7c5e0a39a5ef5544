"""The first layers of an image tower, locked: they keep what they began with, and no gradient is computed for them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.student import Student, save_student
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.loop import StepProgress, train
from teacher_cache.pipeline.train.optimizer import adamw
from teacher_cache.storage.errors import UsageError
from tests.conftest import TINY_MODEL
from tests.pipeline.models.towers import KINDS, build
from tests.pipeline.train.train_work import trace, train_config

# by hand: stem, 7 stages of 1, 2, 2, 3, 3, 4 and 1 blocks, of which the last has the head with it
GROUPS = 1 + 16
VIT_GROUPS = 1 + TINY_MODEL["vision_cfg"]["layers"] + 1


def make_student(kind: str = "lite0") -> Student:
    config = copy.deepcopy(KINDS[kind])
    config["vision_cfg"]["image_size"] = 32
    return build(config, 3).train()


def begin(folder: Path, kind: str = "lite0") -> dict[str, Any]:
    """Settings that start from a checkpoint of this kind."""
    student, start = make_student(kind), folder / "start"
    start.mkdir()
    save_student(student, student.config, start, {})
    return {"student": start / "open_clip_config.json", "init": str(start)}


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "open_clip_model.safetensors")


def kept(run: Path, start: Path) -> set[str]:
    """Names of the tensors of the image tower that a run left byte for byte as they were."""
    before, after = weights(start), weights(RunFolder(run).checkpoint_path())
    assert before.keys() == after.keys()
    return {name for name in before if name.startswith("visual.") and torch.equal(before[name], after[name])}


def names(student: Student, *parts: str) -> set[str]:
    """Names of the tensors of the image tower, statistics included, that begin so."""
    begins = tuple(f"visual.{part}" for part in parts)
    return {name for name in student.model.state_dict() if name.startswith(begins)}


@pytest.mark.parametrize("more", [{}, {"ema_decay": 0.9, "micro_batch": 4, "select_split": "test"}])
def test_locked_layers_and_their_statistics_stay_and_all_others_learn(
    photo_cache: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    """Also where an epoch is measured in between, and a batch goes through the student in parts."""
    settings = begin(tmp_path)
    locked = names(make_student(), "trunk.conv_stem", "trunk.bn1", "trunk.blocks.0.", "trunk.blocks.1.")
    train(train_config(photo_cache, out=tmp_path / "run", lock_image_unlocked_groups=GROUPS - 4, **more, **settings))
    assert kept(tmp_path / "run", tmp_path / "start") == locked
    train(train_config(photo_cache, out=tmp_path / "free", **settings))
    assert kept(tmp_path / "free", tmp_path / "start") == set()


VIT_LOCKED = ("conv1", "class_embedding", "positional_embedding", "ln_pre", "transformer.resblocks.0.")


@pytest.mark.parametrize(
    ("kind", "unlocked", "locked"), [("lite0", 0, ("trunk.",)), ("vit", VIT_GROUPS - 2, VIT_LOCKED)]
)
def test_a_whole_trunk_or_the_first_layers_of_a_transformer(
    photo_cache: Path, tmp_path: Path, kind: str, unlocked: int, locked: tuple[str, ...]
) -> None:
    settings = begin(tmp_path, kind) | {"lock_image_unlocked_groups": unlocked}
    train(train_config(photo_cache, out=tmp_path / "run", **settings))
    assert kept(tmp_path / "run", tmp_path / "start") == names(make_student(kind), *locked)


def test_nothing_is_kept_for_a_gradient_and_training_mode_leaves_them_alone() -> None:
    student = make_student()
    student.lock_image(GROUPS - 4)
    tower: Any = student.model.visual
    trunk = tower.trunk
    first_that_learns, seen = trunk.blocks[2], []
    first_that_learns.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].requires_grad))
    for _ in range(2):
        student.eval()
        student.train()
        assert first_that_learns.training
        assert trunk.bn2.training
        locked = [trunk.conv_stem, trunk.bn1, trunk.blocks[0], trunk.blocks[1]]
        assert not any(module.training for part in locked for module in part.modules())
    pixels = torch.randn(4, 3, 32, 32)
    torch.autograd.backward(student.encode_image(pixels).sum())
    assert seen == [False]
    # what does not learn is neither decayed nor given moments
    optimized = {parameter for group in adamw(student, 1e-3, 0.1).param_groups for parameter in group["params"]}
    assert optimized == {parameter for parameter in student.parameters() if parameter.requires_grad}
    assert 0 < len(optimized) < len(list(student.parameters()))


def test_a_run_that_goes_on_locks_them_again(photo_cache: Path, tmp_path: Path) -> None:
    settings = begin(tmp_path) | {"lock_image_unlocked_groups": GROUPS - 4, "checkpoint_steps": 3}

    def stop(at: StepProgress) -> None:
        if at.step == 5:
            raise KeyboardInterrupt

    train(train_config(photo_cache, out=tmp_path / "whole", **settings))
    with pytest.raises(KeyboardInterrupt):
        train(train_config(photo_cache, out=tmp_path / "stopped", **settings), stop)
    train(train_config(photo_cache, out=tmp_path / "stopped", **settings), resume=True)
    assert trace(tmp_path / "stopped") == trace(tmp_path / "whole")
    whole, stopped = (weights(RunFolder(tmp_path / name).checkpoint_path()) for name in ("whole", "stopped"))
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)
    free = settings | {"lock_image_unlocked_groups": None}
    with pytest.raises(UsageError, match="lock_image_unlocked_groups is None, the run has 13"):
        train(train_config(photo_cache, out=tmp_path / "stopped", **free), resume=True)


@pytest.mark.parametrize("unlocked", [2, 0])
def test_two_processes_lock_as_one_does(photo_cache: Path, tmp_path: Path, unlocked: int) -> None:
    settings = begin(tmp_path, "vit") | {"lock_image_unlocked_groups": unlocked}
    for name, devices in (("one", 1), ("two", 2)):
        train(train_config(photo_cache, out=tmp_path / name, devices=devices, **settings))
    for two, one in zip(trace(tmp_path / "two"), trace(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    assert kept(tmp_path / "two", tmp_path / "start") == kept(tmp_path / "one", tmp_path / "start") != set()


def test_what_cannot_be_locked(photo_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keeps the weights of init, and none is given"):
        TrainConfig(cache=str(photo_cache), student="vit-s-32", out="run", lock_image_unlocked_groups=0)
    with pytest.raises(UsageError, match="groups 17 locks nothing: the image tower has no more groups than that"):
        make_student().lock_image(GROUPS)
    with pytest.raises(UsageError, match=f"groups {VIT_GROUPS} locks nothing"):
        make_student("vit").lock_image(VIT_GROUPS)
    with pytest.raises(UsageError, match=r"ModifiedResNet cannot be locked in part: AssertionError.* Use 0"):
        make_student("resnet").lock_image(2)
    pooled = copy.deepcopy(KINDS["vit"])
    pooled["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_heads": 2}
    with pytest.raises(UsageError, match="its attentional pooler is in no group"):
        build(pooled).lock_image(1)
    resnet = make_student("resnet")
    resnet.lock_image(0)
    tower: Any = resnet.train().model.visual
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert not tower.training
