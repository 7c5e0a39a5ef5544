"""Distil in Lightning: python examples/lightning_module.py f8k.cache --student ViT-S-32."""

import argparse
from typing import Any

import lightning
import open_clip
import torch
from open_clip.loss import DistillClipLoss
from torch import Tensor
from torch.utils.data import DataLoader

from teacher_cache import TargetDataset


class CachedTargets(lightning.LightningDataModule):
    """Training batches of a cache. Under DDP, Lightning puts its DistributedSampler around the dataset."""

    def __init__(self, cache: str, image_size: int, tokenizer: Any, batch_size: int = 64) -> None:
        super().__init__()
        self.targets = TargetDataset(cache, "train", dtype="float32").with_images(image_size).with_tokens(tokenizer)
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of the training split."""
        return DataLoader(self.targets, self.batch_size, shuffle=True, num_workers=2, drop_last=True)


class Distilled(lightning.LightningModule):
    """An open_clip student with open_clip's distillation loss."""

    def __init__(self, student: torch.nn.Module, teacher_scale: float) -> None:
        super().__init__()
        self.student, self.loss, self.teacher_scale = student, DistillClipLoss(), torch.tensor(teacher_scale)

    def training_step(self, batch: dict[str, Tensor], step: int) -> Tensor:
        """Return the loss of a batch."""
        images, texts, scale = self.student(batch["pixels"], batch["tokens"][:, 0])
        teacher = batch["image"], batch["text"][:, 0], self.teacher_scale
        contrastive, kept = self.loss(images, texts, scale, *teacher)
        print(f"step {self.global_step + 1}: contrastive {contrastive:.3f}, distillation {kept:.3f}")
        return contrastive + kept

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=5e-4)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("cache")
    parser.add_argument("--student", default="ViT-S-32")
    parser.add_argument("--batch", type=int, default=64)
    given = parser.parse_args()
    student = open_clip.create_model(given.student)
    image_size = open_clip.get_model_preprocess_cfg(student)["size"]
    data = CachedTargets(given.cache, image_size, open_clip.get_tokenizer(given.student), given.batch)
    trainer = lightning.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(Distilled(student, data.targets.logit_scale), data)
