"""A cache of int8: what is read back, what zarr-python reads, which damage is found, and who refuses it."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import uuid
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr

import teacher_cache.storage.format.manifest
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheCorruptError, CacheError, CacheFormatError, CacheMismatchError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.arrays import encode_object
from teacher_cache.storage.format.commits import ChunkRef, all_chunks
from teacher_cache.storage.format.int8 import NO_EMBEDDING, dequantize, norm_slack
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.look.info import describe_cache
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import cache_digest, finish_known_cache, known_arrays, known_row, make_known_cache, plan_known_cache
from tests.damage import KINDS, SCALE_KINDS, Others, damage, make_older
from tests.storage.check.test_corruption import (
    NOTED,
    require_right_rows_or_errors,
    require_right_tables_or_errors,
    turn,
)
from tests.storage.read.test_stream import fill_known_cache

LOST = 6


def write_int8_cache(path: Path, lost: Sequence[int] = (), chunks: int | None = None) -> Path:
    """The known cache in int8, with journal notes."""
    plan_known_cache(path, dtype="int8")
    finish_known_cache(path, lost, chunks, **NOTED)
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_int8_cache(tmp_path_factory.mktemp("int8") / "c")


@pytest.fixture(scope="module")
def others(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Others:
    foreign = tmp_path_factory.mktemp("foreign") / "c"
    plan_known_cache(foreign, name="other", dtype="int8")
    finish_known_cache(foreign, change=turn, **NOTED)
    return Others(foreign, make_older(sound, tmp_path_factory.mktemp("older") / "c"))


@pytest.mark.parametrize(("tower", "count"), [("image", 10), ("text", 25)])
def test_rows_are_unit_vectors_within_half_a_step_of_what_was_written(sound: Path, tower: Tower, count: int) -> None:
    reader = EmbeddingReader(str(sound))
    given = reader.take(tower, np.arange(count))
    wanted = np.stack([known_row(tower, row) for row in range(count)]).astype(np.float64)
    assert given.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(given, axis=1), 1, atol=1e-6)
    for chunk in range(-(-count // 4)):
        ref = ChunkRef(tower, 0, chunk)
        stored = reader.stored_chunk(ref)
        rows = slice(4 * chunk, 4 * chunk + 4)
        off = np.abs(stored["embedding"] * stored["scale"].astype(np.float64) - wanted[rows])
        assert (off <= stored["scale"] / 2 * (1 + 1e-9)).all()
        np.testing.assert_array_equal(reader.chunk(ref), given[rows])
        assert (np.abs(given[rows] - wanted[rows]).max(axis=1) <= 2 * norm_slack(stored["scale"])).all()
    np.testing.assert_array_equal(reader.take(tower, np.arange(count), array="norm"), np.arange(count) + 1)


@pytest.mark.parametrize("where", ["mapped", "copied", "store"])
def test_streams_and_resident_rows_are_those_that_take_gives(tmp_path: Path, where: str) -> None:
    """Chunks of 512 x 8 int8 are one page, and mapped; others, and those of a store, are copied."""
    location = f"memory://int8-{uuid.uuid4().hex}" if where == "store" else str(tmp_path / "c")
    fill_known_cache(location, 512 if where == "mapped" else 300, dtype="int8")
    reader = EmbeddingReader(location)
    rows = np.random.default_rng(0).permutation(reader.image_rows())
    wanted = reader.take("image", rows)
    streamed = np.concatenate(list(EmbeddingReader(location).stream("image", np.array_split(rows, 20))))
    resident = reader.resident("image")
    assert (streamed.dtype, streamed.tobytes()) == (np.float32, wanted.tobytes())
    assert (resident.rows.dtype, resident.take(rows).tobytes()) == (np.int8, wanted.tobytes())
    assert resident.take(rows[:0]).dtype == np.float32
    lost = reader.quarantined[0].row
    with pytest.raises(CacheCorruptError, match=f"row {lost} was quarantined"):
        list(reader.stream("image", [np.array([lost])]))
    with pytest.raises(ValueError, match=f"row {lost} was quarantined"):
        resident.take(np.array([lost]))


def test_resident_int8_rows_reach_another_process_with_their_scales(tmp_path: Path) -> None:
    reader = EmbeddingReader(fill_known_cache(str(tmp_path / "c"), 300, dtype="int8"))
    rows = reader.image_rows()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(reader.resident("image").take, rows).result(timeout=300)
    np.testing.assert_array_equal(found, reader.take("image", rows))


def test_zarr_reads_it_with_its_scales(tmp_path: Path) -> None:
    cache = write_int8_cache(tmp_path / "c", lost=[LOST])
    group = zarr.open_group(cache / "targets.zarr", mode="r")
    image, scale = np.asarray(group["image/embedding"])[:, 0], np.asarray(group["image/scale"])[:, 0]
    assert (image.dtype, image.shape, scale.dtype, scale.shape) == (np.int8, (10, 8), np.float32, (3, 8))
    assert group["image/scale"].metadata.dimension_names == ("chunk", "view", "dim")
    assert (image[LOST] == NO_EMBEDDING).all()
    assert (np.delete(image, LOST, axis=0) != NO_EMBEDDING).all()
    values = image * scale[np.arange(10) // 4]
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    kept = np.delete(np.arange(10), LOST)
    np.testing.assert_allclose(EmbeddingReader(str(cache)).take("image", kept), unit[kept], atol=1e-6)
    assert np.asarray(group["text/scale"]).shape == (7, 8)


def test_a_quarantined_row_can_never_be_read_as_a_value(tmp_path: Path) -> None:
    cache = write_int8_cache(tmp_path / "c", lost=[LOST])
    assert verify_cache(str(cache)).findings == ()
    reader = EmbeddingReader(str(cache))
    with pytest.raises(CacheCorruptError, match=rf"image row {LOST} was quarantined and has no embedding"):
        reader.take("image", np.arange(10))
    assert np.isnan(reader.chunk(ChunkRef("image", 0, 1))[LOST - 4]).all()
    assert np.isfinite(reader.take("image", reader.image_rows())).all()
    assert describe_cache(str(cache)).images_quarantined == 1


def rewritten(cache: Path, ref: ChunkRef, **changed: np.ndarray) -> None:
    """Replace objects of a chunk and make commit and seal fit, as a wrong program would."""
    writer = EmbeddingWriter(str(cache))
    commit = EmbeddingReader(str(cache)).commits()[ref]
    objects = dict(commit.objects)
    for name, values in changed.items():
        shape = (4, 8) if name == "embedding" else (1, 8)
        data, objects[name] = encode_object(values, shape, values.dtype)
        writer.files.write(ref.object_keys(writer.manifest.layout)[name], data)
    writer.files.write(ref.commit_key, commit.model_copy(update={"objects": objects}).to_bytes())
    writer.seal()


def test_verify_names_values_that_cannot_be(sound: Path, tmp_path: Path) -> None:
    ref = ChunkRef("text", 0, 2)
    key = {name: f"targets.zarr/text/{name}/c/2/0" for name in ("embedding", "scale")}
    whole = EmbeddingReader(str(sound)).stored_chunk(ref)
    holed, longer = whole["embedding"].copy(), whole["embedding"].copy()
    holed[1, 3] = NO_EMBEDDING
    longer[2] = 127
    wrong = whole["scale"].copy()
    wrong[0, 5] = np.nan
    for number, (changed, name, kind, what) in enumerate(
        [
            ({"embedding": holed}, "embedding", "not-finite", "row 9 holds NaN or infinity"),
            ({"embedding": longer}, "embedding", "not-unit-norm", "row 10 has norm"),
            ({"scale": wrong}, "scale", "not-finite", "column 5 holds nan"),
            ({"scale": -whole["scale"]}, "scale", "not-finite", "column 0 holds -"),
            ({"scale": 2 * whole["scale"]}, "embedding", "not-unit-norm", "row 8 has norm"),
        ]
    ):
        cache = shutil.copytree(sound, tmp_path / str(number))
        rewritten(cache, ref, **changed)
        found = [finding for finding in verify_cache(str(cache)).findings if not finding.key.startswith("commits")]
        assert [(finding.key, finding.kind) for finding in found] == [(key[name], kind)]
        assert what in found[0].message


@pytest.mark.parametrize("kind", [*KINDS, *SCALE_KINDS])
def test_every_damage_is_named_and_never_read(kind: str, sound: Path, others: Others, tmp_path: Path) -> None:
    cache = shutil.copytree(sound, tmp_path / "c")
    whole = EmbeddingReader(str(sound))

    def known(tower: Tower, array: str, rows: range) -> np.ndarray:
        return whole.take(tower, np.array(rows), array=array)

    for seed in range(3 if kind in SCALE_KINDS else 1):
        shutil.rmtree(cache)
        shutil.copytree(sound, cache)
        done = damage(kind, seed, cache, others)
        report = verify_cache(str(cache))
        assert not report.ok
        assert done.named <= {finding.key for finding in report.findings}, report.findings
        require_right_rows_or_errors(cache, done, known)
        require_right_tables_or_errors(cache, done, sound)


@pytest.mark.parametrize("seed", range(5))
def test_stopped_anywhere_and_finished_it_has_the_bytes_of_one_run(sound: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    cache = write_int8_cache(tmp_path / "c", chunks=rng.randrange(10))
    writer = EmbeddingWriter(str(cache))
    left = writer.pending()
    rng.shuffle(left)
    if left:  # killed between the objects of a chunk and its commit
        writer.write(left[0], known_arrays(writer, left[0]))
        (cache / left[0].commit_key).unlink()
    for ref in left:
        writer.write(ref, known_arrays(writer, ref))
    EmbeddingWriter(str(cache)).seal()
    assert cache_digest(cache) == cache_digest(sound)


def test_stored_rows_are_written_again_bit_for_bit(sound: Path, tmp_path: Path) -> None:
    plan_known_cache(tmp_path / "c", dtype="int8")
    writer, reader = EmbeddingWriter(str(tmp_path / "c")), EmbeddingReader(str(sound))
    for ref in all_chunks(writer.manifest.layout):
        writer.write(ref, reader.stored_chunk(ref))
    writer.seal()
    assert cache_digest(tmp_path / "c") == cache_digest(sound)


def test_rounded_rows_and_float_rows_are_not_mixed_up(sound: Path, known_cache: Path) -> None:
    reader, ref = EmbeddingReader(str(sound)), ChunkRef("text", 0, 0)
    with pytest.raises(ValueError, match=r"arrays \['embedding', 'norm', 'scale'\], \['embedding', 'norm'\] wanted"):
        EmbeddingWriter(str(known_cache)).write(ref, reader.stored_chunk(ref))
    writer = EmbeddingWriter(str(sound))
    without = {name: values for name, values in reader.stored_chunk(ref).items() if name != "scale"}
    with pytest.raises(ValueError, match="embedding: int8, float16 wanted"):
        writer.write(ref, without)
    with pytest.raises(ValueError, match="embedding: float32, float16 wanted"):
        writer.write(ref, {**without, "embedding": reader.chunk(ref)})
    with pytest.raises(CacheMismatchError, match=r'targets.dtype: "int8" in the cache, "float16" asked for'):
        plan_known_cache(sound)


def test_an_older_reader_refuses_it_by_name(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of the format is checked first, whatever else the manifest says."""
    assert json.loads((sound / "manifest.json").read_bytes())["format_version"] == 3
    monkeypatch.setattr(teacher_cache.storage.format.manifest, "FORMAT_VERSION", 2)
    for open_it in (EmbeddingReader, EmbeddingWriter, verify_cache, describe_cache):
        with pytest.raises(
            CacheFormatError, match=r"format version 3, this teacher-cache reads 1 to 2. Install a newer"
        ):
            open_it(str(sound))


@pytest.mark.parametrize("changed", [{"format_version": 1}, {"embedding_dtype": None}])
def test_a_manifest_that_contradicts_itself_is_refused(changed: dict[str, object], sound: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(sound, tmp_path / "c")
    manifest = EmbeddingReader(str(cache)).manifest
    layout = manifest.layout.model_copy(update={name: changed[name] for name in changed if name != "format_version"})
    update = {name: changed[name] for name in changed if name == "format_version"} | {"layout": layout}
    (cache / "manifest.json").write_bytes(manifest.model_copy(update=update).to_bytes())
    with pytest.raises(CacheFormatError, match=r"format version 1 holds no int8 rows|float16 rows, targets are"):
        EmbeddingReader(str(cache))


def test_its_objects_take_half_the_bytes(sound: Path, known_cache: Path) -> None:
    def embedding_bytes(cache: Path) -> int:
        return sum(path.stat().st_size for path in cache.rglob("embedding/c/**/*") if path.is_file())

    assert embedding_bytes(known_cache) - 4 * 10 == 2 * (embedding_bytes(sound) - 4 * 10)  # but for the checksums
    found = describe_cache(str(sound)).target_bytes
    assert found == sum(path.stat().st_size for path in sound.glob("targets.zarr/*/*/c/**/*") if path.is_file())


def test_a_cache_in_memory_takes_half_the_bytes(sound: Path, known_cache: Path) -> None:
    held = []
    for cache in (sound, known_cache):
        reader = EmbeddingReader(str(cache))
        reader.take("text", np.arange(25))
        held.append(reader.chunks.held_bytes)
    assert held == [7 * (4 * 8), 7 * (4 * 8 * 2)]  # scales are kept beside


def test_scales_of_an_image_without_any_embedding_are_zeros(tmp_path: Path) -> None:
    make_known_cache(tmp_path / "c", lost=range(4), images=4, captions=4, dtype="int8")
    reader = EmbeddingReader(str(tmp_path / "c"))
    stored = reader.stored_chunk(ChunkRef("image", 0, 0))
    assert not stored["scale"].any()
    assert np.isnan(dequantize(stored["embedding"], stored["scale"])).all()
    assert verify_cache(str(tmp_path / "c")).ok
    with pytest.raises(CacheError, match="quarantined"):
        reader.take("image", np.array([0]))
    assert open_files(tmp_path / "c").exists("targets.zarr/image/scale/c/0/0/0")
