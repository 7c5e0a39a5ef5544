"""Batches of targets as a PyTorch stream: shuffled by windows, shared out over ranks and workers, resumable."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import closing
from itertools import tee
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from teacher_cache.pipeline.data.batches.pairs import PairOrder
from teacher_cache.pipeline.data.batches.targets import CachedTeacher
from teacher_cache.pipeline.data.torch_datasets.target_dataset import TargetDataset
from teacher_cache.storage.errors import CacheMismatchError, UsageError
from teacher_cache.storage.read.rows import RowSet


class StreamedTargets(IterableDataset[dict[str, Tensor]]):
    """Iterable dataset of whole batches, for caches larger than memory: ``DataLoader(streamed, batch_size=None)``.

    The order is that of ``teacher-cache train``, a function of (seed, epoch, step): each image once per epoch, shuffled
    within windows of chunks. Each rank takes its part of every batch, and its workers take turns, so all ranks have the
    same number of steps and the batches do not depend on the number of workers. The last images of an epoch, fewer
    than a batch over all ranks, are dropped; other ones in another epoch.

    An epoch is repeated until :meth:`set_epoch` is called, also in persistent workers. The state is saved by
    torchdata's ``StatefulDataLoader``, or by :meth:`state_dict` if there are no workers.

    A stream holds the chunks of some batches. Each worker reads all chunks: use one for a cache in an object store.

    Args:
        targets: What a batch holds, made with ``resident=False``.
        batch_size: Images per batch of this rank.
        window_chunks: Chunks that are shuffled together.
        seed: Seed of the order, of the captions and of the views.
        rank, ranks: This process among those that share each batch. Default: torch.distributed's, if it is initialized
            when the stream is made. What shares a loader out again, as Accelerate's ``prepare`` does, is not needed.

    Yields:
        Batches as ``TargetDataset`` describes items, each tensor with a first dimension of ``batch_size``.

    Raises:
        UsageError: The targets are resident or have an order of their own, or there are too few images for a batch.
    """

    def __init__(
        self,
        targets: TargetDataset,
        batch_size: int,
        *,
        window_chunks: int = 16,
        seed: int = 0,
        rank: int | None = None,
        ranks: int | None = None,
    ) -> None:
        if targets.resident:
            raise UsageError("a stream holds no resident rows: make its TargetDataset with resident=False")
        rows = RowSet.of(targets.rows)
        if targets.caption_rows is not None or len(rows) != len(targets):
            raise UsageError(
                "a stream has an order of its own: make its TargetDataset with a split, or with rows once each"
            )
        running = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = (torch.distributed.get_rank() if running else 0) if rank is None else rank
        self.ranks = (torch.distributed.get_world_size() if running else 1) if ranks is None else ranks
        if not 0 <= self.rank < self.ranks:
            raise UsageError(f"rank {self.rank} of {self.ranks}: ranks are 0 to {self.ranks - 1}")
        whole = batch_size * self.ranks
        if not 0 < whole <= len(rows):
            raise UsageError(f"a batch of {whole} images over all ranks is asked for, and there are {len(rows)}")
        self.targets = copy.copy(targets)
        self.targets.kept_chunks = 2 * window_chunks
        self._drawn = {"batch_size": whole, "window_chunks": window_chunks, "seed": seed}
        self._rows = rows
        # shared: persistent workers see the next epoch
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._first = self._step = 0

    @property
    def epoch(self) -> int:
        """Number of the epoch, from 0."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration. The epoch of a state that was just loaded goes on where it was."""
        if epoch != self.epoch:
            self._first = self._step = 0
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return len(self._rows) // self._drawn["batch_size"]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        start, self._first = self._first, 0
        self._step = start
        reader, worker = self.targets.cache, get_worker_info()
        turn, turns = (worker.id, worker.num_workers) if worker else (0, 1)
        drawn: dict[str, Any] = {
            "views": self.targets.views,
            "captions_per_image": self.targets.captions,
            **self._drawn,
        }
        drawn["caption_kinds"] = self.targets.caption_kinds
        order = enumerate(PairOrder(reader, self._rows, **drawn).epoch(self.epoch, start), start)
        mine = ((step, pairs.part(self.rank, self.ranks)) for step, pairs in order if step % turns == turn)
        steps, taught = tee(mine)
        with closing(CachedTeacher(reader).targets(pairs for _, pairs in taught)) as targets:
            for (step, pairs), target in zip(steps, targets, strict=True):
                batch = self.targets.batch(pairs, target.image, target.text)
                self._step = step + 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the order, and what the order depends on. Small; holds no rows."""
        return {"epoch": self.epoch, "step": self._step, "order": self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the last batch of a state, with the next iteration. The number of ranks may be another one.

        Raises:
            CacheMismatchError: The state is of another order: cache, images, batch over all ranks, or seed.
        """
        if differs := [name for name, value in self._order.items() if state["order"].get(name) != value]:
            raise CacheMismatchError(
                f"{self.targets.cache.location}: the state is of another order: {', '.join(differs)} "
                f"{[state['order'].get(name) for name in differs]}, now {[self._order[name] for name in differs]}. "
                "Go on with the settings that it was saved with, or begin an epoch without it"
            )
        self._epoch.fill_(state["epoch"])
        self._first = self._step = state["step"]

    @property
    def _order(self) -> dict[str, Any]:
        drawn: dict[str, Any] = {**self._drawn, "captions": self.targets.captions, "views": self.targets.views}
        drawn["caption_kinds"] = self.targets.caption_kinds or None  # None: as in states of earlier versions
        return {"cache": self.targets.cache.manifest.digest, "images": len(self._rows), **drawn}
