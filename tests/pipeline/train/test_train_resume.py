"""Killed at any moment, a run goes on with the very next batch and ends as an unbroken one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.student import load_student
from teacher_cache.pipeline.models.weights import write_weights
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.errors import CacheMismatchError, UsageError
from teacher_cache.storage.look.info import describe_cache
from tests import train_process
from tests.commands import run_command
from tests.pipeline.train.train_work import make_cache, make_student, measure, trace, train_config

MOMENTS: dict[str, tuple[int, Callable[[str, str], bool]]] = {
    "behind a step": (3, lambda kind, key: kind == "step"),
    "in the weights": (2, lambda kind, key: kind == "half tensors" and key == "weights.safetensors"),
    "in the optimizer's state": (2, lambda kind, key: kind == "half tensors" and key == "optimizer.safetensors"),
    "in the model": (2, lambda kind, key: kind == "half tensors" and key == "open_clip_model.safetensors"),
    "before the checkpoint is synced": (2, lambda kind, key: kind == "sync" and key.startswith("checkpoints/")),
    "in the record": (2, lambda kind, key: kind == "half record"),
    "between record and rename": (2, lambda kind, key: kind == "sync" and key.startswith(".partial-")),
    "behind the record": (1, lambda kind, key: kind == "sync" and key == "."),
    "in the removal of what is replaced": (2, lambda kind, key: kind == "remove"),
}
# a student with dropout, and a queue of three batches: which patches it sees and which rows are queued has to come back
LOSSES = {"relational": 1.0, "interactive": 0.3, "queue": 1.0}
SETTINGS: dict[str, Any] = {"ema_decay": 0.9, "checkpoint_steps": 3, "select_split": "test", "select_every": 1}
SETTINGS |= {"losses": LOSSES, "queue_rows": 48, "captions_per_image": 2}


class Work:
    """A cache, a student, and what an unbroken run of it leaves."""

    def __init__(self, folder: Path, teacher: Path) -> None:
        self.folder = folder
        self.cache = make_cache(folder, teacher)
        self.student = make_student(folder / "student.json", patch_dropout=0.5)
        process, self.events = self.finish("whole")
        assert process["error"] is None
        self.result = self.left("whole")

    def config(self, name: str, **changes: Any) -> TrainConfig:
        student = changes.pop("student", self.student)
        return train_config(changes.pop("cache", self.cache), student, self.folder / name, **{**SETTINGS, **changes})

    def finish(self, name: str, resume: bool = False) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        out = self.folder / f"{name}.json"
        process = train_process.start(self.config(name).model_dump(), out=out, resume=resume)
        process.join(120)
        found = json.loads(out.read_text())
        return found, [(kind, key) for kind, key in found["events"]]

    def killed(self, name: str, at: int, **changes: Any) -> None:
        config = self.config(name, **changes).model_dump()
        process = train_process.start(config, out=self.folder / "never.json", kill_at=at)
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, f"event {at} of {len(self.events)} never came"

    def left(self, name: str) -> Any:
        """The trace, and digests of every tensor file of the finished run."""
        run = self.folder / name
        files = sorted(run.rglob("*.safetensors"))
        digests = {path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        return (run / "log.jsonl").read_text(), digests


@pytest.fixture(scope="module")
def work(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(tmp_path_factory.mktemp("resumed"), tiny_teacher)


def test_the_unbroken_run_has_all_that_can_be_killed(work: Work) -> None:
    log, digests = work.result
    assert [json.loads(line)["step"] for line in log.splitlines()] == list(range(1, 9))
    best = RunFolder(work.folder / "whole").read().best
    assert best is not None
    assert {name.rsplit("/", 1)[0] for name in digests} == {"checkpoints/epoch-0002", best.checkpoint}
    for count, chosen in MOMENTS.values():
        assert sum(chosen(*event) for event in work.events) >= count


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_seeded_moment_it_ends_as_an_unbroken_run(work: Work, moment: str) -> None:
    count, chosen = MOMENTS[moment]
    places = [number for number, event in enumerate(work.events) if chosen(*event)]
    for number, at in enumerate(random.Random(f"2026 {moment}").sample(places, count)):
        name = f"{moment}-{number}".replace(" ", "-").replace("'", "")
        work.killed(name, at)
        folder = RunFolder(work.folder / name)
        if not folder.exists():  # killed in the very first record: there is no run yet
            assert work.finish(name)[0]["error"] is None
            continue
        before = folder.read()
        if before.checkpoint is not None:
            load_student(folder.checkpoint_path())  # what the record names can be used as it is
        found, events = work.finish(name, resume=True)
        assert found["error"] is None
        assert work.left(name) == work.result
        if not before.finished:
            steps = [int(key) for kind, key in events if kind == "step"]
            assert steps == list(range(before.steps + 1, 9))
        after = folder.read()
        assert after.resumed_at == (() if before.finished or before.checkpoint is None else (before.steps,))
        whole = RunFolder(work.folder / "whole").read()
        assert after.initial_weights_sha256 == whole.initial_weights_sha256 is not None
        assert [(epoch.loss, epoch.parts, epoch.selection) for epoch in after.epochs] == [
            (epoch.loss, epoch.parts, epoch.selection) for epoch in whole.epochs
        ]


def test_killed_from_outside_it_goes_on_by_the_command_that_it_names(work: Work) -> None:
    """As a user does it: the command, kill -9, the command with --resume; with decoders in processes of their own."""
    run = work.folder / "outside"
    command = [sys.executable, "-m", "teacher_cache.pipeline.cli.app", "train"]
    settings = {**SETTINGS, "checkpoint_steps": 1}
    toml = work.folder / "run.toml"
    losses = settings.pop("losses")
    lines = [f"{name} = {json.dumps(value)}" for name, value in {**settings, "epochs": 20, "batch_size": 8}.items()]
    lines += ["[train.losses]", *(f"{name} = {weight}" for name, weight in losses.items())]
    toml.write_text("[train]\n" + "\n".join(lines) + "\n")
    flags = ["--cache", str(work.cache), "--student", str(work.student), "--device", "cpu", "--set", "workers=1"]
    process = subprocess.Popen([*command, str(toml), *flags, "--out", str(run)], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 200
    while not (run / "log.jsonl").exists() or len(trace(run)) < 3:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)  # decoders hold the pipe: they end with the process that is killed
    for more, message in (
        (flags, "Go on with it by --resume"),
        (["--resume", "--epochs", "7"], "epochs is 7, the run has 20"),
    ):
        refused = run_command("train", *more, "--out", run)
        assert refused.returncode == 2
        assert message in refused.stderr
    done = run_command("train", "--resume", "--out", run, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    (resumed,) = record["resumed_at"]
    assert 1 <= resumed < 80
    assert "80 of 80  loss" in done.stderr
    assert "eta 0:00:00" in done.stderr
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 81))
    whole = train(work.config("long", epochs=20, checkpoint_steps=None)).record
    assert (run / "log.jsonl").read_text() == (work.folder / "long" / "log.jsonl").read_text()
    assert [epoch["loss"] for epoch in record["epochs"]] == [epoch.loss for epoch in whole.epochs]


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_is_being_written_names_the_process(work: Work, resume: bool) -> None:
    shutil.copytree(work.folder / "whole", work.folder / f"held-{resume}")
    run = work.folder / f"held-{resume}"
    code = "import sys; from teacher_cache.pipeline.models.run_folder import RunFolder as R\n"
    code += "with R(sys.argv[1]).locked(): print('locked', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(UsageError) as refused:
        train(work.config(run.name), resume=resume)
    holder.communicate("")
    writer = f"process {holder.pid} on {socket.gethostname()}"
    assert str(refused.value) == f"{run}: is being written by {writer}. Wait for it, or stop it."
    assert repr(train(work.config(run.name), resume=True)) == f"TrainResult(run='{run}')"


def test_a_student_is_measured_while_its_training_replaces_the_checkpoints(work: Work) -> None:
    """Every step writes a checkpoint and removes the one before it; each measurement is of a whole one."""
    run = work.folder / "measured"
    config = work.config("measured", epochs=12, select_split=None, checkpoint_steps=1).model_dump()
    process = train_process.start(config, out=work.folder / "measured.json")
    measured = []
    while process.is_alive():
        if (run / "run.json").exists() and RunFolder(run).read().checkpoint is not None:
            measured.append(measure(run))
    process.join()
    assert json.loads((work.folder / "measured.json").read_text())["error"] is None
    assert len({result.checkpoint for result in measured}) > 3
    assert measured[-1].student is not None


def test_a_checkpoint_that_is_replaced_while_it_is_loaded_is_followed_by_the_next(work: Work, tmp_path: Path) -> None:
    shutil.copytree(work.folder / "whole", tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    first = run.checkpoint_path()
    loaded = []

    def load(path: Path) -> str:
        loaded.append(path.name)
        if path == first:  # as a training does it
            shutil.copytree(first, path.with_name("next"))
            run.switch(run.read().model_copy(update={"checkpoint": "checkpoints/next"}))
        return (path / "origin.json").read_text()

    record, path, origin = run.load_checkpoint("last", load)
    assert (loaded, path.name, record.checkpoint) == (["epoch-0002", "next"], "next", "checkpoints/next")
    assert json.loads(origin)["step"] == record.steps
    (path / "origin.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"next/origin\.json"):  # damaged, not replaced
        run.load_checkpoint("last", load)


def test_what_cannot_be_gone_on_with(work: Work, tmp_path: Path, tiny_teacher: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere: no run here \(run.json not found\)"):
        train(work.config("nowhere"), resume=True)
    work.killed("half", work.events.index(("step", "5")))
    with pytest.raises(UsageError, match=r"holds a run already. Go on with it by --resume, or choose another --out"):
        train(work.config("half"))
    wanted = "other settings: ema_decay is 0.5, the run has 0.9; seed is 4, the run has 0. Leave them out"
    with pytest.raises(UsageError, match=wanted):
        train(work.config("half", seed=4, ema_decay=0.5), resume=True)
    other = make_cache(tmp_path, tiny_teacher, 45)
    with pytest.raises(CacheMismatchError, match=r"its manifest is \w{12}, \w{12} was .*half learned from that one"):
        train(work.config("half").model_copy(update={"cache": str(other)}), resume=True)
    folder = RunFolder(work.folder / "half")
    record = folder.read()
    shutil.copytree(work.folder / "half", work.folder / "ruined")
    point = work.folder / "ruined" / str(record.checkpoint) / "resume"
    with (point / "optimizer.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(UsageError, match=r"no point that this run could go on from: SafetensorError"):
        train(work.config("ruined"), resume=True)
    shutil.rmtree(point)
    with pytest.raises(UsageError, match="has no resume folder to go on from; an older version wrote none"):
        train(work.config("ruined"), resume=True)


def test_it_goes_on_without_the_files_that_it_began_with(work: Work) -> None:
    student, expect = work.folder / "gone.json", work.folder / "expected.json"
    shutil.copy(work.student, student)
    expect.write_text(describe_cache(str(work.cache)).model_dump_json())
    files = {"student": str(student), "expect": str(expect)}
    work.killed("bereft", work.events.index(("step", "5")), **files)
    expect.unlink()
    # another student of the same shapes: what the run has is what counts
    student.write_text(json.dumps(json.loads(student.read_text()) | {"quick_gelu": True}))
    train(work.config("bereft", **files), resume=True)
    assert (work.folder / "bereft" / "log.jsonl").read_text() == work.result[0]


def test_a_folder_of_pictures_is_no_place_for_a_run(work: Work, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("")
    RunFolder(tmp_path).require_free()
    (tmp_path / "one.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match=r"holds one\.jpg, but no run\.json, so it is no run of ours"):
        train(work.config("x").model_copy(update={"out": str(tmp_path)}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.jpg", "run.toml"]


def test_nothing_of_another_program_is_removed(work: Work, tmp_path: Path) -> None:
    theirs = tmp_path / "checkpoints" / "epoch_1.pt"
    theirs.parent.mkdir()
    theirs.write_bytes(b"weeks of work")
    with pytest.raises(UsageError, match=r"holds checkpoints, but no run.json, so it is no run of ours"):
        train(work.config("x").model_copy(update={"out": str(tmp_path)}))
    assert theirs.read_bytes() == b"weeks of work"


def test_a_file_system_without_locks_is_told_from_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lockf(*what: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("teacher_cache.pipeline.models.run_folder.fcntl.lockf", lockf)
    with pytest.raises(UsageError, match=r"this file system has no locks \(Function not implemented\)"):
        RunFolder(tmp_path).locked().__enter__()


def test_checkpoints_can_be_read_by_whom_the_umask_lets(work: Work) -> None:
    modes = {path.stat().st_mode & 0o777 for path in (work.folder / "whole").rglob("*") if path.is_file()}
    os.umask(umask := os.umask(0))
    assert modes == {0o666 & ~umask}


def test_a_full_disk_is_an_error_with_the_files_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path) -> None:
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr("teacher_cache.pipeline.models.weights.save_file", full)
    with pytest.raises(OSError, match=r"x\.safetensors: cannot be written: .*No space left on device"):
        write_weights({}, tmp_path / "x.safetensors")


def test_a_queue_that_no_loss_uses_is_refused(work: Work) -> None:
    config = work.config("idle", losses={"cosine": 8.0}, queue_rows=48)
    with pytest.raises(UsageError, match=r"queue_rows is 48 and no loss uses .* losses = { cosine = 8, queue = 1 }"):
        train(config)


@pytest.mark.parametrize("devices", [1, 2])
def test_the_variables_of_a_slurm_job_change_nothing(work: Work, devices: int) -> None:
    """One of the processes of ``srun -n 4``, or a job of one task with two devices."""
    tasks = "4" if devices == 1 else "1"
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "sweep", "SLURM_NTASKS": tasks, "SLURM_PROCID": "0"}
    slurm |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "here", "SLURM_NTASKS_PER_NODE": tasks}
    settings = {"--cache": work.cache, "--student": work.student, "--out": work.folder / f"slurm-{devices}"}
    settings |= {"--epochs": 1, "--batch-size": 8, "--set": "workers=0", "--device": "cpu", "--devices": devices}
    done = run_command("train", *(word for pair in settings.items() for word in pair), env={**os.environ, **slurm})
    assert done.returncode == 0, done.stderr
    assert RunFolder(work.folder / f"slurm-{devices}").read().steps == 4


def test_a_finished_run_stays_as_it_is(work: Work) -> None:
    assert train(work.config("whole"), resume=True).record == RunFolder(work.folder / "whole").read()
    assert work.left("whole") == work.result
    with pytest.raises(UsageError, match=r"holds a run already. Choose another --out, or delete the folder"):
        train(work.config("whole"))
    # nothing to go on to: only models are left, and not a byte of pickle
    kinds = {path.suffix for path in (work.folder / "whole").glob("checkpoints/**/*") if path.is_file()}
    assert kinds == {".json", ".safetensors"}
    assert not list((work.folder / "whole").rglob("resume"))


def test_records_of_earlier_versions_are_read(work: Work, tmp_path: Path) -> None:
    data = json.loads((work.folder / "whole" / "run.json").read_text())
    new = {"micro_batch", "ema_decay", "devices", "compile", "checkpoint_seconds", "checkpoint_steps"}
    new |= {"select_split", "select_every", "captions_per_image", "lock_image_unlocked_groups", "train_image_size"}
    data["config"] = {name: value for name, value in data["config"].items() if name not in new}
    del data["best"], data["resumed_at"]
    for epoch in data["epochs"]:
        del epoch["selection"]
    (tmp_path / "run.json").write_text(json.dumps(data))
    record = RunFolder(tmp_path).read()
    assert (record.best, record.resumed_at, record.config.devices) == (None, (), 1)
    assert record.finished
