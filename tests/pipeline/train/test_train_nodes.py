"""One run on two machines, as torchrun starts it: here two launchers on loopback, each with one process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.train.launch import launch, launched_rank
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.errors import UsageError
from tests.pipeline.train.train_work import make_student, trace, train_config

PROJECT = Path(__file__).resolve().parents[3]
_SECONDS = 400  # a bound for a machine under load


def start_node(number: int, port: int, words: list[str], log: Path) -> subprocess.Popen[bytes]:
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(number)]
    place = ["--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "teacher_cache.pipeline.cli.app"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *launcher, *place, *words],
            cwd=PROJECT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@pytest.mark.service
@pytest.mark.timeout(900)
def test_two_nodes_have_the_losses_of_one_process(photo_cache: Path, tmp_path: Path) -> None:
    student = make_student(tmp_path / "student.json")
    train(train_config(photo_cache, student, tmp_path / "one"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "--cache": photo_cache,
        "--student": student,
        "--out": tmp_path / "two",
        "--epochs": 2,
        "--batch-size": 8,
    }
    words = ["train", *(str(word) for pair in settings.items() for word in pair), "--set=workers=0", "--device=cpu"]
    logs = [tmp_path / f"node-{number}.log" for number in range(2)]
    nodes = [start_node(number, port, words, log) for number, log in enumerate(logs)]
    try:
        codes = [node.wait(_SECONDS) for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()
    said = [log.read_text() for log in logs]
    assert codes == [0, 0], said
    one, two = trace(tmp_path / "one"), trace(tmp_path / "two")
    assert len(one) == len(two) == 8
    for alone, shared in zip(one, two, strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert shared["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3)
    assert RunFolder(str(tmp_path / "two")).read().finished
    # one of them tells of the run
    assert "8 steps over 32 images" in said[0]
    assert "8 steps over" not in said[1]


@pytest.fixture
def by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"RANK": 1, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1}
    for name, value in {**told, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 9}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.usefixtures("by_torchrun")
@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        ({"devices": 2}, {}, "torchrun starts a process for each device: leave --devices out"),
        ({"batch_size": 9}, {}, "batch_size 9 cannot be shared evenly by torchrun's 2 processes"),
        (
            {"batch_size": 9},
            {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"},
            "torchrun started 2 of 3 processes on this machine: the same number on each is wanted",
        ),
    ],
)
def test_what_torchrun_cannot_share_is_refused(
    changes: dict[str, Any], processes: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launched_rank() == 1
    for name, value in processes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        launch(train_config(tmp_path, "none", tmp_path / "run", **changes), lambda *_: None)


@pytest.mark.usefixtures("by_torchrun")
@pytest.mark.parametrize("name", ["RANK", "LOCAL_WORLD_SIZE"])
def test_a_process_of_its_own_has_no_rank(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name)
    assert launched_rank() is None


def test_one_process_trains_in_a_folder_and_of_a_finished_run_one_cleans(
    photo_cache: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Started again with ``--resume`` all of torchrun's processes come at once; rank 0 holds the folder meanwhile."""
    student = make_student(tmp_path / "student.json")
    config = train_config(photo_cache, student, tmp_path / "run", epochs=1)
    record = train(config).record
    # another process: a record lock does not keep out its own
    hold = "import sys; from teacher_cache.pipeline.models.run_folder import RunFolder\n"
    hold += "with RunFolder(sys.argv[1]).locked(), RunFolder(sys.argv[2]).locked():\n"
    hold += "    print(1, flush=True); sys.stdin.read()"
    new = train_config(photo_cache, student, tmp_path / "new", epochs=1)
    command = [sys.executable, "-c", hold, config.out, new.out]
    with subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as rank_0:
        assert rank_0.stdout is not None
        assert rank_0.stdout.readline() == b"1\n"
        for held, resume in ((config, True), (new, False)):
            with pytest.raises(UsageError, match="is being written by process"):
                train(held, resume=resume)
        request.getfixturevalue("by_torchrun")
        assert train(config, resume=True).record == record
        rank_0.kill()
    with RunFolder(config.out).locked():  # a process that died holds nothing
        pass
