"""Where a student's images come from: decoding photographs against ready pixels, alone and under real steps.

    python -m benchmarks.student_input ../shared/flickr8k

Two sets: 1,000 photographs as they are (224 x 224), and 200 of them enlarged to 1600 x 1200, as cameras make them. Both
in three views, by the bundled teacher, whose targets play no part. Variants take turns; medians, ranges and ratios
within a round are printed. Files were just written or read, so they come from memory, not from the disk.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.bench.material import photographs
from teacher_cache.pipeline.data.batches.inputs import InputLoader
from teacher_cache.pipeline.data.batches.pairs import PairOrder
from teacher_cache.pipeline.data.batches.student_images import StudentImages
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images.preprocess import handed_on
from teacher_cache.pipeline.data.images.ready_pixels import ReadyPixels
from teacher_cache.pipeline.models.device import keep_freed_memory
from teacher_cache.pipeline.models.student import build_student, student_config, student_tokenizer
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.train import PixelsConfig, TrainConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.pipeline.train.make_pixels import make_pixels, plan_pixels
from teacher_cache.storage.read.reader import EmbeddingReader

STUDENT, VIEWS, BATCH = "vit-ti-32", 3, 50
SETS = {"224 x 224": (1000, None), "1600 x 1200": (200, (1600, 1200))}


def prepare(source: Path, home: Path, count: int, size: tuple[int, int] | None) -> None:
    """Photographs, cache and ready pixels."""
    photographs(source, home / "photos", count, size)
    dataset, cache = f"flickr:{home / 'photos'}", str(home / "c")
    precompute(PrecomputeConfig(dataset=dataset, teacher="bundled:scenes", cache=cache, views=VIEWS, device="cpu"))
    plan = plan_pixels(PixelsConfig(cache=cache, student=STUDENT, out=str(home / "ready")))
    started = time.perf_counter()
    make_pixels(plan)
    spent = time.perf_counter() - started
    taken = sum(path.stat().st_size for path in (home / "photos" / "images").iterdir())
    print(
        f"{count} photographs of {taken / 1e6:.0f} MB: ready pixels {plan.nbytes / 1e6:.0f} MB, made at "
        f"{count / spent:.0f} photographs/s in {VIEWS} views",
        flush=True,
    )


def drained(home: Path, ready: bool, workers: int, epoch: int) -> float:
    """Samples per second of one epoch of inputs that nobody uses."""
    reader = EmbeddingReader(str(home / "c"))
    rows, architecture = reader.image_rows("train"), student_config(STUDENT)
    student = build_student(architecture, handed_on(reader.manifest.identity.preprocess), reader.embed_dim)
    images: StudentImages | ReadyPixels = StudentImages(reader, ImageSource(str(home / "photos")), student.preprocess)
    if ready:
        images = ReadyPixels(str(home / "ready"), reader, rows, VIEWS, student.preprocess)
    pairs = list(PairOrder(reader, rows, BATCH, 16, seed=0).epoch(epoch))
    tokenizer = student_tokenizer(architecture)
    torch.set_num_threads(1)  # as a worker has it: on a shared machine two threads wait for each other
    started = time.perf_counter()
    for _ in InputLoader(reader, tokenizer, images, workers=workers).epoch(pairs):
        pass
    return len(pairs) * BATCH / (time.perf_counter() - started)


def trained(home: Path, ready: bool, name: str) -> tuple[float, float]:
    """Samples per second and the share of time that the step waits for data, of one epoch with one worker."""
    config = TrainConfig(
        cache=str(home / "c"),
        student=STUDENT,
        out=str(home / "runs" / name),
        epochs=1,
        batch_size=BATCH,
        workers=1,
        device="cpu",
        pixels=str(home / "ready") if ready else None,
    )
    epoch = train(config).record.epochs[0]
    return epoch.samples_per_second, epoch.data_wait_share


def shown(values: list[float], form: str) -> str:
    """Median and range."""
    middle, least, most = (format(value, form) for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least}-{most})"


def main() -> None:
    """Prepare both sets, then run the rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("flickr8k", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    keep_freed_memory(torch.device("cpu"))
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        homes = {name: Path(folder) / str(number) for number, name in enumerate(SETS)}
        for name, home in homes.items():
            prepare(options.flickr8k, home, *SETS[name])
        print("\n| photographs | workers | decoded, samples/s | ready, samples/s | ratio |\n|---|---|---|---|---|")
        for name, home in homes.items():
            for workers in (0, 1):
                rounds = [
                    [drained(home, ready, workers, number) for ready in (False, True)]
                    for number in range(options.rounds)
                ]
                decoded, ready = (list(values) for values in zip(*rounds, strict=True))
                ratios = [b / a for a, b in rounds]
                cells = (name, str(workers), shown(decoded, ".0f"), shown(ready, ".0f"), shown(ratios, ".2f"))
                print("| " + " | ".join(cells) + " |", flush=True)
        torch.set_num_threads(threads)
        print("\n| photographs | decoded: waits | ready: waits | ratio of samples/s |\n|---|---|---|---|")
        for name, home in homes.items():
            pairs = [
                [trained(home, ready, f"{number}-{ready}") for ready in (False, True)]
                for number in range(options.rounds)
            ]
            waits = [[pair[side][1] for pair in pairs] for side in (0, 1)]
            ratios = [ready[0] / decoded[0] for decoded, ready in pairs]
            cells = (name, shown(waits[0], ".0%"), shown(waits[1], ".0%"), shown(ratios, ".2f"))
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
