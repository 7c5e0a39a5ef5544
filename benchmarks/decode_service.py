"""Decoding by threads and by processes: images/s at three sizes, and what an image costs the process that asks.

    python -m benchmarks.decode_service ../shared/flickr8k

Photographs are resized to each size and written as JPEG of quality 90. View 0 of a 224-pixel teacher is made by Pillow.
Forms take turns; medians and ranges of the rounds are printed. ``parent`` is the CPU time of the asking process.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from PIL import Image

from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images.model_input import ModelInput
from teacher_cache.pipeline.data.service.service import DecodeProcesses, DecodeService, DecodeThreads
from teacher_cache.pipeline.data.service.slots import Slots
from teacher_cache.pipeline.precompute.teacher_inputs import ImageItem, Place, TeacherInputs
from teacher_cache.storage.format.identity import ViewsIdentity

SIZES = {(224, 224): 400, (500, 375): 200, (2000, 1500): 128}
FORMS = [("threads", 1), ("threads", 2), ("processes", 1), ("processes", 2)]
ROUNDS = 7


def written(source: Path, folder: Path, size: tuple[int, int], count: int) -> list[dict[str, Any]]:
    """Photographs of one size, as rows of a samples table."""
    samples, paths = [], sorted(source.rglob("*.jpg"))
    for number, path in enumerate(islice(cycle(paths), count)):
        name = f"{size[0]}-{number}.jpg"
        Image.open(path).convert("RGB").resize(size).save(folder / name, quality=90)
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        samples.append({"sample_id": name, "uri": name, "offset": -1, "length": -1, "content_sha256": digest})
    return samples


def measured(service: DecodeService, slots: Slots, samples: list[dict[str, Any]], nbytes: int) -> tuple[float, float]:
    """Images per second, and microseconds of this process an image."""
    slot = slots.take(nbytes)
    wall, cpu = time.perf_counter(), time.process_time()
    items = [ImageItem(sample, (Place(0, slot, at),)) for at, sample in enumerate(samples)]
    jobs = [service.submit(items[at : at + service.ticket]) for at in range(0, len(items), service.ticket)]
    for job in jobs:
        job.result()
    seconds, spent = time.perf_counter() - wall, time.process_time() - cpu
    slots.give_back(slot)
    return len(items) / seconds, spent / len(items) * 1e6


def measure(
    source: Path, sizes: dict[tuple[int, int], int], forms: list[tuple[str, int]], rounds: int
) -> Iterator[str]:
    """Yield a line for each size and form: images per second, and what an image costs this process."""
    with tempfile.TemporaryDirectory() as folder:
        for size, count in sizes.items():
            samples = written(source, Path(folder), size, count)
            policy = ViewsIdentity(count=1, policy="evaluation")
            seen = ModelInput((224, 224), (0.5,) * 3, (0.5,) * 3)
            inputs = TeacherInputs(seen, "pillow", policy, ImageSource(folder), len, 77, 1)
            slots, nbytes = Slots(), len(samples) * inputs.row_bytes
            with ExitStack() as closing:
                services = [
                    closing.enter_context(
                        (DecodeThreads if form == "threads" else DecodeProcesses)(inputs, slots, workers)
                    )
                    for form, workers in forms
                ]
                taken = [[measured(each, slots, samples, nbytes) for each in services] for _ in range(rounds + 1)][1:]
            for (form, workers), values in zip(forms, zip(*taken, strict=True), strict=True):
                rates, spent = zip(*values, strict=True)
                yield (
                    f"{size[0]} x {size[1]}, {workers} {form}: {statistics.median(rates):,.0f} images/s "
                    f"({min(rates):,.0f} to {max(rates):,.0f}); parent {statistics.median(spent):,.0f} us an image"
                )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("photographs", type=Path)
    for line in measure(parser.parse_args().photographs, SIZES, FORMS, ROUNDS):
        print(line, flush=True)


if __name__ == "__main__":
    main()
