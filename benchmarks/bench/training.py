"""A training step from the cache against none with a teacher, and an epoch against open_clip's online distillation.

- The step: ours with its default losses and the targets read from the cache in each step, against a plain one of the
  same student: both towers, CLIP's contrastive loss, backward, clipped gradient, AdamW. Once with inputs that lie ready
  in memory, once with both fed by the same loader.
- The epoch: ours against open_clip's recipe, whose teacher runs in each step (``DistillClipLoss``), the same student,
  optimizer, photographs and loader. What a cache can save is the bare steps' ratio, teacher and student on tensors that
  lie ready; the epoch should keep it. Teachers are ViT-B/32 and ViT-L/14 with random weights: their knowledge plays no
  part here. With ``--device cuda`` both sides train in bf16 at batch 1,024, the running teacher in pure_bf16, over
  pictures that are made; that has never run, for want of a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from open_clip.loss import ClipLoss, DistillClipLoss
from torch import Tensor

from benchmarks.bench.harness import Row, Settings, interleave, speed
from benchmarks.bench.material import at_most, made_photographs, photographs, random_weights
from teacher_cache.pipeline.data.batches.inputs import InputLoader
from teacher_cache.pipeline.data.batches.pairs import PairOrder, Pairs
from teacher_cache.pipeline.data.batches.student_images import StudentImages
from teacher_cache.pipeline.data.batches.targets import CachedTeacher
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images.preprocess import handed_on
from teacher_cache.pipeline.models.device import image_memory_format, keep_freed_memory
from teacher_cache.pipeline.models.student import Student, build_student, student_config, student_tokenizer
from teacher_cache.pipeline.models.text_length import encode_text, shorten
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.optimizer import adamw
from teacher_cache.pipeline.train.step import TrainStep
from teacher_cache.storage.read.reader import EmbeddingReader

_STUDENT = "vit-s-32"


def measure(settings: Settings) -> list[Row]:
    """See the module."""
    cuda, quick = settings.device == "cuda", settings.quick
    keep_freed_memory(torch.device(settings.device))
    if cuda:
        bench = TrainingBench.made(settings.scratch, settings.device, 8 if quick else 1024, 16 if quick else 32_768)
    else:
        photographs(settings.shared / "flickr8k", settings.scratch / "photos", 16 if quick else 192)
        bench = TrainingBench(settings.scratch, settings.device, 8 if quick else 32)
    rows = _no_teacher(bench, settings)
    for name, size, steps in _teachers(settings):
        rows += _online(bench, settings, name, size, steps)
    return rows


def _teachers(settings: Settings) -> list[tuple[str, int, int]]:
    """Name, batch and steps of an epoch: a ViT-L/14 takes seconds for each photograph on a CPU."""
    if settings.quick:
        return [("ViT-S-32-alt", 8, 1)]
    if settings.device == "cuda":
        return [("ViT-B-32", 1024, 32), ("ViT-L-14", 1024, 32)]
    return [("ViT-B-32", 32, 4), ("ViT-L-14", 8, 3)]


class TrainingBench:
    """One cache and one student of it, trained in our way, without a teacher, or with one that runs."""

    @classmethod
    def made(cls, folder: Path, device: str, batch: int, images: int | None = None) -> TrainingBench:
        """A bench of pictures that are made, by default two batches."""
        made_photographs(folder / "photos", images or 2 * batch, (224, 224))
        return cls(folder, device, batch)

    def __init__(self, folder: Path, device: str, batch: int) -> None:
        """Cache the photographs of a folder, ``photos``, and build the student.

        On a GPU both sides train in bf16, as one would there.
        """
        cache, dataset = str(folder / "cache"), f"flickr:{folder / 'photos'}"
        precompute(PrecomputeConfig(dataset=dataset, teacher="bundled:scenes", cache=cache, device=device))
        self.batch, half = batch, device == "cuda"
        self.reader = EmbeddingReader(cache)
        self.rows = self.reader.image_rows("train")
        self.source = ImageSource(self.reader.manifest.source.image_root)
        precision: Any = "bf16" if half else "fp32"
        self.config = TrainConfig(
            cache=cache, student=_STUDENT, out="unused", batch_size=batch, device=device, precision=precision
        )
        architecture = student_config(_STUDENT)
        torch.manual_seed(0)
        self.student = self._made(architecture)
        self.fabric = Fabric(accelerator=device, devices=1, precision="bf16-mixed" if half else "32-true")
        tokenizer = student_tokenizer(architecture)
        images = StudentImages(self.reader, self.source, self.student.preprocess)
        self._inputs = InputLoader(self.reader, tokenizer, images, device=self.fabric.device)
        fused = device == "cuda"
        model, optimizer = self.fabric.setup(self.student, adamw(self.student, 1e-5, 0.1, fused))
        model.train()
        self.teacher = CachedTeacher(self.reader, pinned=half)
        self._step = TrainStep(self.config, self.fabric, model, self.student, optimizer, [self.teacher], 10**6)
        self._taken = 0
        # the peer's own, so that neither moves the other's weights or moments
        self.plain = self._made(architecture).to(self.fabric.device).train()
        self._plain_optimizer = adamw(self.plain, 1e-5, 0.1, fused)
        self._contrastive, self._distill = ClipLoss(), DistillClipLoss()

    def _made(self, architecture: dict[str, Any]) -> Student:
        preprocess = handed_on(self.reader.manifest.identity.preprocess)
        student = build_student(architecture, preprocess, self.reader.embed_dim)
        student.model.visual.to(memory_format=image_memory_format(student.model))
        return student

    def pairs(self, steps: int, batch: int | None = None) -> list[Pairs]:
        """The first batches of an epoch, again and again if the data set is too small."""
        found = list(PairOrder(self.reader, self.rows, batch or self.batch, 16, seed=0).epoch(0))
        return (found * -(-steps // len(found)))[:steps]

    def inputs(self, pairs: list[Pairs]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels and tokens by a loader whose processes stay, which both sides share."""
        return self._inputs.epoch(pairs)

    def ours(self, pairs: list[Pairs], inputs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Take the steps of ``train``, targets from the cache."""
        targets, before = self.teacher.targets(pairs), None
        for pair, (pixels, tokens), target in zip(pairs, inputs, targets, strict=True):
            late = self._step(self._taken, pixels, tokens, target, pair)
            self._taken += 1
            if before is not None:
                before.read()  # as train does it: a step late
            before = late
        if before is not None:
            before.read()

    def no_teacher(self, pixels: Tensor, tokens: Tensor) -> None:
        """The student's towers as short as ours, and no teacher's targets, losses or projections."""
        tokens = self.plain.shorten(tokens.flatten(0, 1)).to(self.fabric.device, non_blocking=True)
        with self.fabric.autocast():
            image, scale = self._image(pixels)
            text = self.plain.encode_text(tokens)
        self._finish(self._contrastive(image.float(), text.float(), scale))

    def online(self, teacher: Any, pixels: Tensor, tokens: Tensor, short: bool = False) -> None:
        """As open_clip's ``train_one_epoch`` with a model to distil: it runs in the step.

        Args:
            short: both encode captions as short as ours, which open_clip does not.
        """
        device = self.fabric.device
        pixels, tokens = pixels.to(device, non_blocking=True), tokens.flatten(0, 1).to(device, non_blocking=True)
        if short:
            tokens = shorten(tokens)
        with self.fabric.autocast():
            image, scale = self._image(pixels)
            text = encode_text(self.plain.model, tokens)
        image, text = image.float(), F.normalize(text.float(), dim=-1)
        with torch.no_grad():
            # on a GPU open_clip's own precision="pure_bf16", the fastest teacher that it has
            teacher_image = teacher.encode_image(pixels.to(teacher.logit_scale.dtype), normalize=True).float()
            teacher_text = F.normalize(encode_text(teacher, tokens).float(), dim=-1)
            teacher_scale = teacher.logit_scale.exp()
        self._finish(sum(self._distill(image, text, scale, teacher_image, teacher_text, teacher_scale)))

    def _image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        device, student = self.fabric.device, self.plain
        image = student.encode_image(
            pixels.to(device, non_blocking=True, memory_format=image_memory_format(student.model))
        )
        scale: Tensor = student.model.logit_scale.exp()  # type: ignore[operator]
        return image, scale

    def _finish(self, loss: Any) -> None:
        self._plain_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.plain.parameters(), self.config.clip_grad_norm)
        self._plain_optimizer.step()
        self.plain.clamp_logit_scale()
        loss.item()  # a log line needs it, in ours too


def _no_teacher(bench: TrainingBench, settings: Settings) -> list[Row]:
    steps = 1 if settings.quick else 4 if settings.device == "cpu" else 16
    pairs = bench.pairs(steps)
    ready = list(bench.inputs(pairs))

    def no_teacher(inputs: Any) -> None:
        for pixels, tokens in inputs:
            bench.no_teacher(pixels, tokens)

    seconds = interleave(
        {
            "ours": lambda: bench.ours(pairs, ready),
            "none": lambda: no_teacher(ready),
            "ours, loaded": lambda: bench.ours(pairs, bench.inputs(pairs)),
            "none, loaded": lambda: no_teacher(bench.inputs(pairs)),
        },
        # a few percent are looked for, and a round takes seconds
        1 if settings.quick else max(9, settings.rounds),
        not settings.quick,
    )
    what = f"training step from the cache, {_STUDENT}, batch {bench.batch}"
    against = "step without a teacher (contrastive loss)"
    return [
        at_most(f"{what}, inputs in memory", against, seconds["ours"], seconds["none"], 1.02, steps),
        at_most(f"{what}, by the loader", against, seconds["ours, loaded"], seconds["none, loaded"], 1.02, steps),
    ]


def _online(bench: TrainingBench, settings: Settings, name: str, batch: int, steps: int) -> list[Row]:
    weights = random_weights(name, settings.scratch)
    half = "pure_bf16" if settings.device == "cuda" else "fp32"
    teacher: Any = open_clip.create_model(name, pretrained=str(weights), precision=half).to(bench.fabric.device).eval()
    pairs = bench.pairs(steps, batch)
    ready = list(bench.inputs(pairs))

    def online(inputs: Any, short: bool = False) -> None:
        for pixels, tokens in inputs:
            bench.online(teacher, pixels, tokens, short)

    seconds = interleave(
        {
            "bare cached": lambda: bench.ours(pairs, ready),
            "bare online": lambda: online(ready),
            "bare online, short": lambda: online(ready, short=True),
            "cached": lambda: bench.ours(pairs, bench.inputs(pairs)),
            "online": lambda: online(bench.inputs(pairs)),
        },
        1 if settings.quick else min(settings.rounds, 3),
        not settings.quick,
    )
    what, against = f"{_STUDENT} of {name}, batch {batch}", "open_clip's online distillation"
    work = steps * batch
    long = "it encodes all 77 tokens of each caption, teacher and student; ours as many as the longest of a batch has"
    bare = speed(
        f"bare step, {what}", against, seconds["bare cached"], seconds["bare online"], work, "pairs/s", note=long
    )
    short = speed(
        f"bare step, {what}",
        f"{against}, captions as short as ours",
        seconds["bare cached"],
        seconds["bare online, short"],
        work,
        "pairs/s",
        note="what is left of it where nothing but the teacher is spared",
    )
    epoch = speed(
        f"epoch by the loader, {what}",
        against,
        seconds["cached"],
        seconds["online"],
        work,
        "pairs/s",
        # to two digits: what the bare steps have is measured too
        round(0.98 * bare.ratio, 2),
        f"an epoch of {steps} steps; wanted is the ratio of the bare steps, less 2 % for the noise of that one",
    )
    return [bare, short, epoch]
