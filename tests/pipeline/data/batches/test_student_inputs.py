"""A run's images and captions come from processes that stay, whatever is asked of them in turn."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from teacher_cache.pipeline.data.batches import inputs as inputs_module
from teacher_cache.pipeline.data.batches.cached_samples import CachedSamples, SampleRecord
from teacher_cache.pipeline.data.batches.decoded_images import DecodedImages
from teacher_cache.pipeline.data.batches.inputs import InputLoader
from teacher_cache.pipeline.data.batches.pairs import PairOrder
from teacher_cache.pipeline.data.batches.student_images import StudentImages
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images.preprocess import Preprocess
from teacher_cache.pipeline.data.service.slots import Slots
from teacher_cache.pipeline.models.student import student_config, student_tokenizer
from teacher_cache.pipeline.train.loop import StepProgress, train
from teacher_cache.storage.errors import CacheMismatchError
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.pipeline.data.dataset_files import save_image
from tests.pipeline.late_device import LateDevice, poison
from tests.pipeline.train.train_work import make_cache, make_student, train_config

SEEN = Preprocess((24, 24), (0.4, 0.4, 0.4), (0.2, 0.2, 0.2))


def workers() -> set[int | None]:
    return {child.pid for child in multiprocessing.active_children()}


@pytest.fixture
def cache(tiny_teacher: Path, tmp_path: Path) -> Path:
    return make_cache(tmp_path, tiny_teacher)


@pytest.fixture
def reader(cache: Path) -> EmbeddingReader:
    return EmbeddingReader(str(cache))


@pytest.fixture
def source(reader: EmbeddingReader) -> ImageSource:
    return ImageSource(reader.manifest.source.image_root)


@pytest.fixture
def inputs(reader: EmbeddingReader, source: ImageSource, tmp_path: Path) -> Iterator[InputLoader]:
    tokenizer = student_tokenizer(student_config(str(make_student(tmp_path / "s.json"))))
    images = StudentImages(reader, source, SEEN)
    with closing(InputLoader(reader, tokenizer, images, images, workers=1)) as loader:
        yield loader


def test_a_run_starts_its_workers_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs and two measurements by one process, which ends with the run."""
    before, seen = workers(), []

    def look(at: StepProgress) -> None:
        seen.append((f"epoch {at.epoch}", workers() - before))

    crops = InputLoader.evaluation_crops

    def watched(self: InputLoader, rows: NDArray[np.int64], batch_size: int) -> Iterator[torch.Tensor]:
        for pixels in crops(self, rows, batch_size):
            seen.append(("measurement", workers() - before))
            yield pixels

    monkeypatch.setattr(InputLoader, "evaluation_crops", watched)

    config = train_config(
        cache, make_student(tmp_path / "s.json"), tmp_path / "run", workers=1, select_split="test", select_every=1
    )
    record = train(config, look).record
    assert [epoch.selection is None for epoch in record.epochs] == [False, False]
    assert {what for what, _ in seen} == {"epoch 0", "epoch 1", "measurement"}
    (first,) = {frozenset(pids) for _, pids in seen}
    assert len(first) == 1
    assert workers() == before


def test_epochs_and_measurements_take_turns(reader: EmbeddingReader, source: ImageSource, inputs: InputLoader) -> None:
    """What comes does not depend on what came before, nor on whether that was read to its end."""
    rows = reader.image_rows("train")
    pairs = list(PairOrder(reader, rows, 8, 2, seed=0).epoch(0))
    images = StudentImages(reader, source, SEEN)
    samples = CachedSamples(reader, kept_chunks=1)
    wanted = torch.stack([images.see(image) for image in samples.records(rows)])

    def pixels() -> torch.Tensor:
        return torch.cat([pixels for pixels, _ in inputs.epoch(pairs)])

    first = pixels()
    order = np.concatenate([pair.image_rows for pair in pairs])
    torch.testing.assert_close(
        first, torch.stack([images.see(image) for image in samples.records(order)]), rtol=0, atol=1e-6
    )
    assert torch.equal(torch.cat(list(inputs.evaluation_crops(rows, 5))), wanted)
    next(inputs.epoch(pairs))
    assert torch.equal(torch.cat(list(inputs.evaluation_crops(rows, 3))), wanted)
    next(inputs.evaluation_crops(rows, 3))
    assert torch.equal(pixels(), first)


def test_an_image_that_is_another_one_ends_that_epoch_only(
    reader: EmbeddingReader, source: ImageSource, inputs: InputLoader
) -> None:
    rows = reader.image_rows("train")
    pairs = list(PairOrder(reader, rows, 8, 2, seed=0).epoch(0))
    path = Path(source.root) / reader.samples["uri"][int(pairs[1].image_rows[0])].as_py()
    kept = path.read_bytes()
    save_image(path)
    with pytest.raises(CacheMismatchError, match=path.name):
        list(inputs.epoch(pairs))
    path.write_bytes(kept)
    assert len(list(inputs.epoch(pairs))) == len(pairs)


def test_a_run_that_fails_leaves_no_process(cache: Path, tmp_path: Path) -> None:
    """Also while somebody holds the error, and with it the frames of the run."""
    before = workers()

    def fail(at: StepProgress) -> None:
        assert workers() > before
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough") as caught:
        train(train_config(cache, make_student(tmp_path / "s.json"), tmp_path / "run", workers=1), fail)
    assert workers() == before
    assert caught.value.__traceback__ is not None


def test_a_loader_that_nobody_closes_ends_its_processes_when_it_goes(
    reader: EmbeddingReader, source: ImageSource, tmp_path: Path
) -> None:
    before = workers()
    images = StudentImages(reader, source, SEEN)
    tokenizer = student_tokenizer(student_config(str(make_student(tmp_path / "s.json"))))
    loader = InputLoader(reader, tokenizer, images, images, workers=1)
    next(loader.evaluation_crops(reader.image_rows("train"), 2))
    assert workers() > before
    del loader
    gc.collect()
    assert workers() == before


def test_iterations_are_open_side_by_side(reader: EmbeddingReader, source: ImageSource, inputs: InputLoader) -> None:
    """A measurement does not end the epoch around it. One that is left gives back its slots."""
    rows = reader.image_rows("train")
    images, samples = StudentImages(reader, source, SEEN), CachedSamples(reader, kept_chunks=1)
    wanted = torch.stack([images.see(image) for image in samples.records(rows)])
    first, second = inputs.evaluation_crops(rows, 4), inputs.evaluation_crops(rows, 8)
    assert torch.equal(next(first), wanted[:4])
    assert torch.equal(next(second), wanted[:8])
    assert torch.equal(torch.cat(list(first)), wanted[4:])
    second.close()
    size = inputs._slots._end
    assert torch.equal(torch.cat(list(inputs.evaluation_crops(rows, 8))), wanted)
    assert inputs._slots._end == size
    inputs.close()
    with pytest.raises(ValueError, match="closed"):
        next(inputs.evaluation_crops(rows, 4))


def test_a_whole_batch_is_prefetched_before_its_first_image(
    reader: EmbeddingReader, source: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    ahead, shown = DecodedImages.ahead, DecodedImages.shown

    def prefetch(self: DecodedImages, images: list[SampleRecord]) -> Any:
        asked.append([image.row for image in images])
        return ahead(self, images)

    def show(self: DecodedImages, image: SampleRecord, crop: Any) -> Any:
        asked.append(image.row)
        return shown(self, image, crop)

    monkeypatch.setattr(DecodedImages, "ahead", prefetch)
    monkeypatch.setattr(DecodedImages, "shown", show)
    monkeypatch.setattr(inputs_module, "decode_threads", lambda: 1)
    images = StudentImages(reader, source, SEEN)
    with closing(InputLoader(reader, lambda texts: np.zeros((len(texts), 3)), images, images, workers=0)) as inputs:
        list(inputs.evaluation_crops(np.array([3, 1, 2]), 2))
        assert asked == [[3, 1], 3, 1, [2], 2]
        asked.clear()
        pairs = next(PairOrder(reader, reader.image_rows("train"), 4).epoch(0))
        list(inputs.epoch([pairs]))
        assert asked == [pairs.image_rows.tolist(), *pairs.image_rows.tolist()]


@pytest.mark.parametrize("seed", range(4))
def test_a_device_that_copies_late_gets_every_batch(
    reader: EmbeddingReader, inputs: InputLoader, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """A slot is not written again before its copy has run, in whatever order copies and work come."""
    rows = reader.image_rows("train")
    wanted = list(inputs.evaluation_crops(rows, 2))
    device, normalised = LateDevice(seed), Preprocess.normalized_batch
    copies: dict[int, Any] = {}

    def copied(pinned: torch.Tensor) -> Any:
        moved, done = device.copied(pinned)
        copies[id(moved)] = done
        return moved, done

    def late_normalised(self: Preprocess, moved: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(len(moved), 3, *self.size)
        device.work(lambda: out.copy_(normalised(self, moved)), copies[id(moved)])
        kept.append(moved)  # as the device keeps it
        return out

    kept: list[torch.Tensor] = []
    monkeypatch.setattr(inputs._copies, "copied", copied)
    monkeypatch.setattr(Preprocess, "normalized_batch", late_normalised)
    monkeypatch.setattr(Slots, "give_back", poison)
    found = list(inputs.evaluation_crops(rows, 2))
    for _ in range(4 * len(found)):
        device.step()
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))
