"""Progress on stderr: the count and the time left are there at any width, in a terminal and without one."""

from __future__ import annotations

import pytest

from teacher_cache.storage.observe import progress as module
from teacher_cache.storage.observe.progress import StageProgress

NOTE = "loss 23.604  197 samples/s  data wait 10%"


def shown(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    with StageProgress() as progress:
        progress("train", 1, 2_345, NOTE)
        progress("train", 1_234, 2_345, NOTE)
    return capsys.readouterr().err


@pytest.mark.parametrize(("width", "noted"), [(40, False), (60, False), (80, True), (200, True)])
def test_a_terminal_of_any_width_shows_the_count_and_the_time_left(
    width: int, noted: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(width, monkeypatch, capsys)
    assert "train" in text
    assert "1234/2345" in text
    assert "0:00:" in text or "-:--:--" in text
    assert (NOTE in text) == noted
    assert "…" not in text


def test_lines_without_a_terminal_estimate_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with StageProgress() as progress:
        progress("images", 10, 100)
        now = 120.0
        progress("images", 50, 100)  # 40 rows in 20 seconds, 50 to go
        progress("images", 100, 100)
    assert capsys.readouterr().err == "images: 50 of 100  eta 0:00:25\nimages: 100 of 100\n"


def test_a_caller_that_knows_the_time_left_is_believed(capsys: pytest.CaptureFixture[str]) -> None:
    with StageProgress() as progress:
        progress("train", 4, 4, "loss 1.0", eta_seconds=0.0)
    assert capsys.readouterr().err == "train: 4 of 4  loss 1.0  eta 0:00:00\n"
