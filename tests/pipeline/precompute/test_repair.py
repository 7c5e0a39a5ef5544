"""repair brings a damaged cache back to the very bytes it had, encodes nothing that is sound, and refuses in time."""

from __future__ import annotations

import json
import random
import shutil
import threading
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import teacher_cache.pipeline.models.teacher
from teacher_cache.pipeline.evaluate.retrieval import evaluate
from teacher_cache.pipeline.models.teacher import Encoded, LiveTeacher, load_teacher
from teacher_cache.pipeline.precompute.encode import encode_chunks
from teacher_cache.pipeline.precompute.plan import plan_precompute
from teacher_cache.pipeline.precompute.repair import RepairResult, repair
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import (
    CacheAccessError,
    CacheCorruptError,
    CacheError,
    CacheMismatchError,
    CacheNotFoundError,
    UsageError,
)
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.commits import ChunkRef, all_chunks
from teacher_cache.storage.format.journal import ChunkCost
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.commands import run_command
from tests.conftest import TINY_MODEL, cache_digest, make_model_folder, write_photos
from tests.damage import KINDS, Others, damage, make_older
from tests.pipeline.precompute.conftest import make_config, run_without_torch

IMAGES = 16


@dataclass
class Home:
    """One sound cache with all that is needed to mend copies of it."""

    cache: Path
    photos: Path
    others: Others
    folder: Path
    model: LiveTeacher
    student: Path
    digest: str

    @property
    def teacher(self) -> str:
        return f"local-dir:{self.folder}"

    def settings(self, photos: Path, cache: Path) -> PrecomputeConfig:
        return make_config(photos, self.folder, cache, batch_size=2, chunk_rows=4, decode_threads=1)

    def copy(self, to: Path) -> Path:
        shutil.copytree(self.cache, to)
        return to


@pytest.fixture(scope="module")
def home(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("home")
    photos = write_photos(root / "photos", IMAGES)
    (photos / "images" / "0006.jpg").write_bytes(b"not an image")
    (root / "student.json").write_text(json.dumps(TINY_MODEL))
    model = load_teacher(f"local-dir:{tiny_teacher}", device="cpu")
    others = Others(root / "foreign", root / "older")
    made = Home(root / "sound", photos, others, tiny_teacher, model, root / "student.json", "")
    for folder, cache in ((photos, made.cache), (write_photos(root / "others", IMAGES, first=100), others.foreign)):
        precompute(made.settings(folder, cache))
    make_older(made.cache, others.older)
    made.digest = cache_digest(made.cache)
    return made


@pytest.fixture
def counted(home: Home, taught: Counter[str], monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Rows that any teacher encodes, and loads of one; the tiny one is built once for all tests."""
    load = teacher_cache.pipeline.models.teacher.load_teacher

    def load_once(name: str, *rest: object) -> LiveTeacher:
        taught["loads"] += 1
        return home.model if name == home.teacher else load(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(teacher_cache.pipeline.models.teacher, "load_teacher", load_once)
    return taught


def mend(home: Home, cache: Path, **changes: str) -> RepairResult:
    return repair(str(cache), **{"teacher": home.teacher, "device": "cpu", **changes})  # type: ignore[arg-type]


def owners(cache: Path, keys: set[str]) -> list[ChunkRef]:
    refs = all_chunks(EmbeddingWriter(str(cache)).manifest.layout)
    return [ref for ref in refs if keys & {ref.commit_key, *ref.object_keys().values()}]


def rows_of(refs: list[ChunkRef], tower: str) -> int:
    return sum(4 for ref in refs if ref.tower == tower)  # 16 images and 32 captions: every chunk is full


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_damage_is_mended_to_the_same_bytes(
    kind: str, home: Home, counted: Counter[str], tmp_path: Path
) -> None:
    cache = home.copy(tmp_path / "c")
    done = damage(kind, 7, cache, home.others)
    result = mend(home, cache)
    assert result.ok, result.findings
    assert result.done
    assert (result.findings, result.replaced_manifest_digest) == ((), None)
    assert cache_digest(cache) == home.digest
    assert verify_cache(str(cache)).ok
    bad = owners(cache, done.named)
    assert (counted["image"], counted["text"]) == (rows_of(bad, "image"), rows_of(bad, "text"))
    assert (result.chunks_encoded, counted["loads"]) == (len(bad), 1 if bad else 0)


@pytest.fixture(scope="module")
def undamaged(home: Home, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], object]:
    return learn(home, home.cache, tmp_path_factory.mktemp("run") / "r"), measure(home.cache)


def learn(home: Home, cache: Path, run: Path) -> list[float]:
    config = TrainConfig(
        cache=str(cache),
        student=str(home.student),
        out=str(run),
        epochs=1,
        batch_size=6,
        workers=0,
        device="cpu",
        losses={"feature": 1000.0, "contrastive": 1.0},
    )
    train(config)
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def measure(cache: Path) -> object:
    return evaluate(EvaluateConfig(cache=str(cache), split="test")).teacher


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluation_refuse_what_is_damaged(
    kind: str, home: Home, undamaged: tuple[list[float], object], tmp_path: Path
) -> None:
    """Either a CacheError, or, where the damage was not touched, the very losses and recalls of the sound cache."""
    cache = home.copy(tmp_path / "c")
    done = damage(kind, 3, cache, home.others)
    refused = 0
    try:
        assert learn(home, cache, tmp_path / "run") == undamaged[0]
    except CacheError:
        refused += 1
    try:
        assert measure(cache) == undamaged[1]
    except CacheError:
        refused += 1
    if done.refused is None:
        assert refused == 2
    if any(array == "embedding" for _, array in done.refused or ()):
        assert refused >= 1  # training reads some chunks, evaluation the others


@pytest.mark.parametrize("seed", range(6))
def test_several_kinds_at_once(seed: int, home: Home, counted: Counter[str], tmp_path: Path) -> None:
    cache = home.copy(tmp_path / "c")
    rng = random.Random(seed)
    root = [kind for kind in KINDS if "manifest" in kind or "backup" in kind]
    chosen = rng.sample([kind for kind in KINDS if kind not in root], 6)
    chosen.append(rng.choice([kind for kind in root if ":" in kind]))  # last, and one only: the other says what it was
    named: set[str] = set()
    for kind in chosen:
        named |= damage(kind, seed, cache, home.others).named
    result = mend(home, cache)
    assert result.ok, (chosen, result.findings)
    assert cache_digest(cache) == home.digest
    encoded = {line.removesuffix(": encoded again") for line in result.done if line.endswith(": encoded again")}
    bad = {ref.name for ref in owners(cache, named)}
    # and those whose damaged note can no longer say that they are not older ones, put back
    doubtful = {key.removeprefix("journal/").removesuffix(".json") for key in named if key.startswith("journal/")}
    assert bad <= encoded <= bad | doubtful


def test_nothing_to_repair_loads_no_torch(home: Home, tmp_path: Path) -> None:
    assert run_without_torch("repair", str(home.cache)) == f"{home.cache}: nothing to repair, sound\n"
    assert cache_digest(home.cache) == home.digest


def everything(cache: Path) -> dict[str, bytes]:
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def hurt(cache: Path, *keys: str) -> dict[str, bytes]:
    for key in keys:
        (cache / key).write_bytes(b"damaged")
    return everything(cache)


IMAGE_CHUNK = "targets.zarr/image/embedding/c/1/0/0"
TEXT_CHUNK = "targets.zarr/text/embedding/c/1/0"
ALL_KINDS = (IMAGE_CHUNK, TEXT_CHUNK, "captions/000000.parquet", "manifest.backup.json", "targets.zarr/zarr.json")


def test_another_teacher_is_refused_before_anything_is_written(home: Home, tmp_path: Path) -> None:
    cache = home.copy(tmp_path / "c")
    before = hurt(cache, *ALL_KINDS)
    other = make_model_folder(tmp_path / "other", seed=5)
    with pytest.raises(CacheMismatchError, match=r"teacher.weights_sha256"):
        mend(home, cache, teacher=f"local-dir:{other}")
    with pytest.raises(UsageError, match=r"its teacher is 'local-dir:tiny'.* Give --teacher local-dir:PATH"):
        repair(str(cache), device="cpu")
    assert everything(cache) == before


def test_another_dataset_is_refused_before_anything_is_written(home: Home, tmp_path: Path) -> None:
    cache = home.copy(tmp_path / "c")
    other = write_photos(tmp_path / "other", IMAGES)  # one file differs from the cache's
    before = hurt(cache, IMAGE_CHUNK, "manifest.backup.json")
    with pytest.raises(CacheMismatchError, match=r"0006.jpg: not the image that the cache was made of"):
        mend(home, cache, dataset=f"flickr:{other}")
    with pytest.raises(CacheMismatchError, match=r"0004.jpg: not there, and image row 4 of .* --dataset KIND:PATH"):
        mend(home, cache, dataset=f"flickr:{write_photos(tmp_path / 'third', IMAGES, first=50)}")
    assert everything(cache) == before
    before = hurt(cache, "samples/000000.parquet")
    with pytest.raises(CacheMismatchError, match=r"dataset.samples_sha256"):
        mend(home, cache, dataset=f"flickr:{other}")
    assert everything(cache) == before


def test_a_dataset_that_moved_is_named(home: Home, tmp_path: Path) -> None:
    cache = home.copy(tmp_path / "c")
    shutil.copytree(home.photos, tmp_path / "moved")
    hurt(cache, *ALL_KINDS)
    assert mend(home, cache, dataset=f"flickr:{tmp_path / 'moved'}").ok
    assert cache_digest(cache) == home.digest


def test_a_table_that_does_not_come_back_says_which_and_what_to_do(home: Home, tmp_path: Path) -> None:
    """The same images and captions, but another problem on the way."""
    cache = home.copy(tmp_path / "c")
    shutil.copytree(home.photos, tmp_path / "moved")
    with (tmp_path / "moved" / "captions.txt").open("a") as file:
        file.write("0001.jpg,   \n")
    before = hurt(cache, "problems/000000.parquet", "captions/000000.parquet")
    with pytest.raises(CacheMismatchError, match=r"problems/000000.parquet: damaged, and flickr:.* gives other bytes"):
        mend(home, cache, dataset=f"flickr:{tmp_path / 'moved'}")
    assert everything(cache) == before


def test_a_table_of_an_earlier_version_comes_back_as_it_was(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then a file was one row group, whatever its size."""
    cache = home.copy(tmp_path / "c")
    monkeypatch.setattr("teacher_cache.storage.format.tables.ROWS_PER_GROUP", 3)
    hurt(cache, "samples/000000.parquet", "captions/000000.parquet")
    assert mend(home, cache).ok
    assert cache_digest(cache) == home.digest


def test_captions_alone_need_no_dataset(home: Home, tmp_path: Path) -> None:
    cache = home.copy(tmp_path / "c")
    hurt(cache, TEXT_CHUNK)
    assert mend(home, cache, dataset="flickr:/nowhere").chunks_encoded == 1
    assert cache_digest(cache) == home.digest


def test_other_bytes_than_the_sealed_ones_are_told(
    home: Home, counted: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another machine does: equal rows but for the last bits."""
    cache = home.copy(tmp_path / "c")
    before = verify_cache(str(cache)).manifest_digest
    hurt(cache, TEXT_CHUNK)
    encode = LiveTeacher.encode_texts

    def elsewhere(self: LiveTeacher, tokens: object) -> Encoded:
        encoded = encode(self, tokens)  # type: ignore[arg-type]
        norm = torch.nextafter(torch.from_numpy(encoded.norm), torch.tensor(torch.inf))
        return Encoded(torch.from_numpy(encoded.embedding), norm)

    monkeypatch.setattr(LiveTeacher, "encode_texts", elsewhere)
    result = mend(home, cache)
    assert result.ok
    assert result.replaced_manifest_digest == before != result.manifest_digest
    assert EmbeddingReader(str(cache)).manifest.digest == result.manifest_digest


def test_a_repair_that_stopped_before_the_seal_goes_on(home: Home, counted: Counter[str], tmp_path: Path) -> None:
    """Chunk, commit and note were written, with other last bits; encoding again would not bring the old ones back."""
    cache = home.copy(tmp_path / "c")
    ref = ChunkRef("text", 0, 2)
    writer, older = EmbeddingWriter(str(cache)), EmbeddingReader(str(home.others.older))
    writer.replaces.add(ref)
    writer.write(
        ref, {name: older.chunks.chunk(ref, name) for name in ref.object_keys()}, cost=ChunkCost(rows=4, seconds=1)
    )
    assert not verify_cache(str(cache)).ok
    result = mend(home, cache)
    assert (result.ok, result.chunks_encoded, counted["loads"]) == (True, 0, 0)
    assert result.replaced_manifest_digest is not None


def test_a_repair_that_broke_off_is_finished_by_the_next(
    home: Home, counted: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = home.copy(tmp_path / "c")
    hurt(cache, *ALL_KINDS, "commits/text/000003.json")
    encode, calls = LiveTeacher.encode_texts, []

    def break_off(self: LiveTeacher, tokens: object) -> Encoded:
        calls.append(tokens)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(self, tokens)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(LiveTeacher, "encode_texts", break_off)
        with pytest.raises(KeyboardInterrupt):
            mend(home, cache)
    assert not verify_cache(str(cache)).ok
    result = mend(home, cache)
    assert (result.ok, result.done, result.replaced_manifest_digest) == (True, ("text/000003: encoded again",), None)
    assert cache_digest(cache) == home.digest


def test_without_notes_an_older_chunk_costs_all_of_them(home: Home, counted: Counter[str], tmp_path: Path) -> None:
    cache = home.copy(tmp_path / "c")
    damage("rolled-back-chunk-and-commit", 0, cache, home.others)
    shutil.rmtree(cache / "journal")
    assert {finding.key for finding in verify_cache(str(cache)).findings} == {"commits"}
    result = mend(home, cache)
    assert (result.ok, result.chunks_encoded) == (True, 4 + 8)
    assert cache_digest(cache) == home.digest


def test_unknown_files_are_named_and_kept(home: Home, tmp_path: Path) -> None:
    cache = home.copy(tmp_path / "c")
    strays = ("stray.bin", "journal/mine.txt", "targets.zarr/text/embedding/c/99/0")
    for key in strays:
        (cache / key).parent.mkdir(exist_ok=True, parents=True)
        (cache / key).write_bytes(b"?")
    hurt(cache, TEXT_CHUNK)
    result = mend(home, cache)
    assert not result.ok
    assert {(finding.kind, finding.key) for finding in result.findings} == {("unknown-file", key) for key in strays}
    assert all((cache / key).read_bytes() == b"?" for key in strays)
    assert mend(home, cache).done == ()


def test_an_unfinished_cache_is_left_to_precompute(home: Home, counted: Counter[str], tmp_path: Path) -> None:
    settings = home.settings(home.photos, tmp_path / "c")
    pending = plan_precompute(settings, home.model)
    encode_chunks(settings, home.model, pending[:5])
    (tmp_path / "c" / "manifest.json").write_bytes(b"damaged")
    hurt(tmp_path / "c", IMAGE_CHUNK)
    counted.clear()
    result = mend(home, tmp_path / "c")
    assert (result.ok, result.chunks_encoded, counted["image"], counted["text"]) == (False, 0, 0, 0)
    assert any("5 of 12 chunks are there. Run the same precompute" in finding.message for finding in result.findings)
    assert precompute(settings).chunks_encoded == 8
    assert cache_digest(tmp_path / "c") == home.digest


def test_what_cannot_be_read_is_not_taken_for_damage(home: Home, tmp_path: Path) -> None:
    cache = home.copy(tmp_path / "c")
    (cache / TEXT_CHUNK).unlink()
    (cache / TEXT_CHUNK).mkdir()
    hurt(cache, IMAGE_CHUNK)
    with pytest.raises(CacheAccessError, match=rf"1 objects cannot be read, the first: {TEXT_CHUNK}: cannot be read"):
        mend(home, cache)
    assert (cache / IMAGE_CHUNK).read_bytes() == b"damaged"


def test_with_manifest_and_backup_gone_there_is_nothing_to_mend_from(home: Home, tmp_path: Path) -> None:
    cache = home.copy(tmp_path / "c")
    hurt(cache, "manifest.json", "manifest.backup.json")
    with pytest.raises(CacheCorruptError, match=r"neither manifest.json nor manifest.backup.json can be used"):
        mend(home, cache)


def test_readers_at_work_meanwhile_see_right_rows_or_an_error(
    home: Home, counted: Counter[str], tmp_path: Path
) -> None:
    cache = home.copy(tmp_path / "c")
    right = EmbeddingReader(str(home.cache)).take("text", np.arange(32))
    over, read, wrong = threading.Event(), [0], []

    def watch() -> None:
        while not over.is_set():
            try:
                rows = EmbeddingReader(str(cache)).take("text", np.arange(32))
            except CacheError:
                continue
            except Exception as error:
                wrong.append(error)
            else:
                read[0] += 1
                if not np.array_equal(rows, right):
                    wrong.append(rows)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for seed, kind in enumerate(("flipped-bit:text-embedding", "deleted:commit", "truncated:manifest") * 2):
            damage(kind, seed, cache, home.others)
            assert mend(home, cache).ok
    finally:
        over.set()
        watcher.join()
    assert wrong == []
    np.testing.assert_array_equal(EmbeddingReader(str(cache)).take("text", np.arange(32)), right)


def test_a_cache_behind_a_url_is_mended_too(home: Home, counted: Counter[str]) -> None:
    url = f"memory://{uuid.uuid4()}/a.cache"
    files, sound = open_files(url), everything(home.cache)
    for key, data in sound.items():
        files.write(key, data)
    for key in (*ALL_KINDS, "manifest.json"):
        files.delete(key)
    with pytest.raises(CacheNotFoundError, match="no cache here"):
        repair(url, teacher=home.teacher, device="cpu")
    files.write("manifest.backup.json", sound["manifest.backup.json"])
    files.write(IMAGE_CHUNK, sound[TEXT_CHUNK])
    result = repair(url, teacher=home.teacher, device="cpu")
    assert (result.ok, result.chunks_encoded) == (True, 2)
    assert all(files.read(key) == data for key, data in sound.items() if not key.startswith("journal/"))


def test_the_command_finds_scenes_and_their_teacher_by_itself(tmp_path: Path) -> None:
    """Nothing but the cache is named. A real process, a real teacher."""
    settings = PrecomputeConfig(
        dataset=f"scenes:{tmp_path / 'scenes'}?train=6&dev=1&test=5",
        teacher="bundled:scenes",
        cache=str(tmp_path / "c"),
        device="cpu",
        chunk_rows=4,
    )
    precompute(settings)
    digest = cache_digest(tmp_path / "c")
    hurt(tmp_path / "c", IMAGE_CHUNK, TEXT_CHUNK, "samples/000000.parquet", "manifest.json")
    done = run_command("repair", str(tmp_path / "c"))
    assert done.returncode == 0, done.stderr
    assert "image/v0/000001: encoded again\ntext/000001: encoded again\n" in done.stdout
    assert done.stdout.endswith("c: 4 repairs, sound\n")
    assert cache_digest(tmp_path / "c") == digest
    (tmp_path / "c" / "stray").write_bytes(b"?")
    done = run_command("repair", str(tmp_path / "c"), "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"], found["done"]) == (1, False, [])
    assert [finding["key"] for finding in found["findings"]] == ["stray"]
