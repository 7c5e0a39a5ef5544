"""A dataset that grew, shrank and was edited: only what is new meets the teacher, the rest is copied bit for bit."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from teacher_cache.pipeline.cli.app import app
from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.pipeline.precompute.encode import encode_chunks
from teacher_cache.pipeline.precompute.forecast import forecast
from teacher_cache.pipeline.precompute.foreign.import_folder import import_rows
from teacher_cache.pipeline.precompute.plan import plan_precompute
from teacher_cache.pipeline.precompute.repair import repair
from teacher_cache.pipeline.precompute.reuse import CachedRows, count_known
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.precompute import ImportConfig, PrecomputeConfig
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheIncompleteError, CacheMismatchError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.commits import all_chunks
from teacher_cache.storage.format.journal import read_cost
from teacher_cache.storage.format.manifest_file import read_manifest
from teacher_cache.storage.look.export import export_rows
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import cache_digest, make_model_folder, write_photos
from tests.pipeline.precompute.conftest import make_config

IMAGES = 48
ADDED = 7
REMOVED = (3, 20)
EDITED = 11
BROKEN = 30


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset and its cache; the dataset as it was later, and with images behind the others alone."""
    home = tmp_path_factory.mktemp("reuse")
    make_model_folder(home / "teacher")
    write_photos(home / "before", IMAGES)
    image = home / "before" / "images" / f"{BROKEN:04d}.jpg"
    image.write_bytes(image.read_bytes()[:200])
    precompute(settings(home, "before", "before.cache"))
    shutil.copytree(home / "before", home / "after")
    write_photos(home / "more", ADDED, first=500)
    for added in (home / "more" / "images").iterdir():
        # before, between and behind those that are there, so that every row moves
        name = f"{int(added.stem) % 3 * 24:04d}-{added.name}"
        shutil.copy(added, home / "after" / "images" / name)
    table = home / "after" / "captions.txt"
    lines = table.read_text().splitlines()
    lines = [line for line in lines if not line.startswith(tuple(f"{number:04d}.jpg" for number in REMOVED))]
    lines = [line.replace(f"number {EDITED} again", "another text") for line in lines]
    names = sorted(path.name for path in (home / "after" / "images").iterdir() if "-" in path.name)
    lines += [f"{name},{name} is new" for name in names]
    table.write_text("\n".join(lines) + "\n")
    train = home / "after" / "train.txt"
    kept = [name for name in train.read_text().split() if name not in {f"{number:04d}.jpg" for number in REMOVED}]
    train.write_text("\n".join([*kept, *names]) + "\n")
    for number in REMOVED:
        (home / "after" / "images" / f"{number:04d}.jpg").unlink()
    write_photos(home / "behind", IMAGES + ADDED)
    shutil.copy(image, home / "behind" / "images" / image.name)
    return home


def settings(home: Path, dataset: str, cache: str, **more: Any) -> PrecomputeConfig:
    return make_config(home / dataset, home / "teacher", home / cache, **{"batch_size": 8, "chunk_rows": None, **more})


def rows_by_content(cache: Path, views: int = 1) -> dict[str, tuple[bytes, ...]]:
    """Every stored number of each image and caption that has an embedding, by digest or text."""
    reader = EmbeddingReader(str(cache))
    found = {}
    digests = reader.samples["content_sha256"].to_pylist()
    for row in reader.image_rows():
        at = np.array([row])
        found[digests[row]] = tuple(
            reader.take("image", at, view, name).tobytes()
            for view in range(views)
            for name in ("embedding", "norm", "view")
        )
    for row, text in enumerate(reader.captions["text"].to_pylist()):
        found[text] = tuple(reader.take("text", np.array([row]), 0, name).tobytes() for name in ("embedding", "norm"))
    return found


def test_only_what_is_new_meets_the_teacher(home: Path, tmp_path: Path, taught: Counter[str]) -> None:
    old = EmbeddingReader(str(home / "before.cache"))
    digest, first = old.manifest.digest, old.take("image", np.array([0]))
    made = precompute(settings(home, "after", str(tmp_path / "c"), reuse=str(home / "before.cache")))
    # the broken one is not copied: it is looked at again, as a row of a batch
    assert taught == {"image": ADDED + 1, "text": ADDED + 1}
    assert made.images == IMAGES + ADDED - len(REMOVED)
    assert (made.quarantined, made.rows_reused) == (1, {"image": IMAGES - 1 - len(REMOVED), "text": 2 * IMAGES - 5})
    assert verify_cache(str(tmp_path / "c")).ok
    # of the teacher's speed only what it saw counts
    files, seen = open_files(str(tmp_path / "c")), Counter[str]()
    for ref in all_chunks(read_manifest(files).layout):
        cost = read_cost(files, ref.name)
        assert cost is not None
        seen[ref.tower] += cost.rows if cost.encoded_rows is None else cost.encoded_rows
    assert seen == taught

    before, after = rows_by_content(home / "before.cache"), rows_by_content(tmp_path / "c")
    shared = before.keys() & after.keys()
    assert len(shared) == IMAGES - 1 - len(REMOVED) + 2 * IMAGES - 5
    assert all(before[name] == after[name] for name in shared)
    assert len(after.keys() - shared) == 2 * ADDED + 1

    # whoever reads the earlier state goes on reading it
    assert EmbeddingReader(str(home / "before.cache")).manifest.digest == digest
    assert np.array_equal(old.take("image", np.array([0])), first)


def test_it_is_the_cache_that_encoding_all_of_it_gives(home: Path, tmp_path: Path) -> None:
    """Identity and tables are equal, each row to the rounding of another batch."""
    precompute(settings(home, "after", str(tmp_path / "grown"), reuse=str(home / "before.cache")))
    precompute(settings(home, "after", str(tmp_path / "fresh")))
    grown, fresh = EmbeddingReader(str(tmp_path / "grown")), EmbeddingReader(str(tmp_path / "fresh"))
    assert grown.manifest.identity_digest == fresh.manifest.identity_digest
    assert grown.samples == fresh.samples
    assert grown.captions == fresh.captions
    rows = grown.image_rows()
    assert np.array_equal(rows, fresh.image_rows())
    for tower, wanted in (("image", rows), ("text", np.arange(fresh.captions.num_rows))):
        left, right = (each.take(tower, wanted).astype(np.float64) for each in (grown, fresh))  # type: ignore[arg-type]
        assert np.abs(left - right).max() <= 2**-10  # float16 of numbers up to 1, twice rounded
    assert np.array_equal(grown.take("image", rows, 0, "view"), fresh.take("image", rows, 0, "view"))


def test_views_are_copied_where_they_were_drawn_alike(home: Path, tmp_path: Path, taught: Counter[str]) -> None:
    precompute(settings(home, "before", str(tmp_path / "old"), views=2))
    taught.clear()
    precompute(settings(home, "after", str(tmp_path / "new"), views=3, reuse=str(tmp_path / "old")))
    everything = IMAGES + ADDED - len(REMOVED)
    assert taught["image"] == 2 * (ADDED + 1) + everything  # the third view is new for all
    before, after = rows_by_content(tmp_path / "old", 2), rows_by_content(tmp_path / "new", 2)
    assert all(before[name] == after[name] for name in before.keys() & after.keys())
    taught.clear()
    precompute(settings(home, "after", str(tmp_path / "other"), views=2, view_seed=9, reuse=str(tmp_path / "old")))
    assert taught["image"] == ADDED + 1 + everything


@pytest.mark.parametrize(("dtype", "dataset"), [("float16", "after"), ("int8", "behind")])
def test_a_forecast_says_which_rows_meet_the_teacher_and_prices_them_alone(
    home: Path, tmp_path: Path, taught: Counter[str], dtype: str, dataset: str
) -> None:
    """Of all views, of a cache a third of which is there."""
    old = {"dtype": dtype, "views": 2, "chunk_rows": 8}
    precompute(settings(home, "before", str(tmp_path / "old"), **old))
    asked = settings(home, dataset, str(tmp_path / "new"), reuse=str(tmp_path / "old"), **{**old, "views": 3})
    teacher = load_teacher(asked.teacher, device="cpu")
    encode_chunks(asked, teacher, plan_precompute(asked, teacher)[::3])
    before = cache_digest(tmp_path / "new")

    taught.clear()
    found = forecast(asked, probe=8)
    assert taught == {"image": 2 * 8, "text": 2 * 8}  # the probe's batch, to warm up and to be timed
    assert found.image.teacher_seconds_per_row > 0
    assert cache_digest(tmp_path / "new") == before
    assert found.reuse == asked.reuse
    everything = found.images * 3 + found.captions
    assert found.committed_rows + sum(found.rows_reused.values()) + sum(found.rows_to_encode.values()) == everything
    assert min(found.rows_reused.values()) > 0
    left = found.rows_to_encode
    expected = left["image"] * found.image.seconds_per_row + left["text"] * found.text.seconds_per_row
    assert found.encode_seconds == pytest.approx(expected)

    taught.clear()
    precompute(asked)
    assert taught == left
    assert not any(forecast(asked, probe=8).rows_to_encode.values())


def test_the_plan_command_says_it_and_refuses_what_precompute_refuses(home: Path, tmp_path: Path) -> None:
    asked = settings(home, "after", str(tmp_path / "c"), reuse=str(home / "before.cache"))
    names = ("dataset", "teacher", "cache", "reuse", "device")
    plan = ["precompute", "--dry-run", *(f"--{name}={getattr(asked, name)}" for name in names)]
    images, captions = IMAGES - 1 - len(REMOVED), 2 * IMAGES - 5
    said = f"from {asked.reuse}: {images} images and {captions} captions copied, 8 images and 8 captions to encode\n"
    assert f"reuse      {said}" in CliRunner().invoke(app, plan).stdout
    assert "\nreuse " not in CliRunner().invoke(app, [flag for flag in plan if "--reuse" not in flag]).stdout
    refused = CliRunner().invoke(app, [*plan, "--dtype", "int8"])
    assert isinstance(refused.exception, CacheMismatchError)
    assert "ask for --dtype float16 as it has them" in str(refused.exception)
    # what is there must be of these very images: precompute would refuse others
    precompute(asked)
    shutil.copytree(home / "after", tmp_path / "edited")
    shutil.copy(home / "after" / "images" / "0000.jpg", tmp_path / "edited" / "images" / "0001.jpg")
    edited = settings(tmp_path, "edited", asked.cache, teacher=asked.teacher, reuse=asked.reuse)
    with pytest.raises(CacheMismatchError, match=r"1 image with other bytes, the first: 0001.jpg"):
        forecast(edited, probe=4)


def test_quarantine_is_looked_for_once_in_each_view(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many chunks there are: each time all commits are looked through."""
    location = str(tmp_path / "two")
    precompute(settings(home, "before", location, views=2))
    reader = EmbeddingReader(location)
    known = CachedRows(
        location,
        reader.identity,
        lambda table, name: getattr(reader, table)[name],
    )
    looked: Counter[int] = Counter()
    quarantined_in = EmbeddingReader.quarantined_in

    def counted(self: EmbeddingReader, view: int) -> Any:
        looked[view] += 1
        return quarantined_in(self, view)

    monkeypatch.setattr(EmbeddingReader, "quarantined_in", counted)
    layout = reader.manifest.layout.model_copy(update={"image_chunk_rows": 4, "text_chunk_rows": 4})
    assert count_known(known, layout, all_chunks(layout)) == {"image": 2 * (IMAGES - 1), "text": 2 * IMAGES}
    assert looked == {0: 1, 1: 1}


def test_plan_and_precompute_refuse_imported_rows_in_a_cache_begun_without_them(home: Path, tmp_path: Path) -> None:
    export_rows(str(home / "before.cache"), str(tmp_path / "export"), captions="all")
    imported = settings(home, "before", str(tmp_path / "imported"))
    named = {name: getattr(imported, name) for name in ("dataset", "teacher", "cache", "batch_size", "device")}
    import_rows(ImportConfig(folder=str(tmp_path / "export"), **named))
    begun = settings(home, "after", str(tmp_path / "begun"))
    teacher = load_teacher(begun.teacher, device="cpu")
    encode_chunks(begun, teacher, plan_precompute(begun, teacher)[:1])
    asked = begun.model_copy(update={"reuse": imported.cache})
    before = cache_digest(tmp_path / "begun")
    with pytest.raises(CacheMismatchError, match=r"begun: was begun without the rows of .*imported, of which some"):
        forecast(asked, probe=4)
    with pytest.raises(CacheMismatchError, match=r"begun: was begun without the rows of .*imported, of which some"):
        plan_precompute(asked, teacher)
    assert cache_digest(tmp_path / "begun") == before
    fresh = asked.model_copy(update={"cache": str(tmp_path / "fresh")})
    assert min(forecast(fresh, probe=4).rows_reused.values()) > 0
    # begun with them, or finished, it is theirs
    plan_precompute(fresh, teacher)
    # and is finished as it was begun, though some of its rows were imported once
    with pytest.raises(CacheIncompleteError, match="Run the same precompute command again"):
        EmbeddingReader(fresh.cache)
    assert min(forecast(fresh, probe=4).rows_reused.values()) > 0
    precompute(begun)
    assert not any(forecast(asked, probe=4).rows_to_encode.values())


def test_rows_of_another_teacher_are_refused_before_anything_is_written(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model_folder(tmp_path / "teacher", seed=1)
    asked = settings(
        home,
        "after",
        str(tmp_path / "c"),
        teacher=f"local-dir:{tmp_path / 'teacher'}",
        reuse=str(home / "before.cache"),
    )
    monkeypatch.setattr(
        "teacher_cache.pipeline.precompute.plan.load_samples", None
    )  # would be called for the digests of all files
    for asks in (precompute, forecast):
        with pytest.raises(CacheMismatchError, match=r"before\.cache.*teacher\.weights_sha256.*leave --reuse out"):
            asks(asked)
    assert not (tmp_path / "c").exists()


def test_broken_off_it_goes_on_to_the_same_bytes(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reuse = str(home / "before.cache")
    whole = precompute(settings(home, "after", str(tmp_path / "whole"), reuse=reuse, chunk_rows=8))
    write = EmbeddingWriter.write
    written = 0

    def stop_at_the_fifth(self: EmbeddingWriter, *arguments: Any, **named: Any) -> Any:
        nonlocal written
        written += 1
        if written == 5:
            raise OSError("no space left")
        return write(self, *arguments, **named)

    asked = settings(home, "after", str(tmp_path / "broken"), reuse=reuse, chunk_rows=8)
    monkeypatch.setattr(EmbeddingWriter, "write", stop_at_the_fifth)
    with pytest.raises(OSError, match="no space left"):
        precompute(asked)
    monkeypatch.undo()
    planned = forecast(asked, probe=4).rows_reused
    again = precompute(asked)
    assert again.rows_reused == planned
    assert 0 < sum(planned.values()) < sum(whole.rows_reused.values())  # earlier tries copied the others
    assert 0 < again.chunks_encoded < again.chunks
    assert again.manifest_digest == whole.manifest_digest


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_compressed_copy_and_a_raw_copy_of_it_have_the_same_rows(home: Path, tmp_path: Path, dtype: str) -> None:
    """And the second one the very bytes of the first cache."""
    raw, packed, back = tmp_path / "raw", tmp_path / "packed", tmp_path / "back"
    how: dict[str, Any] = {"dtype": dtype, "chunk_rows": 16}
    precompute(settings(home, "before", str(raw), **how))
    asked = settings(home, "before", str(packed), **how, compress=True, reuse=str(raw))
    made, again = forecast(asked, probe=4), precompute(asked)
    assert made.rows_reused == again.rows_reused
    assert min(again.rows_reused.values()) > 0
    precompute(settings(home, "before", str(back), **how, reuse=str(packed)))
    assert rows_by_content(packed) == rows_by_content(raw)
    assert cache_digest(back) == cache_digest(raw)

    whole = cache_digest(packed)
    damaged = packed / "targets.zarr/text/embedding/c/0/0"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert not verify_cache(str(packed)).ok
    assert repair(str(packed), teacher=asked.teacher, device="cpu").ok
    assert cache_digest(packed) == whole


def test_a_run_that_wants_another_compression_is_refused_with_what_to_do(home: Path, tmp_path: Path) -> None:
    asked = settings(home, "before", str(home / "before.cache"), compress=True)
    for refuses in (precompute, forecast):
        with pytest.raises(CacheMismatchError, match=r"not compressed in the cache, .* Set compress to false; or make"):
            refuses(asked)


def test_rows_of_another_decoder_are_refused_with_the_flag_that_has_them(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("simplejpeg", reason="the extra fastjpeg is not installed")
    precompute(settings(home, "before", str(tmp_path / "scaled"), decoder="jpeg-scaled"))
    for decoder, reuse, have in (
        ("pillow", tmp_path / "scaled", "jpeg-scaled"),
        ("jpeg-scaled", home / "before.cache", "pillow"),
    ):
        asked = settings(home, "after", str(tmp_path / "c"), decoder=decoder, reuse=str(reuse))
        said = rf"preprocess\.decoder: .*ask for --decoder {have} as it has them, or leave --reuse out"
        with pytest.raises(CacheMismatchError, match=said):
            precompute(asked)
    both = settings(home, "after", str(tmp_path / "c"), dtype="int8", reuse=str(tmp_path / "scaled"))
    with pytest.raises(CacheMismatchError, match="ask for --decoder jpeg-scaled --dtype float16 as it has them"):
        precompute(both)
    assert not (tmp_path / "c").exists()
