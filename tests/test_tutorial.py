"""The commands of the tutorial and of the page on COCO, read from their text and run in turn with a tiny teacher."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from teacher_cache.pipeline.cli.app import app
from tests.coco_files import captions_of, write_coco
from tests.conftest import write_photos

DOCS = Path(__file__).parents[1] / "docs"

# what differs from the text: a teacher and a student that are here, and sizes for 20 images
_SMALLER = {"--epochs": "1", "--batch-size": "4", "--sample": "4"}
_ADDED = {
    "train": ["--set", "workers=0"],
    "student cost": ["--rounds", "1", "--batch", "1"],
    "deploy": ["--rounds", "1", "--no-int8"],
}


def commands(page: str) -> list[list[str]]:
    """Words of each teacher-cache command of a page, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    assert {line[0] for line in words} <= {"make", "source", "pip", "mkdir", "curl", "unzip", "teacher-cache"}
    return [line[1:] for line in words if line[0] == "teacher-cache"]


def here(words: list[str], model: Path) -> list[str]:
    """The command as it can be run here; every flag but those of :data:`_SMALLER` and the models stays as it is."""
    line = shlex.join(words)
    line = line.replace("--teacher ViT-B-32 --pretrained openai", f"--teacher local-dir:{model}")
    line = re.sub(r"--student effnet-\S+", f"--student {model / 'open_clip_config.json'}", line)
    line = line.replace(" --trunk-weights package:efficientnet-lite0", "")
    for flag, value in _SMALLER.items():
        line = re.sub(rf"{flag} \S+", f"{flag} {value}", line)
    return shlex.split(line) + ([] if "--resume" in words else _ADDED.get(verb(words), []))


def verb(words: list[str]) -> str:
    """Return the command, with its second word in a group, and apart where it only says what it would do."""
    name = " ".join(words[:2]) if words[0] in ("student", "students") else words[0]
    return f"{name} --dry-run" if "--dry-run" in words else name


def run(page: str, model: Path) -> dict[str, str]:
    """Run the commands of a page; return what each printed."""
    told = {}
    for words in commands(page):
        done = CliRunner().invoke(app, here(words, model), catch_exceptions=False)
        assert done.exit_code == 0, f"{shlex.join(words)}: {done.output}"
        told[verb(words)] = done.stdout
    return told


def test_the_tutorial_does_what_it_says(tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = write_photos(tmp_path / "photos", 40)
    (tmp_path / "pictures").symlink_to(photos / "images")
    (tmp_path / "pictures" / "one.jpg").symlink_to(photos / "images" / "0000.jpg")
    captions = (photos / "captions.txt").read_text().splitlines()[1:]
    (tmp_path / "pairs.csv").write_text("\n".join(["path,caption", *(f"pictures/{line}" for line in captions)]))
    monkeypatch.chdir(tmp_path)
    told = run("tutorial.md", tiny_teacher)
    assert set(told) == {
        *("precompute", "info", "stats", "evaluate", "student inherit", "train", "deploy", "infer", "report")
    }
    assert "40 images and 80 captions" in told["precompute"]
    assert "retention" in told["evaluate"]
    assert "pictures/one.jpg" in told["infer"]
    assert Path("deployed/a/README.md").is_file()
    assert Path("report.html").is_file()


def test_the_page_on_coco_does_what_it_says(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_photos(tmp_path / "photos", 20)
    names = [f"{number:04d}.jpg" for number in range(20)]
    monkeypatch.chdir(tmp_path)
    write_coco(
        tmp_path / "data" / "coco",
        {"train2017": captions_of(photos, names[:12]), "val2017": captions_of(photos, names[12:])},
    )
    told = run("howto/coco.md", tiny_teacher)
    assert set(told) >= {
        "precompute --dry-run",
        "precompute",
        "info",
        "verify",
        "stats",
        "student inherit",
        "train",
        "evaluate",
        "student cost",
        "deploy",
    }
    # what the text says that each of them leaves
    assert "20 images in 2 views and 40 captions" in told["precompute"]
    assert "as the teacher makes them: 4 images and 4 captions" in told["verify"]
    assert "retention" in told["evaluate"]
    assert pq.read_table("ranks.parquet").num_rows == 8 + 16  # of val2017, each image and each caption
    assert len(json.loads(Path("runs/coco/run.json").read_text())["epochs"]) == 1
    assert Path("deployed/coco/README.md").is_file()
    assert told["infer"].count(".jpg") == 8
