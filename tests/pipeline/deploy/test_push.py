"""``student push`` against a hub on loopback: what it uploads is what open_clip downloads, and its errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants
from PIL import Image
from pydantic import ValidationError

from teacher_cache.pipeline.cli.app import app
from teacher_cache.pipeline.deploy.push import PushResult, push
from teacher_cache.pipeline.deploy.record import Artefact, Deployment, DeploymentError
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.student import load_student, student_tokenizer
from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.pipeline.settings.deploy import PushConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.errors import UsageError
from tests.hub_server import TOKEN, Hub, start_hub
from tests.pipeline.deploy.deployed import deploy_tiny
from tests.pipeline.train.train_work import make_cache, make_student, measure, trace, train_config

# huggingface_hub hands httpx a file as data=
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPOSITORY = "somebody/student"
PLAIN = {"open_clip_config.json", "open_clip_model.safetensors", "README.md"}
LOAD = """
import sys, numpy, open_clip, torch
from PIL import Image
model, _, preprocess = open_clip.create_model_and_transforms(sys.argv[1])
tokens = open_clip.get_tokenizer(sys.argv[1])(["a red photo", "blue"])
pixels = preprocess(Image.open(sys.argv[2]))[None]
with torch.inference_mode():
    image, text = (model.eval().encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True))
numpy.savez(sys.argv[3], image=image.numpy(), text=text.numpy())
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A measured run whose token embedding is factorised, which open_clip does not know."""
    folder = tmp_path_factory.mktemp("trained")
    student = make_student(folder / "small.json")
    student.write_text(json.dumps({**json.loads(student.read_text()), "token_embedding_rank": 8}))
    train(train_config(make_cache(folder, tiny_teacher), student, folder / "run", epochs=1))
    measure(folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deploy_tiny(tmp_path_factory.mktemp("exported"))


@pytest.fixture
def deployed(trained: Path, exported: Path, tmp_path: Path) -> Path:
    """A folder as ``deploy`` makes it of the run; its ONNX files are of another student."""
    out = shutil.copytree(exported, tmp_path / "deployed")
    checkpoint = RunFolder(trained).checkpoint_path()
    for name in ("open_clip_model.safetensors", "open_clip_config.json"):
        shutil.copyfile(checkpoint / name, out / name)
    (out / "openvino").mkdir()
    (out / "openvino" / "image.xml").write_text("a graph")
    graph = Artefact.of(out / "openvino" / "image.xml").model_copy(update={"file": "openvino/image.xml"})
    made = {"weights": Artefact.of(out / "open_clip_model.safetensors"), "openvino_graphs": {"image": graph}}
    Deployment.read(out).model_copy(update=made).write(out)
    for name in ("table.json", "table.md", "table.png"):
        (out / name).write_text(name)
    (out / "README.md").write_text('# tiny\n\n## Use\nStudentRuntime("FOLDER")\nopen("local-dir:FOLDER")\n')
    (out / "notes.txt").write_text("not to be published")
    return out


@pytest.fixture(scope="module")
def as_wide(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student as wide as the teacher, which needs no projection, and a run of it."""
    folder = tmp_path_factory.mktemp("as-wide")
    student = make_student(folder / "student.json", embed_dim=16)
    train(train_config(trained.parent / "photos.cache", student, folder / "run", epochs=1))
    return student, folder / "run"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with start_hub() as hub:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "".join((hub.address, *template[1:])))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the hub on loopback has LFS alone
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def pushed(run: Path, **changes: object) -> PushResult:
    return push(PushConfig.model_validate({"run": str(run), "to": REPOSITORY, **changes}))


def test_open_clip_loads_from_the_hub_what_was_pushed(trained: Path, hub: Hub, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["student", "push", "--run", str(trained), "--to", REPOSITORY])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0].startswith(f"{hub.address}/{REPOSITORY}: 3 files, ")
    assert done.stdout.splitlines()[1] == f"open_clip loads it as hf-hub:{REPOSITORY}"
    assert (set(hub.files[REPOSITORY]), len(hub.commits), hub.private) == (PLAIN, 1, {REPOSITORY: False})

    picture, out = tmp_path / "picture.png", tmp_path / "features.npz"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)).save(picture)
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", LOAD, f"hf-hub:{REPOSITORY}", str(picture), str(out)]
    subprocess.run(command, env=environment, check=True)
    student, config = load_student(RunFolder(trained).checkpoint_path())
    pixels = student.preprocess.transform(Image.open(picture))[None]
    with torch.inference_mode():
        image = student.encode_image(pixels)
        text = student.encode_text(torch.as_tensor(student_tokenizer(config)(["a red photo", "blue"])))
    loaded = np.load(out)
    np.testing.assert_allclose(loaded["image"], image, atol=1e-5)
    np.testing.assert_allclose(loaded["text"], text, atol=1e-5)


def test_the_card_says_what_was_measured_and_how_to_load_it(trained: Path, hub: Hub) -> None:
    pushed(trained)
    card = hub.files[REPOSITORY]["README.md"].decode()
    assert card.startswith("---\nlibrary_name: open_clip\npipeline_tag: zero-shot-image-classification\n")
    assert "| test | 8 |" in card
    assert f'get_tokenizer("hf-hub:{REPOSITORY}")' in card
    assert "FOLDER" not in card
    assert str(trained.parent) not in card


def test_a_deployment_goes_with_it_and_leaves_with_the_next_push(trained: Path, deployed: Path, hub: Hub) -> None:
    pushed(trained, deployed=str(deployed), private=True)
    files = hub.files[REPOSITORY]
    assert hub.private == {REPOSITORY: True}
    made = {path.relative_to(deployed).as_posix() for path in deployed.rglob("*") if path.is_file()}
    assert set(files) == made - {"notes.txt"}
    assert all(files[name] == (deployed / name).read_bytes() for name in set(files) - {"README.md"})
    card = files["README.md"].decode()
    assert f"`hf download {REPOSITORY} --local-dir FOLDER` fetches the files." in card
    assert f'open("hf-hub:{REPOSITORY}")' in card

    hub.files[REPOSITORY]["LICENSE"] = b"its owner's"
    pushed(trained)
    assert set(hub.files[REPOSITORY]) == {*PLAIN, "LICENSE"}
    assert len(hub.commits) == 2


def test_only_the_files_that_were_deployed_of_this_run_go_out(trained: Path, deployed: Path, hub: Hub) -> None:
    (deployed / "image.onnx").write_bytes(b"another")
    with pytest.raises(DeploymentError, match=r"image\.onnx"):
        pushed(trained, deployed=str(deployed))
    (deployed / "open_clip_model.safetensors").write_bytes(b"another")
    record = Deployment.read(deployed)
    record.model_copy(update={"weights": Artefact.of(deployed / "open_clip_model.safetensors")}).write(deployed)
    with pytest.raises(UsageError, match=r"was deployed from runs/tiny, epoch-0001, .* Deploy that checkpoint again"):
        pushed(trained, deployed=str(deployed))
    assert hub.files == {}


@pytest.mark.parametrize(
    ("part", "status", "error", "message"),
    [
        ("repos/create", 401, UsageError, r"did not take it .*401.* Log in again by hf auth login"),
        ("repos/create", 403, UsageError, r"did not take it .* Take a token that may write there"),
        ("/preupload/", 400, ConnectionError, r"did not take it .* Push again"),
        ("/objects/", 400, ConnectionError, r"did not take it .* Push again"),
        ("/commit/", 500, ConnectionError, r"did not take it .* Push again"),
    ],
)
def test_a_refused_push_changes_no_file(
    trained: Path, hub: Hub, part: str, status: int, error: type[Exception], message: str
) -> None:
    hub.files[REPOSITORY], hub.private[REPOSITORY] = {"README.md": b"before"}, False
    hub.refused[part] = status
    if part == "repos/create":
        hub.refused["/api/models/"] = status
    with pytest.raises(error, match=message) as refused:
        pushed(trained)
    assert "\n" not in str(refused.value)
    assert hub.files[REPOSITORY] == {"README.md": b"before"}


def test_private_is_not_pushed_to_a_public_repository(trained: Path, hub: Hub) -> None:
    pushed(trained)
    with pytest.raises(UsageError, match="somebody/student: is there and public"):
        pushed(trained, private=True)
    assert len(hub.commits) == 1


def test_what_is_wrong_is_said_before_anything_is_sent(
    trained: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("student", "a/b/c", "a b/c", "/student"):
        with pytest.raises(ValidationError, match="is no repository of the hub: write ORG/NAME"):
            PushConfig(run="r", to=name)
    unfinished = shutil.copytree(trained, tmp_path / "run")
    folder = RunFolder(unfinished)
    record = folder.read()
    folder.write(record.model_copy(update={"config": record.config.model_copy(update={"epochs": 5})}))
    with pytest.raises(UsageError, match="1 of 5 epochs are trained"):
        pushed(unfinished)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UsageError, match=r"127\.0\.0\.1:1 cannot be reached"):
        pushed(trained)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UsageError, match=r"not logged in .* Log in by hf auth login"):
        pushed(trained)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        pushed(trained)
    assert hub.files == {}


def test_a_run_begins_with_what_was_pushed(trained: Path, as_wide: tuple[Path, Path], hub: Hub, tmp_path: Path) -> None:
    """By name alone: --student gives the architecture, --init the weights; and again from the copy, without the hub."""
    student, run = as_wide
    pushed(run)
    name, cache = f"hf-hub:{REPOSITORY}", trained.parent / "photos.cache"
    train(train_config(cache, student, tmp_path / "local", epochs=1, init=str(RunFolder(run).checkpoint_path())))
    for out in (tmp_path / "hub", tmp_path / "copy"):
        words = ["train", "--cache", cache, "--student", name, "--init", name, "--out", out, "--device", "cpu"]
        words += ["--epochs", 1, "--batch-size", 8, "--set", "workers=0"]
        done = CliRunner().invoke(app, [*map(str, words)])
        assert done.exit_code == 0, done.output
        assert [step["loss"] for step in trace(out)] == [step["loss"] for step in trace(tmp_path / "local")]
        record = RunFolder(out).read()
        assert record.initial_weights_sha256 == RunFolder(tmp_path / "local").read().initial_weights_sha256
        assert record.config.init == name
        hub.refused["/resolve/"] = 503
    assert load_teacher(name, device="cpu").embed_dim == 16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such", r"no/such on 127\.0\.0\.1:\d+ is not there, or is private\. Check the name, or log in by hf auth"),
        ("some/data", r"some/data on .* has no open_clip_config\.json\. Name a repository that open_clip can load"),
        ("a b", r"a b on .* is no name of a repository\. Write hf-hub:ORG/NAME"),
        ("some/list", r"some/list on .* gives no open_clip_config\.json .* Try again, or name another"),
        ("some/other", r"another student: embed_dim is 12 there and 16 in .* --student hf-hub:some/other"),
        ("some/torn", r"student 'hf-hub:some/torn' cannot be loaded: Required pretrained weights"),
    ],
)
def test_a_start_that_cannot_be_had_is_one_line_and_leaves_nothing(
    trained: Path, as_wide: tuple[Path, Path], hub: Hub, tmp_path: Path, name: str, message: str
) -> None:
    config, weights = "open_clip_config.json", "open_clip_model.safetensors"
    other, own = RunFolder(trained).checkpoint_path(), RunFolder(as_wide[1]).checkpoint_path()
    hub.files |= {"some/data": {"data.csv": b""}, "some/list": {config: b"[]"}}
    hub.files["some/other"] = {config: (other / config).read_bytes(), weights: (other / weights).read_bytes()}
    hub.files["some/torn"] = {config: (own / config).read_bytes()}
    words = ["train", "--cache", trained.parent / "photos.cache", "--student", as_wide[0], "--init", f"hf-hub:{name}"]
    done = CliRunner().invoke(app, [*map(str, words), "--out", str(tmp_path / "run"), "--set", "workers=0"])
    assert isinstance(done.exception, UsageError), done.output
    assert re.search(message, str(done.exception))
    assert "\n" not in str(done.exception)
    assert not (tmp_path / "run").exists()
