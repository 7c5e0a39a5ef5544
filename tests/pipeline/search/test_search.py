"""Answers of an index: those of exact search, of the right cache, by a model of its space, from proven files."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from teacher_cache.pipeline.cli.app import app
from teacher_cache.pipeline.search.approximate import ApproximateIndex
from teacher_cache.pipeline.search.build import IndexedRows
from teacher_cache.pipeline.search.query import SearchIndex
from teacher_cache.storage.errors import CacheCorruptError, CacheMismatchError, UsageError
from tests.conftest import make_model_folder
from tests.pipeline.search.conftest import CAPTIONS, IMAGES, LOST, make_paired_cache


def answer(*words: str) -> Any:
    done = CliRunner().invoke(app, ["search", *words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("answers", ["image", "text"])
def test_answers_are_the_nearest_rows_by_exact_cosine(paired_index: Path, answers: Any) -> None:
    index = SearchIndex(paired_index)
    rows = IndexedRows(index.reader)
    asks: Any = "text" if answers == "image" else "image"
    every = rows.embeddings(answers, np.arange(len(rows.rows[answers]))).astype(np.float64)
    hits = 0
    for query in rows.embeddings(asks, np.arange(0, 200, 10)):
        near = index.nearest(answers, query, 5)
        cosines = every @ query
        assert [match.cosine for match in near] == sorted((match.cosine for match in near), reverse=True)
        for match in near:
            at = int(np.flatnonzero(rows.rows[answers] == match.row)[0])
            assert match.cosine == pytest.approx(cosines[at])
            assert match.sample_id == f"img-{match.image_row}"
            first = 2 * match.image_row if answers == "image" else match.row
            assert match.caption == f"img {first}"
            assert match.image_row not in LOST
        hits += [match.cosine for match in near] == pytest.approx(np.sort(cosines)[::-1][:5])
    assert hits >= 18


def test_the_teacher_finds_its_own_caption_and_picture(
    photo_index: Path, photo_cache: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    """A caption, and a picture of the cache, are embedded as the cache holds them."""
    index = SearchIndex(photo_index)
    teacher = f"local-dir:{tiny_teacher}"
    text = index.reader.captions["text"][6].as_py()
    found = answer(str(photo_index), text, "--teacher", teacher, "--count", "3")
    stored = index.nearest("image", IndexedRows(index.reader).embeddings("text", np.array([6]))[0], 3)
    assert [match["row"] for match in found["matches"]] == [match.row for match in stored]
    assert [match["cosine"] for match in found["matches"]] == pytest.approx(
        [match.cosine for match in stored], abs=1e-3
    )
    assert (found["answers"], len(found["matches"])) == ("image", 3)
    root = Path(index.reader.manifest.source.image_root)
    picture = root / index.reader.samples["uri"][4].as_py()
    found = answer(str(photo_index), str(picture), "--teacher", teacher)
    stored = index.nearest("text", index.image_vector(4), 10)
    assert [match["row"] for match in found["matches"]] == [match.row for match in stored]
    table = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["search", str(photo_index), text, "--teacher", teacher])
    assert table.stdout.startswith(f"images nearest to {text}, by teacher local-dir:")
    assert len(table.stdout.splitlines()) >= 12


def test_a_student_of_the_teacher_answers(
    photo_index: Path, tiny_deployment: Path, photo_student: Path, tmp_path: Path
) -> None:
    with pytest.raises(CacheMismatchError, match=r"learned from teacher 'tiny teacher', the index .* 'local-dir:"):
        answer(str(photo_index), "a cat", "--student", str(tiny_deployment))
    found = answer(str(photo_index), "a cat", "--student", str(photo_student))
    assert (found["model"], len(found["matches"])) == ("student tiny", 10)
    student = shutil.copytree(photo_student, tmp_path / "student")
    record = json.loads((student / "deploy.json").read_text())
    record["embed_dim"] = 24
    (student / "deploy.json").write_text(json.dumps(record))
    with pytest.raises(CacheMismatchError, match=r"the student tiny is 24 wide, the index .* 16\. Use"):
        answer(str(photo_index), "a cat", "--student", str(student))


def test_another_teacher_is_refused_with_both_values(photo_index: Path, tmp_path: Path) -> None:
    other = make_model_folder(tmp_path / "other", seed=9)
    with pytest.raises(CacheMismatchError, match=r"teacher\.weights_sha256"):
        answer(str(photo_index), "a cat", "--teacher", f"local-dir:{other}")


def test_an_index_of_another_or_a_changed_cache_is_refused(paired_index: Path, tmp_path: Path) -> None:
    other = make_paired_cache(tmp_path / "other.cache", name="pic")
    digest = SearchIndex(paired_index).reader.manifest.digest
    with pytest.raises(
        CacheMismatchError, match=rf"manifest {digest[:12]}, but .*other\.cache has manifest [0-9a-f]{{12}}"
    ):
        SearchIndex(paired_index, str(other))
    moved = shutil.copytree(SearchIndex(paired_index).reader.location, tmp_path / "moved.cache")
    assert SearchIndex(paired_index, str(moved)).reader.location == str(moved)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "image.faiss",
            lambda data: data[:-1] + bytes([data[-1] ^ 1]),
            r"image\.faiss: sha256 [0-9a-f]{12}, the record",
        ),
        ("text.faiss", lambda data: data + b"x", r"text\.faiss: [\d,]+ bytes, the record says sha256"),
        ("image.faiss", None, r"image\.faiss: missing"),
        ("search.json", lambda data: data.replace(b'"rows": 298', b'"rows": 99999999999'), "rows"),
        ("search.json", lambda data: data.replace(b'"effort": ', b'"effort": 9999999'), "effort"),
        ("search.json", lambda data: data.replace(b"{", b'{"more": 1,', 1), "more"),
        ("search.json", lambda data: b"{", "search.json"),
    ],
)
def test_a_file_that_is_not_the_written_one_never_reaches_faiss(
    name: str, change: Any, message: str, paired_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(paired_index, tmp_path / "index")
    if change is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(change((copy / name).read_bytes()))
    loaded = []
    load = ApproximateIndex.loaded
    monkeypatch.setattr(ApproximateIndex, "loaded", lambda data, *rest: (loaded.append(data), load(data, *rest))[1])
    with pytest.raises(CacheCorruptError, match=message):
        SearchIndex(copy)
    if name != "search.json":
        assert (copy / name).exists() is False or (copy / name).read_bytes() not in loaded


def test_files_that_belong_to_other_rows_are_refused(paired_index: Path) -> None:
    data = (paired_index / "image.faiss").read_bytes()
    for rows, dim in ((IMAGES, 8), (IMAGES - len(LOST), 9), (CAPTIONS, 8)):
        with pytest.raises(
            CacheCorruptError, match=rf"holds 298 rows of width 8, metric 0; {rows} rows of width {dim}"
        ):
            ApproximateIndex.loaded(data, rows, dim, 1)
    with pytest.raises(CacheCorruptError, match="cannot read the index"):
        ApproximateIndex.loaded(data[:100], 298, 8, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("CACHE cat", "is a cache: --cache "),
        ("nothing cat", r"no search index here"),
        ("INDEX nothing.jpg", r"nothing\.jpg is not there"),
        ("INDEX", "QUERY is missing"),
        ("INDEX cat --port 1", "--port has no effect without --serve"),
        ("INDEX cat --serve", "--serve takes queries on its page"),
        ("INDEX ''", "the query is empty"),
        ("INDEX cat --student CACHE", "is a cache: --cache "),
        ("INDEX cat --student x --teacher y", "--teacher has no effect with --student"),
    ],
)
def test_mistakes_are_named(
    words: str, message: str, paired_index: Path, paired_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = words.replace("CACHE", str(paired_cache)).replace("INDEX", str(paired_index))
    done = CliRunner().invoke(app, ["search", *shlex.split(typed)])
    assert done.exit_code != 0
    assert isinstance(done.exception, UsageError | SystemExit)
    assert re.search(message, f"{done.exception} {done.output}")
