"""open_clip's own trainer with a cache as its teacher."""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from teacher_cache import Cache, CacheMismatchError, PrecomputeConfig, UsageError, precompute
from teacher_cache.pipeline.data.torch_datasets.shown_pairs import ShownPair
from teacher_cache.pipeline.train.open_clip_trainer import CachedDistModel
from tests.commands import run_command
from tests.conftest import TINY_MODEL, make_model_folder, shared
from tests.pipeline.train.open_clip_work import (
    COLUMNS,
    SMALL_STUDENT,
    cached,
    first_photographs,
    live,
    losses,
    words,
    write_pairs,
    write_tars,
)
from tests.pipeline.train.train_work import make_cache

PROJECT = Path(__file__).resolve().parents[3]

pytestmark = [
    # open_clip's: a loader that pins memory without a GPU, an open image file, loggers
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of the teacher's preprocessing, with weights of its own and another width."""
    return make_model_folder(tmp_path_factory.mktemp("student") / "tiny", seed=1, embed_dim=12)


@pytest.fixture
def pairs(photo_cache: Path, tmp_path: Path) -> Path:
    """A CSV of the 64 pairs to train on."""
    write_pairs(photo_cache, tmp_path / "pairs.csv")
    return tmp_path / "pairs.csv"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]:
    """Images, tokens and teacher's features of each step."""
    steps: list[Any] = []
    forward = CachedDistModel.forward

    def recorded(self: CachedDistModel, images: torch.Tensor, texts: torch.Tensor) -> dict[str, torch.Tensor]:
        result = forward(self, images, texts)
        steps.append((images, texts, result))
        return result

    monkeypatch.setattr(CachedDistModel, "forward", recorded)
    return steps


def require_the_teachers(teacher: Path, images: Any, texts: Any, image_features: Any, text_features: Any) -> None:
    """The features are those that the teacher itself gives for these very pixels and tokens."""
    model = open_clip.create_model(f"local-dir:{teacher}").eval()
    with torch.inference_mode():
        image = model.encode_image(torch.as_tensor(images), normalize=True).numpy()
        text = model.encode_text(torch.as_tensor(texts), normalize=True).numpy()
    np.testing.assert_allclose(np.asarray(image_features), image, atol=2e-3)
    np.testing.assert_allclose(np.asarray(text_features), text, atol=2e-3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_csv_has_the_losses_of_the_live_teacher(
    workers: int, photo_cache: Path, tiny_teacher: Path, student: Path, pairs: Path, tmp_path: Path
) -> None:
    more = [*COLUMNS, "--workers", str(workers), "--epochs", "2"]
    cached(photo_cache, words(student, pairs, tmp_path / "cached", *more))
    live(tiny_teacher, words(student, pairs, tmp_path / "live", *more))
    ours, theirs = losses(tmp_path / "cached"), losses(tmp_path / "live")
    assert len(ours) == len(theirs) == 16
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert ours[-1] < ours[0]
    assert (tmp_path / "cached/run/checkpoints/epoch_2.pt").exists()


def test_tars_bring_the_rows_of_their_pairs(
    photo_cache: Path, tiny_teacher: Path, student: Path, pairs: Path, tmp_path: Path, seen: list[Any]
) -> None:
    tars = write_tars(write_pairs(photo_cache, pairs), tmp_path / "tars")
    given = words(student, tars, tmp_path / "logs", "--train-num-samples", "64", "--workers", "2")
    cached(photo_cache, given)
    assert len(seen) == 8
    for images, texts, features in seen:
        require_the_teachers(tiny_teacher, images, texts, features["image_features"], features["text_features"])


@pytest.mark.parametrize("form", ["csv", "tars"])
def test_of_several_views_the_stored_crops_are_shown(
    form: str, tiny_teacher: Path, student: Path, tmp_path: Path, seen: list[Any]
) -> None:
    cache = make_cache(tmp_path, tiny_teacher, images=10, views=3)
    pairs = write_pairs(cache, tmp_path / "pairs.csv")
    data = tmp_path / "pairs.csv" if form == "csv" else write_tars(pairs, tmp_path / "tars")
    more = COLUMNS if form == "csv" else ["--train-num-samples", "16"]
    cached(cache, words(student, data, tmp_path / "logs", *more, "--workers", "1", "--epochs", "3"))
    rows = Cache(str(cache))
    first = rows.take("image", rows.image_rows("train"))
    evaluation_crops = 0
    for images, texts, features in seen:
        require_the_teachers(tiny_teacher, images, texts, features["image_features"], features["text_features"])
        same = (features["image_features"].numpy()[:, None] == first.astype(np.float32)).all(axis=2).any(axis=1)
        evaluation_crops += int(same.sum())
    assert 0 < evaluation_crops < 48  # of 16 pairs in 3 epochs
    seen.clear()
    cached(cache, words(student, data, tmp_path / "one", *more), views=1)
    assert all((step[2]["image_features"].numpy()[:, None] == first.astype(np.float32)).all(2).any() for step in seen)


@pytest.mark.service
def test_two_ranks_with_two_workers_see_the_rows_of_the_live_teacher(
    photo_cache: Path, tiny_teacher: Path, student: Path, pairs: Path, tmp_path: Path
) -> None:
    for how, place in (("cached", photo_cache), ("live", tiny_teacher)):
        given = words(student, pairs, tmp_path / how, *COLUMNS, "--workers", "2", batch_size=4)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
        work = ["--master-port", str(port), "-m", "tests.pipeline.train.open_clip_work", how, str(place), str(tmp_path)]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
        done = subprocess.run(
            [sys.executable, *command, *work, json.dumps(given)],
            cwd=PROJECT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = losses(tmp_path / "cached"), losses(tmp_path / "live")
    assert len(ours) == 8
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    ranks = [list(np.load(tmp_path / f"{rank}.npz").values()) for rank in range(2)]
    for arrays in ranks:
        require_the_teachers(tiny_teacher, *arrays)
    shown = [{image.tobytes() + text.tobytes() for image, text in zip(*arrays[:2], strict=True)} for arrays in ranks]
    assert [len(pairs) for pairs in shown] == [32, 32]
    assert not shown[0] & shown[1]


@pytest.mark.real_data
def test_twenty_steps_on_photographs(tmp_path: Path) -> None:
    """From one seed, with the trained teacher of Flickr8k in every step and with its float16 cache."""
    teacher = shared("teacher-flickr8k")
    images, cache = first_photographs(shared("flickr8k"), tmp_path / "photographs", 16), tmp_path / "f8k.cache"
    precompute(
        PrecomputeConfig(dataset=f"flickr:{images}", teacher=f"local-dir:{teacher}", cache=str(cache), device="cpu")
    )
    write_pairs(cache, tmp_path / "pairs.csv")
    student = make_model_folder(tmp_path / "student", **SMALL_STUDENT)
    for how, place, run in (("cached", cache, cached), ("live", teacher, live)):
        run(place, words(student, tmp_path / "pairs.csv", tmp_path / how, *COLUMNS, batch_size=4))
    ours, theirs = losses(tmp_path / "cached"), losses(tmp_path / "live")
    assert len(ours) == 20
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_a_batch_that_is_not_the_one_just_loaded_is_refused(photo_cache: Path) -> None:
    reader = Cache(str(photo_cache))
    model = CachedDistModel(reader, views=1)
    tokens, pixels = torch.arange(16).view(1, 16), torch.zeros(1, 3, 32, 32)
    with pytest.raises(CacheMismatchError, match="captions of this batch are not those"):
        model(pixels, tokens)
    sha, text = reader.samples["content_sha256"][3].as_py(), reader.captions["text"][6].as_py()
    model.load(ShownPair(pixels, tokens, [sha], [text], np.zeros(1, int), np.zeros((1, 5)), ["a.jpg"], [""]))
    out = model(pixels, tokens)
    np.testing.assert_array_equal(out["image_features"].numpy(), reader.take("image", [3]).astype(np.float32))
    np.testing.assert_array_equal(out["text_features"].numpy(), reader.take("text", [6]).astype(np.float32))
    assert float(out["logit_scale"]) == pytest.approx(reader.identity.teacher.logit_scale)
    with pytest.raises(CacheMismatchError, match="captions of this batch are not those"):
        model(pixels, tokens + 1)


def test_a_listed_image_is_refused_by_name(photo_cache: Path, tmp_path: Path) -> None:
    reader = Cache(str(photo_cache))
    sha, text = reader.samples["content_sha256"][3].as_py(), reader.captions["text"][6].as_py()
    twins = [{"sample_id": reader.samples["sample_id"][3].as_py()}]
    listed = {"cache": "a", "split": "train", "samples_sha256": reader.identity.dataset.samples_sha256, "twins": twins}
    (tmp_path / "twins.json").write_text(json.dumps(listed))
    model = CachedDistModel(reader, 1, str(tmp_path / "twins.json"))
    batch = [torch.zeros(1, 3, 32, 32), torch.zeros(1, 16), [sha], [text], np.zeros(1, int), np.zeros((1, 5))]
    with pytest.raises(UsageError, match=r"a\.jpg: is on the list of images to leave out, .*twins\.json"):
        model.load(ShownPair(*batch, ["a.jpg"], [""]))


def test_a_crop_that_the_teacher_did_not_see_is_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    reader = Cache(str(make_cache(tmp_path, tiny_teacher, images=10, views=2)))
    model = CachedDistModel(reader, views=2)
    sha, text = reader.samples["content_sha256"][3].as_py(), reader.captions["text"][6].as_py()
    box = reader.take("image", [3], 1, array="view")
    batch = [torch.zeros(1, 3, 32, 32), torch.zeros(1, 16), [sha], [text], np.ones(1, int)]
    model.load(ShownPair(*batch, box, ["a.jpg"], [""]))
    with pytest.raises(CacheMismatchError, match=r"a\.jpg: the crop drawn here is not the one in"):
        model.load(ShownPair(*batch, box + 1, ["a.jpg"], [""]))


def test_what_is_not_in_the_cache_is_named(photo_cache: Path, student: Path, pairs: Path, tmp_path: Path) -> None:
    header, first = pairs.read_text().splitlines()[:2]
    known = first.partition(",")[0]
    strange, broken = tmp_path / "strange.jpg", tmp_path / "broken.jpg"
    Image.new("RGB", (50, 50)).save(strange)
    broken.write_bytes(b"no picture")
    for line, error, message in (
        (f"{known},another text", CacheMismatchError, rf"{known}: .* has no caption 'another text'\. Name the"),
        (
            f'{strange},"picture 0, of colours"',
            CacheMismatchError,
            rf"{strange}: .* no image's stored bytes have the sha256",
        ),
        (f"{broken},number 0 again", OSError, rf"{broken}: not an image"),
        (f"{tmp_path}/gone.jpg,number 0 again", OSError, "gone.jpg"),
    ):
        pairs.write_text("\n".join([header, *[line] * 8]))
        with pytest.raises(error, match=message) as refused:
            cached(photo_cache, words(student, pairs, tmp_path / "logs", *COLUMNS, "--workers", "1"))
        assert "\n" not in str(refused.value)
        shutil.rmtree(tmp_path / "logs")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"text_cfg": {**TINY_MODEL["text_cfg"], "context_length": 12}},
            "reads 12 tokens, .* 16. Add: --force-context",
        ),
        ({"text_cfg": {**TINY_MODEL["text_cfg"], "tokenizer_kwargs": {"clean": "canonicalize"}}}, "gives other tokens"),
        ({"vision_cfg": {**TINY_MODEL["vision_cfg"], "image_size": [32, 64]}}, r"\(size\). Add: .*-size 32 32"),
    ],
)
def test_another_student_is_refused_with_the_flag_to_add(
    changes: dict[str, Any], message: str, photo_cache: Path, pairs: Path, tmp_path: Path
) -> None:
    student = make_model_folder(tmp_path / "student", **changes)
    with pytest.raises(UsageError, match=message):
        cached(photo_cache, words(student, pairs, tmp_path / "logs", *COLUMNS))


def test_other_colours_are_refused_and_the_flags_named_are_taken(
    photo_cache: Path, student: Path, pairs: Path, tmp_path: Path
) -> None:
    given = words(student, pairs, tmp_path / "logs", *COLUMNS)
    with pytest.raises(UsageError, match=r"other pixels than the teacher .*\(mean\)\. Add: ") as refused:
        cached(photo_cache, [*given, "--image-mean", "0.5", "0.5", "0.5"])
    flags = str(refused.value).partition("Add: ")[2].split()
    cached(photo_cache, [*given, *flags, "--name", "again"])
    assert (tmp_path / "logs/again/checkpoints/epoch_1.pt").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--accum-freq", "2"], "--accum-freq: open_clip distils without it; leave it out"),
        (["--dataset-type", "synthetic"], "--train-data is missing"),
        (["--model", "coca_ViT-B-32"], "distils no CoCa"),
    ],
)
def test_what_open_clip_cannot_distil_is_refused(
    more: list[str], message: str, photo_cache: Path, student: Path, pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        cached(photo_cache, words(student, pairs, tmp_path / "logs", *COLUMNS, *more))


def test_the_page_changes_at_most_ten_lines_and_its_commands_run(
    photo_cache: Path, tiny_teacher: Path, student: Path, pairs: Path, tmp_path: Path
) -> None:
    page = (PROJECT / "docs/howto/open-clip.md").read_text()
    _, before, after = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[:3]
    changed = [line for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line[0] in "+-"]
    assert 0 < len(changed) <= 10
    assert "--distill-model" in before
    assert "--distill" not in after
    *front, arguments = re.split(r"\s--\s", after.replace("\\\n", " "))
    given = [word for word in arguments.split() if word != "\\"]
    here = {"ViT-S-32-alt": f"local-dir:{student}", "pairs.csv": str(pairs), "256": "8", "30": "1", "4": "0"}
    more = ["--logs", str(tmp_path / "logs"), "--name", "run", "--device", "cpu"]
    command = [word.replace("pairs.cache", str(photo_cache)) for word in " ".join(front).split()]
    done = run_command(*command[1:], "--", *[here.get(word, word) for word in given], *more)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "logs/run/checkpoints/epoch_1.pt").exists()
