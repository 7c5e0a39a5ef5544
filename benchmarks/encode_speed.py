"""Images and captions per second of a teacher and a student on a CPU, in turns, and their ratio.

python benchmarks/encode_speed.py local-dir:../shared/teacher-flickr8k CHECKPOINT [--rounds 7] [--batch 16]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pipeline.device import keep_freed_memory
from pipeline.student import load_student, student_tokenizer
from pipeline.teacher import load_teacher
from pipeline.train_step import image_memory_format

TEXTS = ["a dog runs through the grass with a red ball in its mouth ."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    keep_freed_memory()
    teacher = load_teacher(options.teacher, device="cpu")
    student, config = load_student(options.checkpoint)
    form = image_memory_format(student)
    student.model.visual.to(memory_format=form)
    batch = options.batch
    teacher_pixels = torch.randn(batch, 3, *teacher.preprocess.size)
    student_pixels = torch.randn(batch, 3, *student.preprocess.size).to(memory_format=form)
    teacher_tokens = teacher.tokenizer(TEXTS * batch)
    student_tokens = student.shorten(student_tokenizer(config)(TEXTS * batch))
    work: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "images": (lambda: teacher.encode_images(teacher_pixels), lambda: student.encode_image(student_pixels)),
        "captions": (lambda: teacher.encode_texts(teacher_tokens), lambda: student.encode_text(student_tokens)),
    }
    sizes = (sum(parameter.numel() for parameter in teacher.model.parameters()), student.num_parameters)
    print(f"parameters: {sizes[0]:,} and {sizes[1]:,}, {sizes[1] / sizes[0]:.1%}")
    with torch.inference_mode():
        for name, pair in work.items():
            for run in pair:
                run()  # kernels are chosen and memory is taken at the first call
            rates = np.array([[batch / seconds(run) for run in pair] for _ in range(options.rounds)])
            ratios = rates[:, 1] / rates[:, 0]
            teacher_rate, student_rate = np.median(rates, axis=0)
            print(
                f"{name}/s: teacher {teacher_rate:.1f}, student {student_rate:.1f}, ratio {np.median(ratios):.2f} "
                f"({ratios.min():.2f} to {ratios.max():.2f}), batch {batch}, {torch.get_num_threads()} threads"
            )


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
