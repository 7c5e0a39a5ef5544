"""bf16 on a CPU: depthwise convolutions that learn are worked out in float32, all others as autocast has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from teacher_cache.pipeline.models.device import keep_depthwise_float32
from teacher_cache.pipeline.train.loop import train
from tests.pipeline.models.test_locked_layers import GROUPS, begin, make_student
from tests.pipeline.train.train_work import trace, train_config

# by hand: one in each of the 16 blocks, of which the stages have 1, 2, 2, 3, 3, 4 and 1
DEPTHWISE = 16
STEPS = 2


class Convolutions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the convolutions within the block: of which pass, with one group or many, in which dtype."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[tuple[str, str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("convolution", "convolution_backward"):
            backward = name == "convolution_backward"
            groups = args[9 if backward else 8]
            self.found[
                "backward" if backward else "forward", "depthwise" if groups > 1 else "dense", args[0].dtype
            ] += 1
        return func(*args, **(kwargs or {}))


def convolutions(photo_cache: Path, folder: Path, **settings: Any) -> Counter[tuple[str, str, torch.dtype]]:
    """Those of a run of a few steps."""
    seen = Convolutions()
    with seen:
        train(train_config(photo_cache, out=folder / "run", epochs=1, device="cpu", **settings, **begin(folder)))
    return seen.found


def test_what_learns_goes_backward_in_float32_and_what_is_locked_stays_in_bf16(
    photo_cache: Path, tmp_path: Path
) -> None:
    """The stem and two stages are locked: 3 depthwise convolutions, of which none has a backward pass."""
    found = convolutions(photo_cache, tmp_path, precision="bf16", lock_image_unlocked_groups=GROUPS - 4)
    steps = found["backward", "depthwise", torch.float32] // (DEPTHWISE - 3)
    assert steps >= STEPS
    assert found["backward", "depthwise", torch.float32] == steps * (DEPTHWISE - 3)
    assert found["forward", "depthwise", torch.float32] == steps * (DEPTHWISE - 3)
    assert found["forward", "depthwise", torch.bfloat16] == steps * 3
    assert found["backward", "depthwise", torch.bfloat16] == 0
    assert found["forward", "dense", torch.float32] == found["backward", "dense", torch.float32] == 0
    assert found["backward", "dense", torch.bfloat16] > 0


# dynamo looks at a tensor's .grad, hides the warning, and does not where warnings are errors
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_it_trains_as_it_does_eagerly(photo_cache: Path, tmp_path: Path) -> None:
    """With few layers that learn: a backward pass through all of them takes most of a minute to compile."""
    start = {**begin(tmp_path), "lock_image_unlocked_groups": 2}
    for name, compiled in (("eager", False), ("compiled", True)):
        train(train_config(photo_cache, out=tmp_path / name, epochs=1, precision="bf16", compile=compiled, **start))
    for one, other in zip(trace(tmp_path / "compiled"), trace(tmp_path / "eager"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.05)


def gradients(prepare: Callable[[nn.Module], Any], bf16: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    student = make_student().eval()
    prepare(student)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        features = student.encode_image(pixels)
    (features * torch.linspace(-1, 1, features.shape[1])).sum().backward()  # type: ignore[no-untyped-call]
    return features, {name: p.grad.flatten() for name, p in student.named_parameters() if p.grad is not None}


def test_features_and_gradients_are_as_near_to_those_of_float32_as_autocast_alone_has_them() -> None:
    exact_features, exact = gradients(lambda student: None, bf16=False)
    plain_features, plain = gradients(lambda student: None)
    features, found = gradients(keep_depthwise_float32)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(features, exact_features).min() > cosine(plain_features, exact_features).min() - 0.001
    assert found.keys() == plain.keys() == exact.keys()
    assert {grad.dtype for grad in found.values()} == {torch.float32}
    near = [float(cosine(found[name], exact[name], dim=0)) for name in exact]
    plain_near = [float(cosine(plain[name], exact[name], dim=0)) for name in exact]
    assert sum(near) / len(near) > max(0.95, sum(plain_near) / len(plain_near) - 0.01)


def test_outside_autocast_nothing_changes_and_no_name_does() -> None:
    student, plain = make_student().eval(), make_student().eval()
    assert keep_depthwise_float32(student) == DEPTHWISE
    assert list(student.state_dict()) == list(plain.state_dict())
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.equal(student.encode_image(pixels), plain.encode_image(pixels))


def test_a_transformer_has_none() -> None:
    assert keep_depthwise_float32(make_student("vit")) == 0
