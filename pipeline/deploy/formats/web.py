"""A deployed student in the layout of transformers.js and Optimum, for a browser or Node.

    web/config.json  preprocessor_config.json  tokenizer.json  tokenizer_config.json
    web/onnx/vision_model.onnx    ``pixel_values`` to ``image_embeds``
    web/onnx/text_model.onnx      ``input_ids`` to ``text_embeds``
    web/onnx/vision_model_quantized.onnx  text_model_quantized.onnx     int8, where the tower has it: dtype q8

The ONNX files are the deployment's, with other names of their tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
from PIL.Image import Resampling

from teacher_cache.pipeline.data.tokens import SPECIALS, WORDS
from teacher_cache.pipeline.deploy.record import Deployment, Tokenization
from teacher_cache.pipeline.deploy.tokens import is_clip
from teacher_cache.storage.errors import UsageError

FOLDER = "web"

_NAMES = {
    "image": ("vision_model", {"pixels": "pixel_values", "image_features": "image_embeds"}),
    "text": ("text_model", {"tokens": "input_ids", "text_features": "text_embeds"}),
}
_SUFFIXES = {"fp32": "", "int8": "_quantized"}


def write_web(folder: Path, deployment: Deployment) -> None:
    """Write ``web/`` into the folder of a deployment.

    Raises:
        UsageError: the student pads its images, reads the padding of texts, or has another tokenizer than CLIP's in
            lower case: transformers.js would show it other pixels or tokens.
    """
    tokens = deployment.tokenization
    tokenizer = json.loads(deployment.proven(folder, tokens.artefact))
    if not is_clip(tokenizer) or tokens.clean != "lower":
        raise UsageError(f"web: {deployment.name} has another tokenizer than CLIP's in lower case. Leave --web out")
    if not tokens.shortens:
        raise UsageError(f"web: {deployment.name} reads the padding of a text, which differs there. Leave --web out")
    files = {
        "config.json": {
            "model_type": "clip",
            "projection_dim": deployment.embed_dim,
            "logit_scale_init_value": deployment.logit_scale,
            "text_config": {"model_type": "clip_text_model", "max_position_embeddings": tokens.context_length},
            "vision_config": {"model_type": "clip_vision_model", "image_size": max(deployment.preprocess["size"])},
        },
        "preprocessor_config.json": _preprocessor(deployment),
        "tokenizer.json": _tokenizer(tokenizer, tokens),
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": tokens.context_length,
            "bos_token": SPECIALS[0],
            "eos_token": SPECIALS[1],
            "unk_token": SPECIALS[1],
            # features are read at the first end token; the runtime's padding, 0, is "!" in the vocabulary
            "pad_token": SPECIALS[1],
        },
    }
    (folder / FOLDER / "onnx").mkdir(parents=True)
    for name, content in files.items():
        (folder / FOLDER / name).write_text(json.dumps(content, ensure_ascii=True) + "\n")
    for variant, towers in deployment.towers.items():
        for tower, artefact in towers.items():
            name, tensors = _NAMES[tower]
            model = onnx.load_from_string(deployment.proven(folder, artefact))
            _rename(model.graph, tensors)
            onnx.save(model, folder / FOLDER / "onnx" / f"{name}{_SUFFIXES[variant]}.onnx")


def _preprocessor(deployment: Deployment) -> dict[str, Any]:
    seen = deployment.preprocess
    height, width = seen["size"]
    box = {"height": height, "width": width}
    if seen["resize_mode"] == "squash":
        size = box
    elif seen["resize_mode"] == "shortest" and height == width:
        size = {"shortest_edge": height}
    else:
        raise UsageError(
            f"web: {deployment.name} sees {height} x {width} pixels in resize mode {seen['resize_mode']}, and "
            "transformers.js has shortest for squares, and squash. Leave --web out"
        )
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": int(Resampling[seen["interpolation"].upper()]),
        "do_center_crop": "shortest_edge" in size,
        "crop_size": box,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": seen["mean"],
        "image_std": seen["std"],
    }


def _tokenizer(content: dict[str, Any], tokens: Tokenization) -> dict[str, Any]:
    """Return CLIP's ``tokenizer.json`` with the parts that this project's runtime has in code."""
    blanks = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
    # JavaScript has no (?i); the text is in lower case
    words, byte_level = content["pre_tokenizer"]["pretokenizers"]
    start, end = zip(SPECIALS, (tokens.start_token, tokens.end_token), strict=True)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        **content,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, blanks, {"type": "Lowercase"}]},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{**words, "pattern": {"Regex": WORDS}}, byte_level],
        },
        "added_tokens": [{"id": number, "content": text, "special": True, **flags} for text, number in (start, end)],
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": list(end),
            "cls": list(start),
            "trim_offsets": False,
            "add_prefix_space": False,
        },
    }


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for value in (*graph.input, *graph.output):
        value.name = names[value.name]
    for node in graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = [names.get(tensor, tensor) for tensor in tensors]
