"""Several precompute processes on one cache share its work; nobody sees what is not whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheIncompleteError, CacheNotFoundError
from teacher_cache.storage.format.commits import all_chunks
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.claims import CLAIMS
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import cache_digest
from tests.precompute_process import finish, start

MakePhotos = Callable[..., Path]
IMAGES, BATCH, CHUNK = 48, 2, 4
CHUNKS = IMAGES // CHUNK * 3  # two captions an image
BATCHES = {"image": IMAGES // BATCH, "text": 2 * IMAGES // BATCH}


def settings(photos: Path, teacher: Path, cache: Path) -> dict[str, Any]:
    return {
        "dataset": f"flickr:{photos}",
        "teacher": f"local-dir:{teacher}",
        "cache": str(cache),
        "device": "cpu",
        "batch_size": BATCH,
        "chunk_rows": CHUNK,
        "decode_threads": 1,
    }


def meet(folder: Path, mine: int, wanted: int) -> None:
    """Return when as many processes have come here."""
    folder.mkdir(exist_ok=True)
    (folder / f"{mine}").touch()
    while len(list(folder.iterdir())) < wanted:
        time.sleep(0.005)


def start_together(config: dict[str, Any], count: int, folder: Path, seconds: float = 0.05) -> dict[Path, Any]:
    """Processes by the file that their result will be in."""
    return {
        folder / f"{number}.json": start(
            config,
            out=folder / f"{number}.json",
            teacher_seconds=seconds,
            setup=partial(meet, folder / "meeting", number, count),
        )
        for number in range(count)
    }


@pytest.fixture
def whole(make_photos: MakePhotos, tiny_teacher: Path, tmp_path: Path) -> tuple[Path, str]:
    """The photographs, and the digest of a cache that one process made of them."""
    photos = make_photos(IMAGES)
    out = tmp_path / "whole.json"
    finish(start(settings(photos, tiny_teacher, tmp_path / "whole"), out=out), out)
    return photos, cache_digest(tmp_path / "whole")


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_started_at_once_share_the_work(
    whole: tuple[Path, str], tiny_teacher: Path, tmp_path: Path, processes: int
) -> None:
    photos, digest = whole
    started = start_together(settings(photos, tiny_teacher, tmp_path / "c"), processes, tmp_path)
    ended = [finish(process, out) for out, process in started.items()]
    assert [end.get("error") for end in ended] == [None] * processes
    encoded = [end["result"]["chunks_encoded"] for end in ended]
    assert sum(encoded) == CHUNKS
    assert min(encoded) > 0
    for tower, batches in BATCHES.items():  # no forward pass was made twice
        assert sum(end["events"].count(["teacher", tower]) for end in ended) == batches
    assert len({end["result"]["manifest_digest"] for end in ended}) == 1
    assert verify_cache(str(tmp_path / "c")).ok
    assert cache_digest(tmp_path / "c") == digest


def test_a_reader_sees_only_what_is_committed_and_whole(
    whole: tuple[Path, str], tiny_teacher: Path, tmp_path: Path
) -> None:
    photos, digest = whole
    cache = str(tmp_path / "c")
    started = start_together(settings(photos, tiny_teacher, tmp_path / "c"), 2, tmp_path)
    seen: list[int] = []
    while any(process.is_alive() for process in started.values()):
        try:
            reader = EmbeddingReader(cache)
        except CacheNotFoundError:
            continue
        except CacheIncompleteError:
            try:
                writer = EmbeddingWriter(cache)
            except CacheNotFoundError:
                continue  # being planned: the reader knows it by the manifest's backup
            committed = [ref for ref in all_chunks(writer.manifest.layout) if writer.is_committed(ref)]
            assert all(writer.is_sound(ref) for ref in committed)
            seen.append(len(committed))
        else:
            reader.take("image", reader.image_rows())
            break
    for out, process in started.items():
        assert "error" not in finish(process, out)
    assert seen == sorted(seen)
    assert len(set(seen)) > 2, "it was never seen in the making"
    assert cache_digest(tmp_path / "c") == digest


def test_the_chunks_of_a_killed_process_are_taken_over(
    whole: tuple[Path, str], tiny_teacher: Path, tmp_path: Path
) -> None:
    photos, digest = whole
    started = start_together(settings(photos, tiny_teacher, tmp_path / "c"), 3, tmp_path)
    out, victim = next(iter(started.items()))
    until = time.monotonic() + 60
    while not _held_by(tmp_path / "c", victim.pid):
        assert time.monotonic() < until
        time.sleep(0.005)
    victim.kill()
    victim.join(60)
    left = _held_by(tmp_path / "c", victim.pid)
    assert left, "it held nothing when it died"
    rest = [finish(process, path) for path, process in started.items() if path != out]
    assert [end.get("error") for end in rest] == [None, None]
    assert sum(end["result"]["chunks_encoded"] for end in rest) <= CHUNKS
    assert verify_cache(str(tmp_path / "c")).ok
    assert cache_digest(tmp_path / "c") == digest
    assert list((tmp_path / "c" / CLAIMS).glob("*.json")) == []


def _held_by(cache: Path, pid: int) -> list[Path]:
    """Claims of a process on chunks without commit record."""
    held = []
    for path in (cache / CLAIMS).glob("[it]*-*.json"):
        tower_view_chunk = path.name.partition(".")[0].replace("-", "/")
        try:
            mine = f'"pid":{pid},' in path.read_text()
        except FileNotFoundError:
            continue
        if mine and not (cache / "commits" / f"{tower_view_chunk}.json").exists():
            held.append(path)
    return held


def test_two_that_plan_at_once_by_other_defaults_agree(
    make_photos: MakePhotos, tiny_teacher: Path, tmp_path: Path
) -> None:
    """Rows per batch and chunk left out: whoever plans decides, the other takes it up."""
    photos = make_photos(8)
    config = settings(photos, tiny_teacher, tmp_path / "c")
    del config["batch_size"], config["chunk_rows"]
    started = start_together(config, 2, tmp_path, seconds=0)
    ended = [finish(process, out) for out, process in started.items()]
    assert [end.get("error") for end in ended] == [None, None]
    assert sum(end["result"]["chunks_encoded"] for end in ended) == ended[0]["result"]["chunks"]
