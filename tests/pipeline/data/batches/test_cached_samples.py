"""What a run knows of its images and captions: the rows of the tables, few of them in memory, each file read once."""

from __future__ import annotations

import errno
import threading
import uuid
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.pipeline.data.batches.cached_samples import CachedSamples, SampleRecord
from teacher_cache.pipeline.data.batches.inputs import InputLoader
from teacher_cache.pipeline.data.batches.pairs import PairOrder
from teacher_cache.pipeline.data.batches.student_images import StudentImages
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images.preprocess import Preprocess
from teacher_cache.pipeline.evaluate.retrieval import evaluate
from teacher_cache.pipeline.models.student import student_config, student_tokenizer
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.errors import CacheUnreachableError
from teacher_cache.storage.format.tables import open_static
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import make_known_cache
from tests.pipeline.train.train_work import make_cache, make_student, train_config

IMAGES, TEXTS = 61, 155


def parted(patched: pytest.MonkeyPatch, per_file: int, per_group: int) -> EmbeddingReader:
    """A cache behind a URL whose tables have many files and row groups."""
    patched.setattr("teacher_cache.storage.format.tables._ROWS_PER_FILE", per_file)
    patched.setattr("teacher_cache.storage.format.tables.ROWS_PER_GROUP", per_group)
    patched.setattr("teacher_cache.storage.format.table_rows.HELD_ROWS", 2 * per_group)
    location = f"memory://{uuid.uuid4()}/x.cache"
    make_known_cache(location, images=IMAGES, captions=TEXTS)
    return EmbeddingReader(location)


@settings(max_examples=25)
@given(
    per_file=st.integers(5, 80),
    per_group=st.integers(2, 80),
    kept=st.integers(0, 5),
    asked=st.lists(st.lists(st.integers(0, IMAGES - 1), max_size=20), max_size=4),
    seed=st.integers(0, 99),
)
def test_any_rows_are_those_of_the_whole_tables(
    per_file: int, per_group: int, kept: int, asked: list[list[int]], seed: int
) -> None:
    """In any order, the same one twice too, none at all, whatever was asked for before and however little is kept."""
    with pytest.MonkeyPatch.context() as patched:
        reader = parted(patched, per_file, per_group)
        samples, captions = reader.samples.to_pylist(), reader.captions["text"].to_pylist()
        found = CachedSamples(reader, kept)
        random = np.random.default_rng(seed)
        for rows in (np.array(part, np.int64) for part in asked):
            names = SampleRecord._fields
            wanted = [SampleRecord(**{name: samples[row][name] for name in names}) for row in rows]
            assert found.records(rows) == wanted
            counts = reader.caption_index.counts(rows)
            paired, counts = rows[counts > 0], counts[counts > 0, None]
            drawn = random.integers(0, counts, (len(paired), random.integers(1, 4)))
            of_each = reader.caption_index.starts(paired)[:, None] + drawn
            assert found.texts(paired, of_each) == [captions[row] for row in of_each.ravel()]


def test_an_epoch_in_the_shuffles_order_reads_each_file_once_and_each_chunk_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader = parted(monkeypatch, 24, 6)
    opened: Counter[str] = Counter()
    groups: Counter[tuple[str, ...]] = Counter()
    read = pq.ParquetFile.read_row_group

    def opening(files: Any, key: str, wanted: Any) -> Any:
        opened[key] += 1
        return open_static(files, key, wanted)

    def reading(self: pq.ParquetFile, group: int, **settings: Any) -> Any:
        groups[tuple(self.schema_arrow.names)] += 1
        return read(self, group, **settings)

    rows = reader.image_rows()
    pairs = list(PairOrder(reader, rows, 8, 3, seed=0).epoch(0))
    monkeypatch.setattr("teacher_cache.storage.format.table_rows.open_static", opening)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", reading)
    samples = CachedSamples(reader, kept_chunks=6)
    for pair in pairs:
        samples.records(pair.image_rows)
        samples.texts(pair.image_rows, pair.caption_rows)
    assert set(opened.values()) == {1}
    assert {key.split("/")[0] for key in opened} == {"samples", "captions"}
    size = reader.manifest.layout.image_chunk_rows
    chunks = -(-IMAGES // size)
    # a chunk's rows lie in so many groups at most, and two of them stay
    of_samples, of_captions = sorted(groups.values())
    assert of_samples <= chunks * (size // 6 + 2)
    assert of_captions <= chunks * (size * 3 // 6 + 2)


def test_training_and_evaluating_hold_no_table(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(tmp_path, tiny_teacher)

    def whole(self: EmbeddingReader) -> Any:
        raise AssertionError("a whole table was read")

    for name in ("samples", "captions", "caption_offsets"):
        monkeypatch.setattr(EmbeddingReader, name, property(whole))
    config = train_config(cache, make_student(tmp_path / "s.json"), tmp_path / "run", select_split="test")
    record = train(config).record
    assert record.epochs[-1].selection is not None
    measured = evaluate(EvaluateConfig(run=str(tmp_path / "run"), device="cpu", workers=0))
    assert measured.student == record.epochs[-1].selection.recalls


@pytest.mark.parametrize("window_chunks", [1, 16])
def test_tables_are_read_before_a_step_needs_them_and_once(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_chunks: int
) -> None:
    """By a thread of its own, many windows ahead too."""
    reader = EmbeddingReader(str(make_cache(tmp_path, tiny_teacher)))
    source = ImageSource(reader.manifest.source.image_root)
    size = reader.manifest.layout.image_chunk_rows
    read: list[str] = []

    def reading(self: CachedSamples, chunk: int) -> Any:
        read.append(threading.current_thread().name)
        return by_chunk(self, chunk)

    by_chunk = CachedSamples._samples_of
    monkeypatch.setattr(CachedSamples, "_samples_of", reading)
    tokenizer = student_tokenizer(student_config(str(make_student(tmp_path / "s.json"))))
    preprocess = Preprocess((24, 24), (0.4, 0.4, 0.4), (0.2, 0.2, 0.2))
    pairs = list(PairOrder(reader, reader.row_set("train"), 4, window_chunks, seed=0).epoch(0))
    chunks = {row // size for pair in pairs for row in pair.image_rows.tolist()}
    images = StudentImages(reader, source, preprocess)
    made = InputLoader(reader, tokenizer, images, images, workers=0, window_chunks=window_chunks)
    with closing(made) as inputs:
        epoch = inputs.epoch(pairs)
        next(epoch)
        inputs._thread.submit(int).result()  # what was asked for before it is done
        assert len(read) == len(chunks) > 2
        assert len(list(epoch)) == len(pairs) - 1
        assert len(read) == len(chunks)
        assert len(list(inputs.evaluation_crops(reader.image_rows("test"), 4))) > 0
    assert {name.rpartition("_")[0] for name in read} == {"inputs"}


def test_a_table_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = parted(monkeypatch, 80, 80)
    samples, row = CachedSamples(reader, kept_chunks=1), np.array([3])
    caption = reader.caption_index.starts(row)[:, None]

    def broken(self: pq.ParquetFile, group: int, **settings: object) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(pq.ParquetFile, "read_row_group", broken)
        with pytest.raises(CacheUnreachableError, match=r"samples/000000\.parquet: cannot be read: Input"):
            samples.records(row)
        with pytest.raises(CacheUnreachableError, match=r"captions/000000\.parquet: cannot be read: Input"):
            samples.texts(row, caption)
    # and tried again when it is asked for again
    assert samples.records(row)[0].sample_id == "img-3"
    assert samples.texts(row, caption) == [reader.captions["text"][int(caption[0, 0])].as_py()]
