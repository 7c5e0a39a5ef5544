"""What a cache on a distant object store costs: how many requests, and how many of them wait side by side."""

from __future__ import annotations

import uuid

import numpy as np
import pytest

from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.files.location import in_parallel, open_files
from teacher_cache.storage.files.protocol import CHUNKS_AT_ONCE, REQUESTS_AT_ONCE
from teacher_cache.storage.files.remote import RemoteFiles
from teacher_cache.storage.format.commits import ChunkRef, committed_chunks
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import known_arrays, known_row, plan_known_cache
from tests.fault_proxy import FaultProxy

pytestmark = pytest.mark.service

IMAGES, CAPTIONS = 80, 80
MANY = 8  # one after the other would be 1; how many of 32 it is, is up to the machine
CHUNKS = IMAGES // 4 + CAPTIONS // 4


def planned() -> str:
    location = f"s3://caches/{uuid.uuid4()}/far.cache"
    plan_known_cache(location, IMAGES, CAPTIONS)
    return location


def fill(location: str, refs: list[ChunkRef]) -> EmbeddingWriter:
    writer = EmbeddingWriter(location)
    for _ in in_parallel(writer.files, lambda ref: writer.write(ref, known_arrays(writer, ref)), refs):
        pass
    return writer


def refs_of(location: str) -> list[ChunkRef]:
    return EmbeddingWriter(location).pending()


@pytest.fixture
def sealed(far: FaultProxy) -> str:
    location = planned()
    fill(location, refs_of(location)).seal()
    return location


def test_opening_is_one_request_and_the_commits_come_side_by_side(far: FaultProxy, sealed: str) -> None:
    far.forget()
    reader = EmbeddingReader(sealed)
    assert far.counts() == {("GET", "manifest.json"): 1}
    assert np.array_equal(reader.take("image", np.array([5])), [known_row("image", 5)])
    assert far.counts() == {("GET", "manifest.json"): 1, ("GET", "commits"): CHUNKS, ("GET", "targets.zarr"): 1}
    assert MANY < far.most_at_once <= REQUESTS_AT_ONCE


def test_a_chunk_is_one_request_and_several_come_side_by_side(far: FaultProxy, sealed: str) -> None:
    reader = EmbeddingReader(sealed)
    reader.take("text", np.array([0]))
    far.forget()
    rows = np.random.default_rng(0).permutation(IMAGES)
    assert np.array_equal(reader.take("image", rows), [known_row("image", row) for row in rows])
    assert far.counts() == {("GET", "targets.zarr"): IMAGES // 4}
    assert 4 <= far.most_at_once <= 8
    far.forget()
    reader.take("image", rows)
    assert not far.counts()


def test_a_chunk_is_written_by_as_few_requests_as_it_has_objects(far: FaultProxy) -> None:
    location = planned()
    ref = ChunkRef("image", 0, 3)
    writer = EmbeddingWriter(location)
    arrays = known_arrays(writer, ref)
    writer.samples.read(range(1))
    writer.files.create("claims/text-000000.0.json", b"{}")  # a claim is the first object that is created
    far.forget()
    writer.write(ref, arrays)
    assert far.counts() == {("PUT", "targets.zarr"): 3, ("PUT", "commits"): 1}
    assert all(request.conditional for request in far.requests)
    assert far.most_at_once == 3  # and not four: the commit comes when all of them are there


def test_looking_at_an_object_is_one_request(far: FaultProxy) -> None:
    location = planned()
    files = open_files(location)
    files.read("manifest.json")
    far.forget()
    assert not files.exists("commits/text/000001.json")
    assert files.exists("manifest.json")
    assert not files.exists("samples")  # a folder
    assert far.counts() == {("HEAD", "commits"): 1, ("HEAD", "manifest.json"): 1, ("HEAD", "samples"): 1}


def test_what_is_committed_is_one_listing(far: FaultProxy) -> None:
    location = planned()
    refs = refs_of(location)
    fill(location, refs[:10])
    files = open_files(location)
    far.forget()
    assert committed_chunks(files, refs) == set(refs[:10])
    assert far.counts() == {("GET", ""): 1}
    far.forget()
    assert EmbeddingWriter(location).pending() == refs[10:]
    # ten chunks of images are proven: their commits, their objects, and the table that they were made of
    assert far.counts() == {
        ("GET", "manifest.json"): 1,
        ("GET", ""): 1,
        ("GET", "commits"): 10,
        ("GET", "targets.zarr"): 30,
        ("GET", "samples"): 1,
    }
    assert 4 <= far.most_at_once <= 8


def test_verify_reads_no_object_more_often_than_it_must(far: FaultProxy, sealed: str) -> None:
    far.forget()
    assert verify_cache(sealed).ok
    assert far.counts()["GET", "targets.zarr"] == IMAGES // 4 * 3 + CAPTIONS // 4 * 2 + 8  # and Zarr's metadata
    assert far.counts()["GET", "commits"] == CHUNKS  # each once; the seal is proven from them
    assert far.counts()["HEAD", ""] == 0
    assert 4 <= far.most_at_once <= CHUNKS_AT_ONCE  # commits are read with their chunks


def test_a_chunk_of_which_an_object_is_not_written_is_not_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    location = f"memory://{uuid.uuid4()}/x.cache"
    plan_known_cache(location)
    writer = EmbeddingWriter(location)
    ref = ChunkRef("image", 0, 1)
    create = RemoteFiles.create

    def fail(self: RemoteFiles, key: str, data: bytes) -> bool:
        if "norm" in key:
            raise ConnectionError("lost")
        return create(self, key, data)

    monkeypatch.setattr(RemoteFiles, "create", fail)
    with pytest.raises(ConnectionError, match="lost"):
        writer.write(ref, known_arrays(writer, ref))
    assert not writer.is_committed(ref)


def test_results_come_in_order_and_an_error_in_its_turn() -> None:
    files = open_files("memory://order/x.cache")
    assert list(in_parallel(files, lambda number: number * 2, range(100))) == list(range(0, 200, 2))
    call = {number: number for number in range(40)}.__getitem__
    results = in_parallel(files, call, range(10_000))
    assert [next(results) for _ in range(40)] == list(range(40))
    with pytest.raises(KeyError, match="40"):
        next(results)
