"""verify finds every kind of damage, names it, and exits 1."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from teacher_cache.pipeline.cli.app import app
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheAccessError, CacheUnreachableError
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.format.arrays import encode_object
from teacher_cache.storage.format.commits import ChunkCommit, ChunkRef
from teacher_cache.storage.format.journal import ChunkCost
from teacher_cache.storage.look.info import describe_cache
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import known_arrays, plan_known_cache


def test_a_sound_cache(known_cache: Path) -> None:
    report = verify_cache(str(known_cache))
    assert report.ok, report.findings
    assert (report.images, report.captions, report.chunks, report.chunks_sound) == (10, 25, 10, 10)
    assert report.objects_read == 3 * 3 + 7 * 2 + len(EmbeddingWriter(str(known_cache)).manifest.files)


def test_one_flipped_bit_in_any_file_is_found_and_named(known_cache: Path) -> None:
    """Every file of the cache in turn, at a random place."""
    rng = random.Random(0)
    files = [path for path in sorted(known_cache.rglob("*")) if path.is_file()]
    assert len(files) > 40
    for path in files:
        data = path.read_bytes()
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(damaged))
        key = path.relative_to(known_cache).as_posix()
        result = CliRunner().invoke(app, ["verify", str(known_cache), "--json"])
        assert result.exit_code == 1
        assert key in {finding["key"] for finding in json.loads(result.stdout)["findings"]}
        path.write_bytes(data)
    assert verify_cache(str(known_cache)).ok


def test_missing_swapped_and_unknown_files(known_cache: Path) -> None:
    first, second = (known_cache / f"targets.zarr/image/embedding/c/{chunk}/0/0" for chunk in (0, 1))
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    (known_cache / "targets.zarr/text/norm/c/3").unlink()
    (known_cache / "commits/text/000005.json").unlink()
    (known_cache / "stray.bin").write_bytes(b"?")
    found = {(finding.kind, finding.key) for finding in verify_cache(str(known_cache)).findings}
    assert found == {
        ("damaged", "targets.zarr/image/embedding/c/0/0/0"),
        ("damaged", "targets.zarr/image/embedding/c/1/0/0"),
        ("missing", "targets.zarr/text/norm/c/3"),
        ("missing", "commits/text/000005.json"),
        ("damaged", "commits"),
        ("unknown-file", "stray.bin"),
    }


def test_a_chunk_and_its_commit_from_another_place_are_found(known_cache: Path) -> None:
    """Chunk and commit moved together agree with each other, but not with the place."""
    (known_cache / "commits/text/000000.json").write_bytes((known_cache / "commits/text/000001.json").read_bytes())
    findings = verify_cache(str(known_cache)).findings
    assert any("holds the record of text/000001" in finding.message for finding in findings)


@pytest.mark.parametrize(("value", "kind"), [(np.nan, "not-finite"), (3.0, "not-unit-norm")])
def test_wrong_values_under_right_digests_are_found(known_cache: Path, value: float, kind: str) -> None:
    """A writer that committed nonsense faithfully."""
    writer = EmbeddingWriter(str(known_cache))
    ref = ChunkRef("text", 0, 2)
    arrays = known_arrays(writer, ref)
    arrays["embedding"][1, 0] = value
    data, digest = encode_object(arrays["embedding"], (4, 8), np.dtype("<f2"))
    (known_cache / ref.object_keys()["embedding"]).write_bytes(data)
    path = known_cache / ref.commit_key
    commit = ChunkCommit.from_bytes(path.read_bytes(), "here")
    path.write_bytes(commit.model_copy(update={"objects": {**commit.objects, "embedding": digest}}).to_bytes())
    assert kind in {finding.kind for finding in verify_cache(str(known_cache)).findings}


UNREADABLE = [
    "targets.zarr/text/embedding/c/1/0",
    "commits/image/v0/000001.json",
    "samples/000000.parquet",
    "targets.zarr/zarr.json",
    "manifest.json",
    "manifest.backup.json",
]


@pytest.mark.parametrize("key", UNREADABLE)
@pytest.mark.parametrize("how", ["folder", "input-output-error"])
def test_an_object_that_cannot_be_read_is_a_finding_of_its_own(known_cache: Path, key: str, how: str) -> None:
    """Something else in its place, and bytes that the disk does not give; the rest is verified all the same."""
    path = known_cache / key
    path.unlink()
    if how == "folder":
        path.mkdir()
        what = "Is a directory"
    else:
        path.symlink_to("/proc/self/mem")  # opens, and answers the first read with EIO
        what = "Input/output error"
    other = known_cache / "targets.zarr/text/norm/c/4"
    other.write_bytes(b"damaged")
    findings = {finding.key: finding for finding in verify_cache(str(known_cache)).findings}
    assert findings[key].kind == "unreadable"
    assert what in findings[key].message
    assert findings["targets.zarr/text/norm/c/4"].kind == "damaged"


def test_without_the_right_to_read_one_object_verify_says_so(
    known_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "targets.zarr/text/norm/c/4"
    (known_cache / key).chmod(0)
    if os.access(known_cache / key, os.R_OK):  # root may read anything
        deny(monkeypatch, key)
    result = CliRunner().invoke(app, ["verify", str(known_cache)])
    assert result.exit_code == 1
    assert f"unreadable: {key}: cannot be read: Permission denied" in result.stdout
    with pytest.raises(CacheAccessError, match=rf"{key}: cannot be read: Permission denied. Let this user read it"):
        EmbeddingReader(str(known_cache)).take("text", np.arange(25), array="norm")


def deny(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    read = LocalFiles.read

    def refuse(self: LocalFiles, wanted: str) -> bytes:
        if wanted == key:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), f"{self.location}/{key}")
        return read(self, wanted)

    monkeypatch.setattr(LocalFiles, "read", refuse)


def test_a_store_that_goes_away_is_not_taken_for_damage(known_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever it happens: at each read in turn."""
    read, reads, last = LocalFiles.read, [0], [1 << 30]

    def go_away(self: LocalFiles, key: str) -> bytes:
        reads[0] += 1
        if reads[0] >= last[0]:
            raise CacheUnreachableError(f"{self.location}/{key}: no answer")
        return read(self, key)

    monkeypatch.setattr(LocalFiles, "read", go_away)
    assert verify_cache(str(known_cache)).ok
    for number in range(1, reads[0] + 1):
        reads[0], last[0] = 0, number
        with pytest.raises(CacheUnreachableError, match="no answer"):
            verify_cache(str(known_cache))


def test_an_unfinished_cache_is_not_ok(tmp_path: Path) -> None:
    plan_known_cache(tmp_path / "c")
    writer = EmbeddingWriter(str(tmp_path / "c"))
    writer.write(writer.pending()[0], known_arrays(writer, writer.pending()[0]))
    report = verify_cache(str(tmp_path / "c"))
    assert not report.ok
    assert [finding.kind for finding in report.findings] == ["incomplete"]
    assert "1 of 10 chunks are there" in report.findings[0].message
    (tmp_path / "c" / "stray").write_bytes(b"?")
    told = CliRunner().invoke(app, ["verify", str(tmp_path / "c")])
    assert told.exit_code == 1
    assert told.output.count("repair") == told.output.count("--leftovers")  # a mere repair would change nothing


def test_info_does_not_depend_on_the_journal(known_cache: Path) -> None:
    """Damaged, foreign and unreadable notes are left out."""
    writer = EmbeddingWriter(str(known_cache))
    for number in range(4):
        ref = ChunkRef("text", 0, number)
        writer.replaces.add(ref)
        writer.write(ref, known_arrays(writer, ref), cost=ChunkCost(rows=4, seconds=2.0, teacher_seconds=2.0))
    notes = [known_cache / f"journal/text/00000{number}.json" for number in range(4)]
    notes[0].write_bytes(notes[0].read_bytes().replace(b"2.0", b"9.0"))
    notes[1].write_bytes(notes[2].read_bytes())
    notes[3].unlink()
    notes[3].symlink_to("/proc/self/mem")
    found = describe_cache(str(known_cache))
    assert (found.encode_seconds, found.captions_per_second) == (2.0, 2.0)
    kinds = {finding.key: finding.kind for finding in verify_cache(str(known_cache)).findings}
    assert kinds == {
        "journal/text/000000.json": "damaged",
        "journal/text/000001.json": "damaged",
        "journal/text/000003.json": "unreadable",
    }


def test_storage_needs_no_torch() -> None:
    code = (
        "import sys, teacher_cache.storage.cli.app, teacher_cache.storage.read.reader, teacher_cache.storage.write.writer; "  # noqa: E501
        "bad = {'torch', 'open_clip', 'faiss', 'prefect', 'zarr', 'pipeline'} & set(sys.modules); "
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
