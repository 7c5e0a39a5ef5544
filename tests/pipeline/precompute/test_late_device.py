"""On a device that works late and in any legal order a cache gets the same bytes: no slot is reused too early."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.pipeline.data.service.slots import Slots
from teacher_cache.pipeline.models.teacher import LiveTeacher, load_teacher
from teacher_cache.pipeline.precompute import encode
from teacher_cache.pipeline.precompute.plan import plan_precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import cache_digest, write_photos
from tests.pipeline.late_device import Done, LateDevice, poison
from tests.pipeline.precompute.conftest import make_config

IMAGES, VIEWS = 11, 2


class LateEncoded:
    """Embeddings that are there once the device has got to them."""

    def __init__(self) -> None:
        self.rows: Any = None
        self.done: Done

    def __getattr__(self, name: str) -> Any:
        self.done.synchronize()
        return getattr(self.rows, name)

    def device_seconds(self) -> None:
        return None


@contextmanager
def late(device: LateDevice, behind: int, ahead: int) -> Iterator[None]:
    """Teachers work on a late device, with batches in flight; slots that are given back hold garbage."""
    encoders = LiveTeacher.encode_shown, LiveTeacher.encode_texts

    def encoder(real: Any) -> Any:
        def encode(self: LiveTeacher, batch: torch.Tensor) -> Any:
            moved, copied = device.copied(batch)
            encoded = LateEncoded()
            encoded.done = device.work(lambda: setattr(encoded, "rows", real(self, moved)), copied)
            return encoded

        return encode

    with (
        patch.object(LiveTeacher, "encode_shown", encoder(encoders[0])),
        patch.object(LiveTeacher, "encode_texts", encoder(encoders[1])),
        patch.object(encode, "_BATCHES_BEHIND", {"cpu": behind}),
        patch.object(encode, "_BATCHES_AHEAD", ahead),
        patch.object(Slots, "give_back", poison),
    ):
        yield


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> tuple[PrecomputeConfig, LiveTeacher, str]:
    """Settings, teacher, and the digest of the cache that an obedient device makes."""
    home = tmp_path_factory.mktemp("late")
    write_photos(home / "photos", IMAGES)
    config = make_config(home / "photos", tiny_teacher, home / "c", views=VIEWS)
    teacher = load_teacher(config.teacher, device="cpu")
    return config, teacher, made(config, teacher)


def made(config: PrecomputeConfig, teacher: LiveTeacher) -> str:
    """Make the cache; its digest."""
    encode.encode_chunks(config, teacher, plan_precompute(config, teacher))
    EmbeddingWriter(config.cache).seal()
    return cache_digest(config.cache)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32), behind=st.integers(0, 4), ahead=st.integers(1, 6), processes=st.integers(0, 1))
def test_its_order_changes_no_byte(
    material: tuple[PrecomputeConfig, LiveTeacher, str],
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    behind: int,
    ahead: int,
    processes: int,
) -> None:
    config, teacher, wanted = material
    other = {"cache": str(tmp_path_factory.mktemp("late") / "c"), "decode_processes": processes}
    device = LateDevice(seed)
    with late(device, behind, ahead):
        assert made(config.model_copy(update=other), teacher) == wanted
    assert device.most_waiting <= behind + 1


def test_a_slot_that_is_given_back_too_early_is_seen(
    material: tuple[PrecomputeConfig, LiveTeacher, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same test with the mistake that it is there to find."""
    config, teacher, wanted = material
    launch = encode._Encoder._launch

    def too_early(self: Any, batch: Any, reader: Any) -> Any:
        launched = launch(self, batch, reader)
        reader.done(batch)
        monkeypatch.setattr(batch, "slot", None)
        return launched

    monkeypatch.setattr(encode._Encoder, "_launch", too_early)
    with late(LateDevice(0), behind=2, ahead=3), pytest.raises((AssertionError, IndexError)):
        assert made(config.model_copy(update={"cache": str(tmp_path / "c")}), teacher) == wanted
