"""The distillation task of open_clip 4, with the rows of a cache in place of the teacher.

No release has that task yet. This is written to open_clip's main branch as of 2026-11: ``DistillCLIPTask(student,
teacher, **settings)``, whose ``training_forward(batch)`` calls ``teacher(**batch)`` with ``image`` and ``text``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from teacher_cache.pipeline.data.torch_datasets.target_dataset import TargetDataset


class _CachedRows(nn.Module):
    """A teacher without a model: returns the rows that were set last."""

    features: dict[str, Tensor]

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        return self.features


def cached_distill_task(task: Any, student: nn.Module, targets: TargetDataset, **settings: Any) -> Any:
    """Return a distillation task of open_clip 4 that learns from batches of the targets, with one caption an image.

    Args:
        task: the class ``open_clip.task.DistillCLIPTask``.
        student: open_clip model with ``output_dict``.
        targets: with images and tokens. Its batches, dicts, are the task's batches.
        settings: keyword arguments of the class, such as ``local_loss``.
    """
    scale = targets.logit_scale

    class CachedDistillTask(task):  # type: ignore[misc]
        def training_forward(self, batch: dict[str, Tensor]) -> Any:
            image, text = batch["image"].float(), batch["text"][:, 0].float()
            logit_scale = image.new_tensor(scale)
            self.teacher.features = {"image_features": image, "text_features": text, "logit_scale": logit_scale}
            return super().training_forward({"image": batch["pixels"], "text": batch["tokens"][:, 0]})

    return CachedDistillTask(student, _CachedRows(), **settings)
