"""The files of a deployed student, made from a checkpoint of a run."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.cached_images import CachedImages
from pipeline.clip_tokens import tokenization_of
from pipeline.decode import decode_image
from pipeline.deployment import Artefact, Deployment, Variant
from pipeline.evaluation_split import EvaluationSplit
from pipeline.export_onnx import export_towers
from pipeline.int8_report import Int8Report
from pipeline.model_input import ModelInput
from pipeline.quantize import NotQuantisable, quantize_tower
from pipeline.runs import CHECKPOINT_WEIGHTS, RunRecord
from pipeline.samples import ImageSource
from pipeline.student import Student, student_tokenizer

__all__ = ["WEIGHTS", "calibration_batches", "write_files"]

WEIGHTS, CONFIG = "model.safetensors", "open_clip_config.json"

_Tower = Literal["image", "text"]
_CALIBRATION_BATCH = 16


def write_files(
    folder: Path,
    student: Student,
    config: dict[str, Any],
    checkpoint: Path,
    record: RunRecord,
    name: str,
    run: str,
    calibration: Callable[[], Iterator[NDArray[np.float32]]] | None,
    progress: Callable[[str, int, int], None],
) -> tuple[Deployment, dict[_Tower, Int8Report]]:
    """Write everything but the table and the model card into a folder, its record last.

    Args:
        student: as loaded from ``checkpoint``; its open_clip model config is ``config``.
        record: of the run.
        name, run: what the student and its run are called; no paths, since the record goes to others.
        calibration: batches of pixels, (batch, 3, height, width), from the start at each call; None for no int8.
        progress: called with (stage, done, of how many).

    Returns:
        The record, and what is int8 in which tower.

    Raises:
        UsageError: an architecture, or tokenizer, that cannot be exported.
    """
    progress("export", 0, 4)
    towers = export_towers(student, folder)
    progress("export", 1, 4)
    files: dict[_Tower, Path] = {"image": towers.image, "text": towers.text}
    made: dict[Variant, dict[_Tower, Artefact]] = {"fp32": {name: Artefact.of(path) for name, path in files.items()}}
    refused: dict[str, str] = {}
    reports: dict[_Tower, Int8Report] = {}
    if calibration is not None:
        for done, (tower, path) in enumerate(files.items(), start=1):
            out = path.with_name(f"{tower}.int8.onnx")
            try:
                reports[tower] = quantize_tower(path, out, calibration() if tower == "image" else None)
            except NotQuantisable as error:
                refused[tower] = str(error)
                out.unlink(missing_ok=True)
            else:
                made.setdefault("int8", {})[tower] = Artefact.of(out)
            progress("export", 1 + done, 4)
    tokenization = tokenization_of(student_tokenizer(config), folder, towers.shortens)
    # the checkpoint's own bytes: what was measured during training is what is shipped
    shutil.copyfile(checkpoint / CHECKPOINT_WEIGHTS, folder / WEIGHTS)
    settings = json.loads((checkpoint / CONFIG).read_text())
    plain = {key: settings[key] for key in ("model_cfg", "preprocess_cfg")}
    (folder / CONFIG).write_text(json.dumps(plain, indent=2) + "\n")
    deployment = Deployment(
        name=name,
        teacher=record.teacher,
        parameters=student.num_parameters,
        embed_dim=student.embed_dim,
        logit_scale=float(student.model.logit_scale.detach().exp()),  # type: ignore[operator]
        preprocess=student.preprocess.to_config(),
        tokenization=tokenization,
        towers=made,
        not_quantised=refused,
        weights=Artefact.of(folder / WEIGHTS),
        run=run,
        checkpoint=checkpoint.name,
        cache_manifest_digest=record.cache_manifest_digest,
        made_with=versions(),
    )
    deployment.write(folder)
    progress("export", 4, 4)
    return deployment, reports


def calibration_batches(
    split: EvaluationSplit, rows: NDArray[np.int64], preprocess: dict[str, Any], images: int
) -> Callable[[], Iterator[NDArray[np.float32]]]:
    """Batches of a split's images as the student sees them: float32 (batch, 3, height, width), 16 at a time.

    Args:
        split: knows where the images of the cache are.
        rows: of the cache, to take them from; training images, so that what is measured is not what was fitted.
        images: how many, drawn evenly over ``rows``.
    """
    taken = rows[np.linspace(0, len(rows) - 1, min(images, len(rows))).round().astype(np.int64)]
    seen = ModelInput.from_config(preprocess)
    # not those of the split, which holds no others
    stored = CachedImages(split.reader, ImageSource(split.image_root), taken.tolist())

    def batches() -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(taken), _CALIBRATION_BATCH):
            part = taken[start : start + _CALIBRATION_BATCH]
            yield np.stack([seen.pixels(decode_image(stored.read(int(row)))) for row in part])

    return batches


def versions() -> dict[str, str]:
    """Of what made and measured a deployment."""
    modules = {"torch": "torch", "open_clip_torch": "open_clip", "onnx": "onnx", "onnxruntime": "onnxruntime"}
    modules |= {"tokenizers": "tokenizers", "pillow": "PIL", "numpy": "numpy"}
    # of the modules: a distribution may have another name, such as onnxruntime-gpu or pillow-simd
    found = {name: str(getattr(import_module(module), "__version__", "unknown")) for name, module in modules.items()}
    return {"python": platform.python_version(), **found}
