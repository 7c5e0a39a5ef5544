"""Every damage of hundreds, at seeded places: verify names the object, and no reader returns a wrong row or NaN."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from teacher_cache.pipeline.cli.app import app
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheCorruptError, CacheError, CacheNotFoundError
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.format.layout import ARRAYS, Tower
from teacher_cache.storage.format.manifest import BACKUP_KEY, MANIFEST_KEY, CacheManifest
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import finish_known_cache, known_row, plan_known_cache
from tests.damage import KINDS, Damage, Others, damage, make_older

SEEDS = range(4)
IMAGES, CAPTIONS = 10, 25


NOTED = {"seconds": 0.5, "host": "here"}


def turn(ref: ChunkRef, arrays: dict[str, np.ndarray]) -> None:
    """Make the rows of another teacher."""
    arrays["embedding"] = arrays["embedding"][:, ::-1].copy()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed cache of known rows, with journal notes."""
    path = tmp_path_factory.mktemp("sound") / "c"
    plan_known_cache(path, IMAGES, CAPTIONS)
    finish_known_cache(path, **NOTED)
    return path


@pytest.fixture(scope="module")
def others(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Others:
    foreign = tmp_path_factory.mktemp("foreign") / "c"
    plan_known_cache(foreign, IMAGES, CAPTIONS, name="other")
    finish_known_cache(foreign, change=turn, **NOTED)
    return Others(foreign, make_older(sound, tmp_path_factory.mktemp("older") / "c"))


def known(tower: Tower, array: str, rows: range) -> np.ndarray:
    if array == "embedding":
        return np.stack([known_row(tower, row) for row in rows])
    if array == "norm":
        return np.arange(rows.start, rows.stop, dtype=np.float32) + 1
    return np.tile(np.array([0, 0, 32, 32, 0], np.float32), (len(rows), 1))


TABLES = ("samples", "captions", "problems")


def require_right_tables_or_errors(cache: Path, done: Damage, sound: Path) -> None:
    """A damaged table is refused each time that it is asked for, and so is what is made of it."""
    whole = EmbeddingReader(str(sound))
    for name in TABLES:
        damaged = any(key.startswith(f"{name}/") for key in done.named)
        try:
            opened = EmbeddingReader(str(cache))
            found = getattr(opened, name)
        except CacheError:
            assert damaged or done.refused is None, f"{name} is refused"
            for what in ("samples", "captions", "caption_offsets"):
                if damaged and what.startswith(name.rstrip("s")):
                    with pytest.raises(CacheError):
                        getattr(EmbeddingReader(str(cache)), what)
        else:
            assert not damaged, f"{name} is returned"
            assert found.equals(getattr(whole, name))


def require_right_rows_or_errors(
    cache: Path, done: Damage, known: Callable[[Tower, str, range], np.ndarray] = known
) -> None:
    """Each array chunk by chunk and whole, each by a fresh reader and by one that goes on after errors."""
    totals: dict[Tower, int] = {"image": IMAGES, "text": CAPTIONS}
    try:
        shared: EmbeddingReader | None = EmbeddingReader(str(cache))
    except CacheError:
        shared = None
        assert done.refused is None
    for tower, total in totals.items():
        for array in ARRAYS[tower]:
            touched = [ref for ref, name in done.refused or () if (ref.tower, name) == (tower, array)]
            parts = [range(start, min(start + 4, total)) for start in range(0, total, 4)]
            for rows in (*parts, range(total)):
                refuse = done.refused is None or any(ref.chunk * 4 in rows for ref in touched)
                for reader in (shared, None):
                    try:
                        opened = reader or EmbeddingReader(str(cache))
                        values = opened.take(tower, np.array(rows), array=array)
                    except CacheError:
                        assert refuse, f"{tower} {array} {rows} is refused"
                    else:
                        assert not refuse, f"{tower} {array} {rows} is returned"
                        np.testing.assert_array_equal(values, known(tower, array, rows))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_damage_is_named_and_never_read(
    kind: str, seed: int, sound: Path, others: Others, tmp_path: Path
) -> None:
    cache = tmp_path / "c"
    shutil.copytree(sound, cache)
    done = damage(kind, seed, cache, others)
    report = verify_cache(str(cache))
    assert not report.ok
    assert done.named <= {finding.key for finding in report.findings}, report.findings
    assert all(finding.message for finding in report.findings)
    require_right_rows_or_errors(cache, done)
    require_right_tables_or_errors(cache, done, sound)


def test_there_are_enough_of_them(sound: Path) -> None:
    assert len(KINDS) * len(SEEDS) >= 240
    assert verify_cache(str(sound)).ok


@pytest.mark.parametrize("kind", ["flipped-bit:manifest", "flipped-bit:note", "rolled-back-chunk-and-commit"])
def test_the_command_exits_1_and_names_the_object(kind: str, sound: Path, others: Others, tmp_path: Path) -> None:
    cache = tmp_path / "c"
    shutil.copytree(sound, cache)
    (named,) = damage(kind, 0, cache, others).named
    result = CliRunner().invoke(app, ["verify", str(cache)])
    assert result.exit_code == 1
    assert named in result.stdout
    assert result.stderr.endswith(f"next: teacher-cache repair {cache}\n")


@pytest.mark.parametrize(
    ("main", "backup", "error", "message"),
    [
        (b"{", b"{", CacheCorruptError, r"neither manifest.json nor manifest.backup.json can be used"),
        (None, b"{", CacheCorruptError, r"manifest.json: missing; .*manifest.backup.json: not JSON"),
        (b"{", None, CacheCorruptError, r"manifest.json: not JSON.*manifest.backup.json: missing"),
        (None, None, CacheNotFoundError, "no cache here"),
    ],
)
def test_with_neither_manifest_nor_backup_there_is_nothing_to_verify(
    sound: Path, tmp_path: Path, main: bytes | None, backup: bytes | None, error: type[CacheError], message: str
) -> None:
    cache = tmp_path / "c"
    shutil.copytree(sound, cache)
    for key, data in ((MANIFEST_KEY, main), (BACKUP_KEY, backup)):
        (cache / key).unlink()
        if data is not None:
            (cache / key).write_bytes(data)
    with pytest.raises(error, match=message):
        verify_cache(str(cache))


def test_every_bit_of_a_manifest_counts(sound: Path, tmp_path: Path) -> None:
    """Not a sample: one flip in each byte, of which the parser must not let a single one pass."""
    data = (sound / MANIFEST_KEY).read_bytes()
    manifest = CacheManifest.from_bytes(data, "here")
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        try:
            parsed = CacheManifest.from_bytes(bytes(flipped), "here")
        except CacheError:
            continue
        assert parsed == manifest
        assert parsed.to_bytes() != bytes(flipped)
