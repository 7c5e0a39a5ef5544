"""What a precompute over many machines costs: measured per chunk here.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/scale.py measure --out /tmp/scale

``measure`` counts every request of a small run against SeaweedFS, weighs real chunks of 4,096 rows, times tables,
listings and seals of growing caches. All on loopback. ``reckon`` prints what follows for a billion pairs.
``benchmarks/scale.md`` says what came out and what follows.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.bench.material import photographs
from benchmarks.bench.reckon import table
from teacher_cache.pipeline.data.datasets.samples import load_samples
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec
from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.pipeline.precompute.encode import encode_shared
from teacher_cache.pipeline.precompute.plan import PlanSettings, plan_precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.commits import ChunkRef, all_chunks
from teacher_cache.storage.format.journal import ChunkCost, note_key
from teacher_cache.storage.format.layout import Layout
from teacher_cache.storage.format.manifest import Source
from teacher_cache.storage.format.tables import CAPTIONS, PROBLEMS, SAMPLES, captions_sha256, samples_sha256
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.shuffle import batches, window_order
from teacher_cache.storage.write.plan import plan_cache
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import make_identity, make_model_folder, plan_known_cache, write_photos
from tests.fault_proxy import FaultProxy, start_fault_proxy
from tests.object_store import start_seaweedfs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    measure = steps.add_parser("measure")
    measure.add_argument("--out", type=Path, required=True)
    measure.add_argument("--only", nargs="*", choices=sorted(MEASURED), default=sorted(MEASURED))
    steps.add_parser("tables").add_argument("rows", type=int)
    steps.add_parser("reckon")
    steps.add_parser("stream").add_argument("location")
    given = parser.parse_args()
    if given.step == "reckon":
        print(*table(), sep="\n")
        return
    if given.step == "stream":
        stream_epochs(given.location)
        return
    if given.step == "tables":
        measure_tables(given.rows)
    else:
        given.out.mkdir(parents=True, exist_ok=True)
        for name in given.only:
            print(f"\n## {name}", flush=True)
            MEASURED[name](given.out)


@contextmanager
def seconds(what: str, count: int = 1) -> Iterator[None]:
    began, cpu = time.perf_counter(), time.process_time()
    yield
    wall, spent = time.perf_counter() - began, time.process_time() - cpu
    each = f", {1000 * wall / count:.3f} ms each ({1000 * spent / count:.3f} of processor)" if count > 1 else ""
    print(f"{what}: {wall:.2f} s, {spent:.2f} s of processor{each}", flush=True)


# ---------------------------------------------------------------- requests


def measure_requests(out: Path) -> None:
    """Requests by what was done, of a run whose worker is in this process."""
    teacher = make_model_folder(out / "teacher") if not (out / "teacher").exists() else out / "teacher"
    photos = out / "photos" if (out / "photos").exists() else write_photos(out / "photos", 64)
    with start_seaweedfs(out / f"weed-{time.time_ns()}") as store, start_fault_proxy(store) as proxy:
        os.environ.update(proxy.front().environment)
        config = PrecomputeConfig(
            dataset=f"flickr:{photos}",
            teacher=f"local-dir:{teacher}",
            cache=store.location(f"requests-{time.time_ns()}"),
            device="cpu",
            chunk_rows=4,
        )
        live = load_teacher(config.teacher, device="cpu")
        pending = count(proxy, "plan a cache of 48 chunks", lambda: plan_precompute(config, live))

        def encode(refs: Sequence[ChunkRef]) -> int:
            return encode_shared(config, live, refs)

        for tower in ("image", "text"):
            mine = [ref for ref in pending if ref.tower == tower]
            count(proxy, f"a span of 8 {tower} chunks", lambda mine=mine: encode(mine[:8]))
            count(proxy, f"a span of 1 {tower} chunk", lambda mine=mine: encode(mine[8:9]))
        done = count(proxy, "plan again, 18 chunks done", lambda: plan_precompute(config, live))
        for first in range(0, len(done), 8):
            encode(done[first : first + 8])
        proxy.requests.clear()
        count(proxy, "seal 48 chunks", lambda: EmbeddingWriter(config.cache).seal())
        count(proxy, "verify 48 chunks", lambda: verify_cache(config.cache))


def count(proxy: FaultProxy, what: str, call: Callable[[], Any]) -> Any:
    proxy.requests.clear()
    made = call()
    kinds: Counter[str] = Counter()
    for request in proxy.requests:
        key = request.key.partition("/")[2]
        kinds[f"{request.method} {key.partition('/')[0] if key else 'LIST'}"] += 1
    by_method = Counter(kind.partition(" ")[0] for kind in kinds.elements())
    print(f"{what}: {dict(sorted(by_method.items()))} = {dict(sorted(kinds.items()))}", flush=True)
    return made


# ---------------------------------------------------------------- bytes and local seconds of a chunk of 4,096 rows


def tables(images: int) -> dict[str, pa.Table]:
    """One caption an image, names as a web crawl has them: 40 characters in a tar."""
    rng = np.random.default_rng(0)
    digests = [f"{a:016x}{b:016x}{c:016x}{d:016x}" for a, b, c, d in rng.integers(0, 2**63, (images, 4)).tolist()]
    return {
        SAMPLES: pa.table(
            {
                "row": np.arange(images),
                "sample_id": [f"{number // 10_000:05d}/{number:012d}" for number in range(images)],
                "uri": [f"shards/{number // 10_000:08d}.tar" for number in range(images)],
                "offset": np.arange(images) * 51_200,
                "length": rng.integers(20_000, 80_000, images),
                "content_sha256": digests,
                "split": ["train"] * images,
            }
        ),
        CAPTIONS: pa.table(
            {
                "row": np.arange(images),
                "image_row": np.arange(images),
                "text": [f"picture {digest[:40]} of a kind, as somebody wrote" for digest in digests],
            }
        ),
        PROBLEMS: pa.table(
            {
                "kind": pa.array([], pa.string()),
                "where": pa.array([], pa.string()),
                "detail": pa.array([], pa.string()),
                "lost_image": pa.array([], pa.bool_()),
            }
        ),
    }


def plan_web_cache(cache: str, images: int, made: dict[str, pa.Table]) -> None:
    identity = make_identity(images, images)
    dataset = identity.dataset.model_copy(
        update={"samples_sha256": samples_sha256(made[SAMPLES]), "captions_sha256": captions_sha256(made[CAPTIONS])}
    )
    teacher = identity.teacher.model_copy(update={"embed_dim": 512})
    identity = identity.model_copy(update={"dataset": dataset, "teacher": teacher})
    layout = Layout(
        embed_dim=512,
        image_rows=images,
        text_rows=images,
        image_chunk_rows=4096,
        text_chunk_rows=4096,
        batch_rows=256,
    )
    plan_cache(cache, identity, layout, Source(dataset="webdataset:/d", image_root="/d"), made, {"torch": "0"})


def unit_rows(ref: ChunkRef, layout: Layout) -> dict[str, Any]:
    rows = len(ref.rows(layout))
    values = np.random.default_rng(ref.chunk).standard_normal((rows, layout.embed_dim), np.float32)
    norm = np.linalg.norm(values, axis=1)
    arrays = {"embedding": (values / norm[:, None]).astype(np.float16), "norm": norm.astype(np.float32)}
    if ref.tower == "image":
        arrays["view"] = np.tile(np.array([0, 0, 224, 224, 0], np.float32), (rows, 1))
    return arrays


def measure_chunks(out: Path) -> None:
    cache = str(out / f"chunks-{time.time_ns()}")
    plan_web_cache(cache, 4096 * 16, tables(4096 * 16))
    writer = EmbeddingWriter(cache)
    layout = writer.manifest.layout
    cost = ChunkCost(rows=4096, seconds=1.0, device="cuda:0")
    refs = all_chunks(layout)
    rows = {ref: unit_rows(ref, layout) for ref in refs}
    writer.write(refs[0], rows[refs[0]], (), cost)  # opens the tables
    writer.replaces.add(refs[0])  # it is timed too
    with seconds("write and commit a chunk of 4,096 x 512", len(refs)):
        for ref in refs:
            writer.write(ref, rows[ref], (), cost)
    for ref in (refs[0], refs[-1]):
        sizes = {name: writer.files.stat(key).nbytes for name, key in ref.object_keys().items()}
        commit, note = (writer.files.stat(key).nbytes for key in (ref.commit_key, note_key(ref.name)))
        total = sum(sizes.values()) + commit + note
        print(f"{ref.tower}: objects {sizes}, commit {commit}, note {note}; {total} bytes in {len(sizes) + 2} objects")
    with seconds("pending: every chunk proven", len(refs)):
        assert not writer.pending()
    with seconds("seal", len(refs)):
        writer.seal()
    with seconds("verify", len(refs)):
        assert verify_cache(cache).ok


def measure_files(out: Path) -> None:
    photos = out / "many" if (out / "many").exists() else write_photos(out / "many", 2000)
    spec = DatasetSpec.parse(f"flickr:{photos}")
    load_samples(spec)  # into the page cache
    with seconds("plan: read and digest an image's file", 2000):
        load_samples(spec)


def measure_second_plan(out: Path) -> None:
    """Planning by a process that meets an unfinished cache: by turns with all files digested, and as it is."""
    photos = out / "photographs"
    if not photos.exists():
        photographs(Path(__file__).resolve().parents[2] / "shared" / "flickr8k", photos, 2000)
    teacher = make_model_folder(out / "teacher") if not (out / "teacher").exists() else out / "teacher"
    cache = out / f"planned-{time.time_ns()}"
    config = PrecomputeConfig(
        dataset=f"flickr:{photos}", teacher=f"local-dir:{teacher}", cache=str(cache), device="cpu"
    )
    live = load_teacher(config.teacher, device="cpu")
    plan_precompute(config, live)
    spent: dict[str, list[float]] = {"all files digested": [], "as it is": []}
    for _ in range(7):
        for name, seconds_of in spent.items():
            with pytest.MonkeyPatch.context() as patch:
                if name == "all files digested":
                    patch.setattr(PlanSettings, "goes_on", False)
                began = time.perf_counter()
                plan_precompute(config, live)
                seconds_of.append(time.perf_counter() - began)
    for name, seconds_of in spent.items():
        print(f"{name}: {[round(one, 3) for one in sorted(seconds_of)]} s")
    ratios = sorted(new / old for old, new in zip(*spent.values(), strict=True))
    print(f"ratio: {ratios[3]:.3f} ({ratios[0]:.3f} - {ratios[-1]:.3f})")


# ---------------------------------------------------------------- tables by rows


def measure_tables(rows: int) -> None:
    """In a process of its own, whose memory is its alone."""

    def memory() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    folder = Path(os.environ["SCALE_OUT"]) / f"tables-{rows}"
    if not folder.exists():
        with seconds(f"{rows:,} images: make, digest and write tables", rows):
            plan_web_cache(str(folder), rows, tables(rows))
        sizes = {name: sum(p.stat().st_size for p in (folder / name).iterdir()) for name in ("samples", "captions")}
        parquet = sum(sizes.values()) / rows
        print(f"{rows:,} images: {sizes} bytes of parquet, {parquet:.0f} an image; peak {memory():.0f} MiB")
        return
    before = memory()
    writer = EmbeddingWriter(str(folder))
    layout = writer.manifest.layout
    with seconds(f"{rows:,} images: a worker reads and proves both tables, chunk by chunk", rows):
        for ref in all_chunks(layout):
            writer.table(ref.tower).read(ref.rows(layout))
    held = writer.samples.held_rows + writer.captions.held_rows
    print(f"{rows:,} images: {held:,} rows held, peak {memory() - before:.0f} MiB above {before:.0f}")


# ---------------------------------------------------------------- a million rows in one cache and in a hundred

PARTS, PART_ROWS = 100, 10_000


def measure_parts(out: Path) -> None:
    """Streams the images of both by turns, each time in a process of its own, in a run's order of rows."""
    made = tables(PARTS * PART_ROWS)
    whole, parts = out / "whole.cache", out / "parts"
    places = [(whole, 0, PARTS * PART_ROWS)]
    places += [(parts / f"{part}.cache", part * PART_ROWS, PART_ROWS) for part in range(PARTS)]
    for place, first, rows in places:
        if not place.exists():
            write_part(str(place), {name: table.slice(first, rows) for name, table in made.items()}, rows)
    took: dict[str, list[list[float]]] = {}
    for _ in range(5):
        for name, location in (("one", str(whole)), ("hundred", f"{parts}/*.cache")):
            run = subprocess.run([sys.executable, __file__, "stream", location], capture_output=True, check=True)
            took.setdefault(name, []).append([float(number) for number in run.stdout.split()])
    names = ("open, s", "first epoch, s", "second epoch, s", "memory, MiB")
    for name, one, hundred in zip(names, *(np.array(took[key]).T for key in ("one", "hundred")), strict=True):
        ratio = hundred / one
        print(f"{name}: one {np.median(one):.2f}, hundred {np.median(hundred):.2f}", end="; ")
        print(f"ratio {np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})")


def write_part(place: str, made: dict[str, pa.Table], rows: int) -> None:
    numbered = {SAMPLES: ["row"], CAPTIONS: ["row", "image_row"]}
    for name, columns in numbered.items():
        for column in columns:
            made[name] = made[name].set_column(made[name].column_names.index(column), column, pa.array(range(rows)))
    plan_web_cache(place, rows, made)
    writer = EmbeddingWriter(place)
    for ref in writer.pending():
        writer.write(ref, unit_rows(ref, writer.manifest.layout))
    writer.seal()


def stream_epochs(location: str) -> None:
    """Prints processor seconds to open and of two epochs, and MiB of memory without mapped files."""
    began = time.process_time()
    reader = EmbeddingReader(location)
    rows, _ = reader.row_set(), reader.caption_index
    took = [time.process_time() - began]
    for epoch in range(2):
        began = time.process_time()
        for values in reader.stream("image", batches(window_order(rows, 4096, 16, 0, epoch), 1024)):
            assert len(values) == 1024
        took.append(time.process_time() - began)
    own = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    print(*took, int(own.split()[1]) / 2**10)


def measure_growth(out: Path) -> None:
    environment = {**os.environ, "SCALE_OUT": str(out)}
    for rows in (100_000, 1_000_000):
        for _ in ("write", "read"):
            subprocess.run([sys.executable, __file__, "tables", str(rows)], env=environment, check=True)


# ---------------------------------------------------------------- listings, claims and seals by commits


def measure_store(out: Path) -> None:
    """Latencies of loopback: of a far store they are 10 to 100 times as long, the number of requests is the same."""
    with start_seaweedfs(out / f"weed-{time.time_ns()}") as store, start_fault_proxy(store) as proxy:
        os.environ.update(proxy.front().environment)
        for chunks in (200,):
            cache = store.location(f"growth-{chunks}-{time.time_ns()}")
            plan_known_cache(cache, images=chunks * 4 // 2, captions=chunks * 4 // 2, chunk_rows=4)
            writer = EmbeddingWriter(cache)
            from tests.conftest import known_arrays

            refs = all_chunks(writer.manifest.layout)
            with seconds(f"{chunks} chunks: write and commit", chunks):
                for ref in refs:
                    writer.write(ref, known_arrays(writer, ref), (), ChunkCost(rows=4, seconds=1.0))
            proxy.requests.clear()
            with seconds(f"{chunks} chunks: list commits"):
                open_files(cache).list("commits")
            print(f"  {len(proxy.requests)} requests")
            proxy.requests.clear()
            with seconds(f"{chunks} chunks: seal", chunks):
                writer.seal()
            print(f"  {len(proxy.requests)} requests: {dict(Counter(request.method for request in proxy.requests))}")
            proxy.requests.clear()
            with seconds(f"{chunks} chunks: pending", chunks):
                writer.pending()
            print(f"  {len(proxy.requests)} requests: {dict(Counter(request.method for request in proxy.requests))}")


MEASURED: dict[str, Callable[[Path], None]] = {
    "chunks": measure_chunks,
    "files": measure_files,
    "parts": measure_parts,
    "plan": measure_second_plan,
    "requests": measure_requests,
    "store": measure_store,
    "tables": measure_growth,
}

if __name__ == "__main__":
    main()
