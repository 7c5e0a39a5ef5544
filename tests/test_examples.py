"""The examples run as a user would run them: as scripts, in a process of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from teacher_cache.pipeline.deploy.runtime import StudentRuntime
from tests.conftest import write_photos

ROOT = Path(__file__).parents[1]
_WITHOUT_TORCH = (
    "import runpy, sys\n"
    "sys.modules.update(dict.fromkeys(('torch', 'torchvision', 'open_clip', 'transformers')))\n"  # importing raises
    "sys.argv = sys.argv[1:]\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')\n"
)


def search(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, str(ROOT / "examples/search_folder.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six photographs, two of them in a folder below."""
    folder = write_photos(tmp_path / "p", 6) / "images"
    (folder / "below").mkdir()
    for name in ("0004.jpg", "0005.jpg"):
        (folder / name).rename(folder / "below" / name)
    return folder


def wanted(folder: Path, student: StudentRuntime, text: str) -> list[str]:
    """Lines that a search has to print, from a plain product."""
    paths = sorted(folder.rglob("*.jpg"))
    cosines = student.embed_images(paths) @ student.embed_texts([text])[0]
    return [f"{cosines[row]:.3f}  {paths[row]}" for row in np.argsort(-cosines)]


def test_search_folder_finds_keeps_and_follows_changes(pictures: Path, tiny_deployment: Path) -> None:
    student = StudentRuntime(tiny_deployment)
    first = search(pictures, "a cat", "--student", tiny_deployment, "-k", "3")
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines() == wanted(pictures, student, "a cat")[:3]
    assert "embedded 6 of 6 new pictures" in first.stderr

    again = search(pictures, "a dog", "--student", tiny_deployment)
    assert again.stdout.splitlines() == wanted(pictures, student, "a dog")[:5]
    assert again.stderr == ""  # nothing was embedded

    # one new, one changed, one gone
    shutil.copy(pictures / "0000.jpg", pictures / "new.JPG")
    (pictures / "0001.jpg").write_bytes((pictures / "0002.jpg").read_bytes())
    (pictures / "below" / "0005.jpg").unlink()
    third = search(pictures, "a cat", "--student", tiny_deployment, "-k", "9")
    assert "embedded 2 of 2 new pictures" in third.stderr
    (pictures / "new.JPG").rename(pictures / "new.jpg")
    renamed = [line.replace("new.jpg", "new.JPG") for line in wanted(pictures, student, "a cat")]
    assert sorted(third.stdout.splitlines()) == sorted(renamed)  # equal pictures, in either order


def test_search_folder_starts_anew_for_another_student(pictures: Path, tiny_deployment: Path, tmp_path: Path) -> None:
    assert search(pictures, "a cat", "--student", tiny_deployment).returncode == 0
    other = shutil.copytree(tiny_deployment, tmp_path / "other")
    record = (other / "deploy.json").read_text().replace('"name": "tiny"', '"name": "other"')
    (other / "deploy.json").write_text(record)
    assert "embedded 6 of 6" in search(pictures, "a cat", "--student", other).stderr


def test_search_folder_names_what_it_cannot_decode_once(pictures: Path, tiny_deployment: Path) -> None:
    (pictures / "bad.jpg").write_bytes(b"no image")
    first = search(pictures, "a cat", "--student", tiny_deployment, "-k", "99")
    assert f"left out: {pictures}/bad.jpg: not an image" in first.stderr
    assert len(first.stdout.splitlines()) == 6
    again = search(pictures, "a cat", "--student", tiny_deployment, "-k", "99")
    assert (again.stdout, again.stderr) == (first.stdout, "")


def test_search_folder_of_nothing_and_of_no_student(pictures: Path, tiny_deployment: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = search(tmp_path / "empty", "a cat", "--student", tiny_deployment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = search(tmp_path / "nowhere", "a cat", "--student", tiny_deployment)
    assert done.returncode == 2
    assert "nowhere: no such folder of pictures" in done.stderr
    done = search(pictures, "a cat", "--student", tmp_path)
    assert done.returncode == 2
    assert "no deployed student here" in done.stderr


def run_shown(page: str, values: dict[str, Path | str], *more: str) -> list[str]:
    """Lines that the command on a how-to page prints, with values for the words that stand for the reader's own."""
    shown = re.search(r"python (examples/[^`\n]+)", (ROOT / "docs/howto" / page).read_text())
    assert shown is not None
    words = shown[1].split()
    assert set(values) <= set(words)
    done = subprocess.run(
        [sys.executable, *(str(values.get(word, word)) for word in words), *more],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_own_training_loop_prints_both_losses_of_each_step(photo_cache: Path, tiny_teacher: Path) -> None:
    values = {"f8k.cache": photo_cache, "ViT-S-32": f"local-dir:{tiny_teacher}"}
    lines = run_shown("own-loop.md", values, "--batch", "8")
    assert len(lines) == 32 // 8
    assert all(re.fullmatch(r"epoch 1: contrastive \d+\.\d{3}, distillation \d+\.\d{3}", line) for line in lines)


def test_a_lightning_module_learns_from_a_data_module_of_targets(photo_cache: Path, tiny_teacher: Path) -> None:
    values = {"f8k.cache": photo_cache, "ViT-S-32": f"local-dir:{tiny_teacher}"}
    lines = run_shown("lightning.md", values, "--batch", "8")
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 32 // 8
    assert all(re.fullmatch(r"step \d: contrastive \d+\.\d{3}, distillation \d+\.\d{3}", line) for line in steps)


def make_clip(folder: Path) -> Path:
    """A tiny CLIPModel of transformers, as wide as the tiny teacher, with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    words = ["<pad>", "<start>", "<end>", "<unk>", "picture", "number", "of", "colours", "again"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<start> $A <end>", None, [("<start>", 1), ("<end>", 2)])
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=12, **special).save_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(words), "max_position_embeddings": 12, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    return folder


def test_the_hugging_face_trainer_learns_from_targets(photo_cache: Path, tmp_path: Path) -> None:
    """The loss falls, and the student is saved in transformers' form."""
    from transformers import CLIPModel

    student, out = make_clip(tmp_path / "student"), tmp_path / "out"
    values = {"f8k.cache": photo_cache, "openai/clip-vit-base-patch32": student, "runs/hf": out}
    lines = run_shown("huggingface.md", values, "--batch", "8", "--epochs", "8")
    losses = [float(number) for line in lines for number in re.findall(r"'loss': '?([\d.]+)", line)]
    assert len(losses) == 8 * 32 // 8
    assert sum(losses[-4:]) < sum(losses[:4])
    assert CLIPModel.from_pretrained(out).config.projection_dim == 16


@pytest.mark.parametrize("name", ["own_training_loop", "lightning_module", "hugging_face_trainer"])
def test_what_others_copy_is_short(name: str) -> None:
    assert len((ROOT / f"examples/{name}.py").read_text().splitlines()) < 60
