"""ONNX export of a student's towers: normalised features, any batch, any text length where the architecture allows it.

The graphs come from torch.export (``dynamo=True``): batch norms are folded into their convolutions, padding is
computed once, GELU and LayerNorm stay single nodes. Paths and names of this machine and run are removed, so that
exporting a student twice gives the same bytes.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from teacher_cache.pipeline.deploy.formats.quantize import strip
from teacher_cache.pipeline.evaluate.cost.torch_models import no_fast_path
from teacher_cache.pipeline.models.student import Student
from teacher_cache.pipeline.models.text_length import encode_any_length
from teacher_cache.storage.errors import UsageError

OPSET = 20  # the first with Gelu as one node; ONNX Runtime 1.17 and newer run it

# protobuf's limit on one message
_MOST_BYTES = 2**31 - 2**20


@dataclass(frozen=True)
class ExportedTowers:
    """The files that :func:`export_towers` wrote.

    Attributes:
        image: image.onnx: ``pixels`` float32 (batch, 3, height, width) to ``image_features`` float32 (batch, dim).
        text: text.onnx: ``tokens`` int64 (batch, length) to ``text_features`` float32 (batch, dim).
        shortens: whether ``length`` may be less than the context length; see
        ``teacher_cache.pipeline.models.text_length``.
    """

    image: Path
    text: Path
    shortens: bool


def export_towers(student: Student, folder: Path) -> ExportedTowers:
    """Write ``image.onnx`` and ``text.onnx``, which compute ``encode_image`` and ``encode_text``.

    The features are the student's own, of unit norm, without its projections to the teacher's width. Files of these
    names in ``folder`` are replaced. The caller makes that atomic and checks the files
    (``teacher_cache.pipeline.deploy.gates``).

    Args:
        student: on any device, in any mode. It is not changed: a copy is exported.

    Raises:
        UsageError: a tower does not fit into one file (2 GiB), or torch cannot export it.
    """
    frozen = copy.deepcopy(student).cpu().eval()
    height, width = frozen.preprocess.size
    context_length = int(frozen.config["text_cfg"].get("context_length", 77))
    shortens = frozen.shortens
    batch = torch.export.Dim("batch", min=1)
    # 2: start and end token
    length = torch.export.Dim("length", min=2, max=context_length)
    towers: list[tuple[str, nn.Module, Tensor, dict[int, Any]]] = [
        ("image", _Image(frozen), torch.zeros(2, 3, height, width), {0: batch}),
        (
            "text",
            _Text(frozen, shortens),
            torch.zeros(2, context_length // 2 if shortens else context_length, dtype=torch.int64),
            {0: batch, 1: length} if shortens else {0: batch},
        ),
    ]
    paths = {}
    for name, module, example, dynamic in towers:
        data = _export(name, module.eval(), example, dynamic)
        paths[name] = folder / f"{name}.onnx"
        paths[name].write_bytes(data)
    return ExportedTowers(paths["image"], paths["text"], shortens)


class _Image(nn.Module):
    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, pixels: Tensor) -> Tensor:
        return self.student.encode_image(pixels)


class _Text(nn.Module):
    def __init__(self, student: Student, shortens: bool) -> None:
        super().__init__()
        self.student = student
        self.shortens = shortens

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.shortens:
            return self.student.encode_text(tokens)
        # encode_text branches on the length; the graph has to work for every length
        features = encode_any_length(self.student.model, tokens)
        return nn.functional.normalize(features.float(), dim=-1)


def _export(name: str, module: nn.Module, example: Tensor, dynamic: dict[int, Any]) -> bytes:
    argument = {"image": "pixels", "text": "tokens"}[name]
    with _quiet(), no_fast_path(), torch.no_grad():
        try:
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                dynamic_shapes={argument: dynamic},
                input_names=[argument],
                output_names=[f"{name}_features"],
                opset_version=OPSET,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"{name} tower: torch cannot export this architecture: {reason}") from error
    assert program is not None
    values = [value.const_value for value in program.model.graph.initializers.values()]
    weights = sum(value.nbytes for value in values if value is not None)
    if weights > _MOST_BYTES:
        raise UsageError(
            f"{name} tower: {weights:,} bytes of weights, and one file of ONNX holds less than 2 GiB. Deploy a smaller "
            "student."
        )
    model = program.model_proto
    strip(model)
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes on its internals within the block."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch.export and onnxscript call deprecated functions of torch and Python
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
