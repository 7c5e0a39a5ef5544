"""Pictures on a distant object store: each is one request, and many wait side by side; for precompute and train.

Tars are listed in large requests, which read nothing twice."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pytest

from teacher_cache.pipeline.data.batches.cached_samples import sample_records
from teacher_cache.pipeline.data.batches.stored_images import StoredImages
from teacher_cache.pipeline.data.datasets.samples import ImageSource, list_samples
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.files import opened
from teacher_cache.storage.files.protocol import REQUESTS_AT_ONCE
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import cache_digest, write_photos
from tests.fault_proxy import FaultProxy
from tests.object_store import ObjectStore
from tests.pipeline.data.dataset_files import load, write_tar

pytestmark = pytest.mark.service

IMAGES = 48
CHUNK = 16
MANY = 8  # one after the other would be 1; how many of 32 it is, is up to the machine
CHUNKS = IMAGES // CHUNK * 2


@pytest.fixture
def table(tmp_path: Path, seaweedfs: ObjectStore) -> Path:
    """A local table of pictures that lie in the store."""
    photos = write_photos(tmp_path / "photos", IMAGES)
    folder, client, lines = f"{uuid.uuid4()}", seaweedfs.client(), ["image,caption"]
    for number, path in enumerate(sorted((photos / "images").iterdir())):
        client.put_object(Bucket=seaweedfs.bucket, Key=f"{folder}/{path.name}", Body=path.read_bytes())
        lines.append(f"s3://{seaweedfs.bucket}/{folder}/{path.name},picture {number}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "pairs.csv"


def test_pictures_are_digested_side_by_side(far: FaultProxy, table: Path) -> None:
    found = load(f"table:{table}")
    assert len(found.samples) == IMAGES
    assert not found.problems
    assert far.counts() == {("GET", ""): IMAGES}
    assert MANY < far.most_at_once <= REQUESTS_AT_ONCE


def test_precompute_fetches_each_picture_twice_and_waits_for_no_write(
    far: FaultProxy, table: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    """Once for its digest, once for the teacher; a chunk costs its objects, its commit, its note and its claim."""
    local, cache = tmp_path / "local.cache", f"s3://caches/{uuid.uuid4()}/far.cache"
    settings = {
        "dataset": f"table:{table}",
        "teacher": f"local-dir:{tiny_teacher}",
        "device": "cpu",
        "batch_size": 8,
        "chunk_rows": CHUNK,
        "decode_threads": 1,
    }
    precompute(PrecomputeConfig(cache=str(local), **settings))
    assert far.counts() == {("GET", ""): 2 * IMAGES}
    assert MANY < far.most_at_once <= REQUESTS_AT_ONCE
    far.forget()
    precompute(PrecomputeConfig(cache=cache, **settings))
    assert cache_digest(cache) == cache_digest(local)
    assert far.counts()["PUT", "targets.zarr"] == CHUNKS // 2 * (3 + 2) + 8  # and Zarr's metadata
    assert far.counts()["PUT", "commits"] == far.counts()["PUT", "journal"] == CHUNKS
    # which are done, asked for so few by a look each: for the plan, before the first claim, and after each claim
    assert far.counts()["HEAD", "commits"] == 3 * CHUNKS
    assert far.counts()["PUT", "claims"] <= CHUNKS + 3 * 3 + 2  # the plan's claims, proofs that a put is refused, beats


def test_a_tar_is_read_once_for_the_plan_and_its_pictures_once_for_the_teacher(
    far: FaultProxy, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan digests pictures as it passes them; the requests do not depend on how many there are."""
    photos = sorted((write_photos(tmp_path / "photos", IMAGES) / "images").iterdir())
    folder, tars, block = f"{uuid.uuid4()}", tmp_path / "tars", 16 << 10
    monkeypatch.setattr(opened, "_REQUEST_BYTES", block)
    for part in range(2):
        members = [
            member
            for path in photos[part::2]
            for member in ((path.name, path.read_bytes()), (f"{path.stem}.txt", f"picture {path.stem}"))
        ]
        tar = write_tar(tars / f"{part}.tar", members)
        far.store.client().put_object(Bucket=far.store.bucket, Key=f"{folder}/{tar.name}", Body=tar.read_bytes())
    sizes = [tar.stat().st_size for tar in sorted(tars.iterdir())]
    listed = len(sizes) + sum(-(-size // block) for size in sizes)
    assert len(list_samples(DatasetSpec.parse(f"webdataset:s3://{far.store.bucket}/{folder}/{{0..1}}.tar")).samples)
    assert (len(far.requests), far.bytes_sent) == (listed, sum(sizes))
    far.forget()
    caches = []
    for root in (f"s3://{far.store.bucket}/{folder}", tars):
        settings = {"dataset": f"webdataset:{root}/{{0..1}}.tar", "teacher": f"local-dir:{tiny_teacher}"}
        caches.append(str(tmp_path / f"{len(caches)}.cache"))
        precompute(PrecomputeConfig(cache=caches[-1], device="cpu", chunk_rows=CHUNK, **settings))
    # every request is of the first cache: the second one's tars lie here
    assert len(far.requests) == listed + IMAGES
    assert far.bytes_sent == sum(sizes) + sum(path.stat().st_size for path in photos)
    one, other = (EmbeddingReader(cache) for cache in caches)
    assert one.samples.column("content_sha256") == other.samples.column("content_sha256")
    assert (one.take("image", rows := np.arange(IMAGES)) == other.take("image", rows)).all()


def test_a_batch_of_pictures_comes_side_by_side(
    far: FaultProxy, table: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    cache = str(tmp_path / "c")
    precompute(
        PrecomputeConfig(dataset=f"table:{table}", teacher=f"local-dir:{tiny_teacher}", cache=cache, device="cpu")
    )
    reader = EmbeddingReader(cache)
    images = StoredImages(ImageSource(reader.manifest.source.image_root))
    records = sample_records(reader.samples)
    alone = [images.read(record) for record in records[:4]]
    far.forget()
    with images.ahead(records):
        together = [images.read(record) for record in records]
        again = images.read(records[0])
    assert together[:4] == alone
    assert again == alone[0]
    assert far.counts() == {("GET", ""): IMAGES + 1}
    assert MANY < far.most_at_once <= REQUESTS_AT_ONCE
    far.forget()
    with images.ahead(records), pytest.raises(KeyError):
        raise KeyError
    assert not images._ahead
