"""Every family of teachers goes through every command, as the table in docs/howto/own-teacher.md says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.pipeline.cli.app import main
from tests.conftest import make_model_folder, write_photos
from tests.pipeline.models.text_towers import make_teacher
from tests.pipeline.models.transformers_folders import make_clip, make_siglip, make_siglip2
from tests.pipeline.train.train_work import make_student

FAMILIES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "transformers SigLIP": ("transformers", make_siglip),
    "transformers SigLIP 2": ("transformers", make_siglip2),
    "transformers CLIP": ("transformers", make_clip),
    "open_clip CLIP": ("local-dir", make_model_folder),
    "open_clip SigLIP": ("local-dir", partial(make_teacher, "SigLIP, unigram")),
    "open_clip SigLIP 2": ("local-dir", partial(make_teacher, "SigLIP 2, byte pairs")),
    "open_clip CoCa": ("local-dir", partial(make_teacher, "CoCa")),
    "open_clip with RoBERTa": ("local-dir", partial(make_teacher, "RoBERTa")),
}
COMMANDS = ("precompute", "verify --sample", "train", "evaluate", "deploy", "infer")
PAGE = Path(__file__).parents[3] / "docs" / "howto" / "own-teacher.md"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_through_every_command(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> Any:
        monkeypatch.setattr(sys, "argv", ["teacher-cache", *map(str, words), "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert not ended.value.code, err
        done.append(" ".join(map(str, words[:1])))
        return json.loads(out)

    done: list[str] = []
    schema, make = FAMILIES[family]
    teacher = f"{schema}:{make(tmp_path / 'teacher')}"
    photos, cache, student = write_photos(tmp_path / "photos", 20), tmp_path / "a.cache", tmp_path / "student.json"
    make_student(student)
    on_cpu = ("--device", "cpu")
    run("precompute", "--dataset", f"flickr:{photos}", "--teacher", teacher, "--cache", cache, *on_cpu)
    proof = run("verify", cache, "--sample", 10, "--teacher", teacher)
    assert proof["proof"]["least_cosine"] > 0.9999
    sigmoid = "SigLIP" in family
    losses = ("--set", "losses={cosine = 8.0, sigmoid_relational = 1.0}") if sigmoid else ()
    settings = ("--epochs", 1, "--batch-size", 8, "--set", "workers=0")
    run("train", "--cache", cache, "--student", student, "--out", tmp_path / "run", *settings, *losses, *on_cpu)
    assert run("evaluate", "--run", tmp_path / "run", *on_cpu)["teacher"]
    out = tmp_path / "deployed"
    run("deploy", "--run", tmp_path / "run", "--out", out, "--teacher", teacher, "--rounds", 1, "--no-int8")
    image = photos / "images" / "0000.jpg"
    found = run("infer", image, "--text", "a cat", "--text", "a dog", "--student", out)
    assert (found["logit_bias"] is not None) == sigmoid
    assert (sum(found["images"][0]["probabilities"]) == pytest.approx(1)) == (not sigmoid)
    assert done == [command.split()[0] for command in COMMANDS]
    assert f"| {family} | {' | '.join(['yes'] * len(COMMANDS))} |" in PAGE.read_text()


def test_the_page_names_these_families_and_commands() -> None:
    table = PAGE.read_text().partition(f"| family | {' | '.join(f'`{command}`' for command in COMMANDS)} |\n")[2]
    rows = table.partition("\n\n")[0].splitlines()[1:]
    assert [row.split("|")[1].strip() for row in rows] == list(FAMILIES)
