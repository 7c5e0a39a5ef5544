"""Rows of a foreign folder find their images and captions, or are counted; what does not fit is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from teacher_cache.pipeline.precompute.foreign.clip_retrieval_folder import (
    ForeignFolder,
    ForeignRows,
    match_rows,
    normalised,
)
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.format.row_rules import wrong_rows
from tests.conftest import known_row
from tests.pipeline.precompute.foreign_folder import write_folder

Rows = np.ndarray[Any, Any]


def rows(count: int, tower: str = "image") -> Rows:
    return np.stack([known_row(tower, row) for row in range(count)])


def samples(*uris: str, tar: str = "", ids: tuple[str, ...] = ()) -> pa.Table:
    """Files, or members of a tar."""
    return pa.table(
        {
            "sample_id": list(ids or uris),
            "uri": [tar or uri for uri in uris],
            "offset": [512 if tar else -1] * len(uris),
        }
    )


def captions(*texts: str) -> pa.Table:
    return pa.table({"text": pa.array(texts, pa.string())})


def match(folder: Path, images: pa.Table, texts: pa.Table | None = None, root: str = "/data") -> ForeignRows:
    return match_rows(ForeignFolder(str(folder)), images, captions() if texts is None else texts, root)


def images_of(folder: Path, images: pa.Table) -> list[int]:
    return list(match(folder, images).sources["image"].tolist())


def test_a_path_is_the_datasets_own_or_the_whole_one(tmp_path: Path) -> None:
    paths = ["/data/b/1.jpg", "2.jpg", "/old/b/3.jpg", "b/1.jpg", "1.jpg"]
    known = match(write_folder(tmp_path / "f", paths, rows(5)), samples("b/1.jpg", "2.jpg", "b/3.jpg"))
    # nobody knows whether /old/b/3.jpg is b/3.jpg, and two different rows claim to be b/1.jpg
    assert known.sources["image"].tolist() == [-1, 1, -1]
    assert (known.counts.images, known.counts.strange, known.counts.ambiguous) == (1, 2, 1)


def test_a_repeated_path_counts_if_its_rows_are_equal(tmp_path: Path) -> None:
    """Our export repeats an image for each caption; keys of tars repeat for other images."""
    image = rows(6)
    image[3] = image[0]
    folder = write_folder(tmp_path / "f", ["s0", "s1", "s2", "s0", "s1", "s2"], image, rows_per_file=4)
    known = match(folder, samples("s0", "s1", "s2", tar="a.tar"))
    assert known.sources["image"].tolist() == [0, -1, -1]
    assert (known.counts.ambiguous, known.counts.strange) == (2, 0)


def test_members_of_tars_are_found_by_key(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", ["000", "b/001", "002"], rows(3))
    assert images_of(folder, samples("b/001", "000", tar="a.tar")) == [1, 0]
    # named with their tar, and a key that two tars have
    named = samples("000", "b/001", tar="t/a.tar", ids=("t/a.tar/000", "t/a.tar/b/001"))
    twice = samples("002", tar="t/b.tar", ids=("t/b.tar/002",)), samples("002", tar="t/c.tar", ids=("t/c.tar/002",))
    assert images_of(folder, pa.concat_tables([named, *twice])) == [0, 1, -1, -1]


def test_sample_ids_of_an_export_come_first(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", ["/x/1.jpg", "/x/2.jpg", "/data/3.jpg"], rows(3))
    path = folder / "metadata/metadata_0.parquet"
    pq.write_table(pq.read_table(path).append_column("sample_id", pa.array(["two", "one", None])), path)
    known = match(folder, samples("1.jpg", "2.jpg", "3.jpg", ids=("one", "two", "three")))
    assert known.sources["image"].tolist() == [1, 0, 2]


def test_captions_are_found_by_their_text(tmp_path: Path) -> None:
    texts = ["A dog.", " A cat.\n", "a dog.", "", "A dog."]
    folder = write_folder(tmp_path / "f", list("abcde"), None, texts, rows(5, "text"), rows_per_file=2)
    known = match(folder, samples("q.jpg"), captions("A cat.", "A dog.", "A dog.", "A dog", "a dog."))
    assert known.sources["text"].tolist() == [1, 0, 0, -1, 2]
    assert known.sources["image"].tolist() == [-1]
    assert (known.counts.captions, known.counts.images) == (4, 0)


def test_parts_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    paths = [f"{row}.jpg" for row in range(24)]
    for pad in (0, 2, 5):
        folder = ForeignFolder(str(write_folder(tmp_path / str(pad), paths, rows(24), rows_per_file=2, pad=pad)))
        assert (folder.rows, folder.dim, folder.towers) == (24, 8, ("image",))
        wanted = np.array([23, 0, 5, 19, 5])
        embedding, norm, usable = folder.take("image", wanted)
        np.testing.assert_array_equal(embedding, rows(24)[wanted])
        assert norm.tolist() == [1] * 5
        assert usable.all()
        assert images_of(Path(folder.location), samples(*paths)) == list(range(24))


def test_rows_that_are_no_numbers_count_as_not_there(tmp_path: Path) -> None:
    for dtype in (np.float16, np.float32):
        image = rows(6).astype(dtype)
        image[1, 3], image[2], image[4, 0] = np.nan, 0, np.inf
        folder = write_folder(tmp_path / np.dtype(dtype).name, [f"{row}.jpg" for row in range(6)], image)
        known = match(folder, samples(*(f"{row}.jpg" for row in range(6))))
        assert known.sources["image"].tolist() == [0, -1, -1, 3, -1, 5]
        assert (known.counts.images, known.counts.unusable) == (3, 3)
        there, embedding, norm = known.of("image", np.arange(2, 6))
        assert there.tolist() == [False, True, False, True]
        np.testing.assert_array_equal(embedding, rows(6)[[3, 5]])
        np.testing.assert_allclose(norm, 1, atol=1e-3)


def test_other_rows_or_other_matches_have_another_digest(tmp_path: Path) -> None:
    paths, image = ["0.jpg", "1.jpg", "2.jpg"], rows(3)
    one = match(write_folder(tmp_path / "a", paths, image), samples(*paths)).sha256
    assert (
        match(write_folder(tmp_path / "b", [f"/data/{path}" for path in paths], image, pad=7), samples(*paths)).sha256
        == one
    )
    assert match(write_folder(tmp_path / "c", paths[:2], image[:2]), samples(*paths)).sha256 != one
    assert match(write_folder(tmp_path / "d", paths[::-1], image), samples(*paths)).sha256 != one
    image[2, 0] = np.nextafter(image[2, 0], np.float16(9))
    assert match(write_folder(tmp_path / "e", paths, image), samples(*paths)).sha256 != one


@given(
    st.sampled_from([np.float16, np.float32]).flatmap(
        lambda dtype: arrays.arrays(
            dtype,
            st.tuples(st.integers(1, 4), st.integers(1, 5)),
            elements=st.floats(width=8 * np.dtype(dtype).itemsize),
        )
    )
)
def test_whatever_is_usable_can_be_written(values: Rows) -> None:
    embedding, norm, usable = normalised(values)
    assert embedding.dtype == np.float16
    kept = {"embedding": embedding[usable], "norm": norm[usable]}
    assert not usable.any() or list(wrong_rows(range(int(usable.sum())), kept, ())) == []
    for row in np.flatnonzero(usable):
        raw = embedding[row].astype(np.float64) * float(norm[row])
        length = math.hypot(*values[row].astype(np.float64))
        np.testing.assert_allclose(raw, values[row].astype(np.float64), atol=length * 2**-10)
    for row in np.flatnonzero(~usable):
        length = math.hypot(*values[row].astype(np.float64))
        assert not 1.2e-38 < length < 3.4e38


def test_unit_rows_of_float16_keep_their_bits() -> None:
    image = rows(50)
    embedding, norm, _ = normalised(image)
    np.testing.assert_array_equal(embedding, image)
    assert set(norm.tolist()) == {1.0}
    renormalised = normalised(image.astype(np.float32))[0]
    assert (renormalised != image).any()  # why: once more normalised they would be others


def break_part(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)


def save(name: str, values: Rows) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / "img_emb" / name, values)


def put(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(data)


def other_columns(folder: Path) -> None:
    pq.write_table(pa.table({"url": ["a", "b"]}), folder / "metadata/metadata_1.parquet")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "metadata/metadata_1.parquet").unlink(), r"part 1 has only one of metadata and img_emb \(1 "),
        (lambda f: (f / "text_emb/text_emb_0.npy").unlink(), r"part 0 has only one of metadata and text_emb"),
        (save("img_emb_01.npy", rows(2)), r"img_emb_1.npy: img_emb_01.npy has this number too"),
        (save("img_emb_1.npy", rows(3)), r"img_emb_1.npy: 3 rows, metadata_1.parquet has 2"),
        (save("img_emb_1.npy", rows(2)[:, :4]), r"rows of several widths, \[4, 8\]"),
        (save("img_emb_1.npy", rows(2).astype(np.int16)), r"int16 of shape \(2, 8\); float16 or float32 \(rows, dim"),
        (save("img_emb_1.npy", rows(2)[0]), r"float16 of shape \(8,\)"),
        (put("img_emb/img_emb_1.npy", b"no npy"), r"img_emb_1.npy: cannot be read as npy"),
        (put("img_emb/img_emb_1.npy", b"PK\3\4 an archive of arrays"), r"img_emb_1.npy: cannot be read as npy"),
        (put("img_emb/img_emb_1.npy", b"\x93NUMPY\1\0"), r"img_emb_1.npy: cannot be read as npy"),
        (put("metadata/metadata_1.parquet", b"PAR1"), r"metadata_1.parquet: cannot be read as parquet"),
        (other_columns, r"metadata_1.parquet: no column 'image_path', which says what .*; its columns are url"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, change: Callable[[Path], Any], said: str) -> None:
    folder = write_folder(tmp_path / "f", list("abcd"), rows(4), list("ABCD"), rows(4, "text"), rows_per_file=2)
    ForeignFolder(str(folder))
    change(folder)
    with pytest.raises(UsageError, match=said):
        ForeignFolder(str(folder))


def test_what_is_no_such_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"img_emb_N.npy or text_emb/text_emb_N.npy are wanted, .* found nothing"):
        ForeignFolder(str(tmp_path))
    with pytest.raises(UsageError, match="is no folder"):
        ForeignFolder(str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match=r"read from a local disk. Download it first"):
        ForeignFolder("s3://bucket/f")


def test_an_array_of_objects_is_not_loaded(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", list("ab"), rows(2))
    np.save(folder / "img_emb/img_emb_0.npy", np.array([[print], [print]], object), allow_pickle=True)
    with pytest.raises(UsageError, match=r"img_emb_0.npy: cannot be read as npy: "):
        ForeignFolder(str(folder))
