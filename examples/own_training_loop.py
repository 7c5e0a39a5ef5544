"""Distil in a PyTorch loop of your own: the targets come from a cache, the loss is open_clip's DistillClipLoss.

    python examples/own_training_loop.py f8k.cache --split train --student ViT-S-32 --epochs 1

No teacher is loaded.
"""

from __future__ import annotations

import argparse

import open_clip
import torch
from open_clip.loss import DistillClipLoss
from torch.utils.data import DataLoader

from teacher_cache import TargetDataset


def main() -> None:
    """Train for some epochs and print both losses of each step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cache")
    parser.add_argument("--split", default="train")
    parser.add_argument("--student", default="ViT-S-32", help="an open_clip model")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    given = parser.parse_args()
    student = open_clip.create_model(given.student)
    targets = TargetDataset(given.cache, given.split, dtype="float32")
    targets.with_images(open_clip.get_model_preprocess_cfg(student)["size"])
    targets.with_tokens(open_clip.get_tokenizer(given.student))
    loader = DataLoader(targets, given.batch, shuffle=True, num_workers=2, drop_last=True)
    optimizer, distill = torch.optim.AdamW(student.parameters(), lr=5e-4), DistillClipLoss()
    teacher_scale = torch.tensor(targets.logit_scale)
    for epoch in range(given.epochs):
        for batch in loader:
            images, texts, scale = student(batch["pixels"], batch["tokens"][:, 0])
            # two losses: with the pairs as labels, and with the teacher's similarities as labels
            contrastive, kept = distill(images, texts, scale, batch["image"], batch["text"][:, 0], teacher_scale)
            optimizer.zero_grad()
            (contrastive + kept).backward()
            optimizer.step()
            print(f"epoch {epoch + 1}: contrastive {contrastive:.3f}, distillation {kept:.3f}", flush=True)


if __name__ == "__main__":
    main()
