"""Targets that are read ahead are those that are read when they are asked for."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from pipeline.batches import CachedTeacher, Pairs, epoch_pairs
from storage.reader import EmbeddingReader


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
    """And a second look at its batches none, for chunks this small are kept."""
    reader = EmbeddingReader(str(known_cache))
    teacher, pairs = CachedTeacher(reader), epoch(reader, 0)
    teacher.follow(pairs)
    for pair in pairs:
        teacher.targets(pair)
    once = reader.objects_read
    assert once <= 3 + 7
    for pair in pairs:  # what is in memory already
        teacher.targets(pair)
    assert reader.objects_read == once
