"""Indexes: what they lose is measured against exact search, bounded, and refused beyond the bound."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from teacher_cache.pipeline.cli.app import app
from teacher_cache.pipeline.evaluate.recall import first_positive_ranks, recall_of_ranks
from teacher_cache.pipeline.search import certificate
from teacher_cache.pipeline.search.approximate import ApproximateIndex
from teacher_cache.pipeline.search.build import IndexedRows, build_index
from teacher_cache.pipeline.search.certificate import upper_bound
from teacher_cache.pipeline.search.record import IndexRecord
from teacher_cache.storage.errors import CacheFormatError, CacheIncompleteError, CacheNotFoundError, UsageError
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import make_known_cache, plan_known_cache
from tests.pipeline.search.conftest import CAPTIONS, IMAGES, LOST


@pytest.mark.parametrize("factory", ["HNSW8", "IVF16,Flat", "PCA7,IVF8_HNSW4,Flat", "Flat"])
def test_recall_is_that_of_evaluate_and_of_the_written_index(paired_cache: Path, tmp_path: Path, factory: str) -> None:
    out = tmp_path / "index"
    record = build_index(str(paired_cache), str(out), 20.0, factory)
    reader = EmbeddingReader(str(paired_cache))
    assert record == IndexRecord.read(out)
    assert record.cache_manifest_digest == reader.manifest.digest
    rows = IndexedRows(reader)
    assert not set(LOST) & set(rows.rows["image"].tolist())
    assert (record.image.rows, record.text.rows) == (IMAGES - len(LOST), CAPTIONS - 2 * len(LOST))
    vectors = {tower: rows.embeddings(tower, np.arange(len(rows.rows[tower]))) for tower in ("image", "text")}
    exact = recall_of_ranks(first_positive_ranks(vectors["image"], vectors["text"], rows.image["text"], 10))
    for tower, direction, asks in (("text", "i2t", "image"), ("image", "t2i", "text")):
        measured = getattr(record, tower)
        assert (measured.exact, measured.sampled) == (pytest.approx(exact[direction]["R@10"]), False)
        data = record.proven(out, tower)
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (measured.sha256, measured.bytes)
        loaded = ApproximateIndex.loaded(data, measured.rows, record.embed_dim, measured.effort)
        near, products = loaded.counted(vectors[asks], 10)
        hits = [own in rows.image[tower][row[row >= 0]] for own, row in zip(rows.image[asks], near, strict=True)]
        assert measured.found == pytest.approx(100 * np.mean(hits))
        assert measured.lost_at_most == pytest.approx(measured.exact - measured.found)
        assert measured.lost_at_most <= record.within
        assert products == pytest.approx(measured.products)
        assert measured.times_fewer == measured.rows / measured.products
        if factory == "Flat":
            assert (products, measured.found) == (measured.rows, measured.exact)


def test_effort_is_raised_until_the_loss_is_within(paired_cache: Path, tmp_path: Path) -> None:
    loose, strict = (build_index(str(paired_cache), str(tmp_path / f"{w}"), w, "IVF32,Flat").image for w in (60.0, 1.0))
    assert loose.effort == 1
    assert strict.effort is not None
    assert strict.effort > 1
    assert strict.lost_at_most <= 1.0 < loose.lost_at_most <= 60.0
    assert 32 < loose.products < strict.products  # the 32 centroids count too


def test_a_sample_is_bounded_by_more_than_it_lost(
    paired_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificate, "MOST_QUERIES", 250)
    record = build_index(str(paired_cache), str(tmp_path / "index"), 30.0, "IVF32,Flat")
    for tower in (record.image, record.text):
        assert (tower.sampled, tower.queries) == (True, 250)
        assert tower.exact - tower.found < tower.lost_at_most <= 30.0
    with pytest.raises(UsageError, match=r"at most \d\.\d\d points at 95% confidence of R@10, more than --within 1pt"):
        build_index(str(paired_cache), str(tmp_path / "none"), 1.0, "Flat")  # 250 queries do not prove 1 point


@pytest.mark.parametrize("chance", [0.002, 0.03, 0.4])
def test_the_bound_is_theorem_4_and_holds_as_often_as_it_says(chance: float) -> None:
    draws = np.random.default_rng(1).random((2_000, 400)) < chance
    bounds = [upper_bound(draw, 0.1) for draw in draws]
    assert np.mean([bound < chance for bound in bounds]) <= 0.1
    some = draws[0]
    log = np.log(2 / 0.1)
    pairs = np.square(some[:, None].astype(float) - some[None]).sum() / (2 * 400 * 399)  # V as the paper defines it
    expected = some.mean() + np.sqrt(2 * pairs * log / 400) + 7 * log / (3 * 399)
    assert bounds[0] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (
            "paired --factory PCA1,Flat",
            UsageError,
            r"text to image: the index loses \d+\.\d\d points of R@10, more than ",
        ),
        ("paired --factory HNSWx", UsageError, "--factory HNSWx: FAISS .* builds no such index of 298 rows of width 8"),
        (
            "paired --factory IVF999,Flat",
            UsageError,
            "--factory IVF999,Flat: FAISS .* builds no such index of 298 rows",
        ),
        ("paired --within 1%", UsageError, "--within 1%: points of R@10 are wanted"),
        ("unfinished", CacheIncompleteError, "0 of 10 chunks are there"),
        ("bare", UsageError, "2 of 10 images have no caption"),
        ("nothing", CacheNotFoundError, "no cache here"),
        ("foreign", CacheFormatError, "another"),
    ],
)
def test_what_cannot_be_certified_is_refused_and_nothing_written(
    words: str, kind: type[Exception], message: str, paired_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paired").symlink_to(paired_cache)
    plan_known_cache(tmp_path / "unfinished")
    make_known_cache(tmp_path / "bare", captions=8)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/manifest.json").write_text(json.dumps({"format": "another"}))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind, match=message):
        CliRunner().invoke(app, ["index", *words.split(), "--out", "out"], catch_exceptions=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_table_says_what_each_direction_lost(paired_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    done = CliRunner(env={"COLUMNS": "120"}).invoke(
        app, ["index", str(paired_cache), "--within", "2pt", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    record = IndexRecord.read(out)
    for direction, tower in (("image to text", record.text), ("text to image", record.image)):
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(direction))
        assert line.split()[3:] == [
            f"{tower.rows:,}",
            f"{tower.queries:,}",
            f"{tower.exact:.2f}",
            f"{tower.found:.2f}",
            f"{tower.lost_at_most:.2f}",
            f"{tower.products:,.0f}",
            f"{tower.times_fewer:.1f}",
        ]
    assert "exact, since all queries were measured" in done.stdout
    again = CliRunner().invoke(app, ["index", str(paired_cache), "--out", str(out)])
    assert "is there already" in str(again.exception)
