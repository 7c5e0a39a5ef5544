"""``import`` of a folder that the real clip-retrieval wrote, from the tars that it read."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.bench.peers import python_of
from teacher_cache.storage.check.verify import verify_cache
from tests.commands import run_command
from tests.conftest import shared
from tests.pipeline.train.open_clip_work import write_tars

ROOT = Path(__file__).parents[3]
MODEL = "ViT-S-32-alt"
PAIRS = 48


def captioned_photographs(flickr8k: Path) -> list[tuple[str, str]]:
    lines = (flickr8k / "captions.txt").read_text().splitlines()[1:]
    first = {line.partition(",")[0]: line.partition(",")[2] for line in reversed(lines)}
    return [(str(flickr8k / "images" / name), caption) for name, caption in sorted(first.items())[:PAIRS]]


def test_a_folder_of_the_real_clip_retrieval_comes_in(tmp_path: Path) -> None:
    try:
        python = python_of("clipret", tmp_path / "peers")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"clip-retrieval cannot be installed here: {error}")
    torch.manual_seed(0)
    model = open_clip.create_model(MODEL)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "random.safetensors")
    tars = write_tars(captioned_photographs(shared("flickr8k")), tmp_path / "tars", tars=1)
    command = [python, "-W", "ignore", "-m", "clip_retrieval.clip_inference.main", f"--input_dataset={tars}"]
    command += ["--input_format=webdataset", "--batch_size=16", "--num_prepro_workers=1", "--enable_wandb=False"]
    command += [f"--clip_model=open_clip:{MODEL}/{tmp_path}/random.safetensors", "--output_partition_count=1"]
    written = subprocess.run(
        [*map(str, command), f"--output_folder={tmp_path}/theirs"], capture_output=True, text=True, check=False
    )
    assert written.returncode == 0, written.stderr[-2000:]
    values = {
        "embeddings": f"{tmp_path}/theirs",
        "webdataset:shards": f"webdataset:{tmp_path}/tars",
        "ViT-B-32": MODEL,
        "laion2b_s34b_b79k": f"{tmp_path}/random.safetensors",
        "shards.cache": f"{tmp_path}/imported.cache",
        "exported": f"{tmp_path}/exported",
    }
    result = json.loads(run_shown("import", values, "--device", "cpu", "--sample", "20"))
    assert (result["images_imported"], result["captions_imported"]) == (PAIRS, PAIRS)
    assert (result["images_encoded"], result["captions_encoded"]) == (0, 0)
    assert verify_cache(values["shards.cache"]).ok
    run_shown("export", values)
    (theirs,) = (tmp_path / "theirs" / "img_emb").glob("*.npy")
    (again,) = (tmp_path / "exported" / "img_emb").glob("*.npy")
    unit = np.load(theirs).astype(np.float32)
    assert np.abs(np.load(again) - unit / np.linalg.norm(unit, axis=1, keepdims=True)).max() < 2e-3


def run_shown(command: str, values: dict[str, str], *more: str) -> str:
    """What a command of the page prints as JSON, with values for the words that stand for the reader's own."""
    page = (ROOT / "docs" / "howto" / "clip-retrieval.md").read_text()
    line = re.findall(rf"^teacher-cache {command} .+$", page, re.MULTILINE)[0]  # further down: DataCompDR
    done = run_command(*(values.get(word, word) for word in line.split()[1:]), *more, "--json")
    assert done.returncode == 0, done.stderr
    return done.stdout
