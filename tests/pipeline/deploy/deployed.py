"""A tiny student, deployed: both towers as ONNX, the image tower as int8 too."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

from teacher_cache.pipeline.deploy.formats.export_onnx import export_towers
from teacher_cache.pipeline.deploy.record import Artefact, Deployment
from teacher_cache.pipeline.deploy.tokens import tokenization_of
from teacher_cache.pipeline.models.student import load_student, student_tokenizer
from tests.conftest import make_model_folder


def deploy_tiny(folder: Path, seed: int = 3) -> Path:
    """``folder/student`` is the model folder that ``folder/deployed`` was made of; gives the latter."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    student, config = load_student(make_model_folder(folder / "student", seed=seed))
    deployed = folder / "deployed"
    deployed.mkdir()
    towers = export_towers(student, deployed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)  # it would like another preparation
        quantize_dynamic(towers.image, deployed / "image.int8.onnx", weight_type=QuantType.QInt8)
        logging.disable(logging.NOTSET)
    (deployed / "open_clip_model.safetensors").write_bytes(
        (folder / "student" / "open_clip_model.safetensors").read_bytes()
    )
    Deployment(
        name="tiny",
        teacher="tiny teacher",
        parameters=student.num_parameters,
        embed_dim=student.embed_dim,
        logit_scale=14.3,
        preprocess=student.preprocess.to_config(),
        tokenization=tokenization_of(student_tokenizer(config), deployed, towers.shortens),
        towers={
            "fp32": {"image": Artefact.of(towers.image), "text": Artefact.of(towers.text)},
            "int8": {"image": Artefact.of(deployed / "image.int8.onnx")},
        },
        not_quantised={"text": "its features lose too much"},
        weights=Artefact.of(deployed / "open_clip_model.safetensors"),
        run="runs/tiny",
        checkpoint="epoch-0001",
        cache_manifest_digest="f" * 64,
        made_with={"onnxruntime": "1.0"},
    ).write(deployed)
    return deployed
