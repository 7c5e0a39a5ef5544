"""Exact search: near-tied, collapsed and overflowing galleries; bounded memory; the GPU's part, played by a fake."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.pipeline.evaluate import faiss_search as nearest
from teacher_cache.pipeline.evaluate.faiss_search import nearest_parts, top_k


def naive_top_k(queries: np.ndarray, gallery: np.ndarray, k: int) -> np.ndarray:
    """All scores in float64, best first, equal ones by row."""
    scores = np.einsum("nd,md->nm", queries.astype(np.float64), gallery.astype(np.float64))
    rows = np.broadcast_to(np.arange(len(gallery)), scores.shape)
    return np.lexsort((rows, -scores), axis=1)[:, :k]


def unit(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    values = rng.standard_normal((rows, dim)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def collapsed(rng: np.random.Generator, rows: int, dim: int, noise: float) -> np.ndarray:
    """What a student gives that has learned nothing yet: nearly one direction for all."""
    values = unit(rng, 1, dim) + noise * rng.standard_normal((rows, dim)).astype(np.float32)
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    queries=st.integers(1, 30),
    gallery=st.integers(1, 150),
    dim=st.integers(1, 24),
    k=st.integers(1, 160),
    noise=st.sampled_from([1e-8, 1e-7, 1e-6, 1e-5, 1e-3]),
    work=st.sampled_from([1, 2000, 20_000, 1 << 20]),
)
def test_collapsed_embeddings_are_ordered_exactly(
    seed: int, queries: int, gallery: int, dim: int, k: int, noise: float, work: int
) -> None:
    """All scores within float32's error of each other, so that float64 must decide, however little is held at once."""
    rng = np.random.default_rng(seed)
    both = collapsed(rng, queries + gallery, dim, noise)
    asked, rows = both[:queries], both[queries:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "_WORK_BYTES", work)
        np.testing.assert_array_equal(top_k(asked, rows, k), naive_top_k(asked, rows, k))


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e18, 1e25])
def test_scores_beyond_the_range_of_float32_are_ordered_by_float64(scale: float) -> None:
    rng = np.random.default_rng(2)
    asked, rows = (scale * rng.standard_normal((size, 8)).astype(np.float32) for size in (20, 90))
    asked[0], rows[7] = 0, 0
    rows[40:] /= 1000
    np.testing.assert_array_equal(top_k(asked, rows, 30), naive_top_k(asked, rows, 30))


@pytest.mark.parametrize(("rows", "dim"), [(1003, 64), (203, 512)])
def test_equal_rows_come_in_order_where_blas_tells_them_apart(rows: int, dim: int) -> None:
    """At the edges of its blocks BLAS adds in another order: equal rows get other last bits even in float64."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        gallery = np.repeat(unit(rng, 1, dim), rows, axis=0)
        for queries in (1, 3):
            assert top_k(unit(rng, queries, dim), gallery, 1).tolist() == [[0]] * queries


def test_parts_are_the_whole_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    asked, rows = unit(rng, 50, 16), unit(rng, 70, 16)
    monkeypatch.setattr(nearest, "_QUERIES_AT_ONCE", 12)
    parts = list(nearest_parts(asked, rows, 5))
    assert [start for start, _ in parts] == [0, 12, 24, 36, 48]
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), naive_top_k(asked, rows, 5))


def test_a_collapsed_gallery_takes_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every query has to look at the whole gallery in float64: 200 MB of scores at once, were it not in parts."""
    rng = np.random.default_rng(4)
    asked, rows = collapsed(rng, 500, 16, 1e-7), collapsed(rng, 50_000, 16, 1e-7)
    monkeypatch.setattr(nearest, "_WORK_BYTES", 4 << 20)
    tracemalloc.start()
    try:
        ranked = top_k(asked, rows, 10)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 * (4 << 20)
    np.testing.assert_array_equal(ranked[::50], naive_top_k(asked[::50], rows, 10))


_PEAK = """
import re, sys
from pathlib import Path

import faiss
import numpy as np

from teacher_cache.pipeline.evaluate.recall import first_positive_ranks
from teacher_cache.pipeline.evaluate.faiss_search import nearest_parts

def kib(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

rng = np.random.default_rng(0)
images, captions, dim = 10_000, 50_000, 32
image = rng.standard_normal((images, dim), dtype=np.float32)
owner = np.arange(captions) % images
text = image[owner] + np.float32(0.9) * rng.standard_normal((captions, dim), dtype=np.float32)
for rows in (image, text):
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
before = kib("VmRSS")
ranks = first_positive_ranks(image, text, owner, 10)
# what it is for: nearly all are found, and not all at once
assert 0.5 < (ranks.t2i == 1).mean() < 1, (ranks.t2i == 1).mean()
counted = kib("VmHWM") - before
# searched for, as on a GPU, they are the same
found = np.concatenate([(rows == owner[start : start + len(rows), None]).argmax(axis=1) + 1
                        for start, rows in nearest_parts(text, image, 10)])
assert (found[ranks.t2i > 0] == ranks.t2i[ranks.t2i > 0]).all()
assert 1024 * counted < 200e6, counted
print(1024 * (kib("VmHWM") - before), 4 * images * captions)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_the_matrix_of_scores_is_never_held() -> None:
    """10,000 images x 50,000 captions are 2 GB of scores; a process of its own measures what both ways take.

    Its VmHWM, and not getrusage's ru_maxrss, which a process inherits from the one that started it.
    """
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    taken, matrix = map(int, done.stdout.split())
    assert taken < matrix / 16


class FakeGpu:
    """The names that faiss-gpu adds, on a CPU: what is asked of it, and how exact its scores are."""

    def __init__(self, gpus: int = 1, noise: float = 0.0, broken: str = "") -> None:
        self.gpus, self.noise, self.broken = gpus, noise, broken
        self.searches: list[tuple[int, int]] = []
        self.configs: list[Any] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        fake = self

        class Config:
            useFloat16 = True  # as faiss spells it

        class Index:
            def __init__(self, resources: object, dim: int, config: Config) -> None:
                fake.configs.append(config)
                self._cpu = faiss.IndexFlatIP(dim)

            def add(self, rows: np.ndarray) -> None:
                if fake.broken:
                    raise RuntimeError(fake.broken)
                self._cpu.add(rows)

            def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
                assert k <= 2048, "faiss-gpu refuses more"
                fake.searches.append((len(queries), k))
                if not fake.noise:
                    return self._cpu.search(queries, k)
                scores, rows = self._cpu.search(queries, self._cpu.ntotal)
                rng = np.random.default_rng(0)
                scores = scores + (fake.noise * rng.standard_normal(scores.shape)).astype(np.float32)
                order = np.argsort(-scores, axis=1)[:, :k]
                return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)

        patch.setattr(faiss, "get_num_gpus", lambda: self.gpus)
        patch.setattr(faiss, "StandardGpuResources", object, raising=False)
        patch.setattr(faiss, "GpuIndexFlatConfig", Config, raising=False)
        patch.setattr(faiss, "GpuIndexFlatIP", Index, raising=False)


def cpu_searches(patch: pytest.MonkeyPatch) -> list[int]:
    """The k of each search on the CPU from now on."""
    asked: list[int] = []
    knn: Callable[..., Any] = faiss.knn

    def counted(queries: np.ndarray, gallery: np.ndarray, k: int, **more: Any) -> Any:
        asked.append(k)
        return knn(queries, gallery, k, **more)

    patch.setattr(faiss, "knn", counted)
    return asked


def test_a_gpu_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    asked, rows = unit(rng, 40, 32), np.repeat(unit(rng, 100, 32), 3, axis=0)
    fake = FakeGpu()
    fake.install(monkeypatch)
    on_cpu = cpu_searches(monkeypatch)
    np.testing.assert_array_equal(top_k(asked, rows, 10), naive_top_k(asked, rows, 10))
    assert fake.searches == [(40, 42)]
    assert on_cpu == []
    assert [config.useFloat16 for config in fake.configs] == [False]


def test_more_candidates_than_a_gpu_takes_are_searched_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    asked, rows = unit(rng, 5, 8), unit(rng, 2500, 8)
    fake = FakeGpu()
    fake.install(monkeypatch)
    on_cpu = cpu_searches(monkeypatch)
    np.testing.assert_array_equal(top_k(asked, rows, 2100), naive_top_k(asked, rows, 2100))
    assert (fake.searches, on_cpu) == ([], [2132])


def test_a_build_for_gpus_without_one_uses_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGpu(gpus=0)
    fake.install(monkeypatch)
    rows = np.eye(4, dtype=np.float32)
    np.testing.assert_array_equal(top_k(rows, rows, 1)[:, 0], np.arange(4))
    assert (fake.searches, fake.configs) == ([], [])


@pytest.mark.parametrize("dim", [8, 64, 512, 2048])
def test_scores_in_tf32_are_noticed(monkeypatch: pytest.MonkeyPatch, dim: int) -> None:
    """Ten bits of mantissa leave errors that the bound of float32 does not cover: not believed, and said."""
    rng = np.random.default_rng(7)
    asked, rows = unit(rng, 60, dim), unit(rng, 300, dim)
    # each factor is rounded to 2^-11 of itself, and the errors of dim products of 1 / dim add up as a random walk
    fake = FakeGpu(noise=2**-11 * np.sqrt(2 / 3) / np.sqrt(dim))
    fake.install(monkeypatch)
    with pytest.warns(RuntimeWarning, match=r"scores are off by .*TF32.*Going on with the CPU, to the same result"):
        found = top_k(asked, rows, 10)
    np.testing.assert_array_equal(found, naive_top_k(asked, rows, 10))
    assert len(fake.searches) == 1


def test_honest_rounding_on_a_gpu_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another order of summation than the CPU's, here noise of one unit in the last place of a score."""
    rng = np.random.default_rng(8)
    asked, rows = unit(rng, 60, 128), unit(rng, 300, 128)
    fake = FakeGpu(noise=2.0**-25)
    fake.install(monkeypatch)
    np.testing.assert_array_equal(top_k(asked, rows, 10), naive_top_k(asked, rows, 10))
    assert len(fake.searches) == 1


def test_a_gpu_without_room_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGpu(broken="Error in alloc\nCUDA out of memory: 1.2 GB asked for")
    fake.install(monkeypatch)
    rows = np.eye(4, dtype=np.float32)
    with pytest.warns(RuntimeWarning, match="faiss-gpu: CUDA out of memory: 1.2 GB asked for. Going on with the CPU"):
        np.testing.assert_array_equal(top_k(rows, rows, 1)[:, 0], np.arange(4))
