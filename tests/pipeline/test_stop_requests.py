"""A training run that is asked to stop ends behind a step, which is saved, and goes on with the next one."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from pipeline.runs import RunFolder
from pipeline.stop_requests import StopRequests
from pipeline.train import StepProgress, train
from tests.pipeline.train_work import make_cache, make_student, trace, train_config

SETTINGS: dict[str, Any] = {"ema_decay": 0.9, "select_split": "test"}  # two epochs of four steps


class Told(Exception):
    """What the handler from before raises."""


def tell(number: int, frame: FrameType | None) -> None:
    raise Told(signal.Signals(number).name)


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    assert [signal.getsignal(number) for number in before] == [tell, tell]  # each was given back
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def home(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a cache, a student and the unbroken run ``whole``."""
    folder = tmp_path_factory.mktemp("stopped")
    make_cache(folder, tiny_teacher)
    student = make_student(folder / "student.json", patch_dropout=0.5)
    train(train_config(folder / "photos.cache", student, folder / "whole", **SETTINGS))
    return folder


def sent(at: int, *numbers: signal.Signals) -> Callable[[StepProgress], None]:
    """Signals that come while a step is being worked on."""

    def progress(now: StepProgress) -> None:
        if now.step == at:
            for number in numbers:
                signal.raise_signal(number)

    return progress


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("at", [1, 3, 4, 6])  # 4 is the last one of an epoch
def test_the_step_is_saved_and_the_run_goes_on_as_an_unbroken_one(
    home: Path, tmp_path: Path, at: int, number: signal.Signals
) -> None:
    config = train_config(home / "photos.cache", home / "student.json", tmp_path / "run", **SETTINGS)
    with pytest.raises(Told, match=number.name):
        train(config, sent(at, number))
    record = RunFolder(tmp_path / "run").read()
    assert (record.steps, len(trace(tmp_path / "run"))) == (at, at)
    train(config, resume=True)
    assert trace(tmp_path / "run") == trace(home / "whole")
    after, whole = RunFolder(tmp_path / "run").read(), RunFolder(home / "whole").read()
    assert after.resumed_at == (at,)
    assert [(epoch.loss, epoch.selection) for epoch in after.epochs] == [
        (epoch.loss, epoch.selection) for epoch in whole.epochs
    ]


@pytest.mark.usefixtures("handlers")
def test_a_second_signal_does_not_wait(home: Path, tmp_path: Path) -> None:
    config = train_config(home / "photos.cache", home / "student.json", tmp_path / "run", **SETTINGS)
    with pytest.raises(Told, match="SIGINT"):
        train(config, sent(3, signal.SIGINT, signal.SIGINT))
    assert RunFolder(tmp_path / "run").read().checkpoint is None


def test_a_handler_that_lets_the_loop_go_on_is_told_between_steps_and_each_time() -> None:
    told: list[int] = []
    saved: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(len(saved)))
    try:
        with StopRequests(lambda: saved.append(1)) as stop:
            for step in range(4):
                if step in (1, 3):
                    signal.raise_signal(signal.SIGTERM)
                assert len(told) == (0, 0, 1, 1)[step]
                stop.may_act()
        assert told == [1, 2]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_items_that_end_with_the_signal_are_no_failure_and_others_are() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise RuntimeError("DataLoader worker is killed by signal")

    saved: list[int] = []
    with pytest.raises(RuntimeError, match="killed by signal"), StopRequests(lambda: saved.append(1)) as stop:
        list(stop.between_steps(items()))
    assert not saved
    child = signal.getsignal(signal.SIGCHLD)

    def loop() -> None:
        with StopRequests(lambda: saved.append(1)) as stop:
            for _ in stop.between_steps(items()):
                signal.raise_signal(signal.SIGINT)
                assert signal.getsignal(signal.SIGCHLD) != child

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert saved == [1]
    assert signal.getsignal(signal.SIGCHLD) == child


def test_what_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with StopRequests(lambda: None) as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.asked is None
        with StopRequests(lambda: None, active=False) as stop, pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
