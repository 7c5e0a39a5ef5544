"""Captions of a chunk go through the teacher by their length: fewer padded positions, each row still its caption's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zarr

from teacher_cache.pipeline.data.tokens import order_by_length
from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.pipeline.precompute.encode import encode_chunks
from teacher_cache.pipeline.precompute.plan import PlanSettings, plan_precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.manifest_file import read_manifest
from tests.pipeline.precompute.conftest import contents, make_config

IMAGES = 24


@pytest.fixture
def settings(make_photos: Callable[..., Path], tiny_teacher: Path, tmp_path: Path) -> PrecomputeConfig:
    """24 photographs whose two captions have 3 and 12 words by turns, in chunks of 16 captions, batches of 4."""
    photos = make_photos(IMAGES)
    lines = (photos / "captions.txt").read_text().splitlines()
    words = [line.split(",", 1)[0] + "," + " ".join(["dog"] * (12 if at % 2 else 3)) for at, line in enumerate(lines)]
    (photos / "captions.txt").write_text("\n".join([lines[0], *words[1:]]) + "\n")
    return make_config(photos, tiny_teacher, tmp_path / "c", chunk_rows=16)


def by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches planned from here on are those of before there was an order."""
    layout = PlanSettings.layout
    monkeypatch.setattr(
        PlanSettings, "layout", lambda self, *of: layout(self, *of).model_copy(update={"text_order": None})
    )


def test_texts_are_ordered_by_characters_and_equal_ones_stay_as_they_are() -> None:
    texts = pa.chunked_array([["four", "é", "ab", "漢字"], ["", "b"]])
    assert order_by_length(texts).tolist() == [4, 1, 5, 2, 3, 0]


def test_captions_of_like_length_share_a_pass(settings: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in the model: half of them at half of the length, where one long caption padded its whole batch."""
    teacher = load_teacher(settings.teacher, device="cpu")
    positions: list[int] = []
    model: Any = teacher.model
    model.transformer.register_forward_pre_hook(lambda _, inputs: positions.append(inputs[0].shape[:2].numel()))
    found = {}
    for order in ("characters", None):
        if order is None:
            by_row(monkeypatch)
        mine = settings.model_copy(update={"cache": f"{settings.cache}-{order}"})
        refs = plan_precompute(mine, teacher)
        assert read_manifest(open_files(mine.cache)).layout.text_order == order
        positions.clear()
        encode_chunks(mine, teacher, refs)
        found[order] = sum(positions), zarr.open_group(f"{mine.cache}/targets.zarr", mode="r")["text/embedding"][:]
    assert found[None][0] == 2 * IMAGES * 16
    assert found["characters"][0] == IMAGES * 16 + IMAGES * 8
    # three words are not twelve: a row in another's place would be far off
    np.testing.assert_allclose(found["characters"][1], found[None][1], atol=1e-3)
    assert np.abs(found[None][1][::2] - found[None][1][1::2]).max(axis=1).min() > 0.01


def test_a_cache_of_before_there_was_an_order_goes_on_by_row(
    settings: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by an earlier version and finished by this one, it has the very bytes of one that was not stopped."""
    teacher = load_teacher(settings.teacher, device="cpu")
    whole = settings.model_copy(update={"cache": f"{settings.cache}-whole"})
    with monkeypatch.context() as before:
        by_row(before)
        encode_chunks(whole, teacher, plan_precompute(whole, teacher))
        begun = plan_precompute(settings, teacher)
        encode_chunks(settings, teacher, begun[:2])
    left = plan_precompute(settings, teacher)
    assert len(left) == len(begun) - 2
    encode_chunks(settings, teacher, left)
    assert read_manifest(open_files(settings.cache)).layout.text_order is None
    assert contents(Path(settings.cache) / "targets.zarr") == contents(Path(whole.cache) / "targets.zarr")
