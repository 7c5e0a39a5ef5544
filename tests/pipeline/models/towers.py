"""Tiny students of each kind, their input, and their exported towers run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from teacher_cache.pipeline.deploy.formats.export_onnx import ExportedTowers, export_towers
from teacher_cache.pipeline.models.student import Student, build_student
from tests.conftest import TINY_MODEL

PREPROCESS: dict[str, Any] = {
    "mean": [0.48, 0.46, 0.41],
    "std": [0.27, 0.26, 0.28],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
TEXT: dict[str, Any] = {**TINY_MODEL["text_cfg"], "context_length": 77}
KINDS: dict[str, dict[str, Any]] = {
    # a factorised embedding and a projection to a teacher of another width
    "vit": {**TINY_MODEL, "text_cfg": TEXT, "token_embedding_rank": 6},
    "resnet": {
        **TINY_MODEL,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64},
        "text_cfg": {**TEXT, "layers": 1},
    },
    "lite0": {
        **TINY_MODEL,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 64,
        },
        # each position sees all others: texts cannot be shortened
        "text_cfg": {**TEXT, "layers": 1, "no_causal_mask": True},
    },
}


def build(config: dict[str, Any], seed: int = 0, teacher_dim: int = 16) -> Student:
    """A student with seeded random weights, in evaluation mode."""
    torch.manual_seed(seed)
    return build_student(config, PREPROCESS, teacher_dim).eval()


def make_student(kind: str) -> Student:
    """Random weights, and batch norms that would show if they were not folded."""
    student = build(KINDS[kind], 7, 24 if kind == "vit" else 16)
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # open_clip starts some at 0, and whole branches with them
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
            module.momentum = 1.0
    # statistics that fit: else the image is lost on its way, and all features are alike
    with torch.no_grad():
        student.train().encode_image(torch.randn(16, 3, *student.preprocess.size))
    return student.eval()


_EXPORTED: dict[str, tuple[Student, ExportedTowers]] = {}


def exported_once(kind: str, folders: pytest.TempPathFactory) -> tuple[Student, ExportedTowers]:
    """A student and its towers, exported once in a session; to be left as they are."""
    if kind not in _EXPORTED:
        student = make_student(kind)
        _EXPORTED[kind] = student, export_towers(student, folders.mktemp(kind))
    return _EXPORTED[kind]


def make_tokens(batch: int, length: int, seed: int = 0) -> NDArray[np.int64]:
    """Rows as the tokenizer makes them: start, words, end at another place in each row, padding."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((batch, length), np.int64)
    for row, end in enumerate(rng.integers(1, length, batch)):
        tokens[row, 0], tokens[row, 1:end], tokens[row, end] = 49406, rng.integers(1, 49406, end - 1), 49407
    tokens[0, :] = rng.integers(1, 49406, length)  # a full row
    tokens[0, -1] = 49407
    return tokens


def run_onnx(path: Path, values: NDArray[Any]) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    (features,) = session.run(None, {given.name: values})
    return np.asarray(features)
