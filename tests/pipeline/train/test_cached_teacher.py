"""Targets from the cache, prefetched along the one order of an epoch."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray

import teacher_cache.pipeline.data.batches.inputs
import teacher_cache.pipeline.train.loop
import teacher_cache.storage.read.stream
from teacher_cache.pipeline.data.batches.pairs import PairOrder, Pairs
from teacher_cache.pipeline.data.batches.targets import CachedTeacher
from teacher_cache.pipeline.train.loop import train
from teacher_cache.pipeline.train.step import TrainStep
from teacher_cache.storage.errors import CacheAccessError
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.pipeline.train.train_work import make_cache, make_student, train_config


@pytest.fixture
def reader(known_cache: Path) -> EmbeddingReader:
    return EmbeddingReader(str(known_cache))


def test_targets_are_the_rows_that_single_reads_give(reader: EmbeddingReader) -> None:
    order, threads = PairOrder(reader, reader.image_rows(), 3, 2, captions_per_image=2), threading.active_count()
    for number in range(2):
        for pairs, targets in zip(order.epoch(number), CachedTeacher(reader).targets(order.epoch(number)), strict=True):
            image, text = reader.take("image", pairs.image_rows), reader.take("text", pairs.caption_rows.ravel())
            assert torch.equal(targets.image, torch.from_numpy(image).float())
            assert torch.equal(targets.text.flatten(0, 1), torch.from_numpy(text).float())
            assert targets.text.shape[:2] == (3, 2)
    assert threading.active_count() == threads


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_read_that_fails_or_a_closed_iteration_leaves_no_thread(
    reader: EmbeddingReader, monkeypatch: pytest.MonkeyPatch, tower: str
) -> None:
    teacher, order = CachedTeacher(reader), PairOrder(reader, reader.image_rows(), 3, 2)
    stream, threads = reader.stream, threading.active_count()

    def failing(name: str, batches: Any) -> Iterator[NDArray[Any]]:
        rows = stream(name, batches)
        yield next(rows)
        if name == tower:
            raise CacheAccessError("no answer")
        yield from rows

    with closing(teacher.targets(order.epoch(0))) as targets:
        next(targets)
        assert threading.active_count() > threads
    assert threading.active_count() == threads
    monkeypatch.setattr(reader, "stream", failing)
    targets = teacher.targets(order.epoch(0))
    next(targets)
    with pytest.raises(CacheAccessError, match="no answer"):
        next(targets)
    assert threading.active_count() == threads


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_draws_its_order_once_and_drops_each_batch_once_used(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Held are those of a group or two that the stream sees, whose keys are looked up and that workers have begun.

    ``tee`` drops them 57 at a time.
    """
    monkeypatch.setattr(teacher_cache.pipeline.data.batches.inputs, "_ROWS_AHEAD", 8)
    monkeypatch.setattr(teacher_cache.storage.read.stream, "_GROUP_ROWS", 4)
    monkeypatch.setattr(teacher_cache.storage.read.stream, "_CHECKED_ROWS", 4)
    monkeypatch.setattr(teacher_cache.storage.read.stream, "_ROWS_IN_SIGHT", 8)
    made: list[weakref.ref[Pairs]] = []
    held: list[int] = []
    epochs: list[tuple[int, int]] = []
    epoch = PairOrder.epoch

    def counted(self: PairOrder, number: int, start_step: int = 0) -> Iterator[Pairs]:
        epochs.append((number, start_step))
        for pair in epoch(self, number, start_step):
            made.append(weakref.ref(pair))
            yield pair

    class Step(TrainStep):
        def __call__(self, *arguments: Any) -> Any:
            held.append(sum(pair() is not None for pair in made))
            return super().__call__(*arguments)

    monkeypatch.setattr(PairOrder, "epoch", counted)
    monkeypatch.setattr(teacher_cache.pipeline.train.loop, "TrainStep", Step)
    cache, student = make_cache(tmp_path, tiny_teacher, 320), make_student(tmp_path / "s.json")
    train(train_config(cache, student, tmp_path / "run", epochs=1, batch_size=2, workers=workers))
    assert epochs == [(0, 0)]
    assert len(made) == len(held) == 128
    assert max(held) <= 57 + 16


def test_a_run_that_breaks_off_leaves_no_thread(
    photo_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_config(photo_cache, make_student(tmp_path / "s.json"), tmp_path / "run")
    alive = set(threading.enumerate())
    started = []

    def stop(*args: Any) -> None:
        started.extend(set(threading.enumerate()) - alive)
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainStep, "__call__", stop)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(config)
    assert caught.tb is not None  # which keeps what the run held
    assert started
    assert not [thread for thread in started if thread.is_alive()]
