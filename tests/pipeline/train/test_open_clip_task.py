"""open_clip 4's distillation task on batches of a cache, against a double of its interface: no release has it yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.loss import DistillClipLoss
from torch import Tensor, nn
from torch.utils.data import DataLoader

from teacher_cache import TargetDataset, cached_distill_task
from tests.conftest import make_model_folder


class DistillCLIPTask(nn.Module):
    """What of the class is relied on: its arguments, ``teacher``, and ``training_forward`` of a dict."""

    def __init__(self, student_model: nn.Module, teacher_model: nn.Module, *, local_loss: bool = False) -> None:
        super().__init__()
        self.trainable_module, self.teacher = student_model, teacher_model.eval().requires_grad_(False)
        self.loss = DistillClipLoss(local_loss=local_loss)

    def training_forward(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        student = self.trainable_module(**batch)
        with torch.no_grad():
            teacher = self.teacher(**batch)
        losses = self.loss(**student, **{f"dist_{name}": value for name, value in teacher.items()}, output_dict=True)
        return {**losses, "loss": sum(losses.values())}, {}


def losses(task: Any, batches: list[dict[str, Tensor]]) -> list[float]:
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.1)
    values = []
    for batch in batches:
        optimizer.zero_grad()
        loss = task.training_forward(batch)[0]["loss"]
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


def test_cached_rows_give_the_losses_of_a_live_teacher(photo_cache: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "student", seed=1, embed_dim=12)
    teacher, *students = (
        open_clip.create_model(f"local-dir:{path}", output_dict=True) for path in (tiny_teacher, folder, folder)
    )
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    targets = TargetDataset(str(photo_cache), "train").with_images(32).with_tokens(tokenizer)
    torch.manual_seed(0)
    batches = list(DataLoader(targets, batch_size=8, shuffle=True, drop_last=True))
    assert len(batches) > 3
    task = cached_distill_task(DistillCLIPTask, students[0], targets, local_loss=False)
    assert isinstance(task, DistillCLIPTask)
    assert not list(task.teacher.parameters())
    pairs = [{"image": batch["pixels"], "text": batch["tokens"][:, 0]} for batch in batches]
    live = losses(DistillCLIPTask(students[1], teacher), pairs)
    assert losses(task, batches) == pytest.approx(live, abs=1e-3)
    assert live[0] != pytest.approx(live[-1], abs=1e-3)
