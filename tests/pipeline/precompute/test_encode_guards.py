"""What encoding may cost, by counting: each row through the teacher once, each image decoded once, no batch copied."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import teacher_cache.pipeline.precompute.encode
import teacher_cache.pipeline.precompute.teacher_inputs
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images.model_input import ModelInput
from teacher_cache.pipeline.data.images.preprocess import Preprocess
from teacher_cache.pipeline.data.service.slots import Slot, Slots
from teacher_cache.pipeline.data.tokens import ClipTokenizer
from teacher_cache.pipeline.models.teacher import Encoded, LiveTeacher, load_teacher
from teacher_cache.pipeline.precompute.encode import encode_chunks, encode_shared
from teacher_cache.pipeline.precompute.plan import plan_precompute
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.errors import CacheMismatchError, CacheUnreachableError, UsageError
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.format.manifest import StaticFile
from teacher_cache.storage.format.table_rows import TableRows
from teacher_cache.storage.format.tables import open_static
from teacher_cache.storage.observe.logs import hints_heard_by
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import cache_digest
from tests.pipeline.precompute.conftest import make_config

MakePhotos = Callable[..., Path]
Planned = tuple[PrecomputeConfig, LiveTeacher, list[ChunkRef]]
IMAGES, CHUNK, VIEWS = 21, 8, 3


@pytest.fixture
def planned(make_photos: MakePhotos, tiny_teacher: Path, tmp_path: Path) -> Planned:
    """A cache of 21 images and 42 captions in chunks of 8 that is planned, and its teacher."""
    settings = make_config(make_photos(IMAGES), tiny_teacher, tmp_path / "c", views=2)
    teacher = load_teacher(settings.teacher, device="cpu")
    return settings, teacher, plan_precompute(settings, teacher)


def test_each_row_is_read_decoded_and_encoded_once(
    planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Count in the model itself: no probe, no padded row, no second pass; each image opened and decoded once."""
    settings, teacher, _ = planned
    settings = settings.model_copy(update={"views": VIEWS, "cache": str(tmp_path / "three views")})
    refs = plan_precompute(settings, teacher)
    counts: Counter[str] = Counter()
    opened: Counter[str] = Counter()
    decode, read, tokenize = (
        teacher_cache.pipeline.precompute.teacher_inputs.open_image,
        ImageSource.read,
        ClipTokenizer.__call__,
    )

    def decoding(data: bytes, decoder: str) -> Any:
        counts["decoded"] += 1
        return decode(data, decoder)

    def reading(self: ImageSource, *where: Any) -> bytes:
        counts["read"] += 1
        opened[str(where[0])] += 1
        return read(self, *where)

    def tokenizing(self: ClipTokenizer, texts: list[str]) -> Any:
        counts.update({"tokenized": len(texts), "tokenizer calls": 1})
        return tokenize(self, texts)

    def count(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: counts.update({name: len(inputs[0]), f"{name} batches": 1})

    monkeypatch.setattr(teacher_cache.pipeline.precompute.teacher_inputs, "open_image", decoding)
    monkeypatch.setattr(ImageSource, "read", reading)
    monkeypatch.setattr(ClipTokenizer, "__call__", tokenizing)
    model: Any = teacher.model
    model.visual.register_forward_hook(count("images"))
    model.ln_final.register_forward_hook(count("captions"))
    encode_chunks(settings, teacher, refs)
    assert counts == {
        "read": IMAGES,
        "decoded": IMAGES,
        "images": VIEWS * IMAGES,
        "tokenized": 2 * IMAGES + 5,  # and the five texts that identify the tokenizer
        "tokenizer calls": 5 * 2 + 1 + 1,  # one a batch
        "captions": 2 * IMAGES,
        "images batches": VIEWS * (2 + 2 + 2),  # chunks of 8, 8 and 5
        "captions batches": 5 * 2 + 1,  # five chunks of 8 and one of 2
    }
    assert set(opened.values()) == {1}
    assert len(opened) == IMAGES


def test_the_planner_alone_reads_every_image(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process reads the images that it encodes, and one that the planner could not read."""
    settings, teacher, refs = planned
    read, opened = ImageSource.read, list[str]()

    def reading(self: ImageSource, uri: str, *where: Any) -> bytes:
        opened.append(uri)
        return read(self, uri, *where)

    photos = Path(settings.dataset.removeprefix("flickr:"))
    lost = photos / "images/0007.jpg"
    data = lost.read_bytes()
    lost.unlink()
    settings = settings.model_copy(update={"cache": f"{settings.cache}-of-20"})
    monkeypatch.setattr(ImageSource, "read", reading)
    refs = plan_precompute(settings, teacher)
    assert len(opened) == len(set(opened)) == IMAGES  # one full pass

    opened.clear()
    encode_chunks(settings, teacher, [ref for ref in refs if (ref.tower, ref.chunk) == ("image", 0)])
    assert len(opened) == CHUNK
    opened.clear()
    assert precompute(settings).chunks_encoded == len(refs) - settings.views
    assert opened[0] == "images/0007.jpg"
    assert len(opened) == len(set(opened)) == 1 + (IMAGES - 1) - CHUNK

    # a finished cache is compared with every byte, and a picture that is back is a changed dataset
    opened.clear()
    assert precompute(settings).chunks_encoded == 0
    assert len(opened) == IMAGES
    lost.write_bytes(data)
    with pytest.raises(CacheMismatchError, match="1 image and 2 captions more"):
        plan_precompute(settings, teacher)


@pytest.mark.parametrize("number", [1, 20], ids=["a committed one", "a pending one"])
def test_a_picture_that_changed_in_place_is_found_where_it_is_encoded_and_once_all_is(
    planned: Planned, number: int
) -> None:
    """An unfinished cache is not compared with the images of its rows."""
    settings, teacher, refs = planned
    encode_chunks(settings, teacher, [ref for ref in refs if (ref.tower, ref.chunk) == ("image", 0)])
    picture = Path(settings.dataset.removeprefix("flickr:")) / f"images/{number:04d}.jpg"
    picture.write_bytes(picture.with_name("0002.jpg").read_bytes())
    if number >= CHUNK:
        with pytest.raises(CacheMismatchError, match=r"0020\.jpg: not the image that the cache was made of"):
            precompute(settings)
        return
    precompute(settings)
    with pytest.raises(CacheMismatchError, match=r"1 image with other bytes, the first: 0001\.jpg"):
        precompute(settings)


def test_the_thread_that_runs_the_teacher_syncs_no_file(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a claim nor a chunk: a slow disk does not hold up the forward pass."""
    settings, teacher, refs = planned
    syncs: Counter[bool] = Counter()
    sync, inside = os.fsync, threading.local()

    def fsync(descriptor: int) -> None:
        syncs[getattr(inside, "encodes", False)] += 1
        sync(descriptor)

    encode = teacher_cache.pipeline.precompute.encode._Encoder.encode

    def encoding(self: Any, stretches: Any) -> None:
        inside.encodes = True
        encode(self, stretches)
        inside.encodes = False

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(teacher_cache.pipeline.precompute.encode._Encoder, "encode", encoding)
    assert encode_shared(settings, teacher, refs) == len(refs)
    assert syncs[True] == 0
    assert syncs[False] > len(refs)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            UsageError,
            r"too little memory: 4 rows .*--batch-size 1",
        ),
        (torch.AcceleratorError("CUDA error: an illegal memory access"), torch.AcceleratorError, "illegal"),
    ],
)
def test_errors_of_a_gpu_say_what_to_do_or_where(
    planned: Planned, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], message: str
) -> None:
    settings, teacher, refs = planned

    def fail(self: Encoded) -> None:
        raise error

    monkeypatch.setattr(Encoded, "_wait", fail)
    with pytest.raises(kind, match=message) as raised:
        encode_chunks(settings, teacher, refs)
    told = [] if kind is UsageError else ["while the GPU encoded chunk image/v0/000000 or the one after it"]
    assert getattr(raised.value, "__notes__", []) == told


def test_want_of_memory_quarantines_no_image(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own is a RuntimeError."""
    settings, teacher, refs = planned

    def shown(self: ModelInput, image: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(ModelInput, "shown", shown)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        encode_chunks(settings, teacher, refs)


def test_the_teacher_gets_the_bytes_that_the_decoders_wrote(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    """One slot a batch, of bytes: a quarter of the floats to move, and nothing is stacked behind the decoders."""
    settings, teacher, refs = planned
    taken: list[int] = []
    seen: list[int] = []
    take, encode = Slots.take, LiveTeacher.encode_shown

    def taking(self: Slots, nbytes: int) -> Slot:
        slot = take(self, nbytes)
        taken.append(self.array(slot, (1,)).ctypes.data)
        return slot

    def encode_shown(self: LiveTeacher, shown: torch.Tensor) -> Encoded:
        assert (shown.dtype, shown.shape[1:], shown.is_contiguous()) == (torch.uint8, (32, 32, 3), True)
        seen.append(shown.data_ptr())
        return encode(self, shown)

    images = [ref for ref in refs if ref.tower == "image"]
    monkeypatch.setattr(LiveTeacher, "encode_shown", encode_shown)
    monkeypatch.setattr(Slots, "take", taking)
    encode_chunks(settings, teacher, images)
    assert seen == taken
    assert len(seen) == 12
    assert len(set(seen)) <= 7  # four requested ahead, one at the teacher, and those of the other view


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_a_batch_is_normalised_as_its_images_are(size: tuple[int, int]) -> None:
    """To the last bit, for every level of every channel, whatever lies beside it."""
    preprocess = Preprocess(size, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    rng = np.random.default_rng(0)
    shown = rng.integers(0, 256, (5, *size, 3)).astype(np.uint8)
    shown[0].reshape(-1, 3)[:256] = np.arange(256)[:, None]
    batch = preprocess.normalized_batch(torch.from_numpy(shown))
    assert (batch.dtype, batch.shape, batch.is_contiguous()) == (torch.float32, (5, 3, *size), True)
    for image, wanted in zip(shown, batch, strict=True):
        assert torch.equal(preprocess.normalized(image), wanted)
        assert torch.equal(preprocess.transform(Image.fromarray(image)), wanted)


@pytest.mark.parametrize(("waiting_bytes", "most"), [(0, 6), (4 * 8 * (16 * 2 + 4), 10)])
def test_the_teacher_goes_on_while_a_chunk_is_written(
    planned: Planned, monkeypatch: pytest.MonkeyPatch, waiting_bytes: int, most: int
) -> None:
    """With a store that hangs: chunks of so many bytes are encoded meanwhile, at least two, and no more."""
    monkeypatch.setattr(teacher_cache.pipeline.precompute.encode, "_BYTES_AHEAD", {"cpu": waiting_bytes})
    settings, teacher, refs = planned
    captions = [ref for ref in refs if ref.tower == "text"]
    passes, during = threading.Semaphore(0), []
    counts: Counter[str] = Counter()
    write, encode = EmbeddingWriter.write, LiveTeacher.encode_texts

    def encode_texts(self: LiveTeacher, tokens: torch.Tensor) -> Encoded:
        encoded = encode(self, tokens)
        counts["passes"] += 1
        passes.release()
        return encoded

    def hanging_write(self: EmbeddingWriter, ref: ChunkRef, *what: Any) -> Any:
        if not during:
            assert all(passes.acquire(timeout=60) for _ in range(most)), "the teacher waits for the first write"
            time.sleep(0.2)  # room for one pass too many
            during.append(counts["passes"])
        assert threading.current_thread() is not threading.main_thread()
        return write(self, ref, *what)

    monkeypatch.setattr(LiveTeacher, "encode_texts", encode_texts)
    monkeypatch.setattr(EmbeddingWriter, "write", hanging_write)
    encode_chunks(settings, teacher, captions)
    assert during == [most]  # the chunk that is written and those behind it, of two batches each
    assert counts["passes"] == 5 * 2 + 1


def test_each_file_of_a_table_is_opened_once_and_few_rows_are_held(
    planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the chunks are those of a cache with one file of each table."""
    settings, teacher, refs = planned
    encode_chunks(settings, teacher, refs)
    whole = EmbeddingWriter(settings.cache)
    monkeypatch.setattr(
        "teacher_cache.storage.format.tables._ROWS_PER_FILE", 3 * CHUNK
    )  # writing is some chunks behind preparing
    monkeypatch.setattr("teacher_cache.storage.format.tables.ROWS_PER_GROUP", 4)
    monkeypatch.setattr("teacher_cache.storage.format.table_rows.HELD_ROWS", 16)
    other = settings.model_copy(update={"cache": str(tmp_path / "other")})
    assert plan_precompute(other, teacher) == refs
    opened: Counter[str] = Counter()
    held: list[int] = []
    read = TableRows.read

    def opening(files: CacheFiles, key: str, wanted: StaticFile) -> Any:
        opened[key] += 1
        return open_static(files, key, wanted)

    def reading(self: TableRows, rows: range) -> Any:
        found = read(self, rows)
        held.append(self.held_rows)
        return found

    monkeypatch.setattr("teacher_cache.storage.format.table_rows.open_static", opening)
    monkeypatch.setattr(TableRows, "read", reading)
    encode_chunks(other, teacher, [ref for ref in refs if ref.view == 0])
    parts = EmbeddingWriter(other.cache)
    assert opened == {key: 1 for key in parts.manifest.files if key.startswith(("samples/", "captions/"))}
    assert len(opened) == 1 + 2
    assert max(held) <= 16 < IMAGES
    encode_chunks(other, teacher, [ref for ref in refs if ref.view == 1])
    keys = [key for ref in refs for key in (ref.commit_key, *ref.object_keys(parts.manifest.layout).values())]
    assert [parts.files.read(key) for key in keys] == [whole.files.read(key) for key in keys]


def test_a_chunk_that_another_process_commits_first_stays_the_others(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It rounds otherwise. No byte of it is replaced, and the slower process says what happened."""
    settings, teacher, refs = planned
    write, hints = EmbeddingWriter.write, list[str]()

    def beaten(self: EmbeddingWriter, ref: ChunkRef, arrays: Any, *rest: Any) -> Any:
        if ref.tower == "text":
            other = arrays | {"norm": np.nextafter(arrays["norm"], np.float32(np.inf))}
            write(EmbeddingWriter(settings.cache), ref, other, *rest)
            before = self.files.read(ref.object_keys()["norm"]), self.files.read(ref.commit_key)
        commit = write(self, ref, arrays, *rest)
        if ref.tower == "text":
            assert (self.files.read(ref.object_keys()["norm"]), commit.to_bytes()) == before
        return commit

    monkeypatch.setattr(EmbeddingWriter, "write", beaten)
    images = sum(ref.tower == "image" for ref in refs)
    with hints_heard_by(hints.append):
        assert encode_shared(settings, teacher, refs) == images
    assert len(hints) == 1
    assert f"warning: {len(refs) - images} of {len(refs)} chunks that this process encoded were committed" in hints[0]
    assert EmbeddingWriter(settings.cache).pending() == []


def test_stopped_between_the_views_of_a_stretch_it_resumes_to_the_same_bytes(
    planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """View 0 is committed, view 1 is not: the next run reads the images again for view 1 alone."""
    settings, teacher, refs = planned
    encode_chunks(settings, teacher, refs)
    other = settings.model_copy(update={"cache": str(tmp_path / "stopped")})
    plan_precompute(other, teacher)
    write, passes = EmbeddingWriter.write, []

    def stop(self: EmbeddingWriter, ref: ChunkRef, *rest: Any) -> Any:
        if ref == ChunkRef("image", 1, 0):
            raise OSError("no space left")
        return write(self, ref, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingWriter, "write", stop)
        with pytest.raises(OSError, match="no space left"):
            encode_shared(other, teacher, refs)
    pending = EmbeddingWriter(other.cache).pending()
    assert ChunkRef("image", 0, 0) not in pending
    assert ChunkRef("image", 1, 0) in pending
    model: Any = teacher.model
    model.visual.register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    assert encode_shared(other, teacher, pending) == len(pending)
    assert sum(passes) == sum(8 if ref.chunk < 2 else 5 for ref in pending if ref.tower == "image")
    for cache in (settings.cache, other.cache):
        EmbeddingWriter(cache).seal()
    assert cache_digest(other.cache) == cache_digest(settings.cache)


def test_a_second_try_takes_up_what_the_first_left_claimed_on_a_store_that_was_away(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is alive, so its claims are not of a dead one. What it committed is read once, and not encoded."""
    settings, teacher, refs = planned
    write, writes = EmbeddingWriter.write, Counter[ChunkRef]()

    def away(self: EmbeddingWriter, ref: ChunkRef, *what: Any) -> Any:
        writes[ref] += 1
        if writes.total() == 4:
            raise CacheUnreachableError("the store is away")
        return write(self, ref, *what)

    monkeypatch.setattr(EmbeddingWriter, "write", away)
    with pytest.raises(CacheUnreachableError):
        encode_shared(settings, teacher, refs)
    sound, looked = EmbeddingWriter.is_sound, Counter[ChunkRef]()

    def looking(self: EmbeddingWriter, ref: ChunkRef) -> bool:
        looked[ref] += 1
        return sound(self, ref)

    monkeypatch.setattr(EmbeddingWriter, "is_sound", looking)
    committed = EmbeddingWriter(settings.cache).committed(refs)
    assert encode_shared(settings, teacher, refs) == len(refs) - len(committed)
    assert {looked[ref] for ref in committed} == {1}
    assert EmbeddingWriter(settings.cache).seal().sealed


def test_a_teacher_is_probed_once(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compared with the cache before each call, but found out what it is only before the first."""
    settings, teacher, refs = planned
    passes: list[int] = []
    model: Any = teacher.model
    model.visual.register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    probe, probed = Preprocess._probe, []
    monkeypatch.setattr(Preprocess, "_probe", lambda self: probed.append(1) or probe(self))
    for ref in refs[:3]:
        encode_chunks(settings, teacher, [ref])
    assert passes == [4, 4, 4, 4, 4, 1]  # rows of chunks alone: the width was asked for when the cache was planned
    assert len(probed) == 1


def test_a_batch_is_launched_before_the_last_one_is_looked_at(
    planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, which has nothing to do while Python launches; two at most are under way, and no byte is another."""
    settings, teacher, refs = planned
    broken = next(Path(settings.dataset.removeprefix("flickr:")).glob("images/*3.jpg"))
    behind = settings.model_copy(update={"cache": str(tmp_path / "behind")})
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    settings = settings.model_copy(update={"cache": str(tmp_path / "at once")})
    for each in (settings, behind):
        plan_precompute(each, teacher)
    encode_chunks(settings, teacher, refs)

    events: list[tuple[str, int]] = []
    made: list[Encoded] = []
    embedding = Encoded.embedding.fget
    assert embedding is not None

    def init(self: Encoded, *values: Any) -> None:
        events.append(("launched", len(made)))
        made.append(self)
        plain(self, *values)

    def look(self: Encoded) -> Any:
        events.append(("looked at", made.index(self)))
        return embedding(self)

    plain = Encoded.__init__
    monkeypatch.setattr(Encoded, "__init__", init)
    monkeypatch.setattr(Encoded, "embedding", property(look))
    monkeypatch.setattr(teacher_cache.pipeline.precompute.encode, "_BATCHES_BEHIND", {"cpu": 1})
    encode_chunks(behind, teacher, refs)
    batches = len(made)
    assert batches == 12 + 11
    wanted = [("launched", 0)]
    for number in range(1, batches):
        wanted += [("launched", number), ("looked at", number - 1)]
    assert events == [*wanted, ("looked at", batches - 1)]
    for cache in (settings.cache, behind.cache):
        EmbeddingWriter(cache).seal()
    assert len(EmbeddingReader(behind.cache).quarantined) == 1
    assert cache_digest(behind.cache) == cache_digest(settings.cache)
