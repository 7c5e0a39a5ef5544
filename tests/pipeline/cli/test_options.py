"""Options that are generated from the settings models: help, ``--set``, what wins, and answers to mistakes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from teacher_cache.pipeline.cli.app import app
from teacher_cache.pipeline.cli.options import Settings, settings_command
from teacher_cache.pipeline.data.datasets.adapters import ADAPTERS
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.run_file import load_config
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.storage.cli.app import PANELS, every_command
from teacher_cache.storage.errors import UsageError

RUN = {"cache": "c", "student": "s", "out": "o"}


def help_of(*words: str) -> str:
    done = CliRunner().invoke(app, [*words, "--help"], prog_name="teacher-cache", terminal_width=100)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_help_shows_at_most_22_commands_in_panels() -> None:
    lines = help_of().splitlines()
    assert [line.rstrip(":") for line in lines if line.rstrip(":") in PANELS] == list(PANELS)
    assert len(app.entries) <= 22
    assert all(any(line.split()[:1] == [name] for line in lines) for name in app.entries)


@pytest.mark.parametrize("name", ["train", "precompute"])
def test_the_help_of_long_commands_fits_a_screen(name: str) -> None:
    lines = help_of(name).splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100


def test_the_help_names_the_kinds_of_datasets() -> None:
    assert f"Kinds: {', '.join(ADAPTERS)}." in " ".join(help_of("precompute").split())


@pytest.mark.parametrize("words", [["help"], ["help", "train"], ["student", "help"], ["-h"], ["train", "-h"]])
def test_help_has_its_usual_names_and_no_notation_of_click(words: list[str]) -> None:
    done = CliRunner().invoke(app, words, prog_name="teacher-cache", terminal_width=100)
    assert (done.exit_code, done.stdout.startswith("Usage: teacher-cache ")) == (0, True)
    assert ("Begin with: teacher-cache demo\n" in done.stdout) == (len(words) == 1)
    assert not re.search(r"<=x|x>=|\[default", done.stdout)


def test_version_is_a_word_too() -> None:
    said = [CliRunner().invoke(app, [word], prog_name="teacher-cache").stdout for word in ("version", "--version")]
    assert said[0] == said[1] != ""


def test_every_setting_is_a_flag_an_argument_or_named_by_set() -> None:
    for name, command in every_command():
        names = {parameter.name for parameter in command.params}
        described = " ".join(str(getattr(parameter, "help", "")) for parameter in command.params)
        for field in getattr(command, "fields", ()):
            assert field in names or field in described, (name, field)
        assert getattr(command, "example", ""), name


def test_examples_can_be_parsed() -> None:
    for name, command in every_command():
        words = shlex.split(command.example)  # type: ignore[attr-defined]
        assert " ".join(words).startswith(name)
        assert len(f"Example: teacher-cache {command.example}") <= 100, name  # type: ignore[attr-defined]
        command.make_context(name, words[len(name.split()) :])


def typed(*words: str) -> Any:
    """The settings that a command of TrainConfig makes of its words."""
    made: list[TrainConfig] = []

    flags = ("cache", "student", "out", "epochs", "precision", "compile")

    @settings_command("train", TrainConfig, flags=flags, checked=False)
    def command(typed: Settings[TrainConfig]) -> None:
        made.append(load_config(TrainConfig, "train", typed.run_file, typed.flags, typed.assignments))

    done = CliRunner().invoke(command, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return made[0]


def test_the_run_file_is_first_then_set_then_flags(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('cache = "c"\n[train]\nstudent = "s"\nout = "o"\nepochs = 3\nseed = 3\nworkers = 3\n')
    config = typed(str(path), "--set", "epochs=4", "--set", "seed=4", "--epochs", "5", "--compile")
    assert (config.epochs, config.seed, config.workers, config.compile) == (5, 4, 3, True)


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("split=train2017", {"split": "train2017"}),
        ("learning_rate=1e-4", {"learning_rate": 1e-4}),
        ("accept_mismatch=dataset,views", {"accept_mismatch": ("dataset", "views")}),
        ("losses.cosine=2", {"losses": {"cosine": 2.0}}),
        ("losses={cosine = 2}", {"losses": {"cosine": 2.0}}),
        ("compile=true", {"compile": True}),
        ("pixels=", {"pixels": None}),
        ("select_split=a=b", {"select_split": "a=b"}),
    ],
)
def test_set_takes_toml_and_plain_texts(assignment: str, value: dict[str, Any]) -> None:
    config = load_config(TrainConfig, "train", None, RUN, [assignment])
    assert {name: getattr(config, name) for name in value} == value


def test_set_adds_to_a_table_of_the_run_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[train.losses]\nfeature = 1.0\n")
    assert load_config(TrainConfig, "train", path, RUN, ["losses.cosine=2"]).losses == {"feature": 1.0, "cosine": 2.0}
    spans = load_config(PrecomputeConfig, "precompute", None, dict.fromkeys(("dataset", "teacher", "cache"), "x"), [
        "crop_scale=[0.3, 1]"
    ])  # fmt: skip
    assert spans.crop_scale == (0.3, 1.0)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("epocs=3", "epocs is not a setting. Did you mean epochs?"),
        ("weight-decay=3", "weight-decay is not a setting. Did you mean weight_decay?"),
        ("epochs", "--set epochs: write name=value"),
        ("seed.x=1", "seed.x"),
        ("device=gpu", "device 'gpu' is not known; use auto, cpu, cuda or cuda:N"),
        ("losses.cosin=1", "losses cosin are not known; there are contrastive, cosine"),
    ],
)
def test_a_wrong_assignment_says_what_is_wrong(assignment: str, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        load_config(TrainConfig, "train", None, {**RUN, "seed": None}, ["seed=1", assignment])
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["student", "inhert"], "No such command 'inhert'. Did you mean 'inherit'?"),
        (["students", "mean"], "No such command 'mean'. It is teacher-cache student mean."),
        (["promote"], "No such command 'promote'. It is teacher-cache students promote."),
        (["soup"], "No such command 'soup'. teacher-cache --help lists all."),
        (["train", "--epocs", "3"], "No such option '--epocs'. Did you mean --epochs?"),
        (["train", "--weight-decay", "3"], "No such option '--weight-decay'. Did you mean --set weight_decay=VALUE?"),
        (["precompute", "--dtype", "int4"], "'int4' is not one of 'float16', 'int8'"),
    ],
)
def test_a_mistyped_word_is_answered_with_the_right_one(words: list[str], message: str) -> None:
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, message in done.stderr) == (2, True), done.stderr
