"""Stopped by a signal, a full disk or a missing right, a command says how to go on, and what it made is sound."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.files.claim_records import CLAIMS
from teacher_cache.storage.look.info import describe_cache
from tests.commands import run_command
from tests.conftest import cache_digest
from tests.pipeline.precompute.conftest import as_command, settings
from tests.pipeline.train.train_work import make_cache, make_student, trace

MakePhotos = Callable[..., Path]


def command(photos: Path, teacher: Path, cache: Path) -> list[str]:
    return as_command("precompute", settings(photos, teacher, cache, batch_size=2, chunk_rows=4))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "COLUMNS": "300"})


def assert_sound(cache: Path) -> None:
    """Unfinished, and nothing else: no partial file, no claim left, every committed chunk whole."""
    report = verify_cache(str(cache))
    assert {finding.kind for finding in report.findings} == {"incomplete"}, report.findings
    assert list(cache.rglob(".partial-*")) == []
    assert [path for path in (cache / CLAIMS).rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_stopped_by_a_signal_it_says_how_to_go_on(
    make_photos: MakePhotos, tiny_teacher: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        command(make_photos(300), tiny_teacher, tmp_path / "c"),
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    while process.poll() is None and not list((tmp_path / "c" / "commits").rglob("*.json")):
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    last = said.strip().splitlines()[-1]
    found = re.search(r"stopped: (\d+) of 225 chunks are committed\. Run the same command again to go on\.$", last)
    assert found, said
    assert "Traceback" not in said
    assert 0 < int(found[1]) == describe_cache(str(tmp_path / "c")).chunks_committed < 225
    assert_sound(tmp_path / "c")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_stopped_while_it_still_loads_torch_it_says_so_too(
    make_photos: MakePhotos, tiny_teacher: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """The first seconds of each run; whatever is half imported then is not needed to answer."""
    words = command(make_photos(1), tiny_teacher, tmp_path / "c")
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and "libtorch_cpu" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.005)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (
        1,
        "stopped: nothing is committed yet. Run the same command again to go on.\n",
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_train_is_stopped_with_its_workers(tiny_teacher: Path, tmp_path: Path, number: signal.Signals) -> None:
    """As a terminal, systemd and timeout do it: the signal goes to the decoders too, whose end is no failure then."""
    cache, student, out = make_cache(tmp_path, tiny_teacher), make_student(tmp_path / "s.json"), tmp_path / "run"
    asked = {"cache": cache, "student": student, "out": out, "device": "cpu", "workers": 2, "batch_size": 8}
    process = subprocess.Popen(
        as_command("train", {**asked, "epochs": 100_000}),
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        start_new_session=True,
    )
    while process.poll() is None and not RunFolder(out).resumable():
        time.sleep(0.01)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in said) == (1, False), said
    last = said.strip().splitlines()[-1]
    assert re.search(r"stopped: \d+ steps are saved\. Go on by: teacher-cache train --resume --out ", last), said
    assert RunFolder(out).read().steps == len(trace(out))  # which are on disk as they are made: not one is lost


@pytest.mark.parametrize(
    ("arguments", "where", "said"),
    [
        (
            ("repair",),
            "teacher_cache.pipeline.precompute.repair.repair",
            "stopped: what is mended stays. Run the same command again to go on.\n",
        ),
        (("verify",), "teacher_cache.pipeline.cli.caches.verify_cache", "stopped\n"),
        (("info",), "teacher_cache.storage.look.info.describe_cache", "stopped\n"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_every_command_ends_with_a_line_and_1(
    arguments: tuple[str, ...],
    where: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from teacher_cache.pipeline.cli import app as cli

    def stop(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)  # the handler runs before

    monkeypatch.setattr(where, stop)
    monkeypatch.setattr(sys, "argv", ["teacher-cache", *arguments, "c"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.endswith(said)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A real file system of so many KiB; asked again it gets that size."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted: list[Path] = []

    def of(size: int) -> Path:
        options = f"{'remount,' if mounted else ''}size={size}k"
        done = run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place))
        if done.returncode:
            pytest.skip(f"this user may not mount a file system: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield of
    if mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def assert_finished_as_an_unbroken_run(photos: Path, teacher: Path, cache: Path, whole: Path) -> None:
    """Run the same command again, and an unbroken one: the bytes are the same."""
    for place in (cache, whole):
        done = run_command(*command(photos, teacher, place)[3:])
        assert done.returncode == 0, done.stderr
    assert cache_digest(cache) == cache_digest(whole)


def test_a_full_disk_is_named_and_more_room_lets_it_go_on(
    make_photos: MakePhotos, tiny_teacher: Path, tmp_path: Path, small_disk: Callable[[int], Path]
) -> None:
    photos = make_photos(40)
    disk = small_disk(360)
    done = run(*command(photos, tiny_teacher, disk / "c"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(r"error: .*No space left on device: '.*/disk/c/.*'", last), done.stderr
    assert re.search(r"\d+ of 30 chunks are committed\. Run the same command again to go on\.$", last), done.stderr
    assert_sound(disk / "c")
    assert 0 < describe_cache(str(disk / "c")).chunks_committed < 30
    small_disk(4000)
    assert_finished_as_an_unbroken_run(photos, tiny_teacher, disk / "c", tmp_path / "whole")


def test_a_missing_right_is_named_and_the_cache_stays_sound(
    make_photos: MakePhotos, tiny_teacher: Path, tmp_path: Path
) -> None:
    """One folder of the cache may not be written; root runs it without the right to write everywhere."""
    photos = make_photos(12)
    locked = tmp_path / "c" / "commits" / "text"
    locked.mkdir(parents=True)
    locked.chmod(0o555)
    ordinary: tuple[str, ...] = ()
    if os.getuid() == 0:
        rights = "-dac_override,-dac_read_search"
        ordinary = ("setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}")
    done = run(*ordinary, *command(photos, tiny_teacher, tmp_path / "c"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert f"error: [Errno 13] Permission denied: '{locked}/.partial-" in last, done.stderr
    assert last.endswith("of 9 chunks are committed. Run the same command again to go on."), done.stderr
    assert_sound(tmp_path / "c")
    locked.chmod(0o755)
    assert_finished_as_an_unbroken_run(photos, tiny_teacher, tmp_path / "c", tmp_path / "whole")
