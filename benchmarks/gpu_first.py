"""First measurements on a GPU, in the order in which they decide what is to be done next.

    python -m benchmarks.gpu_first [--out FILE] [env decode sync forward precompute step]

- ``env``: cores, memory, TF32, and copies to and from the device.
- ``decode``: images/s by threads and by processes at three sizes. Three times as many by processes on 16 cores justify
  them.
- ``sync``: lines that wait for the device within a batch; cosines to float32 on the CPU; the same bits twice.
- ``forward``: the bare pass by precision, ours as it is and with batches in flight. If both are equal, something waits.
- ``precompute``: encoding beside its bare pass, by batch; how long the device was busy, and with what.
- ``step``: lines that wait for the device within a training step. Ratios of steps are in ``make bench-gpu``.

A line that begins with ``#>`` is a result. Nothing is downloaded: weights are random and photographs are made.
``--device cpu --quick`` shows that it runs. It has not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import decode_service
from benchmarks.bench.material import made_photographs, random_weights
from benchmarks.bench.training import TrainingBench
from teacher_cache.pipeline.data.cores import usable_cores
from teacher_cache.pipeline.models.teacher import LiveTeacher, load_teacher
from teacher_cache.pipeline.precompute.encode import encode_chunks
from teacher_cache.pipeline.precompute.plan import plan_precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig


class First:
    """The steps, and what they found."""

    def __init__(self, device: str, quick: bool, scratch: Path, out: Path | None) -> None:
        self.device, self.quick, self.scratch, self.out = device, quick, scratch, out
        self.models = ["ViT-S-32-alt"] if quick else ["ViT-B-32", "ViT-L-14"]
        self.found: dict[str, Any] = {}

    def say(self, name: str, **values: Any) -> None:
        """Print a result and keep it."""
        self.found[name] = values
        print("#>", name, json.dumps(values), flush=True)
        if self.out is not None:
            self.out.write_text(json.dumps(self.found, indent=1))

    def rate(self, work: Callable[[], Any], count: int) -> float:
        """Things per second: the median of seven rounds after three, each behind all of the device's work."""
        seconds = []
        for _ in range(2 if self.quick else 10):
            self._wait()
            began = time.perf_counter()
            work()
            self._wait()
            seconds.append(time.perf_counter() - began)
        return round(count / statistics.median(seconds[-7:]), 1)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def waits(self, name: str) -> Iterator[None]:
        """Tell the lines of the block at which the host waits for the device."""
        if self.device != "cuda":
            yield
            return
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            yield
        torch.cuda.set_sync_debug_mode("default")
        lines = sorted({f"{Path(each.filename).name}:{each.lineno}" for each in seen})
        self.say(name, count=len(seen), lines=lines)

    def teacher(self, name: str, precision: Any = "pure_bf16", device: str | None = None) -> LiveTeacher:
        """A teacher of random weights."""
        return load_teacher(name, str(random_weights(name, self.scratch)), device or self.device, precision)

    def held(self, shown: torch.Tensor) -> torch.Tensor:
        """Pixels as the encoder has them."""
        return shown.pin_memory() if self.device == "cuda" else shown

    def env(self) -> None:
        """Machine, libraries and copies."""
        self.say(
            "env", python=platform.python_version(), torch=torch.__version__, cores=[os.cpu_count(), usable_cores()]
        )
        if self.device != "cuda":
            return
        self.say("gpu", name=torch.cuda.get_device_name(), tf32={k: v for k, v in os.environ.items() if "TF32" in k})
        size = 154 << 20
        plain, there = torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8, device="cuda")
        pinned = plain.pin_memory()
        copies = {
            "host to device, pinned": lambda: there.copy_(pinned, non_blocking=True),
            "host to device, pageable": lambda: there.copy_(plain),
            "device to host, pinned": lambda: pinned.copy_(there, non_blocking=True),
        }
        for name, copy in copies.items():
            self.say(name, gigabytes_per_second=self.rate(copy, size) / 1e9)

    def decode(self) -> None:
        """See :mod:`benchmarks.decode_service`; on as many workers as there are cores."""
        photos = self.scratch / "decoded"
        made_photographs(photos, 16 if self.quick else 256, (640, 480))
        cores = usable_cores()
        forms = [
            (form, workers) for form in ("threads", "processes") for workers in sorted({1, 4, cores, cores - 1} - {0})
        ]
        sizes = {size: 32 if self.quick else count * cores for size, count in decode_service.SIZES.items()}
        for line in decode_service.measure(photos, sizes, forms, 1 if self.quick else 5):
            self.say(line)

    def sync(self) -> None:
        """Waits of a batch, cosines and repeated bits."""
        name = self.models[0]
        teacher, reference = self.teacher(name), self.teacher(name, "fp32", "cpu")
        generator = torch.Generator().manual_seed(0)
        size = (32, *teacher.preprocess.size, 3)
        shown = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        held, tokens = self.held(shown), teacher.tokenizer([f"a photograph of thing {number}" for number in range(32)])
        first = teacher.encode_shown(held).embedding, teacher.encode_texts(tokens).embedding
        with self.waits("host waits in a batch of images and one of captions"):
            again = teacher.encode_shown(held), teacher.encode_texts(tokens)
        equal = [bool((one == two.embedding).all()) for one, two in zip(first, again, strict=True)]
        self.say("same bits twice", images=equal[0], captions=equal[1])
        wanted = reference.encode_shown(shown).embedding, reference.encode_texts(tokens).embedding
        for precision in ("fp32", "bf16", "pure_bf16"):
            teacher = self.teacher(name, precision)
            rows = teacher.encode_shown(held).embedding, teacher.encode_texts(tokens).embedding
            least = [_least_cosine(one, two) for one, two in zip(rows, wanted, strict=True)]
            self.say(f"least cosine to float32 on the CPU, {precision}", images=least[0], captions=least[1])

    def forward(self) -> None:
        """Bare passes, and ours from bytes on the host to rows on the host."""
        for name in self.models:
            for precision in ("pure_bf16", "bf16"):
                teacher = self.teacher(name, precision)
                for batch in [8] if self.quick else [256, 1024]:
                    self._forward(f"{name} {precision} batch {batch}", teacher, batch)
                del teacher

    def _forward(self, what: str, teacher: LiveTeacher, batch: int) -> None:
        size = teacher.preprocess.size
        pixels = torch.randn(batch, 3, *size, device=self.device)
        held = self.held(torch.randint(0, 256, (batch, *size, 3), dtype=torch.uint8))
        encoded: list[Any] = []

        def in_flight() -> None:
            for _ in range(4):
                encoded.append(teacher.encode_shown(held))
                if len(encoded) > 1:
                    encoded.pop(0).embedding  # noqa: B018  # waits for it
            encoded.pop().embedding  # noqa: B018

        self.say(f"{what}: bare pass", images_per_second=self.rate(lambda: teacher.encode_images(pixels), batch))
        alone = self.rate(lambda: teacher.encode_shown(held).embedding, batch)
        self.say(f"{what}: one at a time", images_per_second=alone)
        self.say(f"{what}: one in flight", images_per_second=self.rate(in_flight, 4 * batch))

    def precompute(self) -> None:
        """Encoding from files to commits, beside the bare pass."""
        for name in self.models:
            images = 32 if self.quick else 24_576 if name == "ViT-B-32" else 12_288
            photos = self.scratch / f"photos-{images}"
            made_photographs(photos, images, (224, 224))
            for batch in [8] if self.quick else [256, 1024]:
                self._precompute(name, photos, images, batch)

    def _precompute(self, name: str, photos: Path, images: int, batch: int) -> None:
        what, teacher = f"precompute {name} batch {batch}", self.teacher(name)
        config = PrecomputeConfig(
            dataset=f"flickr:{photos}",
            teacher=name,
            pretrained=str(random_weights(name, self.scratch)),
            cache=str(self.scratch / what),
            device=self.device,
            precision="pure_bf16",
            batch_size=batch,
            chunk_rows=4 * batch,
        )
        began = time.perf_counter()
        refs = plan_precompute(config, teacher)
        self.say(f"{what}: planned", images_per_second=round(images / (time.perf_counter() - began)))
        pixels = torch.randn(batch, 3, *teacher.preprocess.size, device=self.device)
        bare = self.rate(lambda: [teacher.encode_images(pixels) for _ in range(images // batch)], images)
        of = {tower: [ref for ref in refs if ref.tower == tower] for tower in ("image", "text")}
        ours = {
            tower: self.rate(lambda part=part: encode_chunks(config, teacher, part), images)
            for tower, part in of.items()
        }
        ratio = round(ours["image"] / bare, 3)
        self.say(what, bare=bare, images_per_second=ours["image"], ratio=ratio, captions_per_second=ours["text"])
        if self.device == "cuda":
            self._busy(what, lambda: encode_chunks(config, teacher, of["image"]))

    def _busy(self, what: str, work: Callable[[], None]) -> None:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            began = time.perf_counter()
            work()
            seconds = time.perf_counter() - began
        events = sorted(profiled.key_averages(), key=lambda each: -each.device_time_total)
        top = {each.key[:60]: round(each.device_time_total / 1e3, 1) for each in events[:12]}
        self.say(
            f"{what}: busy", share=round(sum(each.device_time_total for each in events) / 1e6 / seconds, 3), ms=top
        )

    def step(self) -> None:
        """Waits of a training step."""
        bench = TrainingBench.made(self.scratch / "step", self.device, 8 if self.quick else 1024)
        pairs = bench.pairs(2)
        ready = list(bench.inputs(pairs))
        bench.ours(pairs, ready)
        with self.waits("host waits in two training steps"):
            bench.ours(pairs, ready)


def _least_cosine(one: Any, two: Any) -> float:
    one, two = one.astype(np.float64), two.astype(np.float64)
    return float(((one * two).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)).min())


def main() -> None:
    """Run the steps that are named, or all."""
    steps = ["env", "decode", "sync", "forward", "precompute", "step"]
    parser = argparse.ArgumentParser()
    parser.add_argument("steps", nargs="*", default=steps, metavar="STEP")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--out", type=Path, help="JSON of the results, written after each")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        first = First(asked.device, asked.quick, Path(scratch), asked.out)
        for name in asked.steps:
            getattr(first, name)()


if __name__ == "__main__":
    main()
