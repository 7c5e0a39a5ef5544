"""A batch in parts, or shared by two processes, teaches what the whole batch teaches."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from teacher_cache.pipeline.data.batches.inputs import InputLoader
from teacher_cache.pipeline.data.batches.pairs import PairOrder, Pairs
from teacher_cache.pipeline.data.batches.student_images import StudentImages
from teacher_cache.pipeline.data.batches.targets import CachedTeacher, TeacherTargets
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.models import text_length as short_text
from teacher_cache.pipeline.models.device import image_memory_format
from teacher_cache.pipeline.models.student import (
    Student,
    build_student,
    load_student,
    student_config,
    student_tokenizer,
)
from teacher_cache.pipeline.train.log.step_values import StepValues
from teacher_cache.pipeline.train.loop import StepProgress, train
from teacher_cache.pipeline.train.losses import LossInputs, TeacherQueue, weighted_sum
from teacher_cache.pipeline.train.optimizer import WeightAverage, learning_rate_share
from teacher_cache.pipeline.train.step import TrainStep
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import TINY_MODEL
from tests.pipeline.train.train_work import make_student, trace, train_config

LOSSES = {"contrastive": 1.0, "relational": 1.0, "feature": 50.0}


class OneStep:
    """The first batch of a run, and a student to put it through."""

    def __init__(self, photo_cache: Path, student: Path, **changes: Any) -> None:
        reader = EmbeddingReader(str(photo_cache))
        self.config = train_config(photo_cache, student, photo_cache / "unused", **({"losses": LOSSES} | changes))
        architecture = student_config(str(student))
        preprocess = reader.manifest.identity.preprocess.model_dump(exclude={"probe", "image_size", "antialias"})
        torch.manual_seed(0)
        self.student: Student = build_student(architecture, preprocess, reader.manifest.layout.embed_dim).train()
        self.before = copy.deepcopy(self.student)
        rows = reader.image_rows("train")
        each = self.config.captions_per_image
        pairs = next(PairOrder(reader, rows, self.config.batch_size, 4, 0, captions_per_image=each).epoch(0))
        source, tokenizer = ImageSource(reader.manifest.source.image_root), student_tokenizer(architecture)
        inputs = InputLoader(reader, tokenizer, StudentImages(reader, source, self.student.preprocess), workers=0)
        self.pixels, self.tokens = next(inputs.epoch([pairs]))
        teacher = CachedTeacher(reader)
        self.teacher_logit_scale = teacher.logit_scale
        fabric = Fabric(accelerator="cpu", devices=1)
        self.student.model.visual.to(memory_format=image_memory_format(self.student.model))
        model, optimizer = fabric.setup(self.student, torch.optim.SGD(self.student.parameters(), lr=1.0))
        self.queue = TeacherQueue(self.config.queue_rows, reader.embed_dim) if self.config.queue_rows else None
        step = TrainStep(self.config, fabric, model, self.student, optimizer, [teacher], 1, self.queue)
        (self.targets,) = teacher.targets([pairs])
        self.values: StepValues = step(0, self.pixels, self.tokens, self.targets, pairs).read()

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: value.grad for name, value in self.student.named_parameters() if value.grad is not None}


@pytest.mark.parametrize(("micro_batch", "captions_per_image"), [(1, 1), (3, 1), (4, 1), (3, 2)])
def test_parts_have_the_loss_and_the_gradients_of_the_whole(
    photo_cache: Path, tmp_path: Path, micro_batch: int, captions_per_image: int
) -> None:
    student = make_student(tmp_path / "student.json")
    student.write_text(json.dumps(json.loads(student.read_text()) | {"init_logit_bias": -3.0}))
    losses = LOSSES | {"sigmoid": 0.3, "sigmoid_relational": 0.2}
    settings = {
        "losses": losses,
        "learning_rate": 1e-12,
        "clip_grad_norm": 1e9,
        "captions_per_image": captions_per_image,
    }
    whole, parts = (OneStep(photo_cache, student, micro_batch=size, **settings) for size in (None, micro_batch))
    assert parts.values.loss == pytest.approx(whole.values.loss, rel=1e-6)
    assert parts.values.parts == pytest.approx(whole.values.parts, rel=1e-6)
    assert parts.values.grad_norm == pytest.approx(whole.values.grad_norm, rel=1e-5)
    wanted = whole.gradients()
    assert {"model.logit_scale", "model.logit_bias"} <= set(wanted)
    assert set(parts.gradients()) == set(wanted) == {name for name, _ in whole.student.named_parameters()}
    for name, gradient in parts.gradients().items():
        scale = float(wanted[name].abs().max())
        assert float((gradient - wanted[name]).abs().max()) <= 1e-5 * max(scale, 1e-3), name


def test_of_several_captions_the_mean_of_the_losses_counts(photo_cache: Path, tmp_path: Path) -> None:
    """By other code: the images with each caption by itself, gradients added up."""
    step = OneStep(
        photo_cache, make_student(tmp_path / "s.json"), captions_per_image=2, learning_rate=1e-12, clip_grad_norm=1e9
    )
    student, totals = step.before, []
    for caption in (0, 1):
        tokens = step.tokens[:, caption]
        assert tokens.shape == (8, 16)
        image, text, *projected, scale, _ = student(step.pixels, tokens)
        teacher = step.targets.image, step.targets.text[:, caption]
        inputs = LossInputs((image, text), tuple(projected), teacher, scale, step.teacher_logit_scale)
        total, _ = weighted_sum(inputs, LOSSES)
        (total / 2).backward()
        totals.append(total.item())
    assert not math.isclose(*totals, rel_tol=1e-4)
    assert step.values.loss == pytest.approx(sum(totals) / 2, rel=1e-5)
    wanted = {name: parameter.grad for name, parameter in student.named_parameters()}
    assert set(step.gradients()) == set(wanted)
    for name, gradient in step.gradients().items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5 * float(wanted[name].abs().max()))


def test_a_queue_has_each_image_beside_each_of_its_captions(photo_cache: Path, tmp_path: Path) -> None:
    step = OneStep(photo_cache, make_student(tmp_path / "s.json"), captions_per_image=2, queue_rows=16)
    assert step.queue is not None
    queued = [tuple(image + text) for image, text in zip(*(rows.tolist() for rows in step.queue.rows()), strict=True)]
    wanted = [
        tuple(image.tolist() + text.tolist())
        for image, texts in zip(step.targets.image, step.targets.text, strict=True)
        for text in texts
    ]
    assert sorted(queued) == sorted(wanted)


def test_a_student_encodes_captions_by_length(
    photo_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups change nothing but what is padding, in one piece and in parts; here of four captions, not of 64."""
    student = make_student(tmp_path / "student.json")
    shapes: list[torch.Size] = []
    encode = short_text.encode_text

    def watched(model: Any, tokens: torch.Tensor) -> torch.Tensor:
        shapes.append(tokens.shape)
        return encode(model, tokens)

    monkeypatch.setattr(short_text, "encode_text", watched)
    monkeypatch.setattr(short_text, "_STEP", 1)  # captions of this cache are all short
    found = {}
    for group in (10**9, 4):
        monkeypatch.setattr(short_text, "_GROUP", group)
        for micro_batch in (None, 3):
            shapes.clear()
            run = tmp_path / f"{group}-{micro_batch}"
            train(train_config(photo_cache, student, run, captions_per_image=2, micro_batch=micro_batch))
            found[group, micro_batch] = trace(run), len(shapes), sum(rows * length for rows, length in shapes)
    for micro_batch in (None, 3):
        (plain, calls, positions), (grouped, more, fewer) = found[10**9, micro_batch], found[4, micro_batch]
        assert more > calls
        assert fewer < positions
        for one, other in zip(grouped, plain, strict=True):
            assert one == pytest.approx(other, rel=1e-3)


def test_targets_of_other_captions_are_refused(
    photo_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = CachedTeacher.targets

    def flat(self: CachedTeacher, batches: Iterable[Pairs]) -> Iterator[TeacherTargets]:
        for batch in targets(self, batches):
            yield TeacherTargets(batch.image, batch.text.flatten(0, 1))

    monkeypatch.setattr(CachedTeacher, "targets", flat)
    with pytest.raises(
        ValueError, match=r"captions \(16, 16\) and tokens \(8, 2, 16\): wanted \(batch, captions, teacher"
    ):
        OneStep(photo_cache, make_student(tmp_path / "s.json"), captions_per_image=2)


def test_the_second_pass_sees_the_dropout_of_the_first(
    photo_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    encode = Student.encode_image

    def watched(self: Student, pixels: torch.Tensor) -> torch.Tensor:
        features = encode(self, pixels)
        seen.append(features.detach())
        return features

    monkeypatch.setattr(Student, "encode_image", watched)
    OneStep(photo_cache, make_student(tmp_path / "student.json", patch_dropout=0.5), micro_batch=4)
    first, second, first_again, second_again = seen
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)


def test_batch_norm_moves_once_per_part(photo_cache: Path, tmp_path: Path) -> None:
    """Statistics of a ResNet behind one step in three parts: those of three plain forward passes."""
    student = tmp_path / "resnet.json"
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
    student.write_text(json.dumps({**TINY_MODEL, "vision_cfg": vision}))
    step = OneStep(photo_cache, student, micro_batch=3)
    wanted = step.before
    with torch.no_grad():
        for pixels in step.pixels.split(3):
            wanted.encode_image(pixels)
    statistics = dict(wanted.named_buffers())
    counted = [name for name in statistics if name.endswith("num_batches_tracked")]
    assert counted
    assert {int(statistics[name]) for name in counted} == {3}
    for name, value in step.student.named_buffers():
        torch.testing.assert_close(value, statistics[name], rtol=1e-4, atol=1e-5)
    # a convolutional trunk is kept in the layout of its kernels
    assert step.student.model.visual.conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch": None},
        {"micro_batch": 3},
        {"captions_per_image": 2},
        {"micro_batch": 3, "captions_per_image": 2},
        # no loss looks at logit_scale, or none at the projections
        {"losses": {"feature": 100.0}, "epochs": 1},
        {"losses": {"sigmoid": 1.0}, "epochs": 1},
        {"losses": {"contrastive": 1.0}, "epochs": 1, "ema_decay": 0.9, "select_split": "test"},
        {
            "losses": {"queue": 1.0, "interactive": 1.0, "relational_mse": 1.0},
            "queue_rows": 40,
            "captions_per_image": 2,
            "temperature": 0.5,
        },
    ],
    ids=[
        "whole",
        "in parts",
        "several captions",
        "several captions in parts",
        "feature only",
        "sigmoid only",
        "contrastive only",
        "queue",
    ],
)
def test_two_processes_train_as_one_does(photo_cache: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    student = make_student(tmp_path / "student.json")
    for name, devices in (("one", 1), ("two", 2)):
        seen: list[StepProgress] = []
        record = train(
            train_config(photo_cache, student, tmp_path / name, devices=devices, **changes), seen.append
        ).record
        assert [at.step for at in seen] == list(range(1, record.steps + 1))
        assert seen[-1].eta_seconds == 0
        assert record.finished
    for two, one in zip(trace(tmp_path / "two"), trace(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, rel=1e-4 if "micro_batch" in changes else 1e-5)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_an_error_in_a_process_comes_back_as_it_is(photo_cache: Path, tmp_path: Path) -> None:
    student = make_student(tmp_path / "student.json")
    with pytest.raises(UsageError, match="no split 'val'"):
        train(train_config(photo_cache, student, tmp_path / "run", devices=2, split="val"))
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"^row \d+ .*Name their folder with --image-root"):
        train(train_config(photo_cache, student, tmp_path / "run", devices=2, image_root=nowhere))
    with pytest.raises(ValueError, match="batch_size 8 cannot be shared evenly by 3 devices"):
        train_config(photo_cache, student, tmp_path / "run", devices=3)


def test_the_average_moves_fast_while_it_is_young() -> None:
    """By hand: 1/10, 2/11, then 0.2, which is less than 3/12."""
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(1.0)
    average = WeightAverage(module, 0.2)
    wanted = 1.0
    for value, decay in ((2.0, 1 / 10), (4.0, 2 / 11), (8.0, 0.2)):
        module.weight.data.fill_(value)
        average.update()
        wanted = decay * wanted + (1 - decay) * value
        assert float(average.state()["weight"]) == pytest.approx(wanted, rel=1e-6)
    with average.in_place():
        assert module.weight.item() == pytest.approx(wanted, rel=1e-6)
    assert module.weight.item() == 8.0


def test_what_is_saved_is_the_average(photo_cache: Path, tmp_path: Path) -> None:
    """Training itself is not touched by it; the model lies between the start and the last weights."""
    student = make_student(tmp_path / "student.json")
    for name, decay in (("plain", 0.0), ("averaged", 0.99)):
        train(train_config(photo_cache, student, tmp_path / name, ema_decay=decay))
    assert trace(tmp_path / "plain") == trace(tmp_path / "averaged")
    (plain, _), (averaged, _) = (
        load_student(tmp_path / name / "checkpoints" / "epoch-0002") for name in ("plain", "averaged")
    )
    assert not torch.equal(plain.model.visual.proj, averaged.model.visual.proj)


def test_the_schedule_rises_in_a_line_and_falls_as_a_cosine() -> None:
    shares = [learning_rate_share(step, 10, 0.2) for step in range(10)]
    assert shares[:3] == [0.5, 1.0, 1.0]
    assert shares[6] == pytest.approx(0.5)
    assert shares[9] == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)
    assert np.all(np.diff(shares[2:]) < 0)


@pytest.mark.filterwarnings("ignore")  # torch's compiler looks at what warns
def test_a_compiled_student_learns_the_same(photo_cache: Path, tmp_path: Path) -> None:
    student = make_student(tmp_path / "student.json", layers=1)
    model = json.loads(student.read_text())
    student.write_text(json.dumps({**model, "text_cfg": {**model["text_cfg"], "layers": 1}}))
    for name, compiled in (("plain", False), ("compiled", True)):
        train(train_config(photo_cache, student, tmp_path / name, epochs=1, compile=compiled))
    for one, other in zip(trace(tmp_path / "compiled"), trace(tmp_path / "plain"), strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    load_student(tmp_path / "compiled" / "checkpoints" / "epoch-0001")
