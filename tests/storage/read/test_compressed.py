"""Compressed caches: the rows of raw ones in other bytes, readable by others, and no damage passes."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from teacher_cache.pipeline.cli.app import app
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheCorruptError, CacheMismatchError
from teacher_cache.storage.files.checksum import crc32c
from teacher_cache.storage.format.commits import ChunkRef, ObjectDigest, all_chunks
from teacher_cache.storage.look.diff import diff_caches
from teacher_cache.storage.look.info import describe_cache
from teacher_cache.storage.look.listing import list_caches
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.stream_chunks import CopiedChunks, open_chunks
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import cache_digest, finish_known_cache, known_row, make_known_cache, plan_known_cache
from tests.damage import KINDS, Others, damage, make_older
from tests.storage.check.test_corruption import NOTED, require_right_rows_or_errors, turn
from tests.storage.read.test_stream import fill_known_cache

Dtype = Literal["float16", "int8"]
DTYPES: tuple[Dtype, ...] = ("float16", "int8")
LOST = 6


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compressed") / "c"
    plan_known_cache(path, compressor="blosc")
    finish_known_cache(path, **NOTED)
    return path


@pytest.fixture(scope="module")
def others(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Others:
    foreign = tmp_path_factory.mktemp("foreign") / "c"
    plan_known_cache(foreign, name="other", compressor="blosc")
    finish_known_cache(foreign, change=turn, **NOTED)
    return Others(foreign, make_older(sound, tmp_path_factory.mktemp("older") / "c"))


def rows_digest(location: Path | str) -> str:
    """sha256 over every stored number of a cache, chunk by chunk, whatever their form on disk."""
    reader, total = EmbeddingReader(str(location)), hashlib.sha256()
    for ref in all_chunks(reader.manifest.layout):
        for name, values in sorted(reader.stored_chunk(ref).items()):
            total.update(f"{ref.name} {name} {values.dtype} {values.shape}".encode() + values.tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_identity_are_those_of_a_raw_cache(tmp_path: Path, dtype: Dtype) -> None:
    for name, compressor in (("raw", None), ("packed", "blosc")):
        make_known_cache(tmp_path / name, [LOST], chunk_rows=8, dtype=dtype, compressor=compressor)
    raw, packed = tmp_path / "raw", tmp_path / "packed"
    assert rows_digest(packed) == rows_digest(raw)
    assert EmbeddingReader(str(packed)).manifest.identity == EmbeddingReader(str(raw)).manifest.identity
    found = diff_caches(str(raw), str(packed))
    assert [field.field for field in found.layout] == ["compressor"]
    assert found.images is not None
    assert found.captions is not None
    assert (found.images.equal, found.captions.equal) == (9, 23)  # without the lost image and its captions
    assert verify_cache(str(packed)).findings == ()
    assert EmbeddingWriter(str(packed)).pending() == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["pages", "other sizes", "store"])
def test_streams_and_resident_rows_are_those_that_take_gives(tmp_path: Path, where: str, dtype: Dtype) -> None:
    location = f"memory://packed-{uuid.uuid4().hex}" if where == "store" else str(tmp_path / "c")
    fill_known_cache(location, 512 if where == "pages" else 300, dtype, compressor="blosc")
    reader = EmbeddingReader(location)
    rows = np.random.default_rng(0).permutation(reader.image_rows())
    wanted = reader.take("image", rows)
    if dtype == "float16":
        np.testing.assert_array_equal(wanted[:9], [known_row("image", row) for row in rows[:9]])
    for array in ("embedding", "norm", "view"):
        streamed = np.concatenate(
            list(EmbeddingReader(location).stream("image", np.array_split(rows, 20), array=array))
        )
        assert streamed.tobytes() == reader.take("image", rows, array=array).tobytes()
    assert reader.resident("image").take(rows).tobytes() == wanted.tobytes()


def test_chunk_files_are_not_mapped_as_rows(tmp_path: Path) -> None:
    """Whatever their size: one that happens to be as long as a raw chunk would be read as rows."""
    reader = EmbeddingReader(fill_known_cache(str(tmp_path / "c"), 512, compressor="blosc"))
    assert type(open_chunks(reader.chunks, "image", "embedding", prove_every_read=False)) is CopiedChunks


_TENSORSTORE = """
import sys, numpy as np, tensorstore as ts
for tower, name in (("image", "embedding"), ("image", "norm"), ("text", "embedding")):
    store = {"driver": "file", "path": f"{sys.argv[1]}/targets.zarr/{tower}/{name}"}
    array = ts.open({"driver": "zarr3", "kvstore": store}).result()
    np.save(f"{sys.argv[2]}/{tower}-{name}.npy", array.read().result())
"""


@pytest.mark.parametrize("dtype", DTYPES)
def test_zarr_and_tensorstore_read_it(tmp_path: Path, dtype: Dtype) -> None:
    for name, compressor in (("raw", None), ("packed", "blosc")):
        make_known_cache(tmp_path / name, [LOST], dtype=dtype, compressor=compressor)
    raw = zarr.open_group(tmp_path / "raw" / "targets.zarr", mode="r")
    packed = zarr.open_group(tmp_path / "packed" / "targets.zarr", mode="r")
    # its threads do not survive the forks of other tests
    program = [sys.executable, "-c", _TENSORSTORE, str(tmp_path / "packed"), str(tmp_path)]
    subprocess.run(program, check=True, timeout=120)
    for name in ("image/embedding", "image/norm", "text/embedding"):
        wanted = np.asarray(raw[name])
        np.testing.assert_array_equal(np.asarray(packed[name]), wanted)
        np.testing.assert_array_equal(np.load(tmp_path / f"{name.replace('/', '-')}.npy"), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_every_damage_is_named_and_never_read(kind: str, sound: Path, others: Others, tmp_path: Path) -> None:
    cache = shutil.copytree(sound, tmp_path / "c")
    done = damage(kind, 0, cache, others)
    report = verify_cache(str(cache))
    assert not report.ok
    assert done.named <= {finding.key for finding in report.findings}, report.findings
    require_right_rows_or_errors(cache, done)


def test_a_chunk_that_does_not_decompress_is_named_under_right_digests(sound: Path, tmp_path: Path) -> None:
    """A writer that committed nonsense faithfully: verify lists it, readers and a resumed run refuse it."""
    cache, ref = shutil.copytree(sound, tmp_path / "c"), ChunkRef("text", 0, 2)
    writer, key = EmbeddingWriter(str(cache)), ref.object_keys()["embedding"]
    checksum = crc32c(b"no blosc")
    data = b"no blosc" + checksum.to_bytes(4, "little")
    digest = ObjectDigest(nbytes=len(data), crc32c=checksum, sha256=hashlib.sha256(data).hexdigest())
    commit = EmbeddingReader(str(cache)).commits()[ref]
    writer.files.write(key, data)
    changed = commit.model_copy(update={"objects": {**commit.objects, "embedding": digest}})
    writer.files.write(ref.commit_key, changed.to_bytes())
    writer.seal()
    assert key in {finding.key for finding in verify_cache(str(cache)).findings}
    assert writer.pending() == [ref]
    for read in (
        lambda reader: reader.take("text", np.arange(25)),
        lambda reader: list(reader.stream("text", [np.arange(25)])),
        lambda reader: reader.resident("text"),
    ):
        with pytest.raises(CacheCorruptError, match=rf"{key}: does not decompress: .*repair"):
            read(EmbeddingReader(str(cache)))


def test_stopped_and_finished_it_has_the_bytes_of_one_run(sound: Path, tmp_path: Path) -> None:
    plan_known_cache(tmp_path / "c", compressor="blosc")
    finish_known_cache(tmp_path / "c", chunks=4, **NOTED)
    finish_known_cache(tmp_path / "c", **NOTED)
    assert cache_digest(tmp_path / "c") == cache_digest(sound)


def test_another_compression_is_refused_by_name(sound: Path, known_cache: Path) -> None:
    with pytest.raises(
        CacheMismatchError, match=r"are compressed in the cache, not compressed asked .* compress to true"
    ):
        plan_known_cache(sound)
    with pytest.raises(
        CacheMismatchError, match=r"are not compressed in the cache, compressed asked .* compress to false"
    ):
        plan_known_cache(known_cache, compressor="blosc")


def test_info_and_ls_say_it(tmp_path: Path) -> None:
    plan_known_cache(tmp_path / "c", compressor="blosc")
    told = CliRunner().invoke(app, ["info", str(tmp_path / "c")]).output
    assert "8 wide, float16, compressed" in told
    assert "of embeddings before compression" in told
    finish_known_cache(tmp_path / "c")
    stored = sum(path.stat().st_size for path in (tmp_path / "c").glob("targets.zarr/*/*/c/**/*") if path.is_file())
    assert describe_cache(str(tmp_path / "c")).target_bytes == stored
    assert [cache.committed_bytes for cache in list_caches(str(tmp_path)).caches] == [stored]
    told = CliRunner().invoke(app, ["info", str(tmp_path / "c")]).output
    assert "8 wide, float16, compressed" in told
    assert "before compression" not in told
