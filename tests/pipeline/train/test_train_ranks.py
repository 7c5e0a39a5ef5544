"""Two ranks on loopback: when one of them fails in the middle of a run, all end, and it is said why."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.stop_signals import interrupt
from tests.pipeline.train.rank_work import train_failing
from tests.pipeline.train.train_work import make_student, train_config

PROJECT = Path(__file__).resolve().parents[3]
TOLD = {
    "raises": "ZeroDivisionError: a fault of rank 1",
    "dies": "rank 1 was ended by SIGKILL",
    "hangs": r"rank 0 waited 10 s for another rank, .*--resume",
}


@pytest.fixture
def config(photo_cache: Path, tmp_path: Path) -> TrainConfig:
    student = make_student(tmp_path / "student.json")
    return train_config(photo_cache, student, tmp_path / "run", checkpoint_steps=1)


@pytest.fixture
def pids(tmp_path: Path) -> Path:
    folder = tmp_path / "pids"
    folder.mkdir()
    return folder


def assert_ended(config: TrainConfig, pids: Path) -> None:
    """Both were at work and are gone; what was saved by then is there."""
    ranks = [int(path.name) for path in pids.iterdir()]
    assert len(ranks) == 2
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
    assert RunFolder(config.out).read().steps == 2


@pytest.mark.parametrize("how", TOLD)
def test_a_rank_that_fails_ends_all_ranks_and_is_told(how: str, config: TrainConfig, pids: Path) -> None:
    """By spawn. The default of four hours would not end within this test's time."""
    config = config.model_copy(update={"devices": 2, "rank_timeout_seconds": 10.0 if how == "hangs" else 14400.0})
    with pytest.raises(Exception, match=TOLD[how]) as told:
        train_failing(config, how, pids)
    assert isinstance(told.value, OSError) == (how != "raises")  # one line of the command
    assert_ended(config, pids)


def test_ranks_save_the_step_and_stop_together(config: TrainConfig, pids: Path) -> None:
    """The signal reaches the command alone, in the third step; the ranks agree behind the fourth."""
    config = config.model_copy(update={"devices": 2, "checkpoint_steps": None})
    before = signal.signal(signal.SIGTERM, interrupt)  # as a command has it
    try:
        with pytest.raises(KeyboardInterrupt):
            train_failing(config, "stops", pids)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not [path for path in pids.iterdir() if Path(f"/proc/{path.name}").exists()]
    record = RunFolder(config.out).read()
    assert (record.steps, record.checkpoint, record.epochs) == (4, "checkpoints/step-00000004", ())


@pytest.mark.parametrize("how", TOLD)
def test_under_torchrun_a_rank_that_fails_ends_all_ranks_and_is_told(how: str, config: TrainConfig, pids: Path) -> None:
    config = config.model_copy(update={"rank_timeout_seconds": 10.0 if how == "hangs" else 14400.0})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    work = ["-m", "tests.pipeline.train.rank_work", config.model_dump_json(), how, str(pids)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    process = subprocess.Popen(
        [sys.executable, *launcher, *work],
        cwd=PROJECT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said = process.communicate(timeout=300)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 1, said
    # torchrun itself names a rank that was killed
    told = r"(?s)Root Cause .* rank +: 1 .* exitcode +: -9 " if how == "dies" else TOLD[how]
    assert re.search(told, said), said
    assert_ended(config, pids)
