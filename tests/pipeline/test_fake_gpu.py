"""What runs on a GPU, without one: torch's fake tensors say where the host would wait for the device.

A copy to the device without ``non_blocking``, or a value read back, stops the host until the GPU has ended its work,
and the GPU then idles until the host has launched more. Tensors of two devices in one operation raise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from open_clip.model import CLIP
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from teacher_cache.pipeline.data.batches.pairs import Pairs
from teacher_cache.pipeline.data.batches.targets import TeacherTargets
from teacher_cache.pipeline.data.images import preprocess as preprocess_module
from teacher_cache.pipeline.models import student as student_module
from teacher_cache.pipeline.models import teacher as teacher_module
from teacher_cache.pipeline.models import text_length
from teacher_cache.pipeline.models.student import Student, build_student
from teacher_cache.pipeline.models.teacher import LiveTeacher, load_teacher
from teacher_cache.pipeline.train.log import step_values
from teacher_cache.pipeline.train.optimizer import adamw
from teacher_cache.pipeline.train.step import TrainStep
from tests.conftest import TINY_MODEL
from tests.pipeline.train.train_work import make_student, train_config

GPU = torch.device("cuda")
BATCH = 8


class Watch(TorchDispatchMode):
    """The operations of a block, and its copies to and from the device by whether the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.to_device: Counter[bool] = Counter()
        self.bytes = Counter[str]()
        self.to_host: Counter[bool] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.operations += 1
        source = args[0] if args and isinstance(args[0], torch.Tensor) else None
        moved = source is not None and isinstance(out, torch.Tensor) and (source.device.type, out.device.type)
        if isinstance(out, torch.Tensor) and moved:
            self.bytes["->".join(moved)] += out.nbytes * (moved[0] != moved[1])
        if moved == ("cpu", "cuda"):
            self.to_device[not kwargs.get("non_blocking")] += 1
        if moved == ("cuda", "cpu"):
            self.to_host[not kwargs.get("non_blocking")] += 1
        return out


@contextmanager
def fake_gpu() -> Iterator[Watch]:
    """A device that has no memory. Pinning and events need a driver, so they are left out."""
    preprocess_module._on_device.cache_clear()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        patch.object(teacher_module, "mark", lambda device: None),
        patch.object(step_values, "mark", lambda device: None),
        patch.object(teacher_module, "for_copy", lambda tensor, device: tensor),
        # by the values of ids, which lie on the CPU
        patch.object(teacher_module, "shorten", lambda tokens: tokens[:, :8]),
        patch.object(student_module, "shorten", lambda tokens: tokens[:, :8]),
        Watch() as watch,
    ):
        yield watch
    preprocess_module._on_device.cache_clear()


def model_on_gpu() -> CLIP:
    with GPU:
        model = CLIP(**TINY_MODEL)
    text_length._SHORTENS[model] = True  # known before a model moves to its device
    return model


def on_fake_gpu(teacher: LiveTeacher) -> LiveTeacher:
    teacher.model = model_on_gpu().eval().requires_grad_(False)
    teacher.device = GPU
    # a stream of its own needs a driver
    copies: Any = SimpleNamespace(copied=lambda pinned: (pinned.to(GPU, non_blocking=True), None))
    teacher._copies = copies
    return teacher


def test_a_second_batch_of_pictures_and_captions_is_launched_without_a_wait(tiny_teacher: Path) -> None:
    """The first one copies mean and standard deviation to the device. Reading an embedding back would raise here."""
    teacher = load_teacher(f"local-dir:{tiny_teacher}", device="cpu")
    shown = torch.zeros(BATCH, *teacher.preprocess.size, 3, dtype=torch.uint8)
    tokens = torch.zeros(BATCH, teacher.tokenizer.context_length, dtype=torch.int64)
    with fake_gpu() as watch:
        on_fake_gpu(teacher)
        teacher.encode_shown(shown)
        watch.to_device.clear()
        image, text = teacher.encode_shown(shown), teacher.encode_texts(tokens)
        assert image._embedding.shape == text._embedding.shape == (BATCH, 16)
    assert watch.to_device == {False: 2}


def test_what_a_batch_moves_and_launches(tiny_teacher: Path) -> None:
    """A byte for each value of a picture goes there, an embedding and a norm come back. Launches do not grow."""
    teacher = load_teacher(f"local-dir:{tiny_teacher}", device="cpu")
    height, width = teacher.preprocess.size
    counts = []
    with fake_gpu() as watch:
        on_fake_gpu(teacher)
        for rows in (BATCH, 4 * BATCH):
            shown = torch.zeros(rows, height, width, 3, dtype=torch.uint8)
            teacher.encode_shown(shown)
            watch.bytes.clear()
            watch.operations = 0
            teacher.encode_shown(shown)
            assert watch.bytes["cpu->cuda"] == rows * height * width * 3
            assert watch.bytes["cuda->cpu"] == rows * (16 * 2 + 4)
            counts.append(watch.operations)
    few, many = counts
    assert few == many
    assert many <= 70  # of two layers, normalising included


def test_a_training_step_is_launched_without_a_wait(tmp_path: Path) -> None:
    """Reading its values is one wait, after the next step is launched. Autograd needs a driver: gradients are given."""
    losses = {"contrastive": 1.0, "relational": 1.0, "interactive": 1.0, "feature": 50.0}
    config = train_config(tmp_path / "c", make_student(tmp_path / "s.json"), tmp_path / "r", losses=losses)
    rows = np.arange(BATCH)
    pairs = Pairs(rows, np.zeros(BATCH, np.int64), rows[:, None])
    waits = Counter[str]()

    def told(values: torch.Tensor) -> list[float]:
        waits["tolist"] += 1
        return [1.0] * len(values)

    colours = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    student = build_student(TINY_MODEL, {**colours, "fill_color": 0}, 16).train()
    with fake_gpu() as watch, patch.object(FakeTensor, "tolist", told):
        step = fake_step(config, student)
        targets = TeacherTargets(torch.zeros(BATCH, 16).half(), torch.zeros(BATCH, 1, 16).half())
        tokens = torch.zeros(BATCH, 1, 16, dtype=torch.int64)
        pixels = torch.zeros(BATCH, 3, *student.preprocess.size, device=GPU)
        watch.to_device.clear()
        first = step(0, pixels, tokens, targets, pairs)
        step(1, pixels, tokens, targets, pairs)
        assert (waits, watch.to_device, watch.to_host) == ({}, {False: 6}, {False: 2})  # two targets, tokens; values
        assert first.read().loss == 1.0
    assert waits == {"tolist": 1}


def fake_step(config: Any, student: Student) -> TrainStep:
    student.model = model_on_gpu().train()
    fabric = SimpleNamespace(
        device=GPU,
        world_size=1,
        global_rank=0,
        backward=lambda loss: [setattr(each, "grad", torch.zeros_like(each)) for each in student.parameters()],
        clip_gradients=lambda module, optimizer, max_norm, error_if_nonfinite: torch.nn.utils.clip_grad_norm_(
            module.parameters(), max_norm, error_if_nonfinite=error_if_nonfinite
        ),
    )
    teacher: Any = SimpleNamespace(logit_scale=100.0, logit_bias=None)
    optimizer = adamw(student, 1e-3, 0.1, fused=True)
    return TrainStep(config, fabric, student, student, optimizer, [teacher], 1)  # type: ignore[arg-type]
