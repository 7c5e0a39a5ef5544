"""Iterator of training batches."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from itertools import chain, tee
from typing import NamedTuple

from torch import Tensor

from teacher_cache.pipeline.data.batches.inputs import InputLoader
from teacher_cache.pipeline.data.batches.pairs import PairOrder, Pairs
from teacher_cache.pipeline.data.batches.targets import TargetSource, TeacherTargets


class Batch(NamedTuple):
    """Training batch.

    Attributes:
        pairs: rows of the whole batch, over all ranks.
        targets, pixels, tokens: this rank's share. Pixels are on the device, tokens (batch, captions, length) are not.
    """

    pairs: Pairs
    targets: TeacherTargets
    pixels: Tensor
    tokens: Tensor


class BatchLoader:
    """Training batches of a run by epoch: rows, targets, pixels and tokens in step.

    Args:
        inputs: source of pixels and tokens.
        teacher: source of targets.
        rank: rank of this process among ``ranks`` that share each batch.
    """

    def __init__(
        self, order: PairOrder, inputs: InputLoader, teacher: TargetSource, rank: int = 0, ranks: int = 1
    ) -> None:
        self._order, self._inputs, self._teacher = order, inputs, teacher
        self._rank, self._ranks = rank, ranks

    def epochs(self, numbers: range, start_step: int = 0) -> Generator[Batch]:
        """Yield the batches of epochs, one after another. Close the generator to stop prefetching.

        The next epoch's first batches are prepared while this one ends.

        Args:
            numbers: the epochs, from 0.
            start_step: first batch of the first epoch to yield.

        Raises:
            OSError, CacheError: an image or the cache cannot be read.
        """
        orders = (self._order.epoch(number, start_step * (number == numbers.start)) for number in numbers)
        drawn = ((pairs, pairs.part(self._rank, self._ranks)) for pairs in chain.from_iterable(orders))
        # targets prefetch thousands of rows further than inputs, and tee keeps each batch until all have used it
        steps, shown, taught = tee(drawn, 3)
        with (
            closing(self._inputs.epoch(part for _, part in shown)) as inputs,
            closing(self._teacher.targets(part for _, part in taught)) as targets,
        ):
            for (pairs, _), (pixels, tokens), target in zip(steps, inputs, targets, strict=True):
                yield Batch(pairs, target, pixels, tokens)
