"""What ``stats`` says of embeddings, against computations of its own; nearest rows against all scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.pipeline.cli.app import app
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.look import nearest as nearest_module
from teacher_cache.storage.look.nearest import near_pairs, nearest, unit_rows
from teacher_cache.storage.look.sampling import draw_rows
from teacher_cache.storage.look.side_by_side import stats_side_by_side
from teacher_cache.storage.look.stats import Distribution, cache_stats, effective_rank
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import cache_digest, finish_known_cache, known_row, make_known_cache, plan_known_cache
from tests.storage.look.test_diff import BASE, make

run = CliRunner()


def rows_of(reader: EmbeddingReader, tower: Any, rows: Any) -> np.ndarray[Any, Any]:
    return unit_rows(reader.take(tower, np.asarray(rows)))


def coarse(rng: np.random.Generator, rows: int) -> np.ndarray[Any, Any]:
    """Vectors of few values: many equal ones, and many equal scores of unequal ones."""
    return rng.integers(-1, 2, (rows, 4)).astype(np.float32) * np.float32(0.1)


def naive_nearest(queries: Any, gallery: Any, k: int) -> np.ndarray[Any, Any]:
    """All scores in float64, best first, equal ones by row."""
    scores = np.einsum("nd,md->nm", queries.astype(np.float64), gallery.astype(np.float64))
    return np.lexsort((np.broadcast_to(np.arange(len(gallery)), scores.shape), -scores), axis=1)[:, :k]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), images=st.integers(2, 20), captions=st.integers(1, 40), ties=st.booleans())
def test_nearest_equals_all_scores_in_float64(seed: int, images: int, captions: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    make = coarse if ties else lambda rng, rows: unit_rows(rng.standard_normal((rows, 4)))
    image, text = make(rng, images), make(rng, captions)
    blocks = [(part, image[part]) for part in np.array_split(rng.permutation(images), 3) if len(part)]
    for k in (1, 3, 50):
        rows, scores = nearest(text, blocks, k)
        assert rows.tolist() == naive_nearest(text, image, k).tolist()
        assert scores == pytest.approx(np.einsum("nd,nkd->nk", text.astype(float), image[rows].astype(float)))


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 300),
    k=st.integers(1, 6),
    parts=st.integers(1, 12),
    spread=st.sampled_from([0.0, 1e-8, 1e-7, 1e-5]),
)
def test_nearest_of_collapsed_rows_is_exact(seed: int, size: int, k: int, parts: int, spread: float) -> None:
    """All rows equal or nearly so: more near-ties than are kept."""
    rng = np.random.default_rng(seed)
    gallery = (rng.standard_normal(8) + spread * rng.standard_normal((size, 8))).astype(np.float32)
    queries = rng.standard_normal((3, 8)).astype(np.float32)
    wanted = naive_nearest(queries, gallery, k)
    scores = np.einsum("nd,md->nm", queries.astype(float), gallery.astype(float))
    blocks = [(part, gallery[part]) for part in np.array_split(rng.permutation(size), parts) if len(part)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("teacher_cache.storage.look.nearest._KEPT_ROWS", 4)
        rows, exact = nearest(queries, blocks, k)
    assert rows.tolist() == wanted.tolist()
    assert exact == pytest.approx(np.take_along_axis(scores, wanted, axis=1), rel=1e-12)


def test_nearest_keeps_no_more_of_collapsed_rows_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    scores_of_pairs = nearest_module.exact_scores

    def noted(queries: Any, gallery: Any, query: Any, row: Any) -> Any:
        sizes.append(len(gallery))
        return scores_of_pairs(queries, gallery, query, row)

    monkeypatch.setattr(nearest_module, "exact_scores", noted)
    gallery = np.ones((20_000, 4), np.float32)
    blocks = ((part, gallery[part]) for part in np.array_split(np.arange(20_000)[::-1], 40))
    rows, _ = nearest(gallery[:2], blocks, 3)
    assert rows.tolist() == [[0, 1, 2]] * 2
    assert max(sizes) <= 4_096 + 500


def test_near_pairs_are_each_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_cache.storage.look.nearest._BLOCK_BYTES", 4 * 30 * 7)  # blocks of seven rows
    rng = np.random.default_rng(0)
    rows = unit_rows(np.repeat(rng.standard_normal((10, 8)), 3, axis=0) + 0.02 * rng.standard_normal((30, 8)))
    count, partners, found, cosines = near_pairs(rows, 0.9, 5)
    scores = rows.astype(float) @ rows.T.astype(float)
    left, right = np.nonzero(np.triu(scores >= 0.9, 1))
    assert count == len(left) >= 30
    assert partners.tolist() == [(scores[i] >= 0.9).sum() - 1 for i in range(30)]
    best = sorted(zip(-scores[left, right], left, right, strict=True))[:5]
    assert found.tolist() == [[i, j] for _, i, j in best]
    assert cosines == pytest.approx([-score for score, _, _ in best], abs=1e-6)


def test_effective_rank_is_that_of_roy_and_vetterli() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40, 6)) @ rng.standard_normal((6, 10))
    singular = np.linalg.svd(rows, compute_uv=False)
    share = singular / singular.sum()
    assert effective_rank(rows) == pytest.approx(np.exp(-np.sum(share * np.log(share + 1e-300))), rel=1e-5)
    assert effective_rank(np.ones((5, 3))) == pytest.approx(1, abs=1e-5)
    assert effective_rank(np.eye(7)) == pytest.approx(7)
    assert effective_rank(np.empty((0, 3))) is None


def test_rows_are_drawn_from_some_chunks_in_equal_parts() -> None:
    rows = np.setdiff1d(np.arange(10_000), [5, 700])
    assert draw_rows(rows, 100, 20_000, 0) is rows
    drawn = draw_rows(rows, 10, 640, 3)
    assert len(drawn) == len(set(drawn.tolist())) == 640
    assert (np.diff(drawn) > 0).all()
    assert set(drawn) <= set(rows)
    per_chunk = np.unique(drawn // 10, return_counts=True)[1]
    assert len(per_chunk) <= 65  # not all 1000 chunks are read
    assert draw_rows(rows, 10, 640, 3).tolist() == drawn.tolist() != draw_rows(rows, 10, 640, 4).tolist()
    assert len(draw_rows(np.arange(7), 2, 5, 0)) == 5


def test_stats_of_a_known_cache_equal_a_computation_by_hand(known_cache: Path) -> None:
    found = cache_stats(str(known_cache))
    reader = EmbeddingReader(str(known_cache))
    image = unit_rows(np.stack([known_row("image", row) for row in range(10)]))
    text = unit_rows(np.stack([known_row("text", row) for row in range(25)]))
    owner = reader.captions["image_row"].to_numpy()
    true = [float(text[row] @ image[owner[row]]) for row in range(25)]
    assert found.true_pairs is not None
    assert found.true_pairs.mean == pytest.approx(np.mean(true), abs=1e-6)
    assert found.true_pairs.quantiles["50 %"] == pytest.approx(np.median(true), abs=1e-6)
    assert (found.true_pairs.count, sum(found.true_pairs.histogram)) == (25, 25)
    assert found.random_pairs is not None
    assert found.true_pairs.histogram_ends == found.random_pairs.histogram_ends
    assert found.image.norm is not None
    assert (found.image.norm.least, found.image.norm.greatest) == (1, 10)
    assert found.without_caption == 0
    assert (found.sampled, found.image.rows_read, found.text.rows_read) == (False, 10, 25)
    assert (found.image.missing, found.image.equal_rows, found.near_images, found.image.dead_dimensions) == (
        0,
        0,
        0,
        (),
    )
    assert found.image.effective_rank == pytest.approx(effective_rank(image))

    test_split = cache_stats(str(known_cache), split="test")
    assert (test_split.image.rows, test_split.text.rows) == (2, int((owner >= 8).sum()))


def test_the_separation_is_the_area_under_the_curve(known_cache: Path) -> None:
    from teacher_cache.storage.look.stats import _separation

    true, random = np.array([0.1, 0.5, 0.9], np.float32), np.array([0.1, 0.2, 0.9, 0.0], np.float32)
    by_hand = np.mean([(a > b) + 0.5 * (a == b) for a in true for b in random])
    assert _separation(true, random) == pytest.approx(by_hand)
    assert _separation(true, random[:0]) is None


def test_stats_find_what_is_wrong_with_rows(tmp_path: Path) -> None:
    """Two equal images, one nearly equal, a quarantined one, dimensions that never move."""

    def odd(ref: ChunkRef, arrays: dict[str, Any]) -> None:
        for at in range(len(arrays["norm"])):
            row = 4 * ref.chunk + at
            alike = {6: 2, 9: 2}.get(row, row) if ref.tower == "image" else row
            values = known_row(ref.tower, alike).astype(np.float32)
            values[[3, 5]] = 0
            values[0] += 0.01 * ((ref.tower, row) == ("image", 9))
            arrays["embedding"][at] = (values / np.linalg.norm(values)).astype(np.float16)

    path = tmp_path / "odd.cache"
    plan_known_cache(path)
    finish_known_cache(path, [4], change=odd)
    found = cache_stats(str(path))
    assert (found.image.missing, found.image.zero, found.image.equal_rows) == (1, 0, 2)
    assert found.image.dead_dimensions == found.text.dead_dimensions == (3, 5)
    assert (found.near_images, found.near_pairs) == (3, 3)
    assert found.nearest_pairs[0].sample_ids == ("img-2", "img-6")
    assert found.nearest_pairs[0].same_bytes  # all pictures of these caches have one digest
    assert found.true_pairs is not None
    assert found.true_pairs.count == 25 - 3  # the captions of image 4 have nothing to be compared with
    shown = run.invoke(app, ["stats", str(path)]).stdout
    assert f"teacher-cacheevaluate--cache{path}" in "".join(shown.split())  # a terminal folds it
    assert "quarantined        1 image, 0 captions" in shown
    assert "dead dimensions    images 2 (3, 5), captions 2 (3, 5)" in shown
    assert "1.0000  img-2  img-6, the same file" in shown
    in_split = cache_stats(str(path), split="train")
    assert (in_split.image.rows, in_split.image.missing) == (8, 1)


def test_prompts_of_classes_are_no_pairs(tmp_path: Path) -> None:
    """A cache of labelled images has its prompts as captions of one image; recall of those would say nothing."""
    prompts = tuple(f"a photo of a {name}." for name in ("cat", "dog"))
    pictures = [picture._replace(captions=prompts if number == 0 else ()) for number, picture in enumerate(BASE)]
    cache = make(tmp_path / "labelled", pictures)
    found = cache_stats(cache)
    assert (found.without_caption, found.text.rows, found.image.rows) == (11, 2, 12)
    assert (found.true_pairs, found.random_pairs, found.separation) == (None, None, None)
    assert found.image.cosine is not None
    assert "11 images without a caption" in run.invoke(app, ["stats", cache]).stdout


def test_a_tower_without_rows_has_nothing_to_sum_up(tmp_path: Path) -> None:
    bare = [picture._replace(captions=()) for picture in BASE]
    found = cache_stats(make(tmp_path / "bare", bare, lost=tuple(range(12))))
    for tower, missing in ((found.image, 12), (found.text, 0)):
        assert (tower.missing, tower.norm, tower.cosine, tower.effective_rank) == (missing, None, None, None)
        assert (tower.equal_rows, tower.dead_dimensions) == (0, ())


def test_a_large_cache_is_sampled_and_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "large.cache"
    make_known_cache(path, images=400, captions=400)
    done = run.invoke(app, ["stats", str(path), "--rows", "90", "--json", "--seed", "1"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["sampled"], found["image"]["rows"], found["image"]["rows_read"]) == (True, 400, 90)
    assert (found["text"]["rows"], found["text"]["rows_read"]) == (400, 90)
    shown = run.invoke(app, ["stats", str(path), "--rows", "90", "--seed", "1"])
    assert "90 of 400 images, drawn with seed 1; --rows reads more" in shown.stdout


def test_a_view_or_split_that_is_not_there_is_named(known_cache: Path) -> None:
    with pytest.raises(UsageError, match="no view 3; views 0 to 0 can be read"):
        cache_stats(str(known_cache), view=3)
    with pytest.raises(UsageError, match="no split 'dev'; this cache has 'train'"):
        cache_stats(str(known_cache), split="dev")


def test_a_distribution_of_nothing_is_none() -> None:
    assert Distribution.of(np.empty(0, np.float32)) is None


@pytest.mark.parametrize(
    ("values", "beside", "ends", "filled"),
    [
        ([0.0, 1.0], None, (0, 1), {0: 1, 19: 1}),
        ([0.0, 1.0], [4.0], (0, 4), {0: 1, 5: 1}),
        ([3.0], [3.0], (2.5, 3.5), {10: 1}),
    ],
)
def test_distributions_that_are_compared_have_the_same_bins(
    values: list[float], beside: list[float] | None, ends: tuple[float, float], filled: dict[int, int]
) -> None:
    found = Distribution.of(np.array(values), None if beside is None else np.array(beside))
    assert found is not None
    assert found.histogram_ends == ends
    assert {place: count for place, count in enumerate(found.histogram) if count} == filled
    assert (found.least, found.greatest) == (min(values), max(values))


@pytest.fixture
def unlike(tmp_path: Path) -> tuple[str, str]:
    """A cache, and a wider teacher's of its pictures but the last two, in the other order; the first is quarantined."""
    return make(tmp_path / "a", BASE), make(tmp_path / "b", BASE[:10][::-1], tilt=0.3, dim=16, lost=(9,))


def test_several_teachers_are_looked_at_on_the_same_pictures(unlike: tuple[str, str], tmp_path: Path) -> None:
    """As a cache of these pictures alone says it: 9 of 12, of which the other cache has an embedding."""
    cut = BASE[1:10]
    digests = [cache_digest(cache) for cache in unlike]
    result = stats_side_by_side(unlike, drop=True)
    assert (result.images, result.dropped_images) == (9, 3)
    for beside, alone in zip(
        result.caches, (make(tmp_path / "c", cut), make(tmp_path / "d", cut, 0.3, 16)), strict=True
    ):
        same = cache_stats(alone)
        assert same.true_pairs is not None
        assert beside.true_pairs is not None
        assert beside.true_pairs.mean == pytest.approx(same.true_pairs.mean)
        assert beside.separation == pytest.approx(same.separation)
        for tower in ("image", "text"):
            of_both = [getattr(stats, tower).effective_rank for stats in (beside, same)]
            assert of_both[0] == pytest.approx(of_both[1])
    assert digests == [cache_digest(cache) for cache in unlike]


def test_pictures_that_a_cache_lacks_are_refused_by_name_or_left_out_and_counted(unlike: tuple[str, str]) -> None:
    refused = str(run.invoke(app, ["stats", *unlike]).exception)
    assert "of the 12 images of" in refused
    assert "3 have no embedding in it" in refused
    assert "--unmatched drop" in refused
    shown = run.invoke(app, ["stats", *unlike, "--unmatched", "drop", "--rows", "5", "--seed", "2"]).stdout
    assert "9 images that all caches have, 5 of them drawn with seed 2" in shown
    assert "left out: 3 images that a cache lacks" in shown
    assert f"evaluate--cache{unlike[0]}--cache{unlike[1]}" in "".join(shown.split())
    for words, told in (
        ([unlike[0], unlike[0]], "are one and the same cache"),
        ([*unlike, "--view", "1"], "--view has no effect on several caches"),
        ([unlike[0], "--unmatched", "drop"], "--unmatched has no effect on one cache"),
    ):
        assert told in str(run.invoke(app, ["stats", *words]).exception)
