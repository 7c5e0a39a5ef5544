"""A cache's bytes do not depend on who decodes: threads, or processes in any number, killed or not."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.service.service import DecodeProcesses
from teacher_cache.pipeline.data.service.slots import Slot, Slots
from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.pipeline.precompute.encode import RowTally, _Encoder, encode_chunks
from teacher_cache.pipeline.precompute.plan import plan_precompute
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.storage.errors import CacheMismatchError
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import cache_digest
from tests.pipeline.data.odd_images import ODD_IMAGES
from tests.pipeline.precompute.conftest import make_config

VIEWS = 2


@pytest.fixture
def odd_photos(tmp_path: Path) -> Path:
    """Every odd image, captioned: grey, torn, huge, none at all."""
    folder = tmp_path / "photos"
    folder.mkdir()
    names = [f"{number:03d}-{odd.name.replace(' ', '-')}.jpg" for number, odd in enumerate(ODD_IMAGES)]
    for name, odd in zip(names, ODD_IMAGES, strict=True):
        (folder / name).write_bytes(odd.data)
    lines = ["image,caption", *(f"{name},what number {number} shows" for number, name in enumerate(names))]
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot that is given back holds garbage: whoever still reads it writes other bytes into the cache."""
    give_back = Slots.give_back

    def poison(self: Slots, slot: Slot) -> None:
        self.array(slot, (slot.nbytes,))[:] = 0xAA
        give_back(self, slot)

    monkeypatch.setattr(Slots, "give_back", poison)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("decoder", ["pillow", "jpeg-scaled"])
def test_the_bytes_are_those_of_threads(
    odd_photos: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoder: Any
) -> None:
    """Of every picture, quarantined ones and their reasons included, and with workers that are killed meanwhile."""

    def run(name: str, processes: int) -> str:
        config = make_config(odd_photos, tiny_teacher, tmp_path / name, views=VIEWS, decoder=decoder)
        precompute(config.model_copy(update={"decode_processes": processes, "decode_threads": 3}))
        return cache_digest(tmp_path / name)

    threads = run("threads", 0)
    quarantined = EmbeddingReader(tmp_path / "threads").quarantined
    assert {row.reason for row in quarantined} == {"undecodable-image", "untransformable-image"}
    assert run("one", 1) == threads
    if decoder == "jpeg-scaled":
        return  # its workers import torch, which takes each new one seconds here
    submit, left = DecodeProcesses.submit, [3]

    def killing(self: DecodeProcesses, items: Any) -> Any:
        job = submit(self, items)
        if left[0]:
            left[0] -= 1
            os.kill(self.pids[left[0] % 2] or 0, signal.SIGKILL)
        return job

    monkeypatch.setattr(DecodeProcesses, "submit", killing)
    assert run("killed", 2) == threads
    assert left == [0]


def test_a_changed_picture_ends_the_run_by_name(make_photos: Any, tiny_teacher: Path, tmp_path: Path) -> None:
    """An error of a worker keeps its class and its words."""
    photos = make_photos(9)
    config = make_config(photos, tiny_teacher, tmp_path / "c", decode_processes=1)
    teacher = load_teacher(config.teacher, device="cpu")
    refs = plan_precompute(config, teacher)
    last = sorted(photos.rglob("*.jpg"))[-1]
    last.write_bytes(last.read_bytes() + b"x")
    with pytest.raises(CacheMismatchError, match=rf"{last.name}: not the image that the cache was made of"):
        encode_chunks(config, teacher, refs)


def test_remote_pictures_are_fetched_by_the_processes(
    make_photos: Any, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = make_photos(9)
    precompute(make_config(photos, tiny_teacher, tmp_path / "threads"))
    monkeypatch.setattr(ImageSource, "fetches", lambda self, uri: 4)
    precompute(make_config(photos, tiny_teacher, tmp_path / "processes", decode_processes=2))
    assert cache_digest(tmp_path / "threads") == cache_digest(tmp_path / "processes")
    # one encoder encodes again and again, as for the chunks that another process leaves
    config = make_config(photos, tiny_teacher, tmp_path / "again")
    teacher = load_teacher(config.teacher, device="cpu")
    refs, writer = plan_precompute(config, teacher), EmbeddingWriter(config.cache)
    encoder = _Encoder(config, teacher, writer, RowTally(writer.manifest.layout, refs, None))
    for ref in refs:
        encoder.encode([[ref]])
    writer.seal()
    assert cache_digest(tmp_path / "threads") == cache_digest(tmp_path / "again")
