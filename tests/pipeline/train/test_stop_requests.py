"""A training run that is asked to stop ends behind a step, which is saved, and goes on with the next one."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import teacher_cache.pipeline.train.checkpoints
from teacher_cache.pipeline.data.batches.inputs import InputLoader
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.loop import StepProgress, train
from teacher_cache.pipeline.train.stop_signals import StopRequests, interrupt
from tests.pipeline.train.train_work import make_student, trace, train_config

SETTINGS: dict[str, Any] = {"ema_decay": 0.9, "select_split": "test", "select_every": 2}  # two epochs of four steps
BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """As a command has them; each is given back by who replaces it."""
    wanted = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: interrupt}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    yield
    assert {number: signal.getsignal(number) for number in wanted} == wanted
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def home(photo_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a student and the unbroken run ``whole``."""
    folder = tmp_path_factory.mktemp("stopped")
    student = make_student(folder / "student.json", patch_dropout=0.5)
    train(train_config(photo_cache, student, folder / "whole", **SETTINGS))
    return folder


@pytest.fixture
def config(photo_cache: Path, home: Path, tmp_path: Path) -> TrainConfig:
    return train_config(photo_cache, home / "student.json", tmp_path / "run", **SETTINGS)


def sent(at: int, *numbers: signal.Signals, seconds_apart: float = 0.0) -> Callable[[StepProgress], None]:
    """Signals that come while a step is being worked on."""

    def progress(now: StepProgress) -> None:
        if now.step == at:
            for number in numbers:
                signal.raise_signal(number)
                time.sleep(seconds_apart)

    return progress


def assert_goes_on(home: Path, config: TrainConfig, at: int) -> None:
    """Nothing of what was learned is lost, and the run ends as an unbroken one."""
    run = Path(config.out)
    assert (RunFolder(run).read().steps, len(trace(run))) == (at, at)
    train(config, resume=True)
    assert trace(run) == trace(home / "whole")
    after, whole = RunFolder(run).read(), RunFolder(home / "whole").read()
    assert after.resumed_at == (at,)
    assert [(epoch.loss, epoch.selection) for epoch in after.epochs] == [
        (epoch.loss, epoch.selection) for epoch in whole.epochs
    ]


@pytest.mark.parametrize("number", BOTH, ids=[number.name for number in BOTH])
@pytest.mark.parametrize("at", [1, 3, 4, 6, 8])  # 4 and 8 are the last ones of their epochs; the second is measured
def test_the_step_is_saved_and_the_run_goes_on_as_an_unbroken_one(
    home: Path, config: TrainConfig, at: int, number: signal.Signals
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(config, sent(at, number))
    assert_goes_on(home, config, at)


def test_stopped_while_it_measures_it_has_saved_the_last_step(home: Path, config: TrainConfig) -> None:
    def stopped(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("teacher_cache.pipeline.train.loop.embed", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert_goes_on(home, config, 8)


@pytest.mark.parametrize("at", [4, 8])
def test_stopped_in_the_checkpoint_of_an_epoch_it_has_that_one(home: Path, config: TrainConfig, at: int) -> None:
    save = teacher_cache.pipeline.train.checkpoints.save_student

    def stopped(student: Any, architecture: Any, folder: Path, origin: Any) -> None:
        save(student, architecture, folder, origin)
        if origin["step"] == at and "epoch-" in str(folder):
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("teacher_cache.pipeline.train.checkpoints.save_student", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    record = RunFolder(config.out).read()
    assert (record.steps, len(record.epochs)) == (at, at // 4)
    train(config, resume=True)
    assert trace(Path(config.out)) == trace(home / "whole")


def test_stopped_while_it_waits_for_data_it_does_not_wait_for_them(home: Path, config: TrainConfig) -> None:
    shown = InputLoader.epoch

    def slow(self: InputLoader, pairs: Any) -> Iterator[Any]:
        for number, batch in enumerate(shown(self, pairs)):
            if number == 2:
                signal.raise_signal(signal.SIGTERM)
                pytest.fail("it waited")
            yield batch

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(InputLoader, "epoch", slow)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert_goes_on(home, config, 2)


def test_a_second_signal_does_not_wait_and_one_that_is_sent_twice_does(home: Path, config: TrainConfig) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(config, sent(3, signal.SIGINT, signal.SIGINT, seconds_apart=0.6))
    assert RunFolder(config.out).read().checkpoint is None
    with pytest.raises(KeyboardInterrupt):  # as timeout(1) sends it
        train(config, sent(3, signal.SIGTERM, signal.SIGTERM))
    assert_goes_on(home, config, 3)


@pytest.mark.parametrize("error", [RuntimeError, ConnectionResetError, EOFError])
def test_items_that_end_with_the_signal_are_no_failure_and_others_are(error: type[Exception]) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise error("DataLoader worker is killed by signal")

    saved: list[int] = []
    with pytest.raises(error, match="killed by signal"), StopRequests(lambda: saved.append(1)) as stop:
        list(stop.between_steps(items()))
    assert not saved

    def loop() -> None:
        with StopRequests(lambda: saved.append(1)) as stop:
            for _ in stop.between_steps(items()):
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert saved == [1]


def test_a_signal_behind_the_last_moment_acts_at_the_end_of_the_block() -> None:
    saved: list[int] = []

    def block(error: Exception | None) -> None:
        with StopRequests(lambda: saved.append(1)) as stop:
            stop.may_act()
            signal.raise_signal(signal.SIGTERM)
            if error is not None:
                raise error

    with pytest.raises(KeyboardInterrupt):
        block(None)
    assert saved == [1]
    with pytest.raises(KeyboardInterrupt):  # what went wrong in half a step is not saved, and does not hide the signal
        block(RuntimeError("no memory"))
    assert saved == [1]


def test_who_has_a_handler_of_its_own_keeps_it() -> None:
    """Prefect tells a cancellation by it."""
    told: list[int] = []

    def own(number: int, frame: FrameType | None) -> None:
        told.append(number)

    for handler in (own, signal.SIG_IGN):
        before = signal.signal(signal.SIGTERM, handler)
        try:
            with StopRequests() as stop:
                assert signal.getsignal(signal.SIGTERM) is handler
                signal.raise_signal(signal.SIGTERM)
                assert stop.request is None
        finally:
            signal.signal(signal.SIGTERM, before)
    assert told == [signal.SIGTERM]


def test_it_keeps_nothing_where_it_may_not() -> None:
    def block(**settings: Any) -> None:
        with StopRequests(**settings):
            assert signal.getsignal(signal.SIGTERM) is interrupt

    block(active=False)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(block).result()
