"""Train a student from a cache. The teacher is not loaded, not imported, not needed."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray

from teacher_cache.pipeline.data.batches.inputs import InputLoader
from teacher_cache.pipeline.data.batches.pairs import (
    CachedTeacher,
    Pairs,
    TeacherSource,
    describe_views,
    epoch_pairs,
    views_used,
)
from teacher_cache.pipeline.data.batches.ready_pixels import ReadyPixels
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images.preprocess import handed_on
from teacher_cache.pipeline.evaluate.encode import encode_rows
from teacher_cache.pipeline.evaluate.recall import mean_recall, retrieval_recall
from teacher_cache.pipeline.models.device import image_memory_format, keep_depthwise_float32
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import BestRecord, EpochRecord, RunRecord, Selection
from teacher_cache.pipeline.models.student import (
    Student,
    build_student,
    load_initial,
    save_student,
    student_config,
    student_tokenizer,
)
from teacher_cache.pipeline.models.weights import digest_tensors
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.expected import expected_identity
from teacher_cache.pipeline.train.launch import launch, launched_rank
from teacher_cache.pipeline.train.losses import TeacherQueue
from teacher_cache.pipeline.train.optimizer import WeightAverage, adamw
from teacher_cache.pipeline.train.resume import EpochSums, ResumePoint, load_resume_point, save_resume_point
from teacher_cache.pipeline.train.step import TrainStep
from teacher_cache.pipeline.train.step_log import StepLog
from teacher_cache.pipeline.train.stop_signals import StopRequests
from teacher_cache.storage.errors import CacheMismatchError, UsageError
from teacher_cache.storage.format.tables import CAPTIONS
from teacher_cache.storage.observe.logs import event, log_fields, logger
from teacher_cache.storage.observe.telemetry import telemetry
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.row_set import RowSet

__all__ = ["StepProgress", "TrainResult", "train"]

_LOG = logger("train")

_WAY_OUT = (
    "Precompute a cache of what is asked for, leave --expect out, or accept a difference by --accept-mismatch FIELD, "
    "which every checkpoint then records."
)


@dataclass(frozen=True)
class StepProgress:
    """Where a run is, after each step.

    Attributes:
        samples_per_second, data_wait_share: of this epoch, in this process.
        eta_seconds: to the end of the last step at this speed; measurements on the select split not counted.
    """

    step: int
    total_steps: int
    epoch: int
    loss: float
    samples_per_second: float
    data_wait_share: float
    eta_seconds: float


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    run: str
    record: RunRecord


def train(
    config: TrainConfig,
    progress: Callable[[StepProgress], None] | None = None,
    *,
    resume: bool = False,
    teacher_source: Callable[[EmbeddingReader], TeacherSource] | None = None,
) -> TrainResult:
    """Train one student on one split of a finished cache, to the end of the last epoch.

    With one view in the cache the student sees the evaluation crop, as its teacher did; with several it replays the
    stored crops, each image's by turns. A run that was killed goes on where its last checkpoint left it, with the
    losses of an unbroken run on the same kind of device. On one device SIGTERM and SIGINT act behind the step that they
    come in, which is saved; a second one acts at once (``teacher_cache.pipeline.train.stop_signals``).

    Args:
        resume: go on with the run in ``config.out``; a finished one is left as it is.
        teacher_source: makes the source of the targets; the cache itself if left out. With several devices it has
            to be a function that can be pickled.

    Raises:
        CacheMismatchError: the cache is not what ``config.expect`` names, or not the one that the run began with.
        UsageError: a setting cannot be used (unknown student, split or device, fewer images than a batch, a run
            in the folder already; for ``resume``: no run there, or one with other settings).
        CacheError: the cache is missing, unfinished or damaged.
        FloatingPointError: the loss is not finite; the message names the rows of the batch.
    """
    run = RunFolder(config.out)
    if resume:
        record = run.require_resumable(config)
        if record.finished:
            if launched_rank():  # of torchrun's processes rank 0 alone cleans
                return TrainResult(str(run.path), record)
            with run.locked():  # killed at its very end, it may have more than it names
                run.remove_unnamed(record)
            return TrainResult(str(run.path), record)
    elif config.queue_rows and not config.losses.get("queue"):
        # here, not among the settings: runs of earlier versions have it so
        losses = ", ".join(f"{name} = {weight:g}" for name, weight in {**config.losses, "queue": 1.0}.items())
        raise UsageError(
            f"queue_rows is {config.queue_rows} and no loss uses the queue: losses = {{ {losses} }}, or leave it out"
        )
    elif not launched_rank():  # rank 0 of torchrun's processes may have begun it already
        run.require_free()
    launch(config, _train_rank, resume, teacher_source, progress=progress)
    return TrainResult(str(run.path), run.read())


def _train_rank(
    fabric: Fabric,
    config: TrainConfig,
    progress: Callable[[StepProgress], None] | None,
    resume: bool,
    teacher_source: Callable[[EmbeddingReader], TeacherSource] | None,
) -> None:
    """The whole of a run, in the process of one device."""
    run = RunFolder(config.out)
    before = run.read() if resume else None
    # with a checkpoint it stands on what it recorded: files that it began with may have moved, or changed, since
    begun = before if before is not None and before.checkpoint is not None else None
    reader = _opened(run, config.cache, begun)
    manifest = reader.manifest
    accepted: tuple[str, ...] = ()
    if config.expect is not None and begun is None:
        wanted = expected_identity(config.expect)
        accepted = reader.identity.require(wanted, config.cache, _WAY_OUT, config.accept_mismatch)
    rows = reader.row_set(config.split)
    reader.require_captions(rows)
    if len(rows) < config.batch_size:
        raise UsageError(
            f"{config.cache}: split {config.split!r} has {len(rows)} images, fewer than one batch of "
            f"{config.batch_size}. Lower --batch-size."
        )
    if config.select_split is not None and not len(reader.image_rows(config.select_split)):
        raise UsageError(f"{config.cache}: no image of select_split {config.select_split!r} has an embedding")
    fabric.seed_everything(config.seed, verbose=False)
    architecture = student_config(config.student) if begun is None else begun.student_config
    identity = reader.identity
    student = build_student(architecture, handed_on(identity.preprocess), manifest.layout.embed_dim)
    seen = student.preprocess_to_learn(config.train_image_size)
    pixels = None
    if config.pixels is not None:
        pixels = ReadyPixels(config.pixels, reader, rows.numbers(), views_used(reader, config.views), seen)
    if config.init is not None and begun is None:
        load_initial(student, config.init)
    if config.lock_image_unlocked_groups is not None:
        student.lock_image(config.lock_image_unlocked_groups)
    source = ImageSource(config.image_root or manifest.source.image_root)
    record = RunRecord(
        # so that the run can be measured from any folder
        config=config.model_copy(
            update={"cache": _absolute(config.cache), "pixels": config.pixels and _absolute(config.pixels)}
        ),
        student_config=architecture,
        student_parameters=student.num_parameters,
        teacher=identity.teacher.name,
        identity=identity,
        accepted_mismatches=accepted,
        cache_manifest_digest=manifest.digest,
        view=describe_views(reader, config.views),
        image_root=_absolute(source.root),
        train_images=len(rows),
        initial_weights_sha256=digest_tensors(student.state_dict()) if begun is None else None,
    )
    # rank 0 alone writes
    lock = run.locked() if fabric.global_rank == 0 else contextlib.nullcontext()
    with lock, log_fields(run=str(run.path), cache=config.cache):
        if resume:
            record = _recorded(run.read(), record)
        fabric.barrier()
        if fabric.global_rank == 0 and record.checkpoint is None:
            run.start(record)
        teacher = CachedTeacher(reader) if teacher_source is None else teacher_source(reader)
        inputs = InputLoader(
            reader,
            source,
            seen,
            student_tokenizer(record.student_config),
            _workers(config, fabric.world_size),
            fabric.device,
            pixels,
            None if config.select_split is None else student.preprocess,
            config.window_chunks,
        )
        _Trainer(config, fabric, reader, rows, inputs, teacher, run, record, student, progress).train()
        fabric.barrier()


def _opened(run: RunFolder, cache: str, begun: RunRecord | None) -> EmbeddingReader:
    """The cache that the run began with, without views that were added to it since."""
    try:
        return EmbeddingReader(cache, manifest_digest=None if begun is None else begun.cache_manifest_digest)
    except CacheMismatchError as error:
        raise CacheMismatchError(
            f"{error} {run.path} learned from that one so far: go on with it, or train anew with another --out."
        ) from error


def _recorded(before: RunRecord, now: RunRecord) -> RunRecord:
    """The record of the run to go on with."""
    if before.checkpoint is None:  # nothing was learned yet
        return now
    return before.model_copy(
        update={"config": now.config, "image_root": now.image_root, "resumed_at": (*before.resumed_at, before.steps)}
    )


class _Trainer:
    """One run in the process of one device: its epochs, its checkpoints, its logs."""

    def __init__(
        self,
        config: TrainConfig,
        fabric: Fabric,
        reader: EmbeddingReader,
        rows: RowSet,
        inputs: InputLoader,
        teacher: TeacherSource,
        run: RunFolder,
        record: RunRecord,
        student: Student,
        progress: Callable[[StepProgress], None] | None,
    ) -> None:
        self._config, self._fabric, self._reader = config, fabric, reader
        self._run, self._record, self._student, self._progress = run, record, student, progress
        self._rows = rows
        self._steps_per_epoch = len(self._rows) // config.batch_size
        self._total_steps = self._steps_per_epoch * config.epochs
        self._teacher = teacher
        self._inputs = inputs
        self._origin = record.origin()
        student.model.visual.to(memory_format=image_memory_format(student.model))
        if config.precision == "bf16" and fabric.device.type == "cpu":
            keep_depthwise_float32(student)
        if fabric.world_size > 1:
            _freeze_unused(student, inputs.tokenizer(["any"]))
        if config.compile:
            _compile(student)
        self._model, optimizer = fabric.setup(student, adamw(student, config.learning_rate, config.weight_decay))
        self._optimizer: torch.optim.Optimizer = optimizer.optimizer
        self._average = WeightAverage(student, config.ema_decay) if config.ema_decay else None
        self._queue = None
        if config.losses.get("queue", 0) > 0:
            self._queue = TeacherQueue(config.queue_rows, reader.embed_dim, fabric.device)
        self._point = ResumePoint(cache_manifest_digest=record.cache_manifest_digest)
        if record.checkpoint is not None:
            self._point = load_resume_point(
                run.path / record.checkpoint, student, self._optimizer, self._average, self._queue
            )
        self._step = TrainStep(
            config, fabric, self._model, student, optimizer, self._teacher.logit_scale, self._total_steps, self._queue
        )
        self._log: StepLog | None = None
        self._saved_at = time.monotonic()

    def train(self) -> None:
        """To the end of the last epoch."""
        if self._fabric.global_rank == 0:
            if self._record.checkpoint is not None:
                self._run.cut_log(self._point.step)
                self._run.remove_unnamed(self._record)
                self._run.write(self._record)
            self._log = StepLog(self._run, self._point.step)
        try:
            while self._point.epoch < self._config.epochs:
                self._epoch()
        finally:
            self._inputs.close()
            if isinstance(self._teacher, CachedTeacher):
                self._teacher.close()
            if self._log is not None:
                self._log.close()

    def _epoch(self) -> None:
        """From where the run stands to the end of this epoch, its measurement and its checkpoint."""
        config, epoch, sums = self._config, self._point.epoch, self._point.sums
        self._model.train()
        first = sums.steps
        pairs = epoch_pairs(
            self._reader,
            self._rows,
            config.batch_size,
            config.window_chunks,
            config.seed,
            epoch,
            first,
            views_used(self._reader, config.views),
            config.captions_per_image,
        )
        # made as they come into sight and dropped once used: those of millions of rows are hundreds of megabytes
        steps, shown = tee((pair, self._slice(pair)) for pair in pairs)
        if isinstance(self._teacher, CachedTeacher):
            shown, followed = tee(shown)
            self._teacher.follow(part for _, part in followed)
        mine = (part for _, part in shown)
        loader = self._inputs.epoch(mine)
        before = sums.model_copy()
        started = waiting = time.perf_counter()
        measured = self._measures(epoch)
        with StopRequests(self._save_step, active=self._fabric.world_size == 1) as stop:
            for (pair, part), (pixels, tokens) in zip(steps, stop.between_steps(loader), strict=True):
                arrived = time.perf_counter()
                sums.waited += arrived - waiting
                targets = self._teacher.targets(part)
                values = self._step(self._point.step, pixels, tokens, targets, pair)
                if self._average is not None:
                    self._average.update()
                self._point.step += 1
                sums.steps += 1
                for name, value in {"loss": values.loss, **values.parts}.items():
                    sums.values[name] = sums.values.get(name, 0.0) + value
                ended = time.perf_counter()
                spent = ended - started
                telemetry().step(len(part.image_rows), values.loss, arrived - waiting, ended - arrived)
                sums.seconds = before.seconds + spent
                rate = (sums.steps - first) * config.batch_size / spent
                wait_share = (sums.waited - before.waited) / spent
                if self._log is not None:
                    self._log.step(self._point.step, epoch, values, rate, wait_share)
                if self._progress is not None:
                    eta = (self._total_steps - self._point.step) * config.batch_size / rate
                    self._progress(
                        StepProgress(self._point.step, self._total_steps, epoch, values.loss, rate, wait_share, eta)
                    )
                if sums.steps < self._steps_per_epoch and self._due():
                    self._save_step()
                # behind the logs and the checkpoint: writing is no wait for data
                waiting = time.perf_counter()
                stop.may_act()
            if measured:
                self._save_step()  # a signal acts at once while it is measured, which may take minutes
            else:
                self._finish_epoch(epoch, sums, None)
        if measured:
            selection = self._select() if self._log is not None else None
            with StopRequests(active=self._fabric.world_size == 1):
                self._finish_epoch(epoch, sums, selection)

    def _save_step(self) -> None:
        if self._log is not None and self._point.step > self._record.steps:
            self._checkpoint(f"step-{self._point.step:08d}")

    def _finish_epoch(self, epoch: int, sums: EpochSums, selection: Selection | None) -> None:
        self._point = self._point.model_copy(update={"epoch": epoch + 1, "sums": EpochSums()})
        if self._log is None:
            return
        means = {name: total / sums.steps for name, total in sums.values.items()}
        finished = EpochRecord(
            epoch=epoch,
            loss=means.pop("loss"),
            parts=means,
            seconds=sums.seconds,
            samples_per_second=sums.steps * self._config.batch_size / sums.seconds,
            data_wait_share=sums.waited / sums.seconds,
            selection=selection,
        )
        self._log.epoch(self._point.step, finished)
        measured = finished.model_dump(exclude={"parts"})
        event(_LOG, logging.INFO, "epoch finished", step=self._point.step, num_rows=len(self._rows), **measured)
        self._record = self._record.model_copy(
            update={"seconds": self._record.seconds + sums.seconds, "epochs": (*self._record.epochs, finished)}
        )
        best = self._record.best
        if selection is not None and (best is None or selection.mean_recall > best.mean_recall):
            best = BestRecord(
                epoch=epoch,
                split=selection.split,
                mean_recall=selection.mean_recall,
                checkpoint=self._run.best_checkpoint(epoch),
            )
            self._checkpoint(f"epoch-{epoch + 1:04d}", best)
        else:
            self._checkpoint(f"epoch-{epoch + 1:04d}")

    @cached_property
    def _select_rows(self) -> tuple[NDArray[np.int64], list[str], NDArray[np.int64]]:
        """The images of the select split, their captions, and which of the images each caption is of."""
        rows = self._reader.image_rows(self._config.select_split)
        caption_rows, text_image = self._reader.caption_rows(rows)
        return rows, self._reader.table_rows(CAPTIONS, caption_rows)["text"].to_pylist(), text_image

    def _measures(self, epoch: int) -> bool:
        config, done = self._config, epoch + 1
        return config.select_split is not None and (done % config.select_every == 0 or done == config.epochs)

    def _select(self) -> Selection:
        """The student of this moment on the select split."""
        rows, captions, text_image = self._select_rows
        with self._measured_weights():
            image, text = encode_rows(self._student, rows, captions, self._inputs, self._fabric.device)
        recalls = retrieval_recall(image, text, text_image)
        return Selection(split=str(self._config.select_split), mean_recall=mean_recall(recalls), recalls=recalls)

    def _checkpoint(self, name: str, best: BestRecord | None = None) -> None:
        """Save the run as it stands; from now on it goes on from here."""
        assert self._log is not None  # rank 0
        self._log.flush()
        if self._average is not None:
            self._point.average_updates = self._average.updates
        record = self._record.model_copy(update={"steps": self._point.step})

        def model(folder: Path, **more: Any) -> None:
            with self._measured_weights():
                save_student(
                    self._student, record.student_config, folder, {**self._origin, "step": record.steps, **more}
                )

        def whole(folder: Path) -> None:
            model(folder)
            save_resume_point(folder, self._point, self._student, self._optimizer, self._average, self._queue)

        chosen = None
        if best is not None:
            how = best.model_dump(mode="json", exclude={"checkpoint"})
            chosen = (best, lambda folder: model(folder, chosen=how))
        self._record = self._run.checkpoint(record, name, whole, chosen)
        self._saved_at = time.monotonic()
        event(_LOG, logging.INFO, "checkpoint saved", step=record.steps, checkpoint=self._record.checkpoint)

    def _due(self) -> bool:
        every = self._config.checkpoint_steps
        if every is not None and self._point.step % every == 0:
            return True
        return time.monotonic() - self._saved_at >= self._config.checkpoint_seconds

    def _measured_weights(self) -> contextlib.AbstractContextManager[None]:
        """The student as it is measured and shipped: averaged, if there is an average."""
        return self._average.in_place() if self._average is not None else contextlib.nullcontext()

    def _slice(self, pairs: Pairs) -> Pairs:
        """This rank's part of a batch; the parts of all ranks in their order are the batch."""
        size = self._config.batch_size // self._fabric.world_size
        span = slice(self._fabric.global_rank * size, (self._fabric.global_rank + 1) * size)
        values: dict[str, Any] = {field.name: getattr(pairs, field.name) for field in fields(pairs)}
        return replace(pairs, **{name: value[span] for name, value in values.items() if value is not None})


def _workers(config: TrainConfig, world_size: int) -> int | None:
    """Decoding processes of a rank; left to the settings, all ranks together have those of one."""
    if config.workers is not None or world_size == 1:
        return config.workers
    return max(1, min(8, (os.cpu_count() or 1) // 2) // world_size)


def _freeze_unused(student: Student, tokens: torch.Tensor) -> None:
    """Freeze what no output depends on, as some towers have it: DDP would wait for its gradient in every step."""
    size = student.preprocess.size
    student.eval()
    sum(value.sum() for value in student(torch.zeros(1, 3, *size), tokens)).backward()
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def _compile(student: Student) -> None:
    """Compile the towers in place: names of parameters stay what they are, and a checkpoint knows nothing of it."""
    model: Any = student.model
    model.visual.compile()
    text = getattr(model, "text", None) or model.transformer
    text.compile()


def _absolute(location: str) -> str:
    return location if "://" in location else str(Path(location).resolve())
