"""Initialisation of a student with its teacher's weights, as far as they fit. Only here are both loaded.

- open_clip's own text towers and vision transformers: layers, heads and channels chosen by
  ``teacher_cache.pipeline.models.inherit.shrink``. A factorised token embedding gets the teacher's, projected to its
  principal directions.
- Any other image tower: a copy if the architecture is the same, or its trunk from a file; else it stays random.
- A smaller embed_dim: both towers are projected to the principal directions of the teacher's two projections, and the
  student's own projections start as the map back.

Parts that do not fit stay random; the result names them with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from teacher_cache.pipeline.models.inherit.towers import (
    Directions,
    InheritedPart,
    inherit_image,
    inherit_scale,
    inherit_text,
)
from teacher_cache.pipeline.models.inherit.trunk_weights import TrunkWeights, read_trunk_weights
from teacher_cache.pipeline.models.student import (
    Student,
    build_student,
    save_student,
    student_config,
    student_tokenizer,
)
from teacher_cache.pipeline.models.teacher import LiveTeacher, load_teacher
from teacher_cache.pipeline.settings.base import learned_split
from teacher_cache.pipeline.settings.names import TRANSFORMERS
from teacher_cache.pipeline.settings.student import InheritConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.new_files import new_folder, require_free
from teacher_cache.storage.format.tables import CAPTIONS
from teacher_cache.storage.read.reader import EmbeddingReader

_TEXTS_AT_ONCE = 1024


class InheritResult(BaseModel, frozen=True):
    """Origins of an inherited student's parts, also in ``origin.json`` in its folder."""

    out: str
    student: str
    teacher: str
    weights_sha256: str
    parameters: int
    teacher_parameters: int
    parts: tuple[InheritedPart, ...]
    trunk_weights: dict[str, str] | None = None
    cache_manifest_digest: str | None = None
    seed: int
    notes: tuple[str, ...] = ()


def inherit(config: InheritConfig, progress: Callable[[str, int, int], None] | None = None) -> InheritResult:
    """Write a student that starts with its teacher's weights: a checkpoint folder for ``train --init``.

    The folder is created atomically.

    Raises:
        UsageError: a setting cannot be used, the folder exists, or nothing can be inherited.
        CacheError: the cache for token counts is missing, unfinished or damaged.
    """
    out = Path(config.out)
    require_free(out)
    if config.teacher.startswith(TRANSFORMERS):
        raise UsageError(
            f"teacher {config.teacher!r}: only weights of open_clip's towers are inherited. Train without --init, or "
            "name an open_clip model of the same weights"
        )
    architecture = student_config(config.student)
    trunk = read_trunk_weights(config.trunk_weights) if config.trunk_weights else None
    teacher = load_teacher(config.teacher, config.pretrained, device="cpu")
    notes = []
    quick = bool(teacher.architecture.get("quick_gelu", False))
    if quick is not bool(architecture.get("quick_gelu", False)):
        architecture = {**architecture, "quick_gelu": quick}
        notes.append(f"quick_gelu is {quick}, as in the teacher: train --student {out}/open_clip_config.json with it")
    torch.manual_seed(config.seed)
    student = build_student(architecture, teacher.preprocess.to_config(), teacher.embed_dim)
    counts, digest = None, None
    if config.cache is not None:
        reader = EmbeddingReader(config.cache)
        captions = reader.table(CAPTIONS, columns=["text"])
        images = reader.row_set(learned_split(config, reader.identity.dataset.splits))
        vocab_size = int(architecture["text_cfg"].get("vocab_size", 49408))
        tokenizer, counts, done = student_tokenizer(architecture), torch.zeros(vocab_size, dtype=torch.int64), 0
        for rows in images.parts():
            texts = captions.take(reader.caption_rows(rows)[0])["text"].to_pylist()
            counts += token_counts(texts, tokenizer, vocab_size)
            done += len(rows)
            if progress is not None:
                progress("captions of images", done, len(images))
        digest = reader.manifest.digest
    parts = inherit_weights(student, teacher, config.text_layers, config.image_layers, trunk, counts)
    if all(part.random for part in parts):
        reasons = "; ".join(f"{part.part} {part.source}" for part in parts)
        raise UsageError(f"student {config.student!r} can inherit nothing from {config.teacher}: {reasons}")
    result = InheritResult(
        out=str(out),
        student=config.student,
        teacher=teacher.name,
        weights_sha256=teacher.weights_sha256,
        parameters=student.num_parameters,
        teacher_parameters=sum(parameter.numel() for parameter in teacher.model.parameters()),
        parts=tuple(parts),
        trunk_weights=None if trunk is None else {"name": trunk.name, "sha256": trunk.sha256},
        cache_manifest_digest=digest,
        seed=config.seed,
        notes=tuple(notes),
    )
    with new_folder(out) as folder:
        save_student(student, architecture, folder, {"inherited": result.model_dump(mode="json", exclude={"out"})})
    return result


@torch.no_grad()
def inherit_weights(
    student: Student,
    teacher: LiveTeacher,
    text_layers: tuple[int, ...] | None = None,
    image_layers: tuple[int, ...] | None = None,
    trunk: TrunkWeights | None = None,
    counts: Tensor | None = None,
) -> list[InheritedPart]:
    """Overwrite a new student's weights, in place, with the teacher's and a trunk's.

    Args:
        student: student with projections to the teacher's width.
        text_layers: layers of the teacher for the student's text tower, from 0. Default: evenly spaced.
        image_layers: the same for a vision transformer.
        trunk: weights for the student's timm trunk, instead of the teacher's.
        counts: (vocab_size,) frequency of each token in the data (:func:`token_counts`). A factorised embedding then
            keeps frequent tokens best: each is weighted by the root of its frequency, with a small minimum.

    Returns:
        The origin of each part. Their parameters add up to ``student.num_parameters``.

    Raises:
        UsageError: the teacher lacks such layers, or the trunk does not fit the student's.
    """
    directions = Directions.between(teacher.model, student.model, student.teacher_dim, student.embed_dim)
    text = inherit_text(student, teacher, directions, text_layers, counts)
    image = inherit_image(student, teacher, directions, image_layers, trunk)
    if directions.matrix is not None:
        for projection in (student.image_projection, student.text_projection):
            projection.weight.copy_(directions.matrix)  # type: ignore[operator]
    return [*image, *text, inherit_scale(student.model, teacher.model)]


def token_counts(texts: list[str], tokenizer: Any, vocab_size: int) -> Tensor:
    """Count each token in captions, up to and including the end-of-text token: (vocab_size,) int64."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        tokens = torch.as_tensor(tokenizer(texts[start : start + _TEXTS_AT_ONCE]))
        # the end-of-text token has the highest id; padding follows it
        inside = torch.arange(tokens.shape[1]) <= tokens.argmax(1, keepdim=True)
        counts += torch.bincount(tokens[inside], minlength=vocab_size)
    return counts
