"""``StreamedTargets``: each row once per epoch over ranks and workers, in one order, and resumed at any batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from teacher_cache import Cache, CacheCorruptError, CacheMismatchError, StreamedTargets, TargetDataset, UsageError
from tests.conftest import make_known_cache
from tests.pipeline.data.torch_datasets.test_target_dataset import check_known


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """48 images and 96 captions in chunks of 4."""
    path = tmp_path_factory.mktemp("stream") / "c"
    make_known_cache(path, images=48, captions=96)
    return str(path)


def streamed(cache: str, batch_size: int = 4, **settings: Any) -> StreamedTargets:
    targets = TargetDataset(cache, resident=False, **settings.pop("targets", {}))
    return StreamedTargets(targets, batch_size, window_chunks=3, **settings)


def rows(batches: Any) -> list[list[int]]:
    return [batch["row"].tolist() for batch in batches]


def flat(batches: Any) -> list[int]:
    return [row for batch in batches for row in batch]


def loader(dataset: StreamedTargets, workers: int = 0, kind: Any = DataLoader, **settings: Any) -> Any:
    context = "fork" if workers else None
    return kind(dataset, batch_size=None, num_workers=workers, multiprocessing_context=context, **settings)


def test_each_batch_holds_the_rows_that_it_names(cache: str) -> None:
    dataset = streamed(cache, targets={"dtype": "float32", "captions": 2})
    batches = list(loader(dataset))
    assert len(batches) == len(dataset) == 12
    for batch in batches:
        for item in range(4):
            check_known({name: values[item] for name, values in batch.items()}, torch.float32)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (3, 2)])
def test_over_ranks_and_workers_each_row_comes_once_per_epoch(cache: str, ranks: int, workers: int) -> None:
    """The ranks' parts together are the batches of one process: neither ranks nor workers change the order."""
    epochs = []
    for epoch in (0, 1):
        whole = streamed(cache, 12)
        whole.set_epoch(epoch)
        parts = []
        for rank in range(ranks):
            part = streamed(cache, 12 // ranks, rank=rank, ranks=ranks)
            part.set_epoch(epoch)
            parts.append(rows(loader(part, workers)))
        assert {len(part) for part in parts} == {4}
        together = [flat(step) for step in zip(*parts, strict=True)]
        assert together == rows(whole)
        assert sorted(flat(together)) == list(range(48))
        epochs.append(together)
    assert epochs[0] != epochs[1]


def test_it_shuffles_by_windows_of_chunks_and_reads_each_chunk_once(cache: str) -> None:
    dataset = streamed(cache, 12, targets={"captions": 0})
    batches = rows(dataset)
    assert all(len({row // 4 for row in batch}) == 3 for batch in batches)  # three chunks, whole
    assert flat(batches) != sorted(flat(batches))
    assert dataset.targets.cache.objects_read == 12 + 12  # embeddings and boxes, in 12 chunks each


def test_persistent_workers_follow_the_epoch(cache: str) -> None:
    dataset = streamed(cache)
    workers = loader(dataset, 2, persistent_workers=True)
    for epoch in (0, 0, 3):
        dataset.set_epoch(epoch)
        other = streamed(cache)
        other.set_epoch(epoch)
        assert rows(workers) == rows(other)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [1, 5, 11])
def test_resumed_in_mid_epoch_it_yields_exactly_the_rest(cache: str, workers: int, done: int) -> None:
    """With torchdata's loader, in the second epoch; the epoch after it is whole again."""
    first = loader(begun := streamed(cache), workers, StatefulDataLoader)
    begun.set_epoch(1)
    batches = iter(first)
    seen = rows(next(batches) for _ in range(done))
    state = first.state_dict()
    rest = rows(batches)
    assert sorted(flat(seen + rest)) == list(range(48))

    resumed = loader(dataset := streamed(cache), workers, StatefulDataLoader)
    resumed.load_state_dict(state)
    assert rows(resumed) == rest
    assert dataset.epoch == 1
    dataset.set_epoch(2)
    begun.set_epoch(2)
    assert rows(resumed) == rows(begun)


def test_without_workers_the_dataset_keeps_its_own_state(cache: str) -> None:
    dataset = streamed(cache, 4, ranks=1, rank=0)
    batches = iter(dataset)
    seen = rows(next(batches) for _ in range(3))
    state = dataset.state_dict()
    # two ranks go on with half a batch each
    parts = [streamed(cache, 2, rank=rank, ranks=2) for rank in range(2)]
    for part in parts:
        part.load_state_dict(state)
        part.set_epoch(0)  # as a loop over epochs does
    together = [flat(step) for step in zip(*map(rows, parts), strict=True)]
    assert together == rows(batches)
    assert len(seen) + len(together) == 12
    assert len(rows(parts[0])) == 12  # the next iteration is whole


def test_the_order_is_that_of_training(photo_cache: Path) -> None:
    """Same seed, same batches: what ``teacher-cache train`` would see."""
    from teacher_cache.pipeline.data.batches.pairs import PairOrder

    reader = Cache(str(photo_cache))
    wanted = list(PairOrder(reader, reader.image_rows("train"), 8, seed=5).epoch(2))
    dataset = StreamedTargets(TargetDataset(reader, "train", resident=False), 8, seed=5)
    dataset.set_epoch(2)
    for batch, pairs in zip(dataset, wanted, strict=True):
        assert np.array_equal(batch["row"], pairs.image_rows)
        assert np.array_equal(batch["caption"], pairs.caption_rows)


def test_pixels_and_tokens_are_of_the_rows(photo_cache: Path) -> None:
    targets = TargetDataset(str(photo_cache), "train", resident=False).with_images(16)
    targets.with_tokens(lambda texts: [[len(text)] for text in texts])
    dataset = StreamedTargets(targets, 8)
    texts = targets.cache.captions["text"].to_pylist()
    for batch in dataset:
        assert batch["pixels"].shape == (8, 3, 16, 16)
        assert batch["tokens"].ravel().tolist() == [len(texts[row]) for row in batch["caption"].ravel()]
        assert torch.equal(batch["pixels"][3], targets[int(batch["row"][3])]["pixels"])
    assert dataset.targets.kept_chunks == 32


def test_mistakes_are_one_line_that_says_what_to_do(cache: str) -> None:
    with pytest.raises(UsageError, match="resident=False"):
        StreamedTargets(TargetDataset(cache), 4)
    with pytest.raises(UsageError, match="an order of its own"):
        streamed(cache, targets={"rows": [1, 1]})
    with pytest.raises(UsageError, match="50 images over all ranks is asked for, and there are 48"):
        streamed(cache, 25, rank=1, ranks=2)
    with pytest.raises(UsageError, match="rank 2 of 2: ranks are 0 to 1"):
        streamed(cache, rank=2, ranks=2)
    state = streamed(cache).state_dict()
    with pytest.raises(CacheMismatchError, match=r"another order: batch_size, seed \[4, 0\], now \[6, 1\]"):
        streamed(cache, 6, seed=1).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_chunk_is_named_with_its_remedy(tmp_path: Path, workers: int) -> None:
    make_known_cache(tmp_path / "c")
    (tmp_path / "c/targets.zarr/image/embedding/c/1/0/0").unlink()
    with pytest.raises(CacheCorruptError, match=r"missing.*teacher-cache repair"):
        list(loader(streamed(str(tmp_path / "c")), workers))
