"""One optimizer step: forward, loss of the whole batch, backward; optionally in parts and on several devices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from teacher_cache.pipeline.data.batches.pairs import Pairs
from teacher_cache.pipeline.data.batches.targets import TeacherSource, TeacherTargets
from teacher_cache.pipeline.models.device import image_memory_format
from teacher_cache.pipeline.models.student import Student, StudentOutput
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.gather import gather_features
from teacher_cache.pipeline.train.log.step_values import LateValues
from teacher_cache.pipeline.train.losses import LossInputs, TeacherQueue, weighted_sum
from teacher_cache.pipeline.train.optimizer import learning_rate_share, step_unless


class TrainStep:
    """A training step: trains a student on one batch per call.

    A batch in parts has the same loss and gradient as the whole batch, although contrastive and relational losses
    compare every pair with every other. Three passes do it (GradCache: Gao et al. 2021, "Scaling Deep Contrastive
    Learning Batch Size under Memory Limited Setup"; open_clip's ``accum_freq`` does the same): the features of all
    parts without a graph; the loss on all features, with its gradient by each feature; then each part again with a
    graph, through which this gradient is propagated. BatchNorm normalises within each part, so its statistics differ
    from those of the whole batch; the running statistics are updated once per part.

    Each of several devices has a slice of the batch, and computes the same loss on the features of all devices.

    Random numbers (dropout) are a function of (seed, step, rank, part). So both passes over a part see the same ones,
    and a resumed run sees those of an unbroken run.

    Args:
        model: the student as set up by Fabric, with its optimizer.
        teachers: source of each teacher's targets, for its logit scale and bias.
        queue: queue of the teacher's rows for the queue loss; the same on every rank.
    """

    def __init__(
        self,
        config: TrainConfig,
        fabric: Fabric,
        model: Any,
        student: Student,
        optimizer: Any,
        teachers: Sequence[TeacherSource],
        total_steps: int,
        queue: TeacherQueue | None = None,
    ) -> None:
        self._config, self._fabric, self._model, self._student = config, fabric, model, student
        self._memory_format, self._queue = image_memory_format(student.model), queue
        self._optimizer, self._teachers, self._total_steps = optimizer, teachers, total_steps
        # 1 from the first loss or gradient on that is not finite
        self._bad = torch.zeros((), device=fabric.device)

    def __call__(self, step: int, pixels: Tensor, tokens: Tensor, targets: TeacherTargets, pairs: Pairs) -> LateValues:
        """Train on one batch, without a wait for the device.

        If the loss or the gradient is not finite, reading the values raises. Neither this step nor any later one
        changes weights or moments, so a step may be launched before the values of the last one are read.

        Args:
            step: step of the run, from 0.
            pixels, tokens, targets: this device's slice of the batch; tokens (batch, captions, length).
            pairs: rows of the whole batch, for messages.

        Raises:
            ValueError: targets and tokens differ in their number of captions.
        """
        if targets.text.shape[:2] != tokens.shape[:2]:
            raise ValueError(
                f"targets of captions {tuple(targets.text.shape)} and tokens {tuple(tokens.shape)}: wanted (batch, "
                "captions, teacher_dim) and (batch, captions, length), of the same captions"
            )
        config = self._config
        rate = config.learning_rate * learning_rate_share(step, self._total_steps, config.warmup_fraction)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        device = self._fabric.device
        # float16 from a cache is widened there: half the bytes to copy
        teacher = gather_features(
            targets.image.to(device, non_blocking=True).float(), targets.text.to(device, non_blocking=True).float()
        )
        if self._queue is not None:
            # before the loss, so that the match of each pair is in the queue
            image, text = teacher
            self._queue.push(image.repeat_interleave(text.shape[1], dim=0), text.flatten(0, 1))
        size, captions = config.micro_batch or len(pixels), tokens.shape[1]
        tokens = tokens.flatten(0, 1)
        # cut on the device: a slice of pinned memory is not pinned, and its copy would wait for the GPU
        tokens = tokens.to(device, non_blocking=True)[:, : self._student.shorten(tokens).shape[1]]
        images = torch.split(pixels, size)
        texts = torch.split(tokens, size * captions) if captions else [tokens] * len(images)
        parts_of_batch = list(zip(images, texts, strict=True))
        backward = self._whole if len(parts_of_batch) == 1 else self._in_parts
        total, parts, logit_scale = backward(step, parts_of_batch, teacher)
        norm = self._fabric.clip_gradients(
            self._model, self._optimizer, max_norm=config.clip_grad_norm, error_if_nonfinite=False
        )
        values = torch.stack([total, norm.to(total), logit_scale, *parts.values()])  # type: ignore[union-attr]
        self._bad = torch.maximum(self._bad, (~values[:2].isfinite().all()).float())
        step_unless(self._optimizer, self._bad)
        self._student.clamp_logit_scale()
        return LateValues(step, rate, values, list(parts), pairs)

    def _whole(self, step: int, parts_of_batch: list[Any], teacher: tuple[Tensor, ...]) -> Any:
        ((pixels, tokens),) = parts_of_batch
        output = self._forward(step, 0, pixels, tokens)
        total, parts = self._loss(gather_features(*output[:4]), output[4:], teacher)
        if self._fabric.world_size > 1:
            # DDP waits for a gradient of every output, including those that no loss uses
            self._fabric.backward(total + 0.0 * sum(value.sum() for value in output))
        else:
            self._fabric.backward(total)
        return total.detach(), parts, output.logit_scale.detach()

    def _in_parts(self, step: int, parts_of_batch: list[Any], teacher: tuple[Tensor, ...]) -> Any:
        with torch.no_grad(), self._buffers_kept():
            outputs = [self._forward(step, part, *inputs) for part, inputs in enumerate(parts_of_batch)]
        local = [torch.cat(values) for values in list(zip(*outputs, strict=True))[:4]]
        leaves = [value.detach().requires_grad_() for value in gather_features(*local)]
        scalars = [value.detach().requires_grad_() for value in outputs[0][4:]]
        total, parts = self._loss(tuple(leaves), tuple(scalars), teacher)
        slopes = torch.autograd.grad(total, [*leaves, *scalars], allow_unused=True, materialize_grads=True)
        feature_slopes = [
            self._slopes_of_parts(slope, [len(output[place]) for output in outputs])
            for place, slope in enumerate(slopes[:4])
        ]
        for part, inputs in enumerate(parts_of_batch):
            last = part == len(parts_of_batch) - 1
            with self._fabric.no_backward_sync(self._model, enabled=not last):
                output = self._forward(step, part, *inputs)
                sent = sum((value * slope[part]).sum() for value, slope in zip(output[:4], feature_slopes, strict=True))
                # every part computes logit_scale and logit_bias from the same parameters: their gradients count once
                learned = output.logit_scale * slopes[4] + output.logit_bias * slopes[5]
                self._fabric.backward(sent + learned * float(last))
        return total.detach(), parts, scalars[0].detach()

    def _slopes_of_parts(self, slope: Tensor, rows: list[int]) -> tuple[Tensor, ...]:
        """Return this rank's gradient by part, from the gradient by the rows of all ranks."""
        own = slope.tensor_split(self._fabric.world_size)[self._fabric.global_rank]
        # DDP averages over ranks, but a feature has its gradient on one rank only
        return torch.split(own * self._fabric.world_size, rows)

    def _forward(self, step: int, part: int, pixels: Tensor, tokens: Tensor) -> StudentOutput:
        device = self._fabric.device
        numbers = np.random.SeedSequence([self._config.seed, step, self._fabric.global_rank, part])
        torch.manual_seed(int(numbers.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        output: StudentOutput = self._model(
            pixels.to(device, non_blocking=True, memory_format=self._memory_format),
            tokens,
        )
        return output

    def _loss(self, features: tuple[Tensor, ...], scalars: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Any:
        """Return the mean over the teachers, by their shares, of the losses with each teacher.

        ``scalars`` are the student's logit scale and bias. ``teacher`` and the projected features have the rows of all
        teachers side by side.
        """
        image, text, *projected = features
        queue = self._queue.rows() if self._queue is not None else ()
        wide = [rows.split(self._student.teacher_dims, dim=-1) for rows in (*projected, *teacher, *queue)]
        losses = [
            self._loss_of(source, (image, text, *rows), scalars)
            for source, *rows in zip(self._teachers, *wide, strict=True)
        ]
        totals, parts = zip(*losses, strict=True)

        def mean(values: Iterable[Tensor]) -> Tensor:
            shares = self._config.teacher_shares
            return torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum()

        return mean(totals), {name: mean(part[name] for part in parts) for name in parts[0]}

    def _loss_of(self, source: TeacherSource, features: tuple[Tensor, ...], scalars: tuple[Tensor, ...]) -> Any:
        """Return the mean of the losses with one teacher, of all images with their first caption, their second, ...

        Without captions, the losses of the images alone.
        """
        image, text, projected_image, projected_text, teacher_image, teacher_text, *queue = features
        logit_scale, logit_bias = scalars
        images = (image, projected_image, teacher_image)
        texts = (text, projected_text, teacher_text)
        by_caption = [rows.view(*teacher_text.shape[:2], rows.shape[-1]).unbind(1) for rows in texts]
        # student, projected and teacher rows of all images with their first caption, ...
        paired: list[Any] = [zip(images, captions, strict=True) for captions in zip(*by_caption, strict=True)]
        paired = paired or [zip(images, strict=True)]
        losses = [
            weighted_sum(
                LossInputs(
                    own,
                    projected,
                    taught,
                    logit_scale,
                    source.logit_scale,
                    self._config.label_smoothing,
                    self._config.temperature,
                    (queue[0], queue[1]) if queue else None,
                    logit_bias,
                    source.logit_bias or 0.0,
                ),
                self._config.losses,
            )
            for own, projected, taught in paired
        ]
        totals, parts = zip(*losses, strict=True)
        return torch.stack(totals).mean(), {
            name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]
        }

    @contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        """Restore the buffers after the block: only the second pass updates BatchNorm's statistics."""
        saved = [buffer.clone() for buffer in self._student.buffers()]
        yield
        for buffer, value in zip(self._student.buffers(), saved, strict=True):
            buffer.copy_(value)
