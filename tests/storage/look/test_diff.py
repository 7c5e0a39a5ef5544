"""``diff``: what differs is named, what does not is not, and drift is the cosine of the two rows."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from teacher_cache.pipeline.cli.app import app
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.format.commits import ChunkRef, QuarantinedRow
from teacher_cache.storage.format.layout import Layout, Tower
from teacher_cache.storage.format.manifest import Source
from teacher_cache.storage.format.tables import CAPTIONS, PROBLEMS, SAMPLES, SCHEMAS, captions_sha256, samples_sha256
from teacher_cache.storage.look.diff import diff_caches
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.plan import plan_cache
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import cache_digest, finish_known_cache, make_identity, make_known_cache, plan_known_cache

run = CliRunner()


class Picture(NamedTuple):
    """An image of a made cache; the embedding of anything is drawn from its content, or text, and the seed."""

    sample_id: str
    content: str
    captions: tuple[str, ...]
    split: str = "train"


BASE = [Picture(f"p{number}", f"c{number}", (f"one {number}", f"two {number}")) for number in range(12)]


def vector(content: str, tilt: float, dim: int) -> Any:
    """A unit vector for a content; turned by ``tilt`` radians towards another one of its own."""
    rng = np.random.default_rng(list(content.encode()))
    first, second = rng.standard_normal((2, dim))
    first /= np.linalg.norm(first)
    second -= (second @ first) * first
    return (np.cos(tilt) * first + np.sin(tilt) * second / np.linalg.norm(second)).astype(np.float16)


def make(
    path: Path, pictures: list[Picture], tilt: float = 0.0, dim: int = 8, lost: tuple[int, ...] = (), **teacher: Any
) -> str:
    texts = [text for picture in pictures for text in picture.captions]
    owners = np.repeat(np.arange(len(pictures)), [len(picture.captions) for picture in pictures])
    tables = {
        SAMPLES: pa.table(
            {
                "row": np.arange(len(pictures)),
                "sample_id": [picture.sample_id for picture in pictures],
                "uri": [f"{picture.sample_id}.jpg" for picture in pictures],
                "offset": [-1] * len(pictures),
                "length": [-1] * len(pictures),
                "content_sha256": [picture.content for picture in pictures],
                "split": [picture.split for picture in pictures],
            }
        ),
        CAPTIONS: pa.table({"row": np.arange(len(texts)), "image_row": owners, "text": texts}),
        PROBLEMS: SCHEMAS[PROBLEMS].empty_table(),
    }
    identity = make_identity(len(pictures), len(texts), embed_dim=dim, **teacher)
    digests = {"samples_sha256": samples_sha256(tables[SAMPLES]), "captions_sha256": captions_sha256(tables[CAPTIONS])}
    identity = identity.model_copy(update={"dataset": identity.dataset.model_copy(update=digests)})
    layout = Layout(
        embed_dim=dim,
        image_rows=len(pictures),
        text_rows=len(texts),
        image_chunk_rows=4,
        text_chunk_rows=4,
        batch_rows=2,
    )
    plan_cache(str(path), identity, layout, Source(dataset="x:/y", image_root="/y"), tables, {"torch": "0"})
    writer = EmbeddingWriter(str(path))
    for ref in writer.pending():
        rows = ref.rows(layout)
        names = [pictures[row].content for row in rows] if ref.tower == "image" else [texts[row] for row in rows]
        arrays = {
            "embedding": np.stack([vector(name, tilt, dim) for name in names]),
            "norm": np.ones(len(rows), np.float32),
        }
        gone = []
        if ref.tower == "image":
            arrays["view"] = np.tile(np.array([0, 0, 32, 32, 0], np.float32), (len(rows), 1))
            for row in set(lost) & set(rows):
                gone.append(QuarantinedRow(row=row, sample_id=pictures[row].sample_id, reason="r", detail="d"))
                for values in arrays.values():
                    values[row - rows.start] = np.nan
        writer.write(ref, arrays, gone)
    writer.seal()
    return str(path)


def test_a_cache_is_the_same_as_its_copy_in_another_place(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", BASE), make(tmp_path / "b", BASE)
    assert cache_digest(a) == cache_digest(b)
    found = diff_caches(a, b)
    assert found.same
    assert found.images is not None
    assert found.captions is not None
    assert (found.images.compared, found.images.equal, found.captions.compared) == (12, 12, 24)
    done = run.invoke(app, ["diff", a, b])
    assert done.exit_code == 0
    assert done.stdout.splitlines()[0] == f"{a} -> {b}: the same"


def test_images_are_matched_by_content_and_then_by_name(tmp_path: Path) -> None:
    """One removed, one added, one with other bytes, one in another split, one with another caption; all moved."""
    changed = list(BASE)
    changed[2] = BASE[2]._replace(content="other bytes")
    changed[5] = BASE[5]._replace(split="test")
    changed[7] = BASE[7]._replace(captions=("one 7", "two seven"))
    changed[8] = BASE[8]._replace(captions=("one 8",))
    changed = [Picture("new", "n", ("new",)), *changed[1:]]
    changed = changed[::-1]
    found = diff_caches(make(tmp_path / "a", BASE), make(tmp_path / "b", changed))
    assert (found.images_added, found.images_removed, found.images_changed) == (1, 1, 4)
    assert (found.added, found.removed, found.images_moved) == (("new",), ("p0",), 11)
    assert {change.sample_id: change.what for change in found.changed} == {
        "p2": ("content",),
        "p5": ("split",),
        "p7": ("captions",),
        "p8": ("captions",),
    }
    assert [(change.row_a, change.row_b) for change in found.changed] == [(2, 9), (5, 6), (7, 4), (8, 3)]
    assert found.images is not None
    assert found.captions is not None
    # 11 in both, of which one has other bytes; captions of the nine whose captions are the same
    assert (found.images.compared, found.images.equal) == (10, 10)
    assert (found.captions.compared, found.captions.equal) == (16, 16)
    assert {each.field for each in found.identity} == {
        "dataset.captions",
        "dataset.captions_sha256",
        "dataset.samples_sha256",
    }
    assert not found.same


def test_renamed_images_are_the_same(tmp_path: Path) -> None:
    """A moved folder, two pictures that swapped names, and equal pictures: each is matched with one of its bytes."""
    before = [*BASE, *(Picture(f"twin{number}", "twin", (f"twin {number}",)) for number in range(3))]
    after = [picture._replace(sample_id=f"new/{picture.sample_id}") for picture in before]
    after[0], after[1] = before[0]._replace(content="c1"), before[1]._replace(content="c0")
    after[4] = after[4]._replace(content="other bytes")
    a, b = make(tmp_path / "a", before), make(tmp_path / "b", after)
    found = diff_caches(a, b)
    assert (found.images_renamed, found.images_added, found.images_removed) == (14, 1, 1)
    assert found.renamed[:3] == (("p0", "p1"), ("p1", "p0"), ("p2", "new/p2"))
    assert found.renamed[-1] == ("twin2", "new/twin2")
    # the swapped pictures kept the captions of their names
    assert [(change.sample_id, change.what) for change in found.changed] == [
        ("p0", ("captions",)),
        ("p1", ("captions",)),
    ]
    assert found.images is not None
    assert (found.images.compared, found.images.equal) == (14, 14)
    shown = run.invoke(app, ["diff", a, b]).stdout.splitlines()
    counts = "1 image added, 1 image removed, 14 images renamed, 2 images changed, 2 images in another row"
    assert shown[0].startswith(f"{a} -> {b}: {counts}; ")
    assert "  p2 -> new/p2" in shown


def test_tables_of_large_caches_are_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_cache.storage.format.tables.ROWS_PER_GROUP", 8)
    texts = [f"{number} " * 1000 for number in range(200)]
    a = make(tmp_path / "a", [Picture(f"p{number}", f"c{number}", (text,)) for number, text in enumerate(texts)])
    pool = pa.default_memory_pool()
    counted = pa.proxy_memory_pool(pool)
    pa.set_memory_pool(counted)
    try:
        assert diff_caches(a, a).same
    finally:
        pa.set_memory_pool(pool)
    assert counted.max_memory() < sum(map(len, texts)) / 2


def test_drift_is_the_cosine_of_the_two_rows(tmp_path: Path) -> None:
    a = make(tmp_path / "a", BASE)
    b = make(tmp_path / "b", BASE, tilt=0.1, weights_sha256="f" * 64, name="other")
    done = run.invoke(app, ["diff", a, b, "--json"])
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert [each["field"] for each in found["identity"]] == ["teacher.weights_sha256"]
    assert [(each["field"], each["a"], each["b"]) for each in found["names"]] == [("teacher.name", '"tiny"', '"other"')]
    assert found["images"]["cosine"]["mean"] == pytest.approx(np.cos(0.1), abs=2e-3)
    worst = found["images"]["worst"][0]
    by_hand = vector(f"c{worst['row_a']}", 0, 8).astype(float), vector(f"c{worst['row_a']}", 0.1, 8).astype(float)
    cosine = by_hand[0] @ by_hand[1] / np.linalg.norm(by_hand[0]) / np.linalg.norm(by_hand[1])
    assert worst["cosine"] == pytest.approx(cosine, abs=1e-6)
    assert worst["sample_id"] == f"p{worst['row_a']}"
    assert found["images"]["worst"] == sorted(found["images"]["worst"], key=lambda row: row["cosine"])
    shown = run.invoke(app, ["diff", a, b]).stdout.splitlines()
    assert shown[0] == f"{a} -> {b}: embeddings of all 12 images and 24 captions differ"
    assert shown[1].startswith("embeddings of 12 images: 0 equal bit for bit; cosine mean 0.99")
    # of a digest 12 digits for people, the whole in JSON
    assert any(re.fullmatch(r'identity: teacher\.weights_sha256: "\w{12}" -> "f{12}"', line) for line in shown)
    assert found["identity"][0]["b"] == f'"{"f" * 64}"'


def test_drift_holds_a_block_of_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = make(tmp_path / "a", BASE), make(tmp_path / "b", [BASE[0], *BASE[:0:-1]], tilt=0.1)
    whole = diff_caches(a, b)
    asked: list[int] = []
    take = EmbeddingReader.take

    def noted(self: EmbeddingReader, tower: Tower, rows: Any, view: Any = 0, array: str = "embedding") -> Any:
        asked.append(len(rows))
        return take(self, tower, rows, view, array)

    monkeypatch.setattr(EmbeddingReader, "take", noted)
    monkeypatch.setattr("teacher_cache.storage.look.diff._BLOCK_ROWS", 5)
    assert diff_caches(a, b) == whole
    assert asked == [5, 5, 5, 5, 2, 2, *[5] * 8, 4, 4]  # 12 images and 24 captions of both


def test_quarantined_rows_are_left_out_and_large_caches_drawn_from(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", BASE, lost=(3,)), make(tmp_path / "b", BASE, lost=(6,))
    found = diff_caches(a, b)
    assert found.images is not None
    assert (found.images.compared, found.sampled) == (10, False)
    some = diff_caches(a, b, most=4)
    assert some.images is not None
    assert some.captions is not None
    assert (some.images.compared, some.captions.compared, some.sampled) == (4, 8, True)


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    a = make(tmp_path / "a", BASE)
    wide = diff_caches(a, make(tmp_path / "wide", BASE, dim=16))
    assert (wide.images, wide.not_compared) == (None, "the embeddings are 8 and 16 wide")
    assert {each.field for each in wide.layout} == {"embed_dim"}
    plan_known_cache(tmp_path / "part")
    part = diff_caches(a, str(tmp_path / "part"))
    assert part.not_compared is not None
    assert "0 of 10 chunks are there. Run the same precompute command again" in part.not_compared
    empty = make(tmp_path / "empty", BASE, lost=tuple(range(12)))
    none = "no image of the same bytes has an embedding of view 0 in both"
    assert diff_caches(empty, empty).not_compared == none
    # planned and made are not the same cache, though they are of the same
    make_known_cache(tmp_path / "made")
    assert not diff_caches(str(tmp_path / "made"), str(tmp_path / "part")).same


def test_an_embedding_that_only_one_has_is_a_difference(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", BASE), make(tmp_path / "b", BASE, lost=(3,))
    for pair in ((a, b), (b, a)):
        found = diff_caches(*pair)
        assert (found.same, found.differs, found.images_in_one, found.images_changed) == (False, True, 1, 0)
    done = run.invoke(app, ["diff", a, b])
    assert done.exit_code == 1
    in_one, other_bytes = "1 image with an embedding in only one of the two caches", "1 chunk with different bytes"
    shown = done.stdout.splitlines()
    assert shown[0] == f"{a} -> {b}: embeddings of all 11 images and 22 captions are equal"
    assert shown[1:3] == [in_one, f"{other_bytes}, over all views, norms and crops"]
    both = diff_caches(b, make(tmp_path / "c", BASE, lost=(3,)))
    assert (both.same, both.differs, both.images_in_one) == (True, False, 0)


def test_caches_that_were_not_compared_are_not_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        plan_known_cache(tmp_path / name)
    done = run.invoke(app, ["diff", str(tmp_path / "a"), str(tmp_path / "b")])
    assert done.exit_code == 1
    assert "embeddings not compared: " in done.stdout
    assert done.stdout.splitlines()[0].endswith(": nothing that was compared differs")
    found = diff_caches(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (found.same, found.differs) == (False, False)


def test_a_view_that_neither_has_is_refused(tmp_path: Path) -> None:
    a = make(tmp_path / "a", BASE)
    with pytest.raises(UsageError, match="has a view 1; views 0 to 0 can be compared"):
        diff_caches(a, a, view=1)


def test_a_cache_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = run.invoke(app, ["diff", make(tmp_path / "a", BASE), str(tmp_path / "b")])
    assert done.exit_code == 1
    assert "no cache here" in str(done.exception)


def test_another_view_or_norm_is_a_difference(tmp_path: Path) -> None:

    def view_of(name: str, ref: ChunkRef, arrays: dict[str, Any]) -> None:
        arrays["norm"] = arrays["norm"] * (2 if ref.view == 2 and name == "c" else 1)
        arrays["embedding"] = np.roll(arrays["embedding"], ref.view, axis=1)

    for name in ("a", "b", "c"):
        plan_known_cache(tmp_path / name, views=3)
        finish_known_cache(tmp_path / name, change=partial(view_of, name))
    a, b, c = (str(tmp_path / name) for name in ("a", "b", "c"))
    alike = diff_caches(a, b)
    assert (alike.same, alike.differs, alike.other_chunks) == (True, False, 0)
    few = diff_caches(a, b, most=3)  # of which the rows that were not drawn are known by their digests
    assert (few.same, few.sampled) == (True, True)
    other = diff_caches(a, c)
    assert (other.same, other.differs, other.other_chunks) == (False, True, 3)
    assert other.images is not None
    assert other.images.equal == other.images.compared == 10
    done = CliRunner().invoke(app, ["diff", a, c])
    assert done.exit_code == 1
    assert done.stdout.splitlines()[1] == "3 chunks with different bytes, over all views, norms and crops"


def test_the_answer_comes_first(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", BASE[:-1]), make(tmp_path / "b", BASE)
    shown = run.invoke(app, ["diff", a, b]).stdout.splitlines()
    others = "embeddings of the other 11 images and 22 captions are equal"
    assert shown[:2] == [f"{a} -> {b}: 1 image added; {others}", "  + p11"]
    assert shown[-1].startswith("manifests: ")
