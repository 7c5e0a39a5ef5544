"""Caches of every format version that was ever released are read as they are; unknown newer ones are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from typer.testing import CliRunner

from teacher_cache.pipeline.cli.app import app
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheFormatError
from teacher_cache.storage.format.commits import all_chunks
from teacher_cache.storage.format.identity import digest_of
from teacher_cache.storage.format.manifest import FORMAT_VERSION
from teacher_cache.storage.look.info import describe_cache
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import cache_digest, plan_known_cache
from tests.golden.make import HERE, LOST

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


def test_a_cache_of_float16_is_planned_as_on_that_day(tmp_path: Path) -> None:
    """What came later, int8 among it, changes no byte of it; parquet files have pyarrow's version in them."""
    plan_known_cache(tmp_path / "c")
    assert FORMAT_VERSION > 1
    for name in ("manifest.json", "manifest.backup.json"):
        now, then = (json.loads((folder / name).read_text()) for folder in (tmp_path / "c", HERE / "v1" / "stopped"))
        for fields in (now, then):
            fields.pop("digest")
            fields["files"] = {key: None if key.endswith(".parquet") else each for key, each in fields["files"].items()}
        assert now == then


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
