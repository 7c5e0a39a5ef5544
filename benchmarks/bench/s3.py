"""A cache on an object store (SeaweedFS on loopback): streaming against plain GETs of the same objects.

As it is, and with 50 ms added to each request by a proxy (``tests/fault_proxy.py``), where what counts is how many
requests wait together. Plain GETs are obstore's and botocore's, with as many at once as the stream has; the faster of
them is what we are compared with.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench.big_cache import big_cache
from benchmarks.bench.harness import Row, Settings, interleave, speed
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.stream import READ_AHEAD_BYTES, loads_at_once
from tests.fault_proxy import start_distant_process
from tests.object_store import ObjectStore, start_seaweedfs

_BATCH = 1024
_LATENCY_SECONDS = 0.05


def measure(settings: Settings) -> list[Row]:
    """Streaming at both distances, and the time until the first row, against the requests that it cannot do without."""
    rows, chunk_rows = (16_384, 1024) if settings.quick else (1_048_576, 4096)
    with start_seaweedfs(Path(settings.scratch) / "seaweedfs") as store:
        with _environment(store):
            location = big_cache(f"s3://{store.bucket}", rows, chunk_rows=chunk_rows, captions=chunk_rows)
        near = _streaming(store, location, settings.rounds, "loopback")
        with start_distant_process(store, _LATENCY_SECONDS) as far:
            return [
                *near,
                *_streaming(far, location, settings.rounds, "50 ms a request"),
                _first_row(far, location, settings.rounds),
            ]


def _streaming(store: ObjectStore, location: str, rounds: int, where: str) -> list[Row]:
    with _environment(store):
        reader = _reader(location)
        layout = reader.manifest.layout
        refs = [ChunkRef("image", 0, chunk) for chunk in range(layout.chunks("image"))]
        nbytes = sum(reader.chunks.digest(ref, "embedding").nbytes for ref in refs)
        chunk_bytes = nbytes // len(refs)
        in_memory = layout.image_chunk_rows * layout.embed_dim * 2  # without the checksum behind it
        at_once = loads_at_once(reader.files, READ_AHEAD_BYTES // in_memory)
        batches = np.split(np.arange(layout.image_rows), range(_BATCH, layout.image_rows, _BATCH))

        def stream() -> None:
            # a small memory: chunks are fetched in each round
            for batch in _reader(location, reader).stream("image", batches):
                assert len(batch)

        def all_by(get: Callable[[str], Any]) -> Callable[[], None]:
            keys = [ref.object_keys()["embedding"] for ref in refs]

            def run() -> None:
                with ThreadPoolExecutor(at_once) as pool:
                    for data in pool.map(get, keys):
                        assert len(data)

            return run

        peers = {name: all_by(get) for name, get in _getters(store, location, at_once).items()}
        seconds = interleave({"ours": stream, **peers}, rounds)
    fastest = min(peers, key=lambda name: statistics.median(seconds[name]))
    megabytes = nbytes / 1e6
    note = (
        f"{len(refs)} objects of {chunk_bytes / 2**20:.1f} MiB, {at_once} at once. Ours proves each and gathers "
        "its rows, theirs throws the bytes away; on loopback the server wants the same cores"
    )
    return [
        speed(
            f"stream, {where}",
            f"GET by {name}",
            seconds["ours"],
            seconds[name],
            megabytes,
            "MB/s",
            wanted=0.8 if name == fastest else None,
            note=note,
        )
        for name in peers
    ]


def _first_row(store: ObjectStore, location: str, rounds: int) -> Row:
    """Opening and one row: manifest, commits, chunk; three round trips, if no commit waited for another."""
    with _environment(store):

        def first() -> None:
            EmbeddingReader(location).take("image", np.array([0]))

        seconds = interleave({"ours": first}, rounds)["ours"]
        commits = EmbeddingReader(location).manifest.layout.num_chunks
    trips = [second / _LATENCY_SECONDS for second in seconds]
    waves = 2 + -(-commits // 32)
    return Row(
        "open and first row, 50 ms a request",
        f"{waves} round trips: manifest, {commits} commits 32 at once, chunk",
        statistics.median(trips),
        float(waves),
        "round trips",
        statistics.median(trips) / waves,
        min(trips) / waves,
        max(trips) / waves,
        wanted=2.0,
        at_most=True,
        note=f"one after the other it would be {commits + 2} round trips. Connecting and the records' parsing are in "
        "it, and weigh more where cores are busy",
    )


def _reader(location: str, like: EmbeddingReader | None = None) -> EmbeddingReader:
    # the bytes of the chunks are compared, not those of the records
    commits = None if like is None else like.chunks.commits
    return EmbeddingReader(location, memory_bytes=READ_AHEAD_BYTES, commits=commits)


def _getters(store: ObjectStore, location: str, at_once: int) -> Mapping[str, Callable[[str], Any]]:
    import boto3
    import obstore
    from botocore.config import Config

    client = boto3.client("s3", endpoint_url=store.endpoint, config=Config(max_pool_connections=at_once))
    prefix = location.removeprefix(f"s3://{store.bucket}/")
    objects = obstore.store.S3Store(
        store.bucket,
        prefix=prefix,
        endpoint=store.endpoint,
        access_key_id="testing",
        secret_access_key="testing-secret",
        region="us-east-1",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )
    return {
        "botocore": lambda key: client.get_object(Bucket=store.bucket, Key=f"{prefix}/{key}")["Body"].read(),
        "obstore": lambda key: objects.get(key).bytes(),
    }


@contextmanager
def _environment(store: ObjectStore) -> Iterator[None]:
    """The environment names the store; as before afterwards."""
    before = {name: os.environ.get(name) for name in store.environment}
    os.environ.update(store.environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
