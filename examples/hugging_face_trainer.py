"""Distil in the Hugging Face Trainer: python examples/hugging_face_trainer.py f8k.cache --out runs/hf."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoTokenizer, CLIPModel, Trainer, TrainingArguments

from teacher_cache import TargetDataset


class Distiller(Trainer):
    """Trainer whose loss is one minus the cosine to the teacher, of images and captions."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **settings: Any) -> Any:
        """Return the loss of a batch."""
        outputs = model(input_ids=inputs["tokens"][:, 0], pixel_values=inputs["pixels"])
        images = cosine_similarity(outputs.image_embeds, inputs["image"])
        texts = cosine_similarity(outputs.text_embeds, inputs["text"][:, 0])
        loss = 2 - images.mean() - texts.mean()
        return (loss, outputs) if return_outputs else loss


def main() -> None:
    """Train for some epochs and save the student."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cache")
    parser.add_argument("--student", default="openai/clip-vit-base-patch32", help="a CLIPModel, as wide as the teacher")
    parser.add_argument("--out", required=True)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch", type=int, default=64)
    given = parser.parse_args()
    student, tokenizer = CLIPModel.from_pretrained(given.student), AutoTokenizer.from_pretrained(given.student)

    def tokens(texts: list[str]) -> torch.Tensor:
        return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    targets = TargetDataset(given.cache, "train", dtype="float32")
    targets.with_images(student.config.vision_config.image_size).with_tokens(tokens)
    arguments = TrainingArguments(
        given.out,
        num_train_epochs=given.epochs,
        per_device_train_batch_size=given.batch,
        dataloader_num_workers=2,
        remove_unused_columns=False,  # the targets are no arguments of the model
        logging_steps=1,
        report_to="none",
    )
    trainer = Distiller(student, arguments, train_dataset=targets)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
