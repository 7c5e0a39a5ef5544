"""Train a student from a cache. The teacher is not loaded, not imported, not needed."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from pipeline.batches import CachedTeacher, Pairs, TeacherSource, describe_views, epoch_inputs, epoch_pairs
from pipeline.config import TrainConfig
from pipeline.device import keep_freed_memory, resolve_device
from pipeline.losses import LossInputs, weighted_sum
from pipeline.runs import EpochRecord, RunFolder, RunRecord
from pipeline.samples import ImageSource
from pipeline.student import Student, build_student, save_student, student_config, student_tokenizer
from storage.errors import UsageError
from storage.expected import expected_identity
from storage.reader import EmbeddingReader

__all__ = ["StepProgress", "TrainResult", "train"]


_WAY_OUT = (
    "Precompute a cache of what is asked for, leave --expect out, or accept a difference by --accept-mismatch FIELD, "
    "which every checkpoint then records."
)
# what a checkpoint says of itself when it is copied out of its run
_ORIGIN = {"teacher", "identity", "accepted_mismatches", "cache_manifest_digest", "view", "config"}


@dataclass(frozen=True)
class StepProgress:
    """Where a run is, after each step."""

    step: int
    total_steps: int
    epoch: int
    loss: float
    samples_per_second: float
    data_wait_share: float


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    run: str
    record: RunRecord


def train(
    config: TrainConfig,
    progress: Callable[[StepProgress], None] | None = None,
    teacher_source: Callable[[EmbeddingReader], TeacherSource] | None = None,
) -> TrainResult:
    """Train one student on one split of a finished cache, to the end of the last epoch.

    Each epoch ends with a checkpoint. With one view in the cache the student sees the evaluation crop, as its
    teacher did; with several it replays the stored crops, each image's by turns.

    Args:
        teacher_source: makes the source of the targets; the cache itself if left out.

    Raises:
        CacheMismatchError: the cache is not what ``config.expect`` names.
        UsageError: a setting cannot be used (unknown student, split or device, fewer images than a batch, a run
            in the folder already).
        CacheError: the cache is missing, unfinished or damaged.
        FloatingPointError: the loss is not finite; the message names the rows of the batch.
    """
    device = resolve_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    reader = EmbeddingReader(config.cache)
    manifest = reader.manifest
    accepted: tuple[str, ...] = ()
    if config.expect is not None:
        wanted = expected_identity(config.expect)
        accepted = manifest.identity.require(wanted, config.cache, _WAY_OUT, config.accept_mismatch)
    rows = reader.image_rows(config.split)
    steps_per_epoch = len(rows) // config.batch_size
    if not steps_per_epoch:
        raise UsageError(
            f"{config.cache}: split {config.split!r} has {len(rows)} images, fewer than one batch of "
            f"{config.batch_size}. Lower --batch-size."
        )
    fabric = Fabric(
        accelerator=device.type,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        precision="bf16-mixed" if config.precision == "bf16" else "32-true",
    )
    fabric.seed_everything(config.seed, verbose=False)
    architecture = student_config(config.student)
    identity = manifest.identity
    teacher_preprocess = identity.preprocess.model_dump(exclude={"probe", "image_size", "antialias"})
    student = build_student(architecture, teacher_preprocess, manifest.layout.embed_dim)
    source = ImageSource(config.image_root or manifest.source.image_root)
    run = RunFolder(config.out)
    record = RunRecord(
        # so that the run can be measured from any folder
        config=config.model_copy(update={"cache": _absolute(config.cache)}),
        student_config=architecture,
        student_parameters=student.num_parameters,
        teacher=identity.teacher.name,
        identity=identity,
        accepted_mismatches=accepted,
        cache_manifest_digest=manifest.digest,
        view=describe_views(reader),
        image_root=_absolute(source.root),
        train_images=len(rows),
    )
    run.start(record)
    origin = record.model_dump(mode="json", include=_ORIGIN)
    total_steps = steps_per_epoch * config.epochs
    teacher = CachedTeacher(reader) if teacher_source is None else teacher_source(reader)
    model, optimizer = fabric.setup(student, _optimizer(student, config))
    loop = _Loop(config, fabric, model, student, optimizer, teacher, run, total_steps, progress)
    tokenizer = student_tokenizer(architecture)
    for epoch in range(config.epochs):
        pairs = list(epoch_pairs(reader, rows, config.batch_size, config.window_chunks, config.seed, epoch))
        loader = epoch_inputs(reader, source, student.preprocess, tokenizer, pairs, config.workers, device)
        finished = loop.epoch(epoch, pairs, loader)
        record = record.model_copy(
            update={
                "steps": loop.step,
                "seconds": record.seconds + finished.seconds,
                "epochs": (*record.epochs, finished),
            }
        )
        record = run.checkpoint(
            record, f"epoch-{epoch + 1:04d}", lambda folder: save_student(student, architecture, folder, origin)
        )
    return TrainResult(str(run.path), record)


class _Loop:
    """Steps through epochs and keeps what they share."""

    def __init__(
        self,
        config: TrainConfig,
        fabric: Fabric,
        model: Any,
        student: Student,
        optimizer: Any,
        teacher: TeacherSource,
        run: RunFolder,
        total_steps: int,
        progress: Callable[[StepProgress], None] | None,
    ) -> None:
        self._config, self._fabric, self._model, self._student = config, fabric, model, student
        self._optimizer, self._teacher, self._run, self._progress = optimizer, teacher, run, progress
        self._total_steps = total_steps
        self.step = 0

    def epoch(self, epoch: int, pairs: list[Any], loader: Any) -> EpochRecord:
        """Train on these pairs, with the inputs that the loader yields for them."""
        self._model.train()
        started = waiting = time.perf_counter()
        waited = 0.0
        sums: Counter[str] = Counter()
        for pair, (pixels, tokens) in zip(pairs, loader, strict=True):
            waited += time.perf_counter() - waiting
            targets = self._teacher.targets(pair)
            loss, parts, rate = self._train_step(pixels, tokens, targets, pair)
            self.step += 1
            sums.update({"loss": loss, **parts})
            self._run.log({"step": self.step, "epoch": epoch, "loss": loss, **parts, "learning_rate": rate})
            waiting = time.perf_counter()
            if self._progress is not None:
                spent = waiting - started
                seen = (self.step - epoch * len(pairs)) * self._config.batch_size
                self._progress(StepProgress(self.step, self._total_steps, epoch, loss, seen / spent, waited / spent))
        seconds = time.perf_counter() - started
        means = {name: total / len(pairs) for name, total in sums.items()}
        return EpochRecord(
            epoch=epoch,
            loss=means.pop("loss"),
            parts=means,
            seconds=seconds,
            samples_per_second=len(pairs) * self._config.batch_size / seconds,
            data_wait_share=waited / seconds,
        )

    def _train_step(self, pixels: Any, tokens: Any, targets: Any, pair: Any) -> tuple[float, dict[str, float], float]:
        device = self._fabric.device
        rate = self._config.learning_rate * _schedule(self.step, self._total_steps, self._config.warmup_fraction)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        output = self._model(
            pixels.to(device, non_blocking=True), self._student.shorten(tokens).to(device, non_blocking=True)
        )
        total, parts = weighted_sum(
            LossInputs(
                output.image,
                output.text,
                output.projected_image,
                output.projected_text,
                targets.image.to(device, non_blocking=True),
                targets.text.to(device, non_blocking=True),
                output.logit_scale,
                self._teacher.logit_scale,
                self._config.label_smoothing,
            ),
            self._config.losses,
        )
        loss = float(total.detach())
        values = {name: float(value) for name, value in parts.items()}
        if not math.isfinite(loss):
            raise FloatingPointError(_not_finite(self.step + 1, f"loss is {loss} ({values})", pair, rate))
        self._optimizer.zero_grad(set_to_none=True)
        self._fabric.backward(total)
        norm = self._fabric.clip_gradients(
            self._model, self._optimizer, max_norm=self._config.clip_grad_norm, error_if_nonfinite=False
        )
        if norm is not None and not math.isfinite(float(norm)):
            raise FloatingPointError(_not_finite(self.step + 1, f"the gradient's norm is {float(norm)}", pair, rate))
        self._optimizer.step()
        self._student.clamp_logit_scale()
        return loss, values, rate


def _absolute(location: str) -> str:
    return location if "://" in location else str(Path(location).resolve())


def _not_finite(step: int, what: str, pair: Pairs, rate: float) -> str:
    return (
        f"step {step}: {what}. Image rows {pair.image_rows.tolist()}, caption rows {pair.caption_rows.tolist()}. "
        f"Lower the learning rate ({rate:.2g}), or use precision fp32."
    )


def _schedule(step: int, total_steps: int, warmup_fraction: float) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then cosine to 0."""
    warmup = math.ceil(total_steps * warmup_fraction)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total_steps - warmup, 1)))


def _optimizer(student: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; biases, norms and logit_scale (fewer than two dimensions) do not decay, as in open_clip."""
    decayed = [parameter for parameter in student.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in student.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6)
