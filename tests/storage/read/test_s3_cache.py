"""A whole cache on an object store: the same objects as in a folder, and the same proof of every byte."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheCorruptError
from teacher_cache.storage.files import remote as remote_files
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.files.remote import RetryPolicy
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import finish_known_cache, known_row, make_known_cache
from tests.fault_proxy import Fault, FaultProxy
from tests.storage.read.test_stream import fill_known_cache
from tests.storage.write.test_workers import EXPECTED, Rows

pytestmark = pytest.mark.service


def contents(files: CacheFiles) -> dict[str, bytes]:
    """Every object but the journal's."""
    return {key: files.read(key) for key in files.list() if not key.startswith("journal/")}


@pytest.fixture
def s3_cache(s3_location: str) -> str:
    make_known_cache(s3_location)
    return s3_location


def test_a_cache_on_s3_equals_the_one_in_a_folder(s3_cache: str, known_cache: Path) -> None:
    """Object for object: keys and bytes."""
    here, there = contents(open_files(known_cache)), contents(open_files(s3_cache))
    assert list(there) == list(here)
    assert there == here
    report, local = verify_cache(s3_cache), verify_cache(str(known_cache))
    assert report.ok, report.findings
    assert report == local.model_copy(update={"location": s3_cache})


def test_a_compressed_cache_on_s3_gives_its_rows(s3_location: str) -> None:
    reader = EmbeddingReader(fill_known_cache(s3_location, 512, compressor="blosc"))
    rows = np.random.default_rng(0).permutation(reader.image_rows())
    streamed = np.concatenate(list(reader.stream("image", np.array_split(rows, 20))))
    np.testing.assert_array_equal(streamed, [known_row("image", row) for row in rows])
    assert verify_cache(s3_location).ok


def test_a_bad_network_changes_nothing(proxy: FaultProxy, known_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request in five fails, in one way or another, while the cache is made, verified and read."""
    patient = RetryPolicy(tries=8, first_pause_seconds=0.001, longest_pause_seconds=0.002)
    monkeypatch.setattr(remote_files, "RETRY", patient)
    kinds = [Fault("refuse"), Fault("drop"), Fault("lose"), Fault("cut"), Fault("truncate")]
    proxy.seeded(3, 0.2, kinds, most_in_a_row=3)
    location = f"s3://caches/{uuid.uuid4()}/known.cache"
    make_known_cache(location)
    assert contents(open_files(location)) == contents(open_files(known_cache))
    assert verify_cache(location).ok
    assert np.array_equal(EmbeddingReader(location).take("image", [7]), [known_row("image", 7)])
    assert {fault.kind for _, fault in proxy.injected} == {fault.kind for fault in kinds}


def test_zarr_reads_the_same_rows(s3_cache: str) -> None:
    """By its own store, which knows nothing of commits."""
    import zarr
    from obstore.store import S3Store
    from zarr.storage import ObjectStore as ZarrStore

    bucket, _, root = f"{s3_cache}/targets.zarr".removeprefix("s3://").partition("/")
    options = {"allow_http": True}
    store = ZarrStore(S3Store(bucket, prefix=root, client_options=options), read_only=True)
    group = zarr.open_group(store, mode="r")
    images, texts = group["image/embedding"], group["text/embedding"]
    assert isinstance(images, zarr.Array)
    assert isinstance(texts, zarr.Array)
    assert np.array_equal(images[:, 0], [known_row("image", row) for row in range(10)])
    assert np.array_equal(texts[:], [known_row("text", row) for row in range(25)])
    store.close()


@pytest.mark.timeout(180)  # a deadlock ends as a failure
@pytest.mark.usefixtures("own_fork_server")
@pytest.mark.parametrize("object_store", ["seaweedfs"], indirect=True)
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_workers_of_a_data_loader_get_the_same_rows(s3_cache: str, method: str) -> None:
    """Over a reader that is open already, and whose connection the parent has used."""
    import torch
    from torch.utils.data import DataLoader

    reader = EmbeddingReader(s3_cache)
    reader.take("image", np.arange(10))
    reader.take("text", np.arange(5))
    loader = DataLoader(Rows(reader), batch_size=4, num_workers=2, multiprocessing_context=method)
    np.testing.assert_array_equal(torch.cat(list(loader)).numpy(), EXPECTED.astype(np.float32))


def flip(files: CacheFiles, key: str, other: str) -> None:
    data = bytearray(files.read(key))
    data[len(data) // 2] ^= 1
    files.write(key, bytes(data))


def truncate(files: CacheFiles, key: str, other: str) -> None:
    files.write(key, files.read(key)[:-1])


def remove(files: CacheFiles, key: str, other: str) -> None:
    files.delete(key)


def swap(files: CacheFiles, key: str, other: str) -> None:
    mine, theirs = files.read(key), files.read(other)
    files.write(key, theirs)
    files.write(other, mine)


@pytest.mark.parametrize("damage", [flip, truncate, remove, swap])
def test_damage_is_found_and_refused(s3_cache: str, damage: Callable[[CacheFiles, str, str], None]) -> None:
    files = open_files(s3_cache)
    key, other = "targets.zarr/image/embedding/c/1/0/0", "targets.zarr/image/embedding/c/2/0/0"
    damage(files, key, other)
    report = verify_cache(s3_cache)
    assert not report.ok
    assert {finding.key for finding in report.findings} == ({key, other} if damage is swap else {key})
    reader = EmbeddingReader(s3_cache)
    assert np.array_equal(reader.take("image", [0]), [known_row("image", 0)])  # another chunk is sound
    with pytest.raises(CacheCorruptError, match=r"image/embedding/c/1/0/0"):
        reader.take("image", [4])
    # the same command repairs it
    finish_known_cache(s3_cache)
    assert verify_cache(s3_cache).ok


@pytest.mark.parametrize("damage", [flip, truncate, remove])
@pytest.mark.parametrize("key", ["commits/text/000001.json", "samples/000000.parquet", "targets.zarr/zarr.json"])
def test_damage_beside_the_chunks_is_found(
    s3_cache: str, key: str, damage: Callable[[CacheFiles, str, str], None]
) -> None:
    damage(open_files(s3_cache), key, key)
    report = verify_cache(s3_cache)
    assert not report.ok
    assert key in {finding.key for finding in report.findings}
