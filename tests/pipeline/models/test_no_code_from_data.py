"""Nothing that comes in a file is run: not from weights, tokenizers, checkpoints or datasets."""

from __future__ import annotations

import ast
import gc
import io
import json
import logging
import os
import pickle
import sys
import tarfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from teacher_cache.pipeline.models.student import (
    build_student,
    load_student,
    save_student,
    student_config,
    student_tokenizer,
)
from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.storage.errors import UsageError
from tests.commands import run_command
from tests.conftest import TINY_MODEL
from tests.pipeline.data.dataset_files import read, save_image

SOURCES = Path(__file__).parents[3]


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that evil code would make; proven to be made where something is really run."""
    proof = tmp_path / "proof"
    pickle.loads(pickle.dumps(Evil(proof)))
    assert proof.exists()
    return tmp_path / "marker"


def evil_weights(form: str, marker: Path) -> bytes:
    sink = io.BytesIO()
    if form == "torch":
        torch.save({"state_dict": {"logit_scale": torch.zeros(())}, "x": Evil(marker)}, sink)
    elif form == "old-torch":
        torch.save({"x": Evil(marker)}, sink, _use_new_zipfile_serialization=False)
    elif form == "pickle":
        pickle.dump(Evil(marker), sink)
    elif form == "numpy":
        np.save(sink, np.array([Evil(marker)], dtype=object), allow_pickle=True)
    else:
        np.savez(sink, **{"params/t": np.array([Evil(marker)], dtype=object)})
    return sink.getvalue()


FORMS = ["torch", "old-torch", "pickle"]


def refused(name: str, pretrained: str | None, marker: Path) -> str:
    with pytest.raises(UsageError) as caught:
        load_teacher(name, pretrained, device="cpu")
    assert not marker.exists()
    text = str(caught.value)
    assert "\n" not in text
    assert "weights_only=False" not in text
    return text


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", ["pt", "bin"])
def test_evil_weights_by_file(form: str, ending: str, marker: Path, tmp_path: Path) -> None:
    path = tmp_path / f"evil.{ending}"
    path.write_bytes(evil_weights(form, marker))
    assert "code in weights is never run" in refused("RN50-quickgelu", str(path), marker)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize(("form", "ending"), [("numpy", "npy"), ("numpy-zip", "npz")])
def test_evil_arrays_by_file(form: str, ending: str, marker: Path, tmp_path: Path) -> None:
    path = tmp_path / f"evil.{ending}"
    path.write_bytes(evil_weights(form, marker))
    assert "cannot be loaded" in refused("RN50-quickgelu", str(path), marker)
    gc.collect()  # open_clip leaves the file that it refused open, in a cycle: it closes here, not in another test


def model_folder(path: Path, **changes: Any) -> Path:
    path.mkdir()
    config = {"model_cfg": {**TINY_MODEL, **changes}, "preprocess_cfg": {}}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name",
    ["open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth", "anything.bin", "open_clip_model.safetensors"],
)
def test_evil_weights_in_a_model_folder(form: str, name: str, marker: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / name).write_bytes(evil_weights(form, marker))
    refused(f"local-dir:{folder}", None, marker)
    # as a student's checkpoint too
    with pytest.raises(UsageError):
        load_student(folder)
    assert not marker.exists()


def test_the_command_says_it_in_one_line_and_exits_2(marker: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "open_clip_pytorch_model.bin").write_bytes(evil_weights("torch", marker))
    (tmp_path / "pairs.csv").write_text("path,caption\na.jpg,a\n")
    settings = {"--dataset": f"table:{tmp_path}/pairs.csv", "--device": "cpu", "--teacher": f"local-dir:{folder}"}
    done = run_command("precompute", "--cache", tmp_path / "c", *(word for pair in settings.items() for word in pair))
    assert done.returncode == 2
    assert done.stderr == (
        f"error: teacher 'local-dir:{folder}' cannot be loaded: its weights are a pickle of more than tensors, or a "
        "damaged one, and code in weights is never run. Ask for its safetensors file, or save its state_dict as one.\n"
    )
    assert not marker.exists()
    assert not (tmp_path / "c").exists()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80", b"x" * 99, b"{}", None], ids=str)
@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
def test_weights_that_are_damaged_or_a_pipe(name: str, content: bytes | None, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    if content is None:
        os.mkfifo(folder / name)
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match=r"no plain file; remove it" if content is None else "cannot be loaded"):
        load_teacher(f"local-dir:{folder}", device="cpu")


@pytest.mark.parametrize(
    "text", ["[]", "7", '{"model_cfg": []}', '{"model_cfg": {"text_cfg": 1}}', "[" * 100_000, '{"model_cfg": NaN}', ""]
)
def test_configs_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(text)
    (tmp_path / "open_clip_model.safetensors").touch()
    with pytest.raises(UsageError):
        load_teacher(f"local-dir:{tmp_path}", device="cpu")
    with pytest.raises(UsageError):
        load_student(tmp_path)
    (tmp_path / "student.json").write_text(text)
    with pytest.raises(UsageError):
        build_student(student_config(str(tmp_path / "student.json")), {}, 16)


@pytest.mark.parametrize("value", [True, 1, "yes", None])
def test_a_config_that_asks_for_its_own_code_is_refused(value: Any, tiny_teacher: Path, tmp_path: Path) -> None:
    """open_clip would hand tokenizer_kwargs on to transformers, which would run the folder's tokenizer."""
    asks = {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"inner": [{"trust_remote_code": value}]}}
    text_cfg = {**TINY_MODEL["text_cfg"], **asks}
    folder = model_folder(tmp_path / "model", text_cfg=text_cfg)
    (folder / "open_clip_model.safetensors").write_bytes((tiny_teacher / "open_clip_model.safetensors").read_bytes())
    with pytest.raises(UsageError, match="asks for trust_remote_code, and code of a model is never run"):
        load_teacher(f"local-dir:{folder}", device="cpu")
    with pytest.raises(UsageError, match="asks for trust_remote_code"):
        load_student(folder)
    (tmp_path / "s.json").write_text(json.dumps({**TINY_MODEL, "text_cfg": text_cfg}))
    with pytest.raises(UsageError, match="asks for trust_remote_code"):
        student_config(str(tmp_path / "s.json"))


def test_a_tokenizer_of_transformers_is_told_not_to_run_code(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``transformers`` is not among our packages; what it would be asked is what counts."""
    asked: list[dict[str, Any]] = []

    class AutoTokenizer:
        @staticmethod
        def from_pretrained(name: Any, **how: Any) -> Any:
            asked.append(how)
            raise OSError("no tokenizer here")

    fake = types.ModuleType("transformers")
    fake.AutoTokenizer = AutoTokenizer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", fake)
    text_cfg = {**TINY_MODEL["text_cfg"], "hf_tokenizer_name": "x"}
    folder = model_folder(tmp_path / "model", text_cfg=text_cfg)
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    (folder / "open_clip_model.safetensors").write_bytes((tiny_teacher / "open_clip_model.safetensors").read_bytes())
    with pytest.raises(UsageError, match="no tokenizer here"):
        load_teacher(f"local-dir:{folder}", device="cpu")
    with pytest.raises(UsageError, match=r"tokenizer 'x'.* no tokenizer here"):
        student_tokenizer({**TINY_MODEL, "text_cfg": text_cfg})
    assert [how["trust_remote_code"] for how in asked] == [False, False]


def test_nobody_is_asked_whether_code_may_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a limit of 0 seconds ``transformers`` refuses at once; otherwise it waits for a y on the terminal."""
    fake: Any = types.ModuleType("transformers.dynamic_module_utils")
    fake.TIME_OUT_REMOTE_CODE = 15
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, "transformers.dynamic_module_utils", fake)
    (tmp_path / "s.json").write_text(json.dumps({**TINY_MODEL, "text_cfg": {"hf_model_name": "x"}}))
    student_config(str(tmp_path / "s.json"))
    assert fake.TIME_OUT_REMOTE_CODE == 0


def test_an_evil_projection_of_a_student(marker: Path, tmp_path: Path) -> None:
    student = build_student(dict(TINY_MODEL), {"mean": [0.5] * 3, "std": [0.5] * 3}, 24)
    save_student(student, dict(TINY_MODEL), tmp_path, {})
    load_student(tmp_path)
    (tmp_path / "projection.safetensors").write_bytes(evil_weights("torch", marker))
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_student(tmp_path)
    assert not marker.exists()


def test_pickles_in_a_dataset_are_left_alone(marker: Path, tmp_path: Path) -> None:
    image = save_image(tmp_path / "scratch" / "a.png")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in (
            ("a.png", image),
            ("a.txt", b"A."),
            ("a.pkl", evil_weights("pickle", marker)),
            ("a.pyd", evil_weights("pickle", marker)),
            ("a.npy", evil_weights("numpy", marker)),
            ("a.pth", evil_weights("torch", marker)),
            ("b.png", evil_weights("pickle", marker)),
            ("b.json", b'{"caption": "B.", "py/reduce": [{"py/type": "os.system"}]}'),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    samples, problems = read("webdataset", tmp_path / "x.tar")
    assert ([sample.sample_id for sample in samples], problems) == (["a", "b"], [])
    assert not marker.exists()


def _calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize(
    "path",
    [
        path
        for folder in ("storage", "pipeline", "flows", "benchmarks")
        for path in sorted((SOURCES / folder).rglob("*.py"))
    ],
    ids=lambda path: path.relative_to(SOURCES).as_posix(),
)
def test_no_source_of_ours_could_run_data(path: Path) -> None:
    tree = ast.parse(path.read_text())
    modules = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "runpy", "code"}
    for node in ast.walk(tree):
        names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        used = {name.partition(".")[0] for name in names} & modules
        # safe_loading names pickle's error and nothing else of it
        assert not used or (used == {"pickle"} and path.name == "safe_loading.py")
    for name, call in _calls(tree):
        assert name not in ("eval", "exec", "compile", "__import__"), f"line {call.lineno}"
        assert not name.startswith("pickle."), f"line {call.lineno}"
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("allow_pickle", "False") == "False"
        assert given.get("trust_remote_code", "False") == "False"
        assert given.get("shell", "False") == "False"
        if name.endswith("torch.load"):
            assert given.get("weights_only") == "True"
        if name.endswith("create_model") and name != "pydantic.create_model" and "benchmarks" not in path.parts:
            assert given.get("weights_only") == "True" or given.get("load_weights") == "False", f"line {call.lineno}"


def test_the_hub_does_not_write_its_warnings_a_second_time() -> None:
    hub = logging.getLogger("huggingface_hub")
    assert (hub.handlers, hub.propagate) == ([], True)
