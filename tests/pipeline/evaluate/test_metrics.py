"""Exact recall: agrees with the naive full matrix in float64, ties, duplicates and large K included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.pipeline.evaluate.recall import (
    first_positive_ranks,
    recall_of_ranks,
    retention,
    retrieval_recall,
    top_k,
)
from tests.pipeline.evaluate.test_nearest import FakeGpu, cpu_searches, naive_top_k, unit


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    queries=st.integers(1, 20),
    gallery=st.integers(1, 60),
    distinct=st.integers(1, 60),
    dim=st.integers(1, 24),
    k=st.integers(1, 70),
)
def test_top_k_equals_naive_with_duplicates(
    seed: int, queries: int, gallery: int, distinct: int, dim: int, k: int
) -> None:
    """Few distinct rows make whole runs of exact ties, longer than K."""
    rng = np.random.default_rng(seed)
    rows = unit(rng, distinct, dim)[rng.integers(0, distinct, gallery)]
    asked = unit(rng, queries, dim)
    np.testing.assert_array_equal(top_k(asked, rows, k), naive_top_k(asked, rows, k))


def test_near_ties_below_float32_are_ordered_by_float64() -> None:
    """Rows that differ in the last bit of one value: float32 sums cannot tell their order, the answer must."""
    rng = np.random.default_rng(0)
    rows = np.repeat(unit(rng, 3, 512), 40, axis=0)
    for row, column in enumerate(rng.integers(0, 512, len(rows))):
        rows[row, column] = np.nextafter(rows[row, column], np.float32(rng.choice([-1, 1])))
    queries = np.concatenate([rows[::7], unit(rng, 5, 512)])
    np.testing.assert_array_equal(top_k(queries, rows, 10), naive_top_k(queries, rows, 10))


def test_any_caption_of_the_image_counts() -> None:
    # image 0 has captions 0 and 2, image 1 has captions 1 and 3, image 2 has none
    image = np.eye(3, 4, dtype=np.float32)
    text = np.array([[0.1, 0.9, 0, 0], [0.3, 0.2, 0, 0], [0.2, 0.8, 0, 0], [0.4, 0.1, 0, 0]], np.float32)
    text_image = np.array([0, 1, 0, 1])
    ranks = first_positive_ranks(image, text, text_image, 4)
    assert ranks.i2t.tolist() == [3, 3, 0]
    assert ranks.t2i.tolist() == [2, 2, 2, 2]
    assert (ranks.i2t.dtype, ranks.t2i.dtype) == (np.int32, np.int32)
    assert first_positive_ranks(image, text, text_image, 2).i2t.tolist() == [0, 0, 0]
    # the image without captions counts as one that found nothing
    assert recall_of_ranks(ranks, (1, 2, 3)) == {
        "i2t": {"R@1": 0.0, "R@2": 0.0, "R@3": 200 / 3},
        "t2i": {"R@1": 0.0, "R@2": 100.0, "R@3": 100.0},
    }


def test_retrieval_equals_naive_on_several_captions_per_image() -> None:
    rng = np.random.default_rng(1)
    image = unit(rng, 60, 16)
    text_image = np.sort(np.concatenate([np.arange(60), rng.integers(0, 60, 140)]))
    text = image[text_image] + 1.2 * unit(rng, 200, 16)
    text = (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32)
    text[10:20] = text[10]  # the same caption under several images
    expected: dict[str, dict[str, float]] = {"i2t": {}, "t2i": {}}
    for k in (1, 5, 10):
        i2t, t2i = naive_top_k(image, text, k), naive_top_k(text, image, k)
        expected["i2t"][f"R@{k}"] = 100 * float(np.mean([any(text_image[i2t[i]] == i) for i in range(60)]))
        expected["t2i"][f"R@{k}"] = 100 * float(np.mean([text_image[j] in t2i[j] for j in range(200)]))
    assert retrieval_recall(image, text, text_image) == expected
    assert 0 < expected["t2i"]["R@1"] < expected["t2i"]["R@10"] < 100


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    images=st.integers(1, 25),
    captions=st.integers(1, 60),
    distinct=st.integers(1, 60),
    dim=st.integers(1, 12),
    depth=st.integers(1, 80),
)
def test_ranks_equal_counting_who_comes_before(
    seed: int, images: int, captions: int, distinct: int, dim: int, depth: int
) -> None:
    """Images with any number of captions or none, ties, and depths beyond the gallery; another way to the same rank."""
    rng = np.random.default_rng(seed)
    pool = unit(rng, distinct, dim)
    image, text = pool[rng.integers(0, distinct, images)], pool[rng.integers(0, distinct, captions)]
    text_image = rng.integers(0, images, captions)

    def counted(queries: np.ndarray, gallery: np.ndarray, positive: np.ndarray) -> list[int]:
        scores = np.einsum("nd,md->nm", queries.astype(np.float64), gallery.astype(np.float64))
        found = []
        for row, wanted in zip(scores, positive, strict=True):
            if not wanted.any():
                found.append(0)
                continue
            best = row[wanted].max()
            first = np.flatnonzero(wanted & (row == best))[0]
            rank = 1 + int((row > best).sum()) + int((row[:first] == best).sum())
            found.append(rank if rank <= depth else 0)
        return found

    positive = text_image == np.arange(images)[:, None]
    ranks = first_positive_ranks(image, text, text_image, depth)
    assert ranks.i2t.tolist() == counted(image, text, positive)
    assert ranks.t2i.tolist() == counted(text, image, positive.T)


@pytest.mark.parametrize("cosine", [False, True])
def test_a_gpu_finds_the_ranks_that_are_counted_without(monkeypatch: pytest.MonkeyPatch, cosine: bool) -> None:
    rng = np.random.default_rng(7)
    image, text = (unit(rng, rows, 16).astype(np.float16) for rows in (50, 180))
    text[::3] = text[0]
    text_image = rng.integers(0, 50, 180)
    on_cpu = cpu_searches(monkeypatch)
    counted = first_positive_ranks(image, text, text_image, 20, cosine)
    assert on_cpu == []
    fake = FakeGpu()
    fake.install(monkeypatch)
    found = first_positive_ranks(image, text, text_image, 20, cosine)
    assert [queries for queries, _ in fake.searches] == [50, 180]
    assert found.i2t.tolist() == counted.i2t.tolist()
    assert found.t2i.tolist() == counted.t2i.tolist()
    assert {0, 1} < set(found.i2t.tolist())


@pytest.mark.parametrize(("images", "captions", "noise"), [(100, 500, 3.0), (301, 1204, 2.5), (64, 64, 3.0)])
def test_recall_equals_clip_benchmarks(images: int, captions: int, noise: float) -> None:
    """A published implementation, the whole of its retrieval evaluation, gets the same numbers to the last query."""
    torch = pytest.importorskip("torch")
    published = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    rng = np.random.default_rng(images)
    image = unit(rng, images, 32)
    # at least one caption each, which it wants, and some images with many
    text_image = np.sort(np.concatenate([np.arange(images), rng.integers(0, images, captions - images)]))
    text = image[text_image] + noise * unit(rng, captions, 32)
    text = (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32)

    class Rows:
        """A model that knows the row of each image and caption."""

        encode_image = staticmethod(torch.from_numpy(image).__getitem__)
        encode_text = staticmethod(torch.from_numpy(text).__getitem__)

    texts = [[str(row) for row in np.flatnonzero(text_image == at)] for at in range(images)]
    batches = [
        (torch.arange(start, min(start + 30, images)), texts[start : start + 30]) for start in range(0, images, 30)
    ]
    wanted = published.evaluate(
        Rows, batches, lambda rows: torch.tensor([int(row) for row in rows]), "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    found = retrieval_recall(image, text, text_image)
    assert 0 < found["t2i"]["R@1"] < found["t2i"]["R@10"] < 100
    for direction, name, queries in (("t2i", "image", captions), ("i2t", "text", images)):
        for k in (1, 5, 10):
            # its mean is in float32
            hits = round(wanted[f"{name}_retrieval_recall@{k}"] * queries)
            assert found[direction][f"R@{k}"] == 100 * hits / queries


def test_k_beyond_the_gallery() -> None:
    image = np.eye(3, dtype=np.float32)
    assert retrieval_recall(image, image, np.arange(3)) == {
        "i2t": {"R@1": 100.0, "R@5": 100.0, "R@10": 100.0},
        "t2i": {"R@1": 100.0, "R@5": 100.0, "R@10": 100.0},
    }


def test_bad_values_are_refused() -> None:
    rows = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match="must be finite"):
        top_k(rows, np.full((2, 3), np.nan, np.float32), 1)
    with pytest.raises(ValueError, match=r"queries \(3, 3\) and gallery \(2, 4\)"):
        top_k(rows, np.zeros((2, 4), np.float32), 1)
    with pytest.raises(ValueError, match="recall of 3 images and 0 captions"):
        retrieval_recall(rows, rows[:0], np.arange(0))
    with pytest.raises(ValueError, match=r"each of 3 captions a position in 0 ... 2"):
        retrieval_recall(rows, rows, np.arange(3) + 1)
    with pytest.raises(ValueError, match="depth is 0"):
        first_positive_ranks(rows, rows, np.arange(3), 0)
    with pytest.raises(ValueError, match=r"cut-offs \(1, 5\): ranks were looked for down to 3"):
        recall_of_ranks(first_positive_ranks(rows, rows, np.arange(3), 3), (1, 5))


def test_retention_is_a_share_of_the_teacher() -> None:
    teacher = {"i2t": {"R@1": 50.0, "R@5": 80.0}, "t2i": {"R@1": 0.0, "R@5": 70.0}}
    student = {"i2t": {"R@1": 25.0, "R@5": 88.0}, "t2i": {"R@1": 10.0, "R@5": 35.0}}
    kept = retention(student, teacher)
    assert kept["i2t"] == {"R@1": 50.0, "R@5": pytest.approx(110.0)}
    assert kept["t2i"] == {"R@1": None, "R@5": 50.0}
    assert kept["mean"] == pytest.approx(100 * (25 + 88 + 10 + 35) / (50 + 80 + 70))
