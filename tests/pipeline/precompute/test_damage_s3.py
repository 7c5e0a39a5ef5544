"""Every kind of damage on a real S3 server: verify names it, no reader returns it, repair brings the bytes back."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import teacher_cache.pipeline.models.teacher
from teacher_cache.pipeline.cli.app import app
from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.pipeline.precompute.repair import repair
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.storage.errors import CacheError
from teacher_cache.storage.format.commits import all_chunks
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import cache_digest, write_photos
from tests.damage import KINDS, Damage, Others, damage, make_older
from tests.object_store import ObjectStore
from tests.pipeline.precompute.conftest import make_config, prove

pytestmark = pytest.mark.service

IMAGES, LOST = 8, 6


@dataclass
class Home:
    """A sound cache in a folder with all that is needed to damage, put and mend copies of it."""

    cache: Path
    others: Others
    teacher: str
    digest: str
    store: ObjectStore

    def put(self, folder: Path) -> str:
        """A folder's files on the server, past the code under test; the URL."""
        root = str(uuid.uuid4())
        client = self.store.client()
        for path in folder.rglob("*"):
            if path.is_file():
                key = f"{root}/{path.relative_to(folder).as_posix()}"
                client.put_object(Bucket=self.store.bucket, Key=key, Body=path.read_bytes())
        return self.store.location(root)


@pytest.fixture(scope="module")
def home(seaweedfs: ObjectStore, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    root = tmp_path_factory.mktemp("home")
    teacher = f"local-dir:{tiny_teacher}"
    model = load_teacher(teacher, device="cpu")

    def encode(first: int, cache: Path) -> Path:
        photos = write_photos(root / f"photos-{first}", IMAGES, first=first)
        (photos / "images" / f"{first + LOST:04d}.jpg").write_bytes(b"not an image")
        precompute(make_config(photos, teacher, cache, batch_size=2, chunk_rows=4, decode_threads=1))
        return cache

    cache = encode(0, root / "sound")
    others = Others(encode(100, root / "foreign"), make_older(cache, root / "older"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in seaweedfs.environment.items():
            patch.setenv(name, value)
        patch.setattr(teacher_cache.pipeline.models.teacher, "load_teacher", lambda *_: model)
        yield Home(cache, others, teacher, cache_digest(cache), seaweedfs)


def require_right_rows_or_errors(url: str, done: Damage, sound: EmbeddingReader) -> None:
    for ref in all_chunks(sound.manifest.layout):
        rows = np.array([row for row in ref.rows(sound.manifest.layout) if (ref.tower, row) != ("image", LOST)])
        for array in ref.object_keys():
            try:
                found = EmbeddingReader(url).take(ref.tower, rows, array=array)
            except CacheError:
                assert done.refused is None or (ref, array) in done.refused, f"{ref} {array} is refused"
            else:
                assert done.refused is not None, f"{ref} {array} is returned"
                assert (ref, array) not in done.refused, f"{ref} {array} is returned"
                np.testing.assert_array_equal(found, sound.take(ref.tower, rows, array=array))


@pytest.mark.parametrize("kind", KINDS)
def test_every_damage_is_named_never_read_and_mended(kind: str, home: Home, tmp_path: Path) -> None:
    cache = shutil.copytree(home.cache, tmp_path / "c")
    done = damage(kind, 11, cache, home.others)
    url = home.put(cache)
    told = CliRunner().invoke(app, ["verify", url, "--json"])
    assert told.exit_code == 1
    assert done.named <= {finding["key"] for finding in json.loads(told.stdout)["findings"]}
    require_right_rows_or_errors(url, done, EmbeddingReader(str(home.cache)))
    result = repair(url, teacher=home.teacher, device="cpu")
    assert result.ok, result.findings
    assert cache_digest(url) == home.digest
    refs = all_chunks(EmbeddingReader(url).manifest.layout)
    bad = {ref.name for ref in refs if done.named & {ref.commit_key, *ref.object_keys().values()}}
    assert {line.partition(":")[0] for line in result.done if line.endswith(": encoded again")} == bad


def test_a_sample_of_its_rows_is_proven(home: Home) -> None:
    proof = prove(home.put(home.cache), home.teacher)
    assert proof.ok, proof.wrong
    assert (proof.images_compared, proof.quarantined_checked, proof.captions_compared) == (IMAGES - 1, 1, 2 * IMAGES)
