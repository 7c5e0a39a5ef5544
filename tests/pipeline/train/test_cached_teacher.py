"""Targets that are read ahead are those that are read when they are asked for."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray

import teacher_cache.pipeline.data.batches.inputs
import teacher_cache.pipeline.train.loop
import teacher_cache.storage.read.stream
from teacher_cache.pipeline.data.batches.pairs import CachedTeacher, Pairs, epoch_pairs
from teacher_cache.pipeline.train.loop import train
from teacher_cache.pipeline.train.step import TrainStep
from teacher_cache.storage.errors import CacheAccessError
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.pipeline.train.train_work import make_cache, make_student, train_config


def epoch(reader: EmbeddingReader, number: int) -> list[Pairs]:
    return list(epoch_pairs(reader, reader.image_rows(), 3, 2, 0, number))


def test_followed_targets_are_the_same_bytes(known_cache: Path) -> None:
    reader, plain = EmbeddingReader(str(known_cache)), CachedTeacher(EmbeddingReader(str(known_cache)))
    teacher, threads = CachedTeacher(reader), threading.active_count()
    for number in range(2):
        pairs = epoch(reader, number)
        teacher.follow(pairs)
        for pair in pairs:
            found, wanted = teacher.targets(pair), plain.targets(pair)
            assert torch.equal(found.image, wanted.image)
            assert torch.equal(found.text, wanted.text)
    assert threading.active_count() == threads


def test_another_batch_than_the_next_one_is_read_by_itself(known_cache: Path) -> None:
    reader, plain = EmbeddingReader(str(known_cache)), CachedTeacher(EmbeddingReader(str(known_cache)))
    teacher, pairs = CachedTeacher(reader), epoch(reader, 0)
    teacher.follow(pairs)
    for pair in (pairs[2], pairs[0], pairs[0], pairs[1], pairs[2]):
        assert torch.equal(teacher.targets(pair).image, plain.targets(pair).image)


def test_an_epoch_reads_each_object_once(known_cache: Path) -> None:
    """A stream keeps nothing; single reads of batches keep chunks, so that each is read once more, and then no more."""
    reader = EmbeddingReader(str(known_cache))
    teacher, pairs = CachedTeacher(reader), epoch(reader, 0)
    teacher.follow(pairs)
    for pair in pairs:
        teacher.targets(pair)
    once = reader.objects_read
    assert once <= 3 + 7
    for _ in range(2):
        for pair in pairs:
            teacher.targets(pair)
        assert reader.objects_read == 2 * once


@pytest.mark.parametrize("tower", ["image", "text"])
def test_after_a_read_that_failed_each_batch_is_read_by_itself(
    known_cache: Path, monkeypatch: pytest.MonkeyPatch, tower: str
) -> None:
    reader, plain = EmbeddingReader(str(known_cache)), CachedTeacher(EmbeddingReader(str(known_cache)))
    teacher, pairs, stream, threads = CachedTeacher(reader), epoch(reader, 0), reader.stream, threading.active_count()

    def failing(name: str, batches: Any) -> Iterator[NDArray[Any]]:
        rows = stream(name, batches)
        yield next(rows)
        if name == tower:
            raise CacheAccessError("no answer")
        yield from rows

    monkeypatch.setattr(reader, "stream", failing)
    teacher.follow(pairs)
    teacher.targets(pairs[0])
    with pytest.raises(CacheAccessError, match="no answer"):
        teacher.targets(pairs[1])
    assert threading.active_count() == threads
    for pair in pairs[1:]:
        found, wanted = teacher.targets(pair), plain.targets(pair)
        assert torch.equal(found.image, wanted.image)
        assert torch.equal(found.text, wanted.text)


def test_closed_it_reads_nothing_ahead(known_cache: Path) -> None:
    reader, threads = EmbeddingReader(str(known_cache)), threading.active_count()
    teacher, pairs = CachedTeacher(reader), epoch(reader, 0)
    teacher.follow(pairs)
    first = teacher.targets(pairs[0])
    assert threading.active_count() > threads
    teacher.close()
    assert threading.active_count() == threads
    assert torch.equal(teacher.targets(pairs[0]).image, first.image)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_made_as_they_come_into_sight_and_dropped_once_used(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Those of a group or two that the stream sees, whose keys are looked up and that workers have begun.

    ``tee`` drops them 57 at a time.
    """
    monkeypatch.setattr(teacher_cache.pipeline.data.batches.inputs, "_ROWS_AHEAD", 8)
    monkeypatch.setattr(teacher_cache.storage.read.stream, "_GROUP_ROWS", 4)
    monkeypatch.setattr(teacher_cache.storage.read.stream, "_CHECKED_ROWS", 4)
    monkeypatch.setattr(teacher_cache.storage.read.stream, "_ROWS_IN_SIGHT", 8)
    made: list[weakref.ref[Pairs]] = []
    held: list[int] = []

    def counted(*arguments: Any) -> Iterator[Pairs]:
        for pair in epoch_pairs(*arguments):
            made.append(weakref.ref(pair))
            yield pair

    class Step(TrainStep):
        def __call__(self, *arguments: Any) -> Any:
            held.append(sum(pair() is not None for pair in made))
            return super().__call__(*arguments)

    monkeypatch.setattr(teacher_cache.pipeline.train.loop, "epoch_pairs", counted)
    monkeypatch.setattr(teacher_cache.pipeline.train.loop, "TrainStep", Step)
    cache, student = make_cache(tmp_path, tiny_teacher, 320), make_student(tmp_path / "s.json")
    train(train_config(cache, student, tmp_path / "run", epochs=1, batch_size=2, workers=workers))
    assert len(made) == len(held) == 128
    assert max(held) <= 57 + 16


def test_a_run_that_breaks_off_leaves_no_thread(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_config(make_cache(tmp_path, tiny_teacher), make_student(tmp_path / "s.json"), tmp_path / "run")
    alive = set(threading.enumerate())
    left = []

    def stop(*args: Any) -> None:
        left.extend(set(threading.enumerate()) - alive)
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainStep, "__call__", stop)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(config)
    assert caught.tb is not None  # which keeps what the run held
    assert left
    assert not [thread for thread in left if thread.is_alive()]
