"""Distil in a PyTorch loop of your own: the targets come from a cache, the loss is open_clip's DistillClipLoss.

    python examples/own_training_loop.py f8k.cache --split train --student ViT-S-32 --epochs 1

No teacher is loaded. The cache must hold loose image files (not tars); the evaluation crop is the image of each target.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.loss import DistillClipLoss
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from teacher_cache import Cache


class CachedPairs(Dataset[tuple[Any, ...]]):
    """Images of a split, each with one of its captions, drawn anew each time, and the teacher's embedding of both."""

    def __init__(self, cache: Cache, split: str, preprocess: Any, tokenizer: Any) -> None:
        self.cache, self.preprocess, self.tokenizer = cache, preprocess, tokenizer
        self.rows = cache.image_rows(split)
        self.folder = Path(cache.manifest.source.image_root)
        self.uris, self.texts = cache.samples["uri"], cache.captions["text"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        row = int(self.rows[index])
        caption = random.randrange(*self.cache.caption_offsets[row : row + 2])
        with Image.open(self.folder / self.uris[row].as_py()) as image:
            pixels = self.preprocess(image)
        tokens = self.tokenizer([self.texts[caption].as_py()])[0]
        return pixels, tokens, self.cache.take("image", [row])[0], self.cache.take("text", [caption])[0]


def main() -> None:
    """Train for some epochs and print both losses of each step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cache")
    parser.add_argument("--split", default="train")
    parser.add_argument("--student", default="ViT-S-32", help="an open_clip model")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    given = parser.parse_args()
    student, _, preprocess = open_clip.create_model_and_transforms(given.student)
    cache = Cache(given.cache)
    pairs = CachedPairs(cache, given.split, preprocess, open_clip.get_tokenizer(given.student))
    loader = DataLoader(pairs, given.batch, shuffle=True, num_workers=2, drop_last=True)
    optimizer, distill = torch.optim.AdamW(student.parameters(), lr=5e-4), DistillClipLoss()
    teacher_scale = torch.tensor(cache.identity.teacher.logit_scale)
    for epoch in range(given.epochs):
        for pixels, tokens, teacher_image, teacher_text in loader:
            images, texts, scale = student(pixels, tokens)
            # two losses: with the pairs as labels, and with the teacher's similarities as labels
            teacher = teacher_image.float(), teacher_text.float(), teacher_scale
            contrastive, kept = distill(images, texts, scale, *teacher)
            optimizer.zero_grad()
            (contrastive + kept).backward()
            optimizer.step()
            print(f"epoch {epoch + 1}: contrastive {contrastive:.3f}, distillation {kept:.3f}", flush=True)


if __name__ == "__main__":
    main()
