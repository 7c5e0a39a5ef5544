"""Exact recall: equal to all scores in float64 whatever the ties; bounded memory; the GPU's part, played by a fake."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.pipeline.evaluate import faiss_search
from teacher_cache.pipeline.evaluate.faiss_search import find_engine
from teacher_cache.pipeline.evaluate.recall import (
    RetrievalRanks,
    chance_recall,
    first_positive_ranks,
    recall_of_ranks,
    retention,
    retrieval_recall,
)
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.look.nearest import unit_rows

Array = np.ndarray[Any, Any]


def random_unit(rng: np.random.Generator, rows: int, dim: int) -> Array:
    return unit_rows(rng.standard_normal((rows, dim)))


def naive_ranks(image: Array, text: Array, text_image: Array, depth: int | None = None) -> tuple[list[int], list[int]]:
    """From all scores in float64, query by query; 0 for no positive down to the depth."""
    scores = np.einsum("nd,md->nm", image.astype(np.float64), text.astype(np.float64))
    positive = text_image == np.arange(len(image))[:, None]

    def rank(row: Array, positive: Array) -> int:
        if not positive.any():
            return 0
        best = row[positive].max()
        first = np.flatnonzero(positive & (row == best))[0]
        rank = 1 + int((row > best).sum()) + int((row[:first] == best).sum())
        return rank if depth is None or rank <= depth else 0

    return list(map(rank, scores, positive)), list(map(rank, scores.T, positive.T))


def assert_exact(image: Array, text: Array, text_image: Array, depth: int | None = None) -> RetrievalRanks:
    ranks = first_positive_ranks(image, text, text_image, depth)
    assert (ranks.i2t.tolist(), ranks.t2i.tolist()) == naive_ranks(image, text, text_image, depth)
    assert ranks.i2t.dtype == ranks.t2i.dtype == np.int32
    return ranks


KINDS: dict[str, Callable[[np.random.Generator, int, int], Array]] = {
    # whole runs of exact ties
    "duplicates": lambda rng, rows, dim: random_unit(rng, 7, dim)[rng.integers(0, 7, rows)],
    # ties of vectors that differ
    "coarse": lambda rng, rows, dim: rng.integers(-1, 2, (rows, dim)).astype(np.float32) * np.float32(0.1),
    "random": random_unit,
    # within float32's rounding error of each other, and within float64's
    "collapsed": lambda rng, rows, dim: unit_rows(np.ones(dim) + 1e-6 * rng.standard_normal((rows, dim))),
    "nearly equal": lambda rng, rows, dim: unit_rows(np.ones(dim) + 1e-8 * rng.standard_normal((rows, dim))),
    "equal": lambda rng, rows, dim: unit_rows(np.full((rows, dim), 0.3)),
    "last bits": lambda rng, rows, dim: np.nextafter(
        np.float32(0.3), rng.choice(np.array([0, 1], np.float32), (rows, dim))
    ),
    "beyond float32": lambda rng, rows, dim: (1e25 * rng.standard_normal((rows, dim))).astype(np.float32),
    "below float32": lambda rng, rows, dim: (1e-30 * rng.standard_normal((rows, dim))).astype(np.float32),
}


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.tuples(st.sampled_from(sorted(KINDS)), st.sampled_from(sorted(KINDS))),
    sizes=st.tuples(st.integers(1, 25), st.integers(1, 70), st.integers(1, 24)),
    depth=st.one_of(st.none(), st.integers(1, 80)),
    spare=st.sampled_from([0, 1, 32]),
    at_once=st.sampled_from([3, 4096]),
    work=st.sampled_from([1, 2000, 64 << 20]),
)
def test_ranks_equal_those_of_all_scores_in_float64(
    seed: int,
    kinds: tuple[str, str],
    sizes: tuple[int, int, int],
    depth: int | None,
    spare: int,
    at_once: int,
    work: int,
) -> None:
    """Any number of captions per image or none, ties of all kinds, depths beyond the gallery, blocks of any size."""
    rng = np.random.default_rng(seed)
    images, captions, dim = sizes
    image, text = KINDS[kinds[0]](rng, images, dim), KINDS[kinds[1]](rng, captions, dim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faiss_search, "_SPARE", spare)
        patch.setattr(faiss_search, "_MOST_CANDIDATES", 20 + spare)
        patch.setattr(faiss_search, "_QUERIES_AT_ONCE", at_once)
        patch.setattr(faiss_search, "_WORK_BYTES", work)
        assert_exact(image, text, rng.integers(0, images, captions), depth)


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e18, 1e25])
def test_scores_beyond_the_range_of_float32_are_ordered_by_float64(scale: float) -> None:
    rng = np.random.default_rng(2)
    image, text = ((scale * rng.standard_normal((rows, 8))).astype(np.float32) for rows in (20, 90))
    image[0], text[7] = 0, 0
    text[40:] /= 1000
    ranks = assert_exact(image, text, rng.integers(0, 20, 90))
    assert 1 < np.median(ranks.t2i) < 20


def test_near_ties_below_float32_are_decided_by_float64() -> None:
    """Rows that differ in the last bit of one value: float32 ranks some of them wrongly, and that shows."""
    rng = np.random.default_rng(3)
    text = np.repeat(random_unit(rng, 6, 512), 40, axis=0)
    for row, column in enumerate(rng.integers(0, 512, len(text))):
        text[row, column] = np.nextafter(text[row, column], np.float32(rng.choice([-1, 1])))
    image, text_image = text[::40] + np.float32(0.01), np.arange(240) % 6
    ranks = assert_exact(image, text, text_image)
    rough = image @ text.T
    best = np.where(text_image == np.arange(6)[:, None], rough, -np.inf).max(axis=1)
    assert (1 + (rough > best[:, None]).sum(axis=1)).tolist() != ranks.i2t.tolist()


@pytest.mark.parametrize(("rows", "dim"), [(1003, 64), (203, 512)])
def test_equal_rows_come_in_order_where_blas_tells_them_apart(rows: int, dim: int) -> None:
    """At the edges of its blocks BLAS adds in another order: equal rows get other last bits even in float64."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        image = np.repeat(random_unit(rng, 1, dim), rows, axis=0)
        ranks = first_positive_ranks(image, random_unit(rng, 3, dim), np.array([0, 5, rows - 1]))
        assert ranks.t2i.tolist() == [1, 6, rows]


def test_any_caption_of_the_image_counts() -> None:
    # image 0 has captions 0 and 2, image 1 has captions 1 and 3, image 2 has none
    image = np.eye(3, 4, dtype=np.float32)
    text = np.array([[0.1, 0.9, 0, 0], [0.3, 0.2, 0, 0], [0.2, 0.8, 0, 0], [0.4, 0.1, 0, 0]], np.float32)
    text_image = np.array([0, 1, 0, 1])
    ranks = assert_exact(image, text, text_image, 4)
    assert ranks.i2t.tolist() == [3, 3, 0]
    assert ranks.t2i.tolist() == [2, 2, 2, 2]
    assert first_positive_ranks(image, text, text_image, 2).i2t.tolist() == [0, 0, 0]
    # the image without captions counts as one that found nothing
    assert recall_of_ranks(ranks, (1, 2, 3)) == {
        "i2t": {"R@1": 0.0, "R@2": 0.0, "R@3": 200 / 3},
        "t2i": {"R@1": 0.0, "R@2": 100.0, "R@3": 100.0},
    }


@pytest.mark.parametrize(("images", "captions", "noise"), [(100, 500, 3.0), (301, 1204, 2.5), (64, 64, 3.0)])
def test_recall_equals_clip_benchmarks(images: int, captions: int, noise: float) -> None:
    """A published implementation, the whole of its retrieval evaluation, gets the same numbers to the last query."""
    torch = pytest.importorskip("torch")
    published = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    rng = np.random.default_rng(images)
    image = random_unit(rng, images, 32)
    # at least one caption each, which it wants, and some images with many
    text_image = np.sort(np.concatenate([np.arange(images), rng.integers(0, images, captions - images)]))
    text = unit_rows(image[text_image] + noise * random_unit(rng, captions, 32))

    class Rows:
        """A model that knows the row of each image and caption."""

        encode_image = staticmethod(torch.from_numpy(image).__getitem__)
        encode_text = staticmethod(torch.from_numpy(text).__getitem__)

    texts = [[str(row) for row in np.flatnonzero(text_image == at)] for at in range(images)]
    batches = [
        (torch.arange(start, min(start + 30, images)), texts[start : start + 30]) for start in range(0, images, 30)
    ]
    theirs = published.evaluate(
        Rows, batches, lambda rows: torch.tensor([int(row) for row in rows]), "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    ours = retrieval_recall(image, text, text_image)
    assert 0 < ours["t2i"]["R@1"] < ours["t2i"]["R@10"] < 100
    for direction, name, queries in (("t2i", "image", captions), ("i2t", "text", images)):
        for k in (1, 5, 10):
            # its mean is in float32
            hits = round(theirs[f"{name}_retrieval_recall@{k}"] * queries)
            assert ours[direction][f"R@{k}"] == 100 * hits / queries


def test_k_beyond_the_gallery() -> None:
    image = np.eye(3, dtype=np.float32)
    recalls = {"R@1": 100.0, "R@5": 100.0, "R@10": 100.0}
    assert retrieval_recall(image, image, np.arange(3)) == {"i2t": recalls, "t2i": recalls}


_PEAK = """
import re
from pathlib import Path

import faiss
import numpy as np

from teacher_cache.pipeline.evaluate.recall import first_positive_ranks

def kib(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

rng = np.random.default_rng(0)
images, captions, dim = 10_000, 50_000, 32
image = rng.standard_normal((images, dim), dtype=np.float32)
owner = np.arange(captions) % images
text = image[owner] + np.float32(0.9) * rng.standard_normal((captions, dim), dtype=np.float32)
text[:500] = text[0]  # more ties than candidates: these queries look at the whole gallery
for rows in (image, text):
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
before = kib("VmRSS")
ranks = first_positive_ranks(image, text, owner, 10)
assert 0.5 < (ranks.t2i == 1).mean() < 1, (ranks.t2i == 1).mean()
first_positive_ranks(image[:2000], text, owner % 2000)
print(1024 * (kib("VmHWM") - before), 4 * images * captions)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_the_matrix_of_scores_is_never_held() -> None:
    """10,000 images x 50,000 captions are 2 GB of scores; a process of its own measures what ranking takes.

    Its VmHWM, and not getrusage's ru_maxrss, which a process inherits from the one that started it.
    """
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    taken, matrix = map(int, done.stdout.split())
    assert taken < matrix / 8


def test_faiss_takes_no_more_threads_than_torch_and_gets_its_own_back(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    threads, knn = [], faiss.knn
    monkeypatch.setattr(
        faiss, "knn", lambda *args, **more: (threads.append(faiss.omp_get_max_threads()), knn(*args, **more))[1]
    )
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    try:
        retrieval_recall(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), np.arange(3))
        assert (threads, faiss.omp_get_max_threads()) == ([1, 1], 2)
    finally:
        faiss.omp_set_num_threads(before)


class FakeGpu:
    """The names that faiss-gpu adds, on a CPU: what is asked of it, and how exact its scores are."""

    def __init__(self, gpus: int = 1, noise: float = 0.0) -> None:
        self.gpus, self.noise = gpus, noise
        self.searches: list[tuple[int, int]] = []
        self.configs: list[Any] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        fake = self

        class Config:
            useFloat16 = True  # as faiss spells it
            device = 0

        class Index:
            def __init__(self, resources: object, dim: int, config: Config) -> None:
                fake.configs.append(config)
                self._cpu = faiss.IndexFlatIP(dim)
                self.add = self._cpu.add

            def search(self, queries: Array, k: int) -> tuple[Array, Array]:
                assert k <= 2048, "faiss-gpu refuses more"
                fake.searches.append((len(queries), k))
                scores, rows = self._cpu.search(queries, self._cpu.ntotal)
                rng = np.random.default_rng(0)
                scores = scores + (fake.noise * rng.standard_normal(scores.shape)).astype(np.float32)
                order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
                return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)

        patch.setattr(faiss, "get_num_gpus", lambda: self.gpus)

        class Resources:
            def setTempMemory(self, size: int) -> None:  # as faiss spells it
                assert size <= 256 << 20, "a training on the same GPU needs the rest"

        patch.setattr(faiss, "StandardGpuResources", Resources, raising=False)
        patch.setattr(faiss, "GpuIndexFlatConfig", Config, raising=False)
        patch.setattr(faiss, "GpuIndexFlatIP", Index, raising=False)
        patch.setattr(faiss, "knn", lambda *args, **more: pytest.fail("searched on the CPU"))


@pytest.mark.parametrize(("device", "gpu", "noise"), [("auto", 0, 0.0), ("cuda", 0, 2.0**-25), ("cuda:1", 1, 0.0)])
def test_a_gpu_gives_the_ranks_of_the_cpu(monkeypatch: pytest.MonkeyPatch, device: str, gpu: int, noise: float) -> None:
    """Another order of summation than the CPU's, noise of one unit in the last place of a score, is allowed for."""
    rng = np.random.default_rng(7)
    image, text_image = random_unit(rng, 50, 128), rng.integers(0, 50, 180)
    text = unit_rows(image[text_image] + 3 * random_unit(rng, 180, 128))
    text[::3] = text[0]
    cpu = assert_exact(image, text, text_image, 20)
    fake = FakeGpu(gpus=2, noise=noise)
    fake.install(monkeypatch)
    ranks = first_positive_ranks(image, text, text_image, 20, device)
    assert fake.searches == [(50, 52), (180, 50)]
    assert [(config.useFloat16, config.device) for config in fake.configs] == [(False, gpu)] * 2
    assert (ranks.i2t.tolist(), ranks.t2i.tolist()) == (cpu.i2t.tolist(), cpu.t2i.tolist())
    assert {0, 1} < set(ranks.i2t.tolist())
    assert (cpu.engine, ranks.engine) == (f"faiss-cpu {faiss.__version__}", f"faiss-gpu {faiss.__version__}")


@pytest.mark.parametrize("dim", [8, 64, 512, 2048])
def test_scores_in_tf32_are_refused(monkeypatch: pytest.MonkeyPatch, dim: int) -> None:
    """Ten bits of mantissa leave errors that the bound of float32 does not cover."""
    rng = np.random.default_rng(7)
    image, text = random_unit(rng, 60, dim), random_unit(rng, 300, dim)
    # each factor is rounded to 2^-11 of itself, and the errors of dim products of 1 / dim add up as a random walk
    FakeGpu(noise=2**-11 * np.sqrt(2 / 3) / np.sqrt(dim)).install(monkeypatch)
    with pytest.raises(UsageError, match=r"scores are off by .*TF32.*Use --device cpu"):
        first_positive_ranks(image, text, np.arange(300) % 60, 10)


def test_the_device_asked_for_is_used_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"device 'cuda' asked for, but FAISS .* finds 0 GPUs: .*faiss-gpu"):
        find_engine("cuda")
    for name in ("tpu", "cuda:", "cuda:x", "cpu:1"):
        with pytest.raises(UsageError, match=f"device '{name}' is not known; use auto, cpu, cuda or cuda:N"):
            find_engine(name)
    FakeGpu(gpus=0).install(monkeypatch)
    assert find_engine("auto").gpu is None  # a build for GPUs on a machine without one
    FakeGpu(gpus=1).install(monkeypatch)
    assert find_engine("cpu").gpu is None
    with pytest.raises(UsageError, match=r"device 'cuda:1' asked for, but FAISS .* finds 1 GPUs"):
        find_engine("cuda:1")


def test_recall_without_faiss_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UsageError, match=r"recall needs faiss, which is not installed: .*pip install .*\[train\]'"):
        find_engine()


def test_bad_values_are_refused() -> None:
    rows, owner = np.eye(3, dtype=np.float32), np.arange(3)
    for value in (np.nan, np.inf, -np.inf):
        wrong = rows.copy()
        wrong[1, 1] = value
        for both in ((wrong, rows), (rows, wrong)):
            with pytest.raises(ValueError, match="images and captions must be finite"):
                retrieval_recall(*both, owner)
    with pytest.raises(ValueError, match=r"images \(3, 3\) and captions \(3, 2\) must both"):
        retrieval_recall(rows, rows[:, :2], owner)
    with pytest.raises(ValueError, match="recall of 3 images and 0 captions"):
        retrieval_recall(rows, rows[:0], np.arange(0))
    with pytest.raises(ValueError, match=r"each of 3 captions a position in 0 ... 2"):
        retrieval_recall(rows, rows, owner + 1)
    with pytest.raises(ValueError, match="depth is 0"):
        first_positive_ranks(rows, rows, owner, 0)
    with pytest.raises(ValueError, match=r"cut-offs \(1, 5\): ranks were looked for down to 3"):
        recall_of_ranks(first_positive_ranks(rows, rows, owner, 3), (1, 5))


@pytest.mark.parametrize(("images", "own"), [(3, 1), (4, 2), (2, 6)])
def test_chance_is_the_mean_over_all_orders(images: int, own: int) -> None:
    """Each image finds one of its captions in the first K places of every subset of that size."""
    found = chance_recall(images, images * own)
    for k in (1, 5, 10):
        galleries = list(combinations(range(images * own), min(k, images * own)))
        hits = sum(any(caption < own for caption in gallery) for gallery in galleries)  # the captions of image 0
        assert found["i2t"][f"R@{k}"] == pytest.approx(100 * hits / len(galleries))
        assert found["t2i"][f"R@{k}"] == pytest.approx(100 * min(k, images) / images)


def test_retention_is_a_share_of_the_teacher() -> None:
    teacher = {"i2t": {"R@1": 50.0, "R@5": 80.0}, "t2i": {"R@1": 0.0, "R@5": 70.0}}
    student = {"i2t": {"R@1": 25.0, "R@5": 88.0}, "t2i": {"R@1": 10.0, "R@5": 35.0}}
    shares = retention(student, teacher)
    assert shares["i2t"] == {"R@1": 50.0, "R@5": pytest.approx(110.0)}
    assert shares["t2i"] == {"R@1": None, "R@5": 50.0}
    assert shares["mean"] == pytest.approx(100 * (25 + 88 + 10 + 35) / (50 + 80 + 70))
