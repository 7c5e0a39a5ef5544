"""A hub that does not answer: one sentence within seconds, and no request after the first."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from teacher_cache.pipeline.models import hub as hub_module
from teacher_cache.pipeline.models.hub import hub_within_reach
from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.storage.errors import UsageError

NO_COPY = "and there is no local copy. Offline: docs/howto/offline.md, or name a local folder"


@pytest.fixture(params=["refuses", "hangs"])
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a hub that refuses connections, or accepts them and says nothing."""
    monkeypatch.setattr(hub_module, "_HUB_SECONDS", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "hangs":
            server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", f"http://{address}")
        yield address


@pytest.mark.parametrize("teacher", [("ViT-B-32", "openai"), ("hf-hub:no-such/model", None)])
def test_a_hub_out_of_reach_ends_in_one_sentence(
    teacher: tuple[str, str | None], hub: str, caplog: pytest.LogCaptureFixture
) -> None:
    began = time.monotonic()
    with pytest.raises(UsageError) as refused:
        load_teacher(*teacher, device="cpu")
    assert str(refused.value) == f"teacher {teacher[0]!r}: {hub} cannot be reached, {NO_COPY}"
    assert time.monotonic() - began < 10  # one try waits 1 s and more, the library makes six of each file
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert constants.HF_HUB_OFFLINE is False


def test_offline_is_said_as_it_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=f"teacher 'ViT-B-32': HF_HUB_OFFLINE is set, {NO_COPY}"):
        load_teacher("ViT-B-32", "openai", device="cpu")


def test_other_errors_stay_what_they_are(hub: str) -> None:
    with pytest.raises(ZeroDivisionError), hub_within_reach("x"):
        _ = 1 / 0
