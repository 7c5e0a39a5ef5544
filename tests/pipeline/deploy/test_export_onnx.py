"""Exported towers compute what the student computes, at any batch and length, in the same bytes each time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from teacher_cache.pipeline.deploy.formats.export_onnx import OPSET, ExportedTowers, export_towers
from teacher_cache.pipeline.deploy.gates import least_cosine, require_parity
from teacher_cache.pipeline.deploy.record import DeploymentError
from teacher_cache.pipeline.models.student import Student
from tests.pipeline.models.towers import KINDS, exported_once, make_student, make_tokens, run_onnx


@pytest.fixture(scope="module", params=list(KINDS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, Any]:
    return exported_once(request.param, tmp_path_factory)


def test_images_and_texts_of_any_batch_and_length(exported: tuple[Student, ExportedTowers]) -> None:
    student, towers = exported
    for batch in (1, 7):
        pixels = torch.randn(batch, 3, *student.preprocess.size)
        with torch.no_grad():
            wanted = student.encode_image(pixels).numpy()
        found = run_onnx(towers.image, pixels.numpy())
        assert found.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        require_parity("image", least_cosine(found, wanted))
        # other images have other features, or this would show nothing
        assert batch == 1 or least_cosine(wanted, np.roll(wanted, 1, axis=0)) < 0.995
        for length in (5, 16, 77) if towers.shortens else (77,):
            tokens = make_tokens(batch, length)
            with torch.no_grad():
                wanted = student.encode_text(torch.from_numpy(tokens)).numpy()
            found = run_onnx(towers.text, tokens)
            np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
            require_parity(f"text {length}", least_cosine(found, wanted))


def test_a_shortened_text_has_the_features_of_the_padded_one(exported: tuple[Student, ExportedTowers]) -> None:
    student, towers = exported
    assert towers.shortens == student.shortens == (student.config["text_cfg"].get("no_causal_mask") is None)
    tokens = make_tokens(7, 9)
    padded = np.pad(tokens, ((0, 0), (0, 77 - 9)))
    if towers.shortens:
        np.testing.assert_allclose(run_onnx(towers.text, tokens), run_onnx(towers.text, padded), atol=1e-6)
    else:  # refused by the graph itself: the features would be others
        with pytest.raises(Exception, match=r"Got: 9 Expected: 77"):
            run_onnx(towers.text, tokens)


def test_a_file_is_whole_sound_and_says_nothing_about_this_machine(exported: tuple[Student, ExportedTowers]) -> None:
    student, towers = exported
    for path, tower in ((towers.image, "image"), (towers.text, "text")):
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(model, full_check=True)
        assert [entry.version for entry in model.opset_import if entry.domain == ""] == [OPSET]
        assert not any(tensor.external_data for tensor in model.graph.initializer)
        kinds = Counter(node.op_type for node in model.graph.node)
        assert "BatchNormalization" not in kinds
        assert "Dropout" not in kinds
        assert list(path.parent.glob(f"{tower}*")) == [path]
        data = path.read_bytes()
        for trace in (b".py", b"site-packages", str(Path.home()).encode(), str(Path.cwd()).encode()):
            assert trace not in data
    # no weight of one tower lies in the other's file
    total = towers.image.stat().st_size + towers.text.stat().st_size
    assert total < student.num_parameters * 4 * 1.03 + 200_000


def test_the_student_is_left_as_it_was(tmp_path: Path) -> None:
    student = make_student("vit").train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    fast_path, random = torch.backends.mha.get_fastpath_enabled(), torch.get_rng_state()
    export_towers(student, tmp_path)
    assert student.training
    assert student.model.training
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_another_process_writes_the_same_bytes(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.pipeline.models.towers import make_student; "
        "from teacher_cache.pipeline.deploy.formats.export_onnx import export_towers; export_towers(make_student('vit'), Path(sys.argv[1]))"  # noqa: E501
    )
    run = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    subprocess.run(run, check=True, env={**os.environ, "PYTHONHASHSEED": "3"})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["image.onnx", "text.onnx"]
    _, towers = exported_once("vit", tmp_path_factory)
    for path in (towers.image, towers.text):
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (path, tmp_path / path.name)]
        assert digests[0] == digests[1]


def test_the_gate() -> None:
    rows = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    turned = rows.copy()
    turned[3] = np.roll(turned[3], 1)
    by_hand = float(np.dot(rows[3], turned[3]) / (np.linalg.norm(rows[3]) * np.linalg.norm(turned[3])))
    assert least_cosine(rows, rows * 3) == pytest.approx(1, abs=1e-12)
    assert least_cosine(rows, turned) == pytest.approx(by_hand, abs=1e-6)
    require_parity("image", 0.9999901)
    with pytest.raises(DeploymentError, match=r"0\.9000000, 1\.00e-01 below the required 0\.9999900"):
        require_parity("image", 0.9)
    for broken in (np.nan, np.inf, 0.0):
        bad = rows.copy()
        bad[2] = broken
        with pytest.raises(DeploymentError, match="least cosine nan"):
            require_parity("image", least_cosine(bad, rows))
    with pytest.raises(ValueError, match=r"found \(5, 8\) and \(4, 8\)"):
        least_cosine(rows, rows[:4])
    with pytest.raises(ValueError, match="at least one"):
        least_cosine(rows[:0], rows[:0])
