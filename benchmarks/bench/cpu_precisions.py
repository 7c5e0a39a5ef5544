"""A teacher's forward pass on a CPU in other arithmetic than plain float32: how fast, and how far from its rows.

Photographs of Flickr8k and their captions, ready as tensors, by the batch size of ``precompute``, captions sorted by
length. Each row's note has the cosines to fp32, and for torch.compile the seconds that the first batch took. A
convolutional image tower is measured with channels last too. OpenVINO is measured if it is installed. ViT-B/32,
ViT-B/16 and RN50 have random weights, whose cosines say less than those of the trained teacher.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import teacher_cache.pipeline  # noqa: F401  # first: sets how OpenMP's threads wait, as in a command

# isort: split
import onnxruntime
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.bench.harness import Row, Settings, interleave, speed
from benchmarks.bench.material import random_weights
from teacher_cache.pipeline.data.tokens import order_by_length
from teacher_cache.pipeline.deploy.formats.export_onnx import export_towers
from teacher_cache.pipeline.models.device import image_memory_format, keep_freed_memory
from teacher_cache.pipeline.models.teacher import LiveTeacher, load_teacher

_BATCH = 16


@dataclass(frozen=True)
class _Family:
    """A teacher, its numbers of photographs compared, photographs timed and captions timed, and what is compiled."""

    label: str
    compared: int = 32
    images: int = 16
    captions: int = 64
    compiled: tuple[str, ...] = ("bf16",)


_TRAINED = _Family("teacher-flickr8k", 200, 48, 320, ("fp32", "bf16", "pure_bf16"))
# RN50 and ViT-B/16 have the text tower of ViT-B/32
_RANDOM = (_Family("ViT-B-32"), _Family("RN50", captions=0), _Family("ViT-B-16", captions=0))

Forward = Callable[[Tensor], Any]


def measure(settings: Settings) -> list[Row]:
    """See the module."""
    keep_freed_memory(torch.device("cpu"))
    rows = _measure(settings, _TRAINED, f"local-dir:{settings.shared / _TRAINED.label}", None)
    for family in () if settings.quick else _RANDOM:
        rows += _measure(settings, family, family.label, str(random_weights(family.label, settings.scratch)))
    return rows


def _measure(settings: Settings, family: _Family, name: str, pretrained: str | None) -> list[Row]:
    if settings.quick:
        family = replace(family, compared=16, images=16, captions=32, compiled=())
    plain = load_teacher(name, pretrained, "cpu")
    pixels, tokens = _material(plain, settings.shared / "flickr8k", family.compared)
    timed = {"image": pixels[: family.images // _BATCH]}
    if family.captions:
        timed["text"] = tokens[:: len(tokens) * _BATCH // family.captions]
    forwards = _forwards(plain, name, pretrained, settings.scratch / "onnx" / family.label, family.compiled)
    rows: list[Row] = []
    for tower, part in timed.items():
        batches = pixels if tower == "image" else tokens
        exact: Tensor | None = None
        named = {
            variant: both[tower] for variant, both in forwards.items() if tower == "image" or "last" not in variant
        }
        notes = {}
        for variant, forward in named.items():
            started = time.perf_counter()
            forward(batches[0])
            first = time.perf_counter() - started
            features = torch.cat([torch.as_tensor(forward(batch)) for batch in batches])
            exact = features if exact is None else exact
            cosines = nn.functional.cosine_similarity(features.double(), exact.double())
            notes[variant] = f"cosine to fp32 {cosines.mean():.6f} on average, {cosines.min():.6f} at least"
            notes[variant] += f"; first batch {first:.0f} s" if "compiled" in variant else ""
        candidates = {variant: partial(_all, forward, part) for variant, forward in named.items()}
        seconds = interleave(candidates, settings.rounds, warm_up=False)
        unit = {"image": "images/s", "text": "captions/s"}[tower]
        work = sum(len(batch) for batch in part)
        for variant, own in seconds.items():
            what = f"{family.label}, {tower}s, {variant}"
            rows.append(speed(what, "fp32", own, seconds["fp32"], work, unit, note=notes[variant]))
            print(rows[-1], flush=True)
    return rows


def _all(forward: Forward, batches: list[Tensor]) -> None:
    for batch in batches:
        forward(batch)


def _material(teacher: LiveTeacher, flickr: Path, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Batches of pixels and of tokens, by length; the tokens as ``precompute`` shortens them."""
    names = (flickr / "dev.txt").read_text().split()[:count]
    shown = torch.stack([teacher.preprocess.transform(Image.open(flickr / "images" / name)) for name in names])
    lines = (flickr / "captions.txt").read_text().splitlines()[1:]
    texts = [line.partition(",")[2].strip('"') for line in lines if line.partition(",")[0] in set(names)]
    ordered = pa.array(texts).take(order_by_length(pa.chunked_array([texts]))).to_pylist()
    tokens = [torch.as_tensor(teacher.tokenizer(ordered[at : at + _BATCH])) for at in range(0, len(ordered), _BATCH)]
    return list(shown.split(_BATCH)), tokens


def _forwards(
    plain: LiveTeacher, name: str, pretrained: str | None, folder: Path, compiled: tuple[str, ...]
) -> dict[str, dict[str, Forward]]:
    """Each variant's calls by tower: a batch to its features of unit norm."""
    found = {"fp32": _of_torch(plain)}
    precisions: tuple[Any, ...] = ("fp32", "bf16", "pure_bf16")
    for precision in precisions:
        if precision != "fp32":
            found[precision] = _of_torch(load_teacher(name, pretrained, "cpu", precision))
        if image_memory_format(plain.model) is torch.channels_last:
            live = load_teacher(name, pretrained, "cpu", precision)
            live.model.visual.to(memory_format=torch.channels_last)  # type: ignore[operator,union-attr]
            found[f"{precision}, channels last"] = {
                "image": partial(_channels_last, live),
                "text": found[precision]["text"],
            }
        if precision in compiled:
            live = load_teacher(name, pretrained, "cpu", precision)
            live.model.visual.compile()  # type: ignore[operator,union-attr]
            live.model.transformer.compile()  # type: ignore[operator,union-attr]
            found[f"{precision}, compiled"] = _of_torch(live)
    folder.mkdir(parents=True)
    towers = export_towers(_Exported(plain), folder)  # type: ignore[arg-type]
    files = {"image": towers.image, "text": towers.text}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    found["ONNX Runtime"] = {
        tower: _as_called(partial(_of_session, onnxruntime.InferenceSession(path, options)), plain)
        for tower, path in files.items()
    }
    try:
        import openvino
    except ImportError:
        return found
    threads = torch.get_num_threads()
    for hint in ("f32", "bf16"):
        found[f"OpenVINO {hint}"] = {}
        for tower, path in files.items():
            core = openvino.Core()
            settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads}
            model = core.compile_model(core.read_model(path), "CPU", settings)
            found[f"OpenVINO {hint}"][tower] = _as_called(partial(_of_openvino, model), plain)
    return found


def _of_torch(live: LiveTeacher) -> dict[str, Forward]:
    return {"image": live.image_features, "text": live.text_features}


def _channels_last(live: LiveTeacher, pixels: Tensor) -> Tensor:
    return live.image_features(pixels.to(memory_format=torch.channels_last))


def _as_called(run: Callable[[Any], Any], plain: LiveTeacher) -> Forward:
    return lambda batch: run((batch if batch.is_floating_point() else plain._text(batch)[1]).numpy())


def _of_session(session: Any, values: Any) -> Any:
    return session.run(None, {session.get_inputs()[0].name: values})[0]


def _of_openvino(model: Any, values: Any) -> Any:
    return model.create_infer_request().infer([values])[0]


class _Exported(nn.Module):
    """A teacher with what the exporter asks of a student."""

    def __init__(self, teacher: LiveTeacher) -> None:
        super().__init__()
        self.model: Any = teacher.model
        self.preprocess, self.config, self.shortens = teacher.preprocess, teacher.architecture, teacher._shortens

    def encode_image(self, pixels: Tensor) -> Tensor:
        return nn.functional.normalize(self.model.encode_image(pixels), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return nn.functional.normalize(self.model.encode_text(tokens), dim=-1)
