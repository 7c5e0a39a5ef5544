"""The harness of the benchmark: turns, ratios, tables, sections that fail; and that its sections compare the same."""

from __future__ import annotations

import itertools
import json
import mmap
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from benchmarks.bench import __main__ as bench
from benchmarks.bench import rival_loaders
from benchmarks.bench.harness import Row, Settings, interleave, keep, speed, table
from benchmarks.bench.memory import PeakMemory
from benchmarks.bench.peers import PEERS, python_of
from benchmarks.bench.reckon import Form
from benchmarks.bench.reckon import table as reckoned
from benchmarks.bench.shuffle import mates_share

ROOT = Path(__file__).parents[1]
ROW = Row("ours", "theirs", ours=200.0, theirs=100.0, unit="rows/s", ratio=2.0, low=1.5, high=2.5)


# --- turns


def test_candidates_take_turns_and_another_one_begins_each_round() -> None:
    calls: list[str] = []
    seconds = interleave({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4)
    rounds = ["".join(calls[at : at + 3]) for at in range(0, len(calls), 3)]
    assert rounds == ["abc", "abc", "bca", "cab", "abc"]  # the first warms up
    assert {name: len(found) for name, found in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    calls.clear()
    interleave({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=1, warm_up=False)
    assert "".join(calls) == "ab"


def test_a_ratio_is_of_one_round_and_not_of_medians() -> None:
    row = speed("a", "b", ours=[1.0, 10.0, 2.0], theirs=[2.0, 10.0, 6.0], work=60.0, unit="rows/s", wanted=2.0)
    assert (row.ratio, row.low, row.high) == (2.0, 1.0, 3.0)
    assert (row.ours, row.theirs) == (30.0, 10.0)
    with pytest.raises(ValueError, match="zip"):
        speed("a", "b", [1.0], [1.0, 2.0], 1.0, "rows/s")


@pytest.mark.parametrize(
    ("wanted", "at_most", "reached"),
    [(None, False, None), (2.0, False, True), (2.1, False, False), (2.0, True, True), (1.9, True, False)],
)
def test_reached(wanted: float | None, at_most: bool, reached: bool | None) -> None:
    assert replace(ROW, wanted=wanted, at_most=at_most).reached is reached


# --- what is kept


def test_a_section_joins_those_of_the_day_and_replaces_its_own(tmp_path: Path) -> None:
    settings = Settings(tmp_path, tmp_path)
    out = tmp_path / "results"
    keep(out, "first", [ROW], settings, 1.0)
    keep(out, "second", [replace(ROW, what="other")], settings, 1.0)
    written = keep(out, "first", [replace(ROW, ratio=3.0)], settings, 1.0)
    kept = json.loads(written.with_suffix(".json").read_text())
    assert {name: found["rows"][0]["ratio"] for name, found in kept.items()} == {"first": 3.0, "second": 2.0}
    assert written.read_text().count("\n## ") == 2
    assert "--device cpu" in kept["first"]["command"]
    quick = keep(out, "first", [ROW], replace(settings, quick=True), 1.0)
    assert quick != written  # numbers that mean nothing are no results
    assert json.loads(written.with_suffix(".json").read_text()) == kept


def test_the_table_says_what_was_reached_and_why_not() -> None:
    rows = [
        replace(ROW, wanted=1.5),
        replace(ROW, what="slow", wanted=3.0, note="disks are slow"),
        Row("start", "a limit", 0.25, None, "s", 0.25, 0.2, 0.3, wanted=0.5, at_most=True, value_unit="s"),
        replace(ROW, what="tight", wanted=2.2),
        ROW,
    ]
    found = {"command": "c", "date": "d", "hardware": "h", "minutes": 1}
    kept = {"speed": found | {"rows": [vars(row) for row in rows]}}
    lines = table(kept).splitlines()
    assert "| ours | theirs | 200 rows/s | 100 rows/s | 2 (1.5 - 2.5) | >= 1.5 | reached |" in lines
    assert "| slow | theirs | 200 rows/s | 100 rows/s | 2 (1.5 - 2.5) | >= 3 | **missed** |" in lines
    assert "| start | a limit | 0.25 s |  | 0.25 (0.2 - 0.3) s | <= 0.5 | reached |" in lines
    tight = "| tight | theirs | 200 rows/s | 100 rows/s | 2 (1.5 - 2.5) | >= 2.2 | **missed**, not in each round |"
    assert tight in lines
    assert "| ours | theirs | 200 rows/s | 100 rows/s | 2 (1.5 - 2.5) |  |  |" in lines
    assert "- slow, theirs: disks are slow" in lines
    assert "- tight, theirs: why it was missed is not known" in lines


# --- the command


def _section(name: str, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False, devices: tuple[str, ...]) -> None:
    module = ModuleType(f"benchmarks.bench.{name}")

    def measure(settings: Settings) -> list[Row]:
        assert settings.scratch.is_dir()
        if fails:
            raise OSError("no room")
        return [replace(ROW, what=name)]

    module.measure = measure  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(bench.SECTIONS, name, devices)


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    return bench.main()


def test_a_section_that_fails_leaves_the_others_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("before", "broken", "after"):
        _section(name, monkeypatch, fails=name == "broken", devices=("cpu",))
    assert _main(monkeypatch, "before", "broken", "after", "--out", str(tmp_path)) == 1
    said = capsys.readouterr()
    assert "failed: broken" in said.err
    assert "no room" in said.err
    (kept,) = tmp_path.glob("*.json")
    assert sorted(json.loads(kept.read_text())) == ["after", "before"]
    assert _main(monkeypatch, "before", "--out", str(tmp_path)) == 0


def test_without_names_the_sections_of_the_device_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SECTIONS", {})
    _section("everywhere", monkeypatch, devices=("cpu", "cuda"))
    _section("elsewhere", monkeypatch, devices=("cuda",))
    assert _main(monkeypatch, "--out", str(tmp_path)) == 0
    (kept,) = tmp_path.glob("*.json")
    assert list(json.loads(kept.read_text())) == ["everywhere"]


def test_an_unknown_section_is_refused_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        _main(monkeypatch, "streeming")
    assert ended.value.code == 2
    assert "no section streeming; there are " + ", ".join(bench.SECTIONS) in capsys.readouterr().err


def test_every_section_is_a_module_for_known_devices() -> None:
    for name, devices in bench.SECTIONS.items():
        assert (ROOT / "benchmarks" / "bench" / f"{name}.py").exists(), name
        assert set(devices) <= {"cpu", "cuda"}
        assert devices


# --- that what is compared is the same


def _rows(folder: Path, rows: int) -> np.ndarray:  # type: ignore[type-arg]
    at = folder / "npy" / "img_emb"
    at.mkdir(parents=True)
    found = np.random.default_rng(0).standard_normal((rows, rival_loaders.WIDTH)).astype(np.float16)
    np.save(at / "img_emb_0.npy", found)
    return found


def test_a_loader_answers_with_all_rows_and_tells_them_apart(tmp_path: Path) -> None:
    rows = _rows(tmp_path, 2 * rival_loaders.CHUNK)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench.rival_loaders", "npy_memmap", str(tmp_path), "60"],
        input="prove\ngo\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    ).stdout.splitlines()
    proven, gone = json.loads(done[1]), json.loads(done[2])
    assert done[0] == "ready"
    assert proven["rows"] == gone["rows"] == len(rows)
    assert proven["total"] == pytest.approx(rival_loaders.weighed(rows), rel=1e-9)
    assert gone["total"] == 0  # a turn that is timed adds nothing up
    columns_moved = rows[:, np.roll(np.arange(rows.shape[1]), 1)]
    assert rival_loaders.weighed(columns_moved) != pytest.approx(rival_loaders.weighed(rows), rel=1e-6)


def test_windows_are_those_of_the_cache(tmp_path: Path) -> None:
    """Every row once, batches of one window at most."""
    rows = _rows(tmp_path, 4 * rival_loaders.CHUNK)
    epochs = [list(rival_loaders.npy_memmap(tmp_path)(number)) for number in (0, 1)]
    assert all(batch.shape == (rival_loaders.BATCH, rival_loaders.WIDTH) for batch in epochs[0])
    for batches in epochs:
        found = np.concatenate(batches)
        assert np.array_equal(np.sort(found[:, 0]), np.sort(rows[:, 0]))
        assert not np.array_equal(found, rows)
    assert not np.array_equal(epochs[0][0], epochs[1][0])


def test_the_share_of_chunk_mates_is_one_in_the_chunks_of_a_window() -> None:
    shares = [mates_share(64 * 64, 64, window, 64, batches_read=32) for window in (1, 4, 16, 64)]
    assert shares[0] == 1.0
    assert all(a > 2 * b for a, b in itertools.pairwise(shares))
    assert shares[1] == pytest.approx(1 / 4, rel=0.1)
    assert shares[3] == pytest.approx(63 / 4095, rel=0.2)


def test_peak_memory_counts_what_was_touched_and_let_go() -> None:
    # not by the allocator, which may have kept what an earlier test let go
    with PeakMemory(every_seconds=0.001) as peak, mmap.mmap(-1, 64 << 20) as block:
        for start in range(0, len(block), mmap.PAGESIZE):
            block[start] = 1
        peak._over.wait(0.05)
    assert 60 << 20 < peak.bytes < 96 << 20


# --- peers


def test_an_environment_that_is_there_is_taken_and_another_one_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[str]] = []

    def run(command: list[str], **how: object) -> subprocess.CompletedProcess[str]:
        made.append(command)
        if "venv" in command:
            (tmp_path / "mosaic" / "site").mkdir(parents=True, exist_ok=True)
        return subprocess.CompletedProcess(command, 0, stdout=f"{tmp_path / 'mosaic' / 'site'}\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert python_of("mosaic", tmp_path) == tmp_path / "mosaic" / "bin" / "python"
    assert any(PEERS["mosaic"].check in command for command in made)
    assert any("--no-deps" in command and "mosaicml-streaming==0.13.0" in command for command in made)
    first = len(made)
    python_of("mosaic", tmp_path)
    assert len(made) == first
    monkeypatch.setitem(PEERS, "mosaic", replace(PEERS["mosaic"], requirements=("other==1",)))
    python_of("mosaic", tmp_path)
    assert len(made) == 2 * first
    with pytest.raises(KeyError):
        python_of("no-such-peer", tmp_path)


# --- reckoned tables


def test_reckoned_tables_are_what_the_script_prints() -> None:
    """The pages hold the script's lines; a chunk has the bytes that were measured."""
    lines = "\n".join(reckoned())
    assert lines in (ROOT / "benchmarks" / "scale.md").read_text()
    assert lines.rpartition("\n\n")[2] in (ROOT / "docs" / "design" / "014-scale.md").read_text()
    in_chunks = Form().bytes_of(4096) - 4096 * 74
    assert in_chunks == pytest.approx(4_293_707 + 4_211_665, rel=1e-4)
