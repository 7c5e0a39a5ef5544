"""Static int8 quantization of convolutions: calibrate, quantise, correct the biases. No torch.

Four measures keep an EfficientNet-Lite close to its float form (docs/design/010-deployment.md has the numbers):

- The leading convolutions stay float. They hold a thousandth of the parameters but cause most of the error, since
  everything else is computed from their output.
- A convolution followed by a ReLU has the ReLU's range. Rounding to int8 then clips as the ReLU did.
- Rounded weights shift the mean of each output channel by the convolution of the mean input with the rounding errors.
  This shift is subtracted from the bias (Nagel et al. 2019, Data-Free Quantization, section 4.2; the means come from
  images).
- Matrix products, such as the last layer, return float. The features are normalised next, and a range that fits all
  images has few int8 steps for a short vector.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
from onnxruntime.quantization.calibrate import TensorsData

LEADING_SHARE = 0.0015
"""Maximum share of the parameters in leading convolutions that stay float."""

# operators to quantise
_KINDS = ("Conv", "Gemm", "MatMul", "Add", "Clip", "Relu", "AveragePool")


@dataclass
class _Ranges:
    """The range of each tensor over all images, and the mean input of each convolution."""

    least: dict[str, float]
    most: dict[str, float]
    mean: dict[str, NDArray[np.float64]]
    images: int


def quantize_static(source: Path, calibration: Iterable[NDArray[np.float32]]) -> tuple[onnx.ModelProto | None, int]:
    """Return a tower with int8 weights (per output channel, 7 bits) and uint8 activations, as QDQ nodes.

    Args:
        source: a float tower.
        calibration: batches of the tower's input; one is held at a time.

    Returns:
        The model, None without images; and the number of images.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(source))
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"  # nodes that stay float are excluded by name
    ranges = _calibrate(model, calibration)
    if not ranges.images:
        return None, 0
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    quantizer = QDQQuantizer(
        model,
        True,  # per channel
        True,  # reduce_range, see teacher_cache.pipeline.deploy.formats.quantize
        QuantType.QInt8,
        QuantType.QUInt8,
        TensorsData(CalibrationMethod.MinMax, _behind_relu(model, ranges)),
        [],
        _left_float(model),
        list(_KINDS),
        {"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    quantized: onnx.ModelProto = quantizer.model.model
    _correct_biases(plain, quantized, ranges.mean)
    return quantized, ranges.images


def _calibrate(model: onnx.ModelProto, calibration: Iterable[NDArray[np.float32]]) -> _Ranges:
    """Run the float tower and reduce each activation inside the graph, so that none is kept."""
    graph = model.graph
    constant = {tensor.name for tensor in graph.initializer}
    tensors = {
        name: None
        for node in graph.node
        if node.op_type in _KINDS
        for name in (*node.input, *node.output)
        if name and name not in constant
    }
    inputs = {node.input[0]: None for node in graph.node if node.op_type == "Conv"}
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    tapped.graph.initializer.append(numpy_helper.from_array(np.array([0]), "batch_axis"))
    reductions: list[tuple[str, str]] = []
    for kind, names in (("ReduceMin", tensors), ("ReduceMax", tensors), ("ReduceMean", inputs)):
        for name in names:
            reduced = f"{kind}/{name}"
            axes = ["batch_axis"] if kind == "ReduceMean" else []
            tapped.graph.node.append(helper.make_node(kind, [name, *axes], [reduced], keepdims=0))
            tapped.graph.output.append(helper.make_tensor_value_info(reduced, TensorProto.FLOAT, None))
            reductions.append((kind, name))
    least: dict[str, float] = defaultdict(lambda: np.inf)
    most: dict[str, float] = defaultdict(lambda: -np.inf)
    total: dict[str, NDArray[np.float64]] = {}
    images = 0
    session = _session(tapped)
    for batch in calibration:
        values = session.run([f"{kind}/{name}" for kind, name in reductions], {graph.input[0].name: batch})
        for (kind, name), value in zip(reductions, values, strict=True):
            if kind == "ReduceMin":
                least[name] = min(least[name], float(value))
            elif kind == "ReduceMax":
                most[name] = max(most[name], float(value))
            else:
                total[name] = total.get(name, 0.0) + value.astype(np.float64) * len(batch)
        images += len(batch)
    return _Ranges(least, most, {name: value / max(images, 1) for name, value in total.items()}, images)


def _behind_relu(model: onnx.ModelProto, ranges: _Ranges) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Return the range of each tensor; a tensor whose only consumer is a ReLU has the ReLU's range."""
    consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            consumers[name].append(node)
    by_tensor = {}
    for name in ranges.least:
        next_nodes = consumers[name]
        only_relu = len(next_nodes) == 1 and next_nodes[0].op_type in ("Clip", "Relu")
        source = next_nodes[0].output[0] if only_relu else name
        by_tensor[name] = (np.float32(ranges.least[source]), np.float32(ranges.most[source]))
    return {name: (np.array(low), np.array(high)) for name, (low, high) in by_tensor.items()}


def _left_float(model: onnx.ModelProto) -> list[str]:
    """Return the names of nodes that stay float: leading convolutions, and additions of a constant."""
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    most = LEADING_SHARE * sum(size for size in sizes.values())
    names, held, leading = [], 0, True
    for node in model.graph.node:
        if node.op_type == "Conv" and leading:
            held += sizes[node.input[1]]
            leading = held <= most
            if leading:
                names.append(node.name)
        elif node.op_type == "Add" and any(name in sizes for name in node.input):
            names.append(node.name)
    return names


def _correct_biases(plain: onnx.ModelProto, quantized: onnx.ModelProto, mean: dict[str, NDArray[np.float64]]) -> None:
    """Subtract the mean effect of rounded weights from the int32 biases, in place."""
    weights = {tensor.name: tensor for tensor in plain.graph.initializer}
    stored = {tensor.name: tensor for tensor in quantized.graph.initializer}
    makers = {name: node for node in quantized.graph.node for name in node.output}
    before = {node.name: node for node in plain.graph.node if node.op_type == "Conv"}
    nodes, constants, corrected = [], [numpy_helper.from_array(np.array([0, 2, 3]), "axes")], {}
    for node in quantized.graph.node:
        if node.op_type != "Conv" or len(node.input) < 3:
            continue
        weight_maker, bias_maker = makers.get(node.input[1]), makers.get(node.input[2])
        if weight_maker is None or bias_maker is None:
            continue  # stays float
        exact = numpy_helper.to_array(weights[before[node.name].input[1]])
        scale = numpy_helper.to_array(stored[weight_maker.input[1]])
        rounded = numpy_helper.to_array(stored[weight_maker.input[0]]) * scale.reshape(-1, 1, 1, 1)
        own = node.name
        # convolution is linear: the mean image gives the mean of all outputs, padded borders included
        for what, value in (("error", exact - rounded), ("mean", mean[before[node.name].input[0]][None])):
            constants.append(numpy_helper.from_array(value.astype(np.float32), f"{own}/{what}"))
        convolution = helper.make_node("Conv", [f"{own}/mean", f"{own}/error"], [f"{own}/out"])
        convolution.attribute.extend(node.attribute)
        nodes += [convolution, helper.make_node("ReduceMean", [f"{own}/out", "axes"], [f"{own}/shift"], keepdims=0)]
        corrected[f"{own}/shift"] = bias_maker
    if not corrected:
        return
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in corrected]
    shifts = _session(
        helper.make_model(
            helper.make_graph(nodes, "shifts", [], outputs, constants),
            opset_imports=list(plain.opset_import),
            ir_version=plain.ir_version,
        )
    ).run(list(corrected), {})
    for shift, maker in zip(shifts, corrected.values(), strict=True):
        bias = stored[maker.input[0]]
        steps = np.round(shift.astype(np.float64) / numpy_helper.to_array(stored[maker.input[1]]))
        bounds = np.iinfo(np.int32)
        values = (numpy_helper.to_array(bias) + steps).clip(bounds.min, bounds.max).astype(np.int32)
        bias.CopyFrom(numpy_helper.from_array(values, bias.name))


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # idle threads must not spin: other programs share the cores
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory(prefix="teacher-cache-int8-") as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
