"""Training of a student from a cache, without the teacher."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning_fabric import Fabric

from teacher_cache.pipeline.data.batches.inputs import InputLoader
from teacher_cache.pipeline.data.batches.loader import Batch, BatchLoader
from teacher_cache.pipeline.data.batches.pairs import PairOrder, views_used
from teacher_cache.pipeline.data.batches.student_images import StudentImages
from teacher_cache.pipeline.data.batches.targets import CachedTeacher, JoinedTeachers, TargetSource, TeacherSource
from teacher_cache.pipeline.data.cores import loader_workers
from teacher_cache.pipeline.data.service.fork_server import start_fork_server
from teacher_cache.pipeline.evaluate.recall import mean_recall, recall_of_ranks
from teacher_cache.pipeline.evaluate.split import embed
from teacher_cache.pipeline.evaluate.student_rows import StudentRows
from teacher_cache.pipeline.models.device import image_memory_format, keep_depthwise_float32, memory_told
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import RunRecord, Selection
from teacher_cache.pipeline.models.student import Student, student_tokenizer
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.checkpoints import ResumePoint, RunWriter, TrainState, load_resume_point
from teacher_cache.pipeline.train.gather import StopVote
from teacher_cache.pipeline.train.launch import launch, launched_rank
from teacher_cache.pipeline.train.log.step_log import EpochMeter, EpochSums
from teacher_cache.pipeline.train.log.step_values import LateValues
from teacher_cache.pipeline.train.log.trackers import TrackedRun, Trackers
from teacher_cache.pipeline.train.losses import TeacherQueue
from teacher_cache.pipeline.train.optimizer import WeightAverage, adamw, measured_weights
from teacher_cache.pipeline.train.start import (
    TrainingCache,
    fit_to_cache,
    fit_to_captions,
    new_record,
    new_student,
    recorded_start,
    training_images,
)
from teacher_cache.pipeline.train.step import TrainStep
from teacher_cache.pipeline.train.stop_signals import StopRequests
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.logs import log_fields, logger
from teacher_cache.storage.observe.quantities import counted
from teacher_cache.storage.read.reader import EmbeddingReader

_LOG = logger("train")


@dataclass(frozen=True)
class StepProgress:
    """Progress of a run after a step.

    Attributes:
        samples_per_second, data_wait_share: mean over this epoch in this process. On a GPU the share is an upper limit:
            the next batch is waited for while the GPU still works.
        eta_seconds: time to the last step at this speed, without measurements on the select split.
    """

    step: int
    total_steps: int
    epoch: int
    loss: float
    samples_per_second: float
    data_wait_share: float
    eta_seconds: float


Progress = Callable[[StepProgress], None]
MakeTeacher = Callable[[EmbeddingReader], TeacherSource]


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    run: str
    record: RunRecord = field(repr=False)


def train(
    config: TrainConfig,
    progress: Progress | None = None,
    *,
    resume: bool = False,
    teacher_source: MakeTeacher | None = None,
) -> TrainResult:
    """Train one student on one split of a finished cache, to the end of the last epoch.

    Caches of further teachers (``config.other_caches``) are joined to it by content; the losses are computed for each
    teacher and averaged by ``config.teacher_weights``.

    A cache with one split is trained on without naming it, and a batch is no larger than the split; the record has the
    numbers that were used.

    With one view in the cache the student sees the evaluation crop, as the teacher did. With several it replays the
    stored crops of each image in turn. A killed run resumes from its last checkpoint, with the same losses as an
    unbroken run: to the last bit on a CPU, to rounding on a GPU. A SIGTERM or SIGINT takes effect after the current
    step is saved, or the next one if several devices agree on it; a second one takes effect at once
    (``teacher_cache.pipeline.train.stop_signals``).

    Args:
        resume: resume the run in ``config.out``; a finished run is not changed.
        teacher_source: function that makes the source of the targets of each cache. Default: the cache. With several
            devices it must be picklable.

    Raises:
        CacheMismatchError: the cache differs from ``config.expect``, or from the one that the run began with; or
            another teacher's cache has other crops.
        UsageError: a setting cannot be used (unknown student, split or device, too few images, images that another
            teacher's cache lacks, a run in the folder already; for ``resume``: no run in the folder, or one with other
            settings).
        CacheError: the cache is missing, unfinished or damaged.
        FloatingPointError: the loss is not finite; the message names the rows of the batch.
    """
    run, config = RunFolder(config.out), fit_to_captions(config)
    if resume:
        record = run.require_resumable(config)
        config = record.fitted(config)
        if record.finished:
            if not launched_rank():  # under torchrun only rank 0 cleans up
                with run.locked():  # a run killed at its very end may have unnamed files
                    run.remove_unnamed(record)
            return TrainResult(str(run.path), record)
    else:
        _require_queue_used(config)
        if not launched_rank():  # under torchrun rank 0 may have begun the run already
            run.require_unlocked()
            run.require_free()
        config = _fitted(config)
    launch(config, _train_rank, resume, teacher_source, progress=progress)
    return TrainResult(str(run.path), run.read())


def _fitted(config: TrainConfig) -> TrainConfig:
    """Return the settings for the cache, and warn about what they change."""
    fitted = fit_to_cache(config)
    if launched_rank():
        return fitted  # rank 0 warns
    if fitted.split != config.split:
        name = repr(fitted.split) if fitted.split else "all its images"
        way_out = "" if fitted.split else ". To measure on others, precompute with ?holdout=10%% behind the dataset"
        warning = "%s: there is no split %r; the student learns from %s" + way_out
        _LOG.warning(warning, config.cache, config.split, name)
    if fitted.batch_size != config.batch_size:
        fewer = "%s: fewer images than a batch of %d: batches of %d"
        _LOG.warning(fewer, config.cache, config.batch_size, fitted.batch_size)
    return fitted


def _require_queue_used(config: TrainConfig) -> None:
    # not checked in the settings: records of earlier versions have such settings
    if config.queue_rows and not config.losses.get("queue"):
        losses = ", ".join(f"{name} = {weight:g}" for name, weight in {**config.losses, "queue": 1.0}.items())
        raise UsageError(
            f"queue_rows is {config.queue_rows} and no loss uses the queue: losses = {{ {losses} }}, or leave it out"
        )


def _train_rank(
    fabric: Fabric, config: TrainConfig, progress: Progress | None, resume: bool, teacher_source: MakeTeacher | None
) -> None:
    """Train a whole run in the process of one device."""
    workers = _workers(config, fabric.device)
    if workers != 0:
        start_fork_server()  # in parallel to the student
    run = RunFolder(config.out)
    begun = recorded_start(run) if resume else None
    cache = TrainingCache.open(config, run, begun)
    if cache.dropped and not begun and fabric.global_rank == 0:
        lacking = "%s: %s of split %r, or a caption of theirs, are not in %s: left out of the run"
        dropped = counted(cache.dropped, "image")
        _LOG.warning(lacking, config.cache, dropped, config.split, " or not in ".join(config.other_caches))
    student = new_student(fabric, cache, begun)
    images = training_images(cache, student)
    lock = run.locked() if fabric.global_rank == 0 else contextlib.nullcontext()
    with lock, log_fields(run=str(run.path), cache=config.cache):
        record = new_record(cache, student, recorded_start(run) if resume else None)
        fabric.barrier()
        if fabric.global_rank == 0 and record.checkpoint is None:
            run.start(record)
        evaluated = None
        if config.select_split is not None:
            evaluated = StudentImages(cache.reader, cache.source, student.preprocess)
        tokenizer = student_tokenizer(record.student_config)
        pinned = fabric.device.type == "cuda"
        make = teacher_source or partial(CachedTeacher, pinned=pinned)
        teachers = [make(reader) for reader in (cache.reader, *(other.reader for other in cache.others))]
        with closing(
            InputLoader(cache.reader, tokenizer, images, evaluated, workers, fabric.device, config.window_chunks)
        ) as inputs:
            _Trainer(fabric, cache, inputs, teachers, run, record, student, progress).train()
        fabric.barrier()


def _workers(config: TrainConfig, device: torch.device) -> int:
    """Return the number of decoding processes per rank. By default the ranks of a machine share its cores."""
    if config.workers is not None:
        return config.workers
    ranks_here = config.devices if launched_rank() is None else int(os.environ["LOCAL_WORLD_SIZE"])
    return loader_workers(device.type == "cuda", ranks_here)


class _Trainer:
    """The epochs of one run in the process of one device."""

    def __init__(
        self,
        fabric: Fabric,
        cache: TrainingCache,
        inputs: InputLoader,
        teachers: Sequence[TeacherSource],
        run: RunFolder,
        record: RunRecord,
        student: Student,
        progress: Progress | None,
    ) -> None:
        self._config = config = cache.config
        self._fabric, self._cache, self._inputs, self._progress = fabric, cache, inputs, progress
        self._steps_per_epoch = len(cache.rows) // config.batch_size
        self._total_steps = self._steps_per_epoch * config.epochs
        order = PairOrder(
            cache.reader,
            cache.rows,
            config.batch_size,
            config.window_chunks,
            config.seed,
            views_used(cache.reader, config.views),
            config.captions_per_image,
            config.caption_kinds,
        )
        targets: TargetSource = JoinedTeachers(teachers, cache.others) if cache.others else teachers[0]
        self._loader = BatchLoader(order, inputs, targets, fabric.global_rank, fabric.world_size)
        _prepare(student, config, fabric, inputs)
        fused = fabric.device.type == "cuda"
        self._model, optimizer = fabric.setup(student, adamw(student, config.learning_rate, config.weight_decay, fused))
        average = WeightAverage(student, config.ema_decay) if config.ema_decay else None
        queue = None
        if config.losses.get("queue", 0) > 0:
            queue = TeacherQueue(config.queue_rows, sum(student.teacher_dims), fabric.device)
        point = ResumePoint(cache_manifest_digest=record.cache_manifest_digest)
        self._state = TrainState(student, optimizer.optimizer, average, queue, point)
        if record.checkpoint is not None:
            load_resume_point(run.path / record.checkpoint, self._state)
        self._step = TrainStep(config, fabric, self._model, student, optimizer, teachers, self._total_steps, queue)
        self._late: LateValues | None = None
        self._writer = None
        several = fabric.world_size > 1
        # ranks that ended behind different steps would wait for each other
        self._all_stop = StopRequests(self._save_all, several, StopVote(fabric.device) if several else None)
        if fabric.global_rank == 0:
            tracked = TrackedRun(run.path, run.tracker_id(), self._state.point.step, record.facts())
            trackers = Trackers(config.report_to, tracked)
            self._writer = RunWriter(run, record, self._state, trackers)

    def train(self) -> None:
        """Train to the end of the last epoch."""
        point, epochs = self._state.point, self._config.epochs
        try:
            with (
                self._all_stop,
                closing(self._loader.epochs(range(point.epoch, epochs), point.sums.steps)) as self._batches,
            ):
                while point.epoch < epochs:
                    self._epoch()
        finally:
            if self._writer is not None:
                self._writer.log.close(finished=point.epoch >= epochs)

    def _epoch(self) -> None:
        """Train to the end of the current epoch, then measure and save the student."""
        epoch, one_device = self._state.point.epoch, self._fabric.world_size == 1
        self._model.train()
        with StopRequests(self._save_step, active=one_device) as stop:
            self._steps(stop if one_device else self._all_stop)
            if not self._measures(epoch):
                self._finish_epoch(epoch, None)
                return
            self._save_step()  # the measurement may take minutes, in which signals are not delayed
        selection = self._select() if self._writer is not None else None
        with StopRequests(active=one_device):
            self._finish_epoch(epoch, selection)

    def _steps(self, stop: StopRequests) -> None:
        point = self._state.point
        self._meter = meter = EpochMeter(point.sums, self._config.batch_size)
        coming = islice(self._batches, self._steps_per_epoch - point.sums.steps)
        for batch in stop.between_steps(coming):
            meter.batch_arrived()
            late = self._take(batch)
            self._read_late()  # of the step before; a GPU has its next work by now
            self._late = late
            meter.step_taken(len(batch.pixels))
            if late.ready:
                self._read_late()
            if point.sums.steps < self._steps_per_epoch and self._writer is not None and self._writer.is_due():
                self._save_step()
            meter.wait()
            stop.may_act()
        self._read_late()
        meter.ended()

    def _take(self, batch: Batch) -> LateValues:
        state, size = self._state, self._config.micro_batch or len(batch.pixels)
        with memory_told(f"{size} images at once. --micro-batch {max(1, size // 4)} has the same loss and gradient"):
            late = self._step(state.point.step, batch.pixels, batch.tokens, batch.targets, batch.pairs)
        if state.average is not None:
            state.average.update()
        state.point.step += 1
        return late

    def _read_late(self) -> None:
        """Read the values of the last step, unless they were: they are summed, logged and reported."""
        if self._late is None:
            return
        values, epoch, meter = self._late.read(), self._state.point.epoch, self._meter
        self._late = None
        meter.values_read(values)
        if self._writer is not None:
            self._writer.log.step(epoch, values, meter.rate, meter.wait_share)
        if self._progress is not None:
            eta = (self._total_steps - values.step) * self._config.batch_size / meter.rate
            self._progress(
                StepProgress(values.step, self._total_steps, epoch, values.loss, meter.rate, meter.wait_share, eta)
            )

    def _save_step(self) -> None:
        self._read_late()  # a step that is not finite is never saved
        if self._writer is not None:
            self._writer.save_step()

    def _save_all(self) -> None:
        self._save_step()
        self._fabric.barrier()  # a rank that has ended may end the others

    def _finish_epoch(self, epoch: int, selection: Selection | None) -> None:
        point = self._state.point
        finished = EpochMeter.finished(epoch, point.sums, self._config.batch_size, selection)
        point.epoch, point.sums = epoch + 1, EpochSums()
        if self._writer is not None:
            self._writer.finish_epoch(finished)

    def _measures(self, epoch: int) -> bool:
        config, done = self._config, epoch + 1
        return config.select_split is not None and (done % config.select_every == 0 or done == config.epochs)

    def _select(self) -> Selection:
        """Measure the student on the select split."""
        split = self._cache.select_split
        with measured_weights(self._state.average):
            rows = embed(split, StudentRows(self._state.student, self._inputs, self._fabric.device))
        recalls = recall_of_ranks(split.ranks(*rows, device="cpu"))  # a GPU is full of the training
        return Selection(split=split.name, mean_recall=mean_recall(recalls), recalls=recalls)


def _prepare(student: Student, config: TrainConfig, fabric: Fabric, inputs: InputLoader) -> None:
    """Prepare the student for this device in place, without changing its weights."""
    student.model.visual.to(memory_format=image_memory_format(student.model))
    if config.precision == "bf16" and fabric.device.type == "cpu":
        keep_depthwise_float32(student)
    if fabric.world_size > 1:
        _freeze_unused(student, torch.as_tensor(inputs.tokenizer(["any"]))[: config.captions_per_image])
    if config.compile:
        _compile(student)


def _freeze_unused(student: Student, tokens: torch.Tensor) -> None:
    """Freeze parameters that no output depends on: DDP would wait for their gradients."""
    size = student.preprocess.size
    student.eval()
    sum(value.sum() for value in student(torch.zeros(1, 3, *size), tokens)).backward()
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def _compile(student: Student) -> None:
    """Compile the towers in place, which keeps the names of parameters in checkpoints."""
    model: Any = student.model
    model.visual.compile()
    text = getattr(model, "text", None) or model.transformer
    text.compile()
