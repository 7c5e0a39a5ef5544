"""int8 towers are int8, close to the float ones, and what is not int8 is said or refused."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import teacher_cache.pipeline.deploy.formats.static_int8
import teacher_cache.pipeline.models
from teacher_cache.pipeline.data.datasets.adapters.scenes import render_scene
from teacher_cache.pipeline.deploy.formats.export_onnx import ExportedTowers, export_towers
from teacher_cache.pipeline.deploy.formats.quantize import NotQuantisable, quantisation_of, quantize_tower
from teacher_cache.pipeline.deploy.formats.quantize import _patches_by_matmul as patches_by_matmul
from teacher_cache.pipeline.deploy.table import Int8Report
from teacher_cache.pipeline.models.student import Student, load_student
from teacher_cache.storage.errors import UsageError
from tests.conftest import shared
from tests.pipeline.models.towers import exported_once, make_tokens, run_onnx


def make_pixels(batches: int, size: int, batch: int = 8, seed: int = 0) -> Iterator[NDArray[np.float32]]:
    """Coarse coloured squares: like photographs, neighbours are alike."""
    rng = np.random.default_rng(seed)
    for _ in range(batches):
        coarse = rng.standard_normal((batch, 3, size // 8, size // 8)) + rng.standard_normal((batch, 3, 1, 1))
        yield coarse.repeat(8, 2).repeat(8, 3).astype(np.float32)


def mean_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float((a.astype(np.float64) * b).sum(1).mean())


def quantized(source: Path, target: Path, size: int = 64) -> Int8Report:
    return quantize_tower(source, target, make_pixels(4, size))


def int8_bytes(path: Path) -> int:
    """Bytes of all int8 tensors of at least two dimensions: zero points have fewer."""
    return sum(
        numpy_helper.to_array(tensor).nbytes
        for tensor in onnx.load(path).graph.initializer
        if tensor.data_type in (TensorProto.INT8, TensorProto.UINT8) and len(tensor.dims) > 1
    )


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, ExportedTowers]:
    return exported_once("vit", tmp_path_factory)


@pytest.fixture(scope="module")
def lite0(tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, ExportedTowers]:
    return exported_once("lite0", tmp_path_factory)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, ExportedTowers]:
    return exported_once("resnet", tmp_path_factory)


@pytest.mark.parametrize("kind", ["resnet", "lite0"])
def test_convolutions_get_fixed_ranges(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    student, towers = request.getfixturevalue(kind)
    assert quantisation_of(towers.image) == "static"
    target = tmp_path / "image.int8.onnx"
    report = quantized(towers.image, target)
    assert (report.method, report.calibration_images) == ("static", 32)
    assert report.bytes == target.stat().st_size < 0.4 * report.float_bytes
    # against the file and against torch: everything with two dimensions that is not left float
    visual = student.model.visual
    weights = sum(parameter.numel() for parameter in visual.parameters() if parameter.ndim > 1)
    assert report.parameters_int8 == int8_bytes(target)
    assert 0.97 * weights < report.parameters_int8 < weights
    assert report.share_int8 == report.parameters_int8 / report.parameters > 0.97
    assert report.int8_operators["QLinearConv"] > 15
    assert sum(report.float_operators.values()) < 6
    assert "leading convolutions" in report.kept_float["Conv"]
    (pixels,) = make_pixels(1, 64, 39, seed=9)
    found, wanted = run_onnx(target, pixels), run_onnx(towers.image, pixels)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    # random weights carry rounding errors much further than trained ones: see the test with photographs below
    assert mean_cosine(found, wanted) > 0.92
    # ranges are fixed: what else is in the batch changes nothing
    np.testing.assert_allclose(run_onnx(target, pixels[:1]), found[:1], atol=1e-6)


@pytest.mark.parametrize(("kind", "convolutions"), [("resnet", 15), ("lite0", 30)])
def test_weights_use_seven_bits_and_a_scale_by_channel(
    kind: str, convolutions: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Eight bits would overflow where x86 sums pairs of products in 16 bits."""
    _, towers = request.getfixturevalue(kind)
    for source in (towers.image, towers.text):
        quantized(source, tmp_path / source.name)
        model = onnx.load(tmp_path / source.name)
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        weights = [value for value in stored.values() if value.dtype == np.int8 and value.ndim > 1]
        assert weights
        assert max(np.abs(value.astype(int)).max() for value in weights) <= 64
    scales = [
        (stored[node.input[0]].shape, stored[node.input[1]].shape)
        for model in [onnx.load(tmp_path / "image.onnx")]
        for stored in [{tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored and stored[node.input[0]].ndim == 4
    ]
    assert len(scales) > convolutions
    assert all(scale == (weight[0],) for weight, scale in scales)


@pytest.mark.parametrize("padding", [0, 2])
def test_the_rounding_of_weights_does_not_shift_the_mean(
    padding: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    constants = {
        "w1": rng.standard_normal((16, 3, 1, 1)).astype(np.float32),
        "b1": np.ones(16, np.float32),
        # two groups; one large weight makes the steps of its channel coarse
        "w2": rng.standard_normal((8, 8, 5, 5)).astype(np.float32) * np.where(rng.random((8, 8, 5, 5)) < 0.01, 30, 1),
        "b2": rng.standard_normal(8).astype(np.float32),
    }
    constants["w2"] = constants["w2"].astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["y"], group=2, pads=[padding] * 4),
    ]
    onnx.save(make_graph(nodes, constants, ["n", 3, 8, 8], 4), tmp_path / "tower.onnx")
    (pixels,) = make_pixels(1, 8, 64)
    wanted = run_onnx(tmp_path / "tower.onnx", pixels).mean((0, 2, 3))
    error = {}
    for name in ("corrected", "plain"):
        quantize_tower(tmp_path / "tower.onnx", tmp_path / name, [pixels])
        error[name] = np.abs(run_onnx(tmp_path / name, pixels).mean((0, 2, 3)) - wanted).mean()
        monkeypatch.setattr(teacher_cache.pipeline.deploy.formats.static_int8, "_correct_biases", lambda *_: None)
    assert error["corrected"] < 0.2 * error["plain"]


def test_transformers_are_quantised_without_calibration(vit: tuple[Student, ExportedTowers], tmp_path: Path) -> None:
    student, towers = vit
    untouched = make_pixels(1, 32)
    for source, tower in ((towers.image, student.model.visual), (towers.text, student.model.transformer)):
        assert quantisation_of(source) == "dynamic"
        target = tmp_path / source.name
        report = quantize_tower(source, target, untouched)
        assert (report.method, report.calibration_images) == ("dynamic", 0)
        assert report.parameters_int8 == int8_bytes(target)
        # nothing but attention's products of two activations is multiplied in float
        blocks = len(getattr(tower, "transformer", tower).resblocks)
        assert sum(report.float_operators.values()) == 2 * blocks
        assert sum(report.int8_operators.values()) > 4 * blocks
    next(untouched)  # was not begun
    assert report.share_int8 > 0.9
    (pixels,) = make_pixels(1, 32, 7)
    assert mean_cosine(run_onnx(tmp_path / "image.onnx", pixels), run_onnx(towers.image, pixels)) > 0.99
    for length in (5, 77):
        tokens = make_tokens(7, length)
        assert mean_cosine(run_onnx(tmp_path / "text.onnx", tokens), run_onnx(towers.text, tokens)) > 0.99


def test_patch_embeddings_become_the_same_product_of_matrices(
    vit: tuple[Student, ExportedTowers], tmp_path: Path
) -> None:
    rewritten = patches_by_matmul(onnx.load(vit[1].image))
    onnx.checker.check_model(rewritten, full_check=True)
    assert not [node for node in rewritten.graph.node if node.op_type == "Conv"]
    onnx.save(rewritten, tmp_path / "rewritten.onnx")
    (pixels,) = make_pixels(1, 32, 7)
    pixels += np.random.default_rng(1).standard_normal(pixels.shape).astype(np.float32)
    np.testing.assert_allclose(run_onnx(tmp_path / "rewritten.onnx", pixels), run_onnx(vit[1].image, pixels), atol=1e-6)


@pytest.mark.parametrize(
    ("how", "rewritten"),
    [
        ({"strides": [4, 2], "kernel_shape": [4, 2]}, True),
        ({"strides": [3, 3], "kernel_shape": [4, 4]}, False),
        ({"strides": [4, 4], "kernel_shape": [4, 4], "pads": [1, 1, 1, 1]}, False),
        ({"strides": [4, 4], "kernel_shape": [4, 4], "group": 3}, False),
    ],
)
def test_convolutions_are_rewritten_only_if_patches_do_not_overlap(
    how: dict[str, Any], rewritten: bool, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 3 // how.get("group", 1), *how["kernel_shape"])).astype(np.float32)
    constants = {"w": weight, "b": rng.standard_normal(6).astype(np.float32)}
    model = make_graph([helper.make_node("Conv", ["x", "w", "b"], ["y"], **how)], constants, ["n", 3, 8, 12], 4)
    onnx.save(model, tmp_path / "before.onnx")
    after = patches_by_matmul(model)
    onnx.save(after, tmp_path / "after.onnx")
    assert [node.op_type for node in after.graph.node].count("Conv") == (0 if rewritten else 1)
    pixels = rng.standard_normal((2, 3, 8, 12)).astype(np.float32)
    found, wanted = run_onnx(tmp_path / "after.onnx", pixels), run_onnx(tmp_path / "before.onnx", pixels)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def make_graph(
    nodes: list[onnx.NodeProto], constants: dict[str, NDArray[Any]], shape: list[Any], rank: int
) -> onnx.ModelProto:
    """From ``x`` float32 to ``y``."""
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_a_tower_that_would_be_int8_by_a_small_part_is_refused(tmp_path: Path) -> None:
    constants = {"w": np.eye(8, dtype=np.float32), "table": np.ones((50, 8), np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Mul", ["m", "table"], ["y"])]
    onnx.save(make_graph(nodes, constants, [50, 8], 2), tmp_path / "tower.onnx")
    with pytest.raises(NotQuantisable, match=r"64 of 464 parameters became int8.* Mul: 400 parameters"):
        quantize_tower(tmp_path / "tower.onnx", tmp_path / "int8.onnx")
    assert not (tmp_path / "int8.onnx").exists()


def test_a_tower_that_only_stores_int8_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["ids"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "ids"], ["y"], name="look_up"),
    ]
    constants = {"table": np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)}
    onnx.save(make_graph(nodes, constants, ["n"], 2), tmp_path / "tower.onnx")
    with pytest.raises(NotQuantisable, match=r"stored as int8, but nothing is multiplied in int8 \(operators: none\)"):
        quantize_tower(tmp_path / "tower.onnx", tmp_path / "int8.onnx")
    assert not (tmp_path / "int8.onnx").exists()


def test_convolutions_need_calibration_images(resnet: tuple[Student, ExportedTowers], tmp_path: Path) -> None:
    for calibration in (None, iter(())):
        with pytest.raises(UsageError, match=r"image\.onnx: calibration images are needed .* none were given"):
            quantize_tower(resnet[1].image, tmp_path / "int8.onnx", calibration)
    assert not (tmp_path / "int8.onnx").exists()


def test_calibration_holds_one_batch_at_a_time(resnet: tuple[Student, ExportedTowers], tmp_path: Path) -> None:
    alive: list[weakref.ref[Any]] = []
    most = 0

    def batches() -> Iterator[NDArray[np.float32]]:
        nonlocal most
        for seed in range(6):
            (batch,) = make_pixels(1, 64, 2, seed)
            alive.append(weakref.ref(batch))
            yield batch
            del batch
            most = max(most, sum(batch() is not None for batch in alive))

    quantize_tower(resnet[1].image, tmp_path / "int8.onnx", batches())
    assert most == 1


def test_ranges_do_not_depend_on_how_images_are_batched(resnet: tuple[Student, ExportedTowers], tmp_path: Path) -> None:
    images = np.concatenate(list(make_pixels(3, 64)))
    for name, sizes in (("a", [24]), ("b", [1, 7, 16])):
        parts = np.split(images, np.cumsum(sizes)[:-1])
        quantize_tower(resnet[1].image, tmp_path / name, iter(parts))
    (pixels,) = make_pixels(1, 64, 8, seed=5)
    np.testing.assert_allclose(run_onnx(tmp_path / "a", pixels), run_onnx(tmp_path / "b", pixels), atol=2e-3)


def test_the_same_bytes_in_another_process_and_no_noise(
    resnet: tuple[Student, ExportedTowers], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    towers = resnet[1]
    handlers = list(logging.getLogger().handlers)
    for source in (towers.image, towers.text):
        quantized(source, tmp_path / source.name)
    assert logging.getLogger().handlers == handlers
    assert capfd.readouterr() == ("", "")
    code = (
        "import sys; from pathlib import Path; from tests.pipeline.deploy.test_quantize import quantized; "
        "quantized(Path(sys.argv[1]), Path(sys.argv[2])); quantized(Path(sys.argv[3]), Path(sys.argv[4]))"
    )
    again = [tmp_path / "again.image", tmp_path / "again.text"]
    subprocess.run(
        [sys.executable, "-c", code, str(towers.image), str(again[0]), str(towers.text), str(again[1])],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "3"},
    )
    for first, second in zip((towers.image, towers.text), again, strict=True):
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / first.name, second)]
        assert digests[0] == digests[1]


def test_a_trained_resnet_stays_close(tmp_path: Path) -> None:
    """The built-in teacher on scenes that it was not calibrated with."""
    folder = Path(teacher_cache.pipeline.models.__file__).parent / "scenes_teacher"
    student, _ = load_student(folder)
    towers = export_towers(student, tmp_path)
    transform = student.preprocess.transform

    def pixels(split: str, images: int) -> NDArray[np.float32]:
        return torch.stack([transform(render_scene(0, split, index)[0]) for index in range(images)]).numpy()

    report = quantize_tower(towers.image, tmp_path / "int8", np.split(pixels("train", 64), 4))
    assert report.share_int8 > 0.99
    test = pixels("test", 64)
    assert mean_cosine(run_onnx(tmp_path / "int8", test), run_onnx(towers.image, test)) > 0.999


@pytest.mark.real_data
def test_a_trained_trunk_stays_close_on_photographs(tmp_path: Path) -> None:
    """Real outliers: without ranges by channel the mean cosine of this trunk is 0.7."""
    from PIL import Image

    teacher, photos = shared("teacher-flickr8k"), shared("flickr8k")
    student, _ = load_student(teacher)
    towers = export_towers(student, tmp_path)
    transform = student.preprocess.transform

    def pixels(names: list[str]) -> NDArray[np.float32]:
        shown = [transform(Image.open(photos / "images" / name).convert("RGB")) for name in names]
        return torch.stack(shown).numpy()

    train = (photos / "train.txt").read_text().split()[:48]
    report = quantize_tower(towers.image, tmp_path / "int8", (pixels(train[i : i + 8]) for i in range(0, 48, 8)))
    assert report.share_int8 > 0.99
    dev = pixels((photos / "dev.txt").read_text().split()[:16])
    assert mean_cosine(run_onnx(tmp_path / "int8", dev), run_onnx(towers.image, dev)) > 0.995
