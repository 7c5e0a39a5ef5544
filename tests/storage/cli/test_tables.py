"""Tables: no number and no name is cut or broken, at any width; without a terminal a row is a line."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from teacher_cache.pipeline.cli.app import app
from teacher_cache.storage.cli.tables import Facts, Table
from tests.conftest import plan_known_cache

PARAGRAPHS = ["teacher", "  i2t R@1 100.0 90.0-110.0", "  date 2026-12-01", "  i2t R@1 10.0"]


def table() -> Table:
    made = Table("a title", ["", "i2t\nR@1", "date"], caption="a caption")
    made.add_row("teacher", "100.0\n90.0-110.0", "2026-12-01")
    made.add_row("", "10.0", "")
    return made


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (
            31,
            [
                *("a title", "", "                i2t", "                R@1        date"),
                *("─" * 31, "teacher       100.0  2026-12-01", "         90.0-110.0", "               10.0"),
                *("", "a caption"),
            ],
        ),
        (30, ["a title", "", *PARAGRAPHS, "", "a caption"]),
        (5, ["a", "title", "", *PARAGRAPHS, "", "a", "caption"]),
        (
            None,
            [
                *("a title", "", "                      i2t", "                      R@1        date", "─" * 37),
                *("teacher  100.0 90.0-110.0  2026-12-01", "                     10.0", "", "a caption"),
            ],
        ),
    ],
)
def test_a_table_that_does_not_fit_becomes_a_paragraph_per_row(width: int | None, lines: list[str]) -> None:
    assert list(table().lines(width)) == lines


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (None, ["t", "a     one two three", "      four", "long  x"]),
        (60, ["t", "a     one two three", "      four", "long  x"]),
        (13, ["t", "a", "  one two", "  three", "  four", "long", "  x"]),
        (3, ["t", "a", "  one", "  two", "  three", "  four", "long", "  x"]),
    ],
)
def test_facts_are_wrapped_between_words(width: int | None, lines: list[str]) -> None:
    assert list(Facts({"a": "one two three\nfour", "left out": "", "long": "x"}, "t").lines(width)) == lines


@pytest.mark.parametrize("width", [1, 20, 40, 80, 200, None])
def test_no_part_of_a_cell_is_broken_at_any_width(width: int | None) -> None:
    cells = ["a/long/path-to-a.cache", "1,234,567", "8.27x\n(1.34 to 24.54)", "2026-12-01"]
    made = Table(columns=["cache", "rows", "ratio", "date"])
    made.add_row(*cells)
    made.add_row("b", "1")
    lines = list(made.lines(width))
    assert all(any(part in line for line in lines) for cell in cells for part in cell.split("\n"))


def test_wide_characters_and_escapes_keep_the_columns_straight() -> None:
    made = Table(columns=["name", "n"])
    made.add_row("写真", "1")
    made.add_row("\x1b[1mab", "22")
    assert list(made.lines(80)) == ["name     n", "─" * 10, "写真     1", "\N{REPLACEMENT CHARACTER}[1mab  22"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("caches")
    plan_known_cache(here / "a-cache-with-a-name-that-is-longer-than-forty-columns.cache", images=1234, captions=2468)
    return here


@pytest.mark.parametrize("width", ["40", "80", "200", None])
@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("info .", ("location", "teacher", "dataset", "images", "captions")),
        ("info", ("location", "dataset", "identity_digest", "manifest_digest")),
    ],
)
def test_every_name_and_number_stands_on_a_line(
    command: str, keys: tuple[str, ...], width: str | None, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    words = command.split() if command == "info ." else [command, next(place.iterdir()).name]
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    found = found["caches"][0] if command == "info ." else found
    lines = CliRunner(env={"COLUMNS": width}).invoke(app, words).stdout.splitlines()
    for key in keys:
        value = found[key]
        wanted = f"{value:,}" if isinstance(value, int) else value[:12] if key.endswith("digest") else value
        assert any(wanted in line for line in lines), (key, wanted, lines)
    assert width is not None or command != "info ." or len(lines) == 3


def test_a_pipe_has_no_width_and_a_terminal_has_its_own(place: Path) -> None:
    command = [sys.executable, "-m", "teacher_cache.pipeline.cli.app", "info", str(place)]
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    piped = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    ours, theirs = pty.openpty()  # 80 columns, as no size is set
    subprocess.run(command, env=env, stdout=theirs, check=True)
    shown = os.read(ours, 65_536).decode()
    os.close(theirs)
    os.close(ours)
    assert ("─" in piped, "─" in shown) == (True, False)
