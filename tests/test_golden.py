"""Caches of every format version that was ever released are read as they are; unknown newer ones are refused."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from click.testing import CliRunner

from teacher_cache.pipeline.cli.app import app
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheFormatError
from teacher_cache.storage.format.commits import all_chunks
from teacher_cache.storage.format.identity import digest_of
from teacher_cache.storage.format.manifest import FORMAT_VERSION
from teacher_cache.storage.look.info import describe_cache
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import cache_digest
from tests.golden.make import HERE, LOST, make

VERSIONS = sorted(path.name for path in HERE.glob("v*"))


@pytest.fixture(params=VERSIONS)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of one version's caches."""
    return shutil.copytree(HERE / request.param, tmp_path / request.param)


def expected(golden: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((golden / "rows.json").read_text())
    return found


def test_there_is_one_for_each_version() -> None:
    assert [f"v{number}" for number in range(1, FORMAT_VERSION + 1)] == VERSIONS


def test_it_reads_as_on_the_day_it_was_made(golden: Path) -> None:
    known, reader = expected(golden), EmbeddingReader(str(golden / "sealed"))
    assert reader.manifest.digest == known["manifest_digest"]
    assert reader.manifest.identity_digest == known["identity_digest"]
    assert reader.image_rows().tolist() == known["images"]
    rows = reader.image_rows()
    for name in ("embedding", "norm", "view"):
        assert reader.take("image", rows, array=name).tolist() == known[f"image_{name}"]
    captions = np.arange(len(known["texts"]))
    for name in ("embedding", "norm"):
        assert reader.take("text", captions, array=name).tolist() == known[f"text_{name}"]
    assert reader.samples["sample_id"].to_pylist() == known["sample_ids"]
    assert reader.captions["text"].to_pylist() == known["texts"]
    assert reader.captions["image_row"].to_pylist() == known["image_of_caption"]
    assert [(row.row, row.sample_id, row.reason, row.detail) for row in reader.quarantined] == [
        (LOST, f"img-{LOST}", "undecodable-image", "cut")
    ]


def test_zarr_reads_it(golden: Path) -> None:
    known, group = expected(golden), zarr.open_group(str(golden / "sealed" / "targets.zarr"), mode="r")
    image = np.asarray(group["image/embedding"])[:, 0]
    if known.get("dtype") == "int8":
        scaled = image[known["images"]] * np.asarray(group["image/scale"])[np.array(known["images"]) // 4, 0]
        unit = scaled / np.linalg.norm(scaled, axis=1, keepdims=True)
        np.testing.assert_allclose(unit, known["image_embedding"], atol=1e-6)
        assert (image[LOST] == -128).all()
        return
    np.testing.assert_array_equal(image[known["images"]], np.array(known["image_embedding"], np.float16))
    assert np.isnan(image[LOST]).all()
    np.testing.assert_array_equal(np.asarray(group["text/embedding"]), np.array(known["text_embedding"], np.float16))


def test_it_is_sound_and_reading_changes_nothing(golden: Path) -> None:
    before = cache_digest(golden)
    assert verify_cache(str(golden / "sealed")).findings == ()
    info = describe_cache(str(golden / "sealed"))
    assert (info.chunks_committed, info.images_quarantined, info.encode_seconds) == (10, 1, 5.0)
    for command in ("info", "verify"):
        assert CliRunner().invoke(app, [command, str(golden / "sealed"), "--json"]).exit_code == 0
    assert EmbeddingWriter(str(golden / "sealed")).pending() == []
    assert EmbeddingWriter(str(golden / "sealed")).seal().digest == expected(golden)["manifest_digest"]
    assert cache_digest(golden) == before


def test_one_that_was_stopped_is_finished_to_the_bytes_of_the_whole(golden: Path) -> None:
    known, writer = expected(golden), EmbeddingWriter(str(golden / "stopped"))
    pending = writer.pending()
    written = known.get("text_written", known["text_embedding"])
    assert pending == all_chunks(writer.manifest.layout)[5:]
    for ref in pending:  # captions only
        rows = ref.rows(writer.manifest.layout)
        arrays = {
            "embedding": np.array(written[rows.start : rows.stop], np.float16),
            "norm": np.array(known["text_norm"][rows.start : rows.stop], np.float32),
        }
        writer.write(ref, arrays)
    writer.seal()
    assert cache_digest(golden / "stopped") == cache_digest(golden / "sealed")


def contents(cache: Path) -> dict[str, bytes]:
    """All files of a cache but its manifest, backup and journal."""
    found = {path.relative_to(cache).as_posix(): path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    return {key: data for key, data in found.items() if not key.startswith(("manifest.", "journal/"))}


@pytest.mark.parametrize("name", ["sealed", "stopped"])
@pytest.mark.parametrize(("version", "dtype"), [("v1", "float16"), ("v2", "int8")])
def test_rows_commits_and_tables_are_written_as_on_that_day(
    tmp_path: Path, version: str, dtype: Literal["float16", "int8"], name: str
) -> None:
    make(tmp_path, dtype)
    now, then = contents(tmp_path / name), contents(HERE / version / name)
    assert now.keys() == then.keys()
    # parquet files have pyarrow's version in them
    differs = {key for key in now if now[key] != then[key]}
    assert all(key.endswith(".parquet") for key in differs)
    for key in differs:
        assert pq.read_table(io.BytesIO(now[key])).equals(pq.read_table(io.BytesIO(then[key])))
    manifest = json.loads((tmp_path / name / "manifest.json").read_text())
    older = json.loads((HERE / version / name / "manifest.json").read_text())
    (generation,) = older.pop("generations")
    assert manifest.get("seal") == generation.get("seal")
    assert manifest["identity_digest"] == older["identity_digest"]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_cache_of_several_generations_is_refused_by_name(tmp_path: Path, version: str) -> None:
    cache = shutil.copytree(HERE / version / "sealed", tmp_path / "c")
    path = cache / "manifest.json"
    fields = json.loads(path.read_text())
    fields.pop("digest")
    fields["generations"].append({**fields["generations"][0], "number": 1, "views": [1, 2]})
    path.write_text(json.dumps({**fields, "digest": digest_of(fields)}))
    with pytest.raises(CacheFormatError, match=r"has 2 generations .* Precompute a new cache with this version"):
        EmbeddingReader(str(cache))


def test_a_newer_format_is_refused_by_name(golden: Path) -> None:
    for name in ("manifest.json", "manifest.backup.json"):
        path = golden / "sealed" / name
        fields = json.loads(path.read_text()) | {"format_version": FORMAT_VERSION + 1, "something_new": 1}
        fields["digest"] = digest_of({name: value for name, value in fields.items() if name != "digest"})
        path.write_text(json.dumps(fields))
    wanted = rf"format version {FORMAT_VERSION + 1}, this teacher-cache reads 1 to {FORMAT_VERSION}\. Install a newer"
    for open_it in (EmbeddingReader, EmbeddingWriter, describe_cache, verify_cache):
        with pytest.raises(CacheFormatError, match=wanted):
            open_it(str(golden / "sealed"))
