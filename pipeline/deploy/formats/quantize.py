"""int8 quantization of exported towers by ONNX Runtime, with a report of what stays float and why. No torch.

Transformers are quantised dynamically: weights beforehand, activations by their range in each call. Convolutional
towers get fixed ranges from calibration images (``teacher_cache.pipeline.deploy.formats.static_int8``), since only
fixed ranges make convolutions faster. A file that would be int8 in name only is not written.

Weights use 7 of the 8 bits (onnxruntime's ``reduce_range``): x86 processors without VNNI add two products of 8-bit
values in 16 bits, which overflow, so the same file would give different features on them.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from teacher_cache.pipeline.deploy.formats.static_int8 import quantize_static
from teacher_cache.pipeline.deploy.record import DeploymentError
from teacher_cache.pipeline.deploy.table import Int8Report
from teacher_cache.storage.errors import UsageError

LEAST_SHARE = 0.5
"""Minimum share of int8 parameters in an int8 file."""

# operators of an optimised graph that multiply: in int8, and in float
_INT8 = {
    "ConvInteger",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
}
_FLOAT = {"Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul"}

_REASONS = {
    "Add": "biases and position embeddings, added in float",
    "Concat": "the class token, joined in float",
    "Conv": "leading convolutions, kept in float for precision",
    "Expand": "the class token, joined in float",
    "LayerNormalization": "ONNX Runtime normalises in float",
    "Slice": "position embeddings and biases, cut to length and added in float",
    "Gather": "position embeddings, added in float",
}


class NotQuantisable(DeploymentError):
    """A tower without an int8 file, since the file would be int8 in name only."""


def quantisation_of(tower: Path) -> Literal["static", "dynamic"]:
    """Return the method of :func:`quantize_tower`: static, with calibration, for two or more convolutions."""
    kinds = Counter(node.op_type for node in onnx.load(tower).graph.node)
    return "static" if kinds["Conv"] > 1 else "dynamic"


def quantize_tower(source: Path, target: Path, calibration: Iterable[NDArray[np.float32]] | None = None) -> Int8Report:
    """Write the int8 form of an exported tower.

    The graph decides the method, see :func:`quantisation_of`. The same source and calibration give the same bytes. A
    dynamic tower takes the ranges of activations over the whole batch, so a feature depends a little on the other
    inputs of the batch. The caller measures whether the features are good enough.

    Args:
        source: file written by ``teacher_cache.pipeline.deploy.formats.export_onnx``.
        target: file to write; written only if the tower was quantised.
        calibration: batches of the student's input, (batch, 3, height, width), read once, one at a time. Required for
            a static tower, not read for a dynamic one. About 128 training images are enough; images of the measured
            split would flatter the result.

    Raises:
        NotQuantisable: less than half of the parameters became int8, or ONNX Runtime would multiply in float.
        UsageError: the tower needs calibration and no images were passed.
    """
    method = quantisation_of(source)
    images = 0
    with tempfile.TemporaryDirectory(prefix="teacher-cache-int8-") as folder:
        written = Path(folder) / "int8.onnx"
        if method == "static":
            model, images = quantize_static(source, () if calibration is None else calibration)
            if model is None:
                raise UsageError(f"{source}: calibration images are needed to quantise convolutions, none were given")
        else:
            plain = Path(folder) / "plain.onnx"
            onnx.save(_patches_by_matmul(onnx.load(source)), plain)
            with _quiet():
                quantize_dynamic(
                    plain,
                    written,
                    # no Conv: ConvInteger made a ViT's patch embedding slower than all of the float tower
                    op_types_to_quantize=["MatMul", "Gather"],
                    per_channel=True,
                    reduce_range=True,
                    weight_type=QuantType.QInt8,
                )
            model = onnx.load(written)
        strip(model)
        onnx.checker.check_model(model)
        data = model.SerializeToString(deterministic=True)
        written.write_bytes(data)
        report = _report(method, source, written, images)
    _require_int8(source, report)
    target.write_bytes(data)
    return report


def _require_int8(source: Path, report: Int8Report) -> None:
    """Check that enough parameters are int8 and that the file multiplies in int8."""
    what = f"{source.name}: cannot be quantised: "
    float_sizes = "; ".join(f"{kind}: {reason}" for kind, reason in report.kept_float.items())
    if report.share_int8 < LEAST_SHARE:
        raise NotQuantisable(
            f"{what}{report.parameters_int8:,} of {report.parameters:,} parameters became int8, at least "
            f"{LEAST_SHARE:.0%} are wanted. Kept in float: {float_sizes}. Use the float file."
        )
    if not report.int8_operators:
        operators = ", ".join(f"{count} {kind}" for kind, count in report.float_operators.items()) or "none"
        raise NotQuantisable(
            f"{what}its weights are stored as int8, but nothing is multiplied in int8 (operators: {operators}). "
            "Use the float file."
        )


def _patches_by_matmul(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace convolutions without overlap by matrix products, which are fast in int8. Works in place."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.input}
    nodes = []
    for node in graph.node:
        size = shapes.get(node.input[0], []) if node.op_type == "Conv" else []
        weight = numpy_helper.to_array(weights[node.input[1]]) if len(size) == 4 else np.empty((0, 0, 0, 0))
        outputs, channels, height, width = weight.shape
        how = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        fits = (
            len(size) == 4
            and list(how.get("strides", [1, 1])) == [height, width]
            and not any(how.get("pads", []))
            and how.get("auto_pad", b"NOTSET") == b"NOTSET"
            and how.get("group", 1) == 1
            and size[1:] == [channels, size[2] // height * height, size[3] // width * width]
        )
        if not fits:
            nodes.append(node)
            continue
        rows, columns = size[2] // height, size[3] // width
        name = node.output[0]
        for part, values in (
            # 0 keeps the batch dimension
            ("split", np.array([0, channels, rows, height, columns, width])),
            ("flat", np.array([0, rows * columns, channels * height * width])),
            ("grid", np.array([0, outputs, rows, columns])),
            ("weight", np.ascontiguousarray(weight.reshape(outputs, -1).T)),
        ):
            graph.initializer.append(numpy_helper.from_array(values, f"{name}/{part}"))
        biased = len(node.input) > 2
        product = f"{name}/sum" if biased else f"{name}/product"
        nodes += [
            helper.make_node("Reshape", [node.input[0], f"{name}/split"], [f"{name}/patches"]),
            helper.make_node("Transpose", [f"{name}/patches"], [f"{name}/sorted"], perm=[0, 2, 4, 1, 3, 5]),
            helper.make_node("Reshape", [f"{name}/sorted", f"{name}/flat"], [f"{name}/rows"]),
            helper.make_node("MatMul", [f"{name}/rows", f"{name}/weight"], [f"{name}/product"], name=f"{name}/matmul"),
            *([helper.make_node("Add", [f"{name}/product", node.input[2]], [product])] if biased else []),
            helper.make_node("Transpose", [product], [f"{name}/columns"], perm=[0, 2, 1]),
            helper.make_node("Reshape", [f"{name}/columns", f"{name}/grid"], [name]),
        ]
        graph.initializer.remove(weights[node.input[1]])
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _report(method: Literal["static", "dynamic"], source: Path, target: Path, images: int) -> Int8Report:
    before = _float_parameters(onnx.load(source))
    model = onnx.load(target)
    after = _float_parameters(model)
    int8 = _int8_parameters(model)
    parameters = sum(before.values())
    float_sizes: Counter[str] = Counter()
    consumers = {name: node.op_type for node in reversed(model.graph.node) for name in node.input}
    for name, size in after.items():
        if size > 1 and name in before and name in consumers:
            float_sizes[consumers[name]] += size
    running = _running_operators(target)
    return Int8Report(
        method=method,
        parameters=parameters,
        parameters_int8=int8,
        share_int8=int8 / parameters if parameters else 0.0,
        bytes=target.stat().st_size,
        float_bytes=source.stat().st_size,
        calibration_images=images,
        int8_operators={kind: count for kind, count in sorted(running.items()) if kind in _INT8},
        float_operators={kind: count for kind, count in sorted(running.items()) if kind in _FLOAT},
        kept_float={
            kind: f"{size:,} parameters: {_REASONS.get(kind, 'ONNX Runtime has no int8 form of these')}"
            for kind, size in float_sizes.most_common()
        },
    )


def _float_parameters(model: onnx.ModelProto) -> dict[str, int]:
    """Return the sizes of float tensors by name, scalars left out."""
    return {
        tensor.name: int(np.prod(tensor.dims))
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.dims
    }


def _int8_parameters(model: onnx.ModelProto) -> int:
    """Count the weights stored as int8, without scales and zero points."""
    position = {"DequantizeLinear": 0, "Gather": 0, "MatMulInteger": 1, "ConvInteger": 1}
    weights = {node.input[position[node.op_type]] for node in model.graph.node if node.op_type in position}
    return sum(
        int(np.prod(tensor.dims))
        for tensor in model.graph.initializer
        if tensor.name in weights and tensor.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    )


def _running_operators(path: Path) -> Counter[str]:
    """Count the operators of ONNX Runtime's optimised graph, before layouts that depend on the processor."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    optimized = path.with_suffix(".optimized")
    options.optimized_model_filepath = str(optimized)
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(optimized).graph.node)


def strip(model: onnx.ModelProto) -> None:
    """Remove stack traces, which have paths, and the names of Python objects."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    # ONNX Runtime infers the shapes of inner values again
    graph.ClearField("value_info")
    graph.name = "tower"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the quantiser within the block. It logs to the root logger, which would add a handler."""
    root = logging.getLogger()
    silent, level = logging.NullHandler(), root.level
    root.addHandler(silent)
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.removeHandler(silent)
        root.setLevel(level)
