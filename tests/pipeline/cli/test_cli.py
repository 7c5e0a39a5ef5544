"""The commands as they are typed: exit codes, JSON on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.run_file import load_config
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.logs import LOG_FORMAT
from tests.commands import run_command
from tests.conftest import TINY_MODEL

COMMAND = [sys.executable, "-m", "teacher_cache.pipeline.cli.app"]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[3]
    env = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"}
    return subprocess.run([*COMMAND, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_it_says_which_version_it_is(tmp_path: Path) -> None:
    written = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]["version"]
    assert run("--version", cwd=tmp_path).stdout == f"teacher-cache {written}\n"


def test_the_main_job_through_the_command_line(
    make_photos: Callable[..., Path], tiny_teacher: Path, tmp_path: Path
) -> None:
    """``precompute``, ``verify`` and ``train`` start Python anew; those that follow are forked."""
    make_photos(30, "data")
    (tmp_path / "student.json").write_text(json.dumps(TINY_MODEL))
    (tmp_path / "run.toml").write_text(
        f"""
cache = "data.cache"
[precompute]
dataset = "flickr:data"
teacher = "local-dir:{tiny_teacher}"
device = "cpu"
[train]
student = "student.json"
out = "runs/a"
epochs = 1
batch_size = 8
workers = 0
[train.losses]
feature = 1000.0
contrastive = 1.0
[evaluate]
split = "test"
"""
    )
    done = run("precompute", "run.toml", "--json", "--set", "chunk_rows=8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["chunks"] == 4 + 8
    assert "images: 30 of 30" in done.stderr
    assert run("verify", "data.cache", cwd=tmp_path).stdout.startswith("data.cache: sound: 12 of 12 chunks sound")

    teacher = run_command("evaluate", "--cache", "data.cache", "--split", "test", "--json", cwd=tmp_path)
    found = json.loads(teacher.stdout)
    assert (found["split"], found["images"], found["captions"]) == ("test", 6, 12)
    assert list(found["teacher"]) == ["i2t", "t2i"]
    assert list(found["teacher"]["i2t"]) == ["R@1", "R@5", "R@10"]
    assert found["teacher"]["i2t"]["R@10"] <= 100.0
    assert found["student"] is None
    assert found["retention"] is None

    trained = run("train", "run.toml", "--json", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["config"]["losses"] == {"feature": 1000.0, "contrastive": 1.0}
    both = json.loads(run_command("evaluate", "--run", "runs/a", "--split", "test", "--json", cwd=tmp_path).stdout)
    assert both["teacher"] == found["teacher"]
    assert set(both["student"]["t2i"]) == {"R@1", "R@5", "R@10"}
    assert both["retention"]["mean"] > 0
    shown = run_command("evaluate", "run.toml", "--run", "runs/a", cwd=tmp_path).stdout
    assert "retention %" in shown

    # the image bytes are still those of the plan, but a chunk is damaged: verify finds it, running again mends it
    chunk = tmp_path / "data.cache/targets.zarr/text/embedding/c/2/0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    bad = run_command("verify", "data.cache", "--json", cwd=tmp_path)
    assert bad.returncode == 1
    assert [finding["key"] for finding in json.loads(bad.stdout)["findings"]] == ["targets.zarr/text/embedding/c/2/0"]
    assert run_command("verify", "data.cache", cwd=tmp_path).stderr.endswith("next: teacher-cache repair data.cache\n")
    refused = run_command("evaluate", "--cache", "data.cache", "--split", "test", cwd=tmp_path)
    assert (refused.returncode, "Traceback" in refused.stderr) == (0, False)  # that chunk holds no test caption
    assert json.loads(run_command("precompute", "run.toml", "--json", cwd=tmp_path).stdout)["chunks_encoded"] == 1
    assert run_command("verify", "data.cache", cwd=tmp_path).returncode == 0


def test_what_a_recipe_does_not_set_is_said(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[train]\nlearning_rate = 1e-3\n[train.losses]\nfeature = 1.0\n")
    flags = ("--cache", "nothing.cache", "--student", "vit-s-32", "--out", "o")
    told = "recipe guide, but for learning_rate, losses: as given"
    assert told in run("train", "run.toml", *flags, "--recipe", "guide", cwd=tmp_path).stderr
    assert "as given" not in run("train", *flags, "--recipe", "guide", cwd=tmp_path).stderr
    assert "as given" not in run("train", "run.toml", *flags, cwd=tmp_path).stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["precompute", "--teacher", "ViT-B-32"], 2, "dataset is missing: give --dataset or set it in a run file"),
        (["student", "inherit", "--student=s", "--out=o"], 2, "inherit: teacher is missing: give --teacher\n"),
        (["precompute", "absent.toml"], 2, "absent.toml: no such run file"),
        (["evaluate"], 2, "nothing to evaluate"),
        (["info", "foo://x"], 2, "foo://x: no store is known by foo:"),
        (["fly"], 2, "No such command"),
    ],
)
def test_errors_are_one_line_with_the_remedy(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_the_flag_wins_over_the_environments_log_format(
    known_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOG_FORMAT, "json")
    assert run("verify", str(known_cache), cwd=tmp_path).stderr.startswith("{")
    asked = run("verify", str(known_cache), "--log-format", "text", cwd=tmp_path)
    assert asked.returncode == 0
    assert "{" not in asked.stderr
    for words, said in ((["fly"], "No such command 'fly'."), (["info", "nothing"], "nothing: no cache here")):
        line = json.loads(run(*words, cwd=tmp_path).stderr)
        assert line["level"] == "error"
        assert line["message"].startswith(f"error: {said}")
    monkeypatch.setenv(LOG_FORMAT, "xml")
    refused = run("info", str(known_cache), cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == "error: TEACHER_CACHE_LOG_FORMAT is 'xml': text or json is wanted\n"


def test_looking_at_a_cache_loads_no_torch(known_cache: Path) -> None:
    code = (
        "import sys; sys.argv = ['teacher-cache', 'info', sys.argv[1], '--json']; import teacher_cache.pipeline.cli.app as c\n"  # noqa: E501
        "try: c.main()\n"
        "except SystemExit as e: assert not e.code\n"
        "assert not {'torch', 'open_clip', 'zarr', 'faiss', 'prefect'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(known_cache)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train", "not TOML"),
        ("[precompute]\ndataset = flickr:x\n", 'not TOML: .* A text needs quotes: split = "test"'),
        ("precompute = 3", r"precompute = 3 must be a table \[precompute\]"),
        ("[training]\n", r"unknown table \[training\]\. Did you mean train or retrain\?"),
        ('[precompute]\ndatasett = "x"\n', r"\[precompute\]: .*datasett is not a setting\. Did you mean dataset\?"),
        ("[precompute]\nbatch_size = 0\n", "batch_size: must be greater than 0, not 0"),
    ],
)
def test_a_wrong_run_file_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_config(PrecomputeConfig, "precompute", path, {})


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"magic": 1.0}, "losses magic are not known; there are contrastive, cosine, feature, interactive, queue"),
        ({"feature": 0.0}, "one of them > 0"),
        ({"feature": -1.0, "relational": 1.0}, "weights must be >= 0"),
    ],
)
def test_losses_are_checked_before_anything_runs(losses: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(TrainConfig, "train", None, {"cache": "c", "student": "s", "out": "o", "losses": losses})
