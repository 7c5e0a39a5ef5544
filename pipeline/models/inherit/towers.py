"""Parts of a student's towers from the teacher's. ``inherit.run`` combines them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from open_clip.model import resize_pos_embed
from pydantic import BaseModel
from timm.layers.patch_embed import resample_patch_embed
from torch import Tensor, nn

from teacher_cache.pipeline.models.factorized import factors_of, principal_directions, text_tower
from teacher_cache.pipeline.models.inherit.shrink import (
    TowerShape,
    choose_layers,
    most_important_channels,
    shrink_blocks,
    tower_shape,
)
from teacher_cache.pipeline.models.inherit.trunk_weights import TrunkWeights, load_trunk
from teacher_cache.pipeline.models.student import Student
from teacher_cache.pipeline.models.teacher import LiveTeacher
from teacher_cache.storage.errors import UsageError

_TEXT = ("token_embedding", "positional_embedding", "cls_emb", "transformer", "ln_final", "text_projection")
# last layer, a Linear to embed_dim, of image towers other than open_clip's transformer
_HEADS = ("head.proj", "attnpool.c_proj")


class InheritedPart(BaseModel, frozen=True):
    """Origin of one part of the student."""

    part: str
    parameters: int
    source: str
    random: bool = False
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Directions:
    """Map from the teacher's embedding space to the student's.

    Attributes:
        matrix: (teacher_dim, embed_dim), orthonormal columns; None if the widths agree.
        wider: whether the student's space is wider, so that the teacher's projections cannot be used.
    """

    matrix: Tensor | None = None
    wider: bool = False

    @classmethod
    def between(cls, teacher: nn.Module, student: nn.Module, teacher_dim: int, embed_dim: int) -> Directions:
        """Return the principal directions of the teacher's two projections, with equal weights."""
        if embed_dim >= teacher_dim:
            return cls(wider=embed_dim > teacher_dim)
        projections = [_text_projection(text_tower(teacher)), _image_projection(teacher.visual)]
        matrices = [matrix / matrix.norm() for matrix in projections if matrix is not None]
        return cls(principal_directions(torch.cat(matrices), embed_dim)) if matrices else cls(wider=True)

    def project(self, matrix: Tensor) -> Tensor:
        """Project (n, teacher_dim) to (n, embed_dim)."""
        return matrix if self.matrix is None else matrix @ self.matrix


def inherit_text(
    student: Student,
    teacher: LiveTeacher,
    directions: Directions,
    layers: tuple[int, ...] | None,
    counts: Tensor | None,
) -> list[InheritedPart]:
    """Give the student's text tower the teacher's weights."""
    tower, taught = text_tower(student.model), text_tower(teacher.model)
    new_state, state = _text_state(tower), _text_state(taught)
    reason = _text_misfit(new_state, state, student.config, teacher.architecture)
    fit = _fit("text", tower, taught, layers, reason)
    if isinstance(fit, str):
        return [_random("text tower", _parameters(new_state), fit)]
    old, new, chosen = fit
    embedding, positions = state["token_embedding.weight"], state["positional_embedding"]
    projection = _text_projection(taught)
    readers = [] if projection is None else [projection.T]
    channels = most_important_channels(state, chosen, [embedding, positions, *readers], new.width)
    context = new_state["positional_embedding"].shape[0]
    smaller = {
        **{name: state[name][..., channels] for name in state if name.startswith(("ln_final.", "cls_emb"))},
        "positional_embedding": positions[:context, channels],
        **shrink_blocks(state, old, new, chosen, channels),
    }
    outside = ("token_embedding", "text_projection")
    body = {name: value for name, value in new_state.items() if not name.startswith(outside)}
    if reason := _other_tensors(smaller, body):
        return [_random("text tower", _parameters(new_state), reason)]
    tokens = _inherit_tokens(student.model, embedding[:, channels], counts)
    source = _cut(old, new, chosen)
    parts = [
        InheritedPart(part="token embedding", parameters=_parameters(new_state, "token_embedding"), source=tokens),
        InheritedPart(part="text transformer", parameters=_parameters(body), source=source, layers=chosen),
    ]
    if "text_projection" in new_state and projection is not None and not directions.wider:
        smaller["text_projection"] = directions.project(projection[channels])
        parts.append(_projection("text projection", new_state["text_projection"].numel(), directions))
    elif size := _parameters(new_state, "text_projection"):
        parts.append(_random("text projection", size, "the teacher's has another form"))
    tower.load_state_dict(smaller, strict=False)
    return parts


def inherit_image(
    student: Student,
    teacher: LiveTeacher,
    directions: Directions,
    layers: tuple[int, ...] | None,
    trunk: TrunkWeights | None,
) -> list[InheritedPart]:
    """Give the student's image tower the teacher's weights, or its trunk the weights of a file."""
    transformers = _is_transformer(student.model.visual) and _is_transformer(teacher.model.visual)
    if layers is not None and (trunk is not None or not transformers):
        raise UsageError("--image-layers: only a vision transformer takes layers of its teacher's vision transformer")
    if trunk is not None:
        return _load_trunk(student, trunk)
    if transformers:
        return _inherit_transformer(student, teacher.model.visual, directions, layers)
    return _copy_tower(student, teacher, directions)


def _copy_tower(student: Student, teacher: LiveTeacher, directions: Directions) -> list[InheritedPart]:
    """Copy an image tower of the same architecture, with its last layer projected to the student's width."""
    tower: Any = student.model.visual
    taught: Any = teacher.model.visual
    old_name = _image_name(taught, teacher.architecture)
    new_name = _image_name(tower, student.config)
    new, old = dict(tower.state_dict()), dict(taught.state_dict())
    head = next((name for name in _HEADS if f"{name}.weight" in new and f"{name}.weight" in old), None)
    body = {name: value for name, value in new.items() if head is None or not name.startswith(head)}
    reason = None if old_name == new_name else f"the teacher's is {old_name}, not {new_name}"
    reason = reason or _other_tensors({name: old[name] for name in body if name in old}, body)
    if reason is not None:
        hint = "; --trunk-weights can give it others" if hasattr(tower, "trunk") else ""
        return [_random("image tower", _parameters(tower), reason + hint)]
    copied = {name: old[name] for name in body}
    trunk = _parameters(tower, exclude=head or "")
    parts = [InheritedPart(part="image trunk", parameters=trunk, source=f"teacher {new_name}")]
    if head is not None:
        heads = {name: old[name] for name in new if name not in body and name in old}
        if directions.wider or len(heads) < len(new) - len(body):
            parts.append(_random("image projection", _parameters(tower, head), "the teacher's has another form"))
        else:
            copied |= {name: directions.project(value.T).T for name, value in heads.items()}
            parts.append(_projection("image projection", _parameters(tower, head), directions))
    tower.load_state_dict(copied, strict=False)
    return parts


def inherit_scale(student: Any, teacher: Any) -> InheritedPart:
    """Copy logit_scale, and logit_bias if both have one."""
    student.logit_scale.copy_(teacher.logit_scale)
    parameters = student.logit_scale.numel()
    bias, taught = getattr(student, "logit_bias", None), getattr(teacher, "logit_bias", None)
    if bias is not None:
        parameters += bias.numel()
        if taught is not None:
            bias.copy_(taught)
    return InheritedPart(part="logit scale", parameters=parameters, source="teacher")


def _inherit_tokens(model: nn.Module, embedding: Tensor, counts: Tensor | None) -> str:
    """Copy the token embedding, (vocab_size, width), whole or as factors. Return its origin, in words."""
    factors = factors_of(model)
    if factors is None:
        text_tower(model).token_embedding.weight.copy_(embedding)  # type: ignore[union-attr,operator]
        return "teacher"
    # sqrt: plain counts would spend the rank on "a" and the end of text; 0.1: no token is lost
    weights = torch.ones(len(embedding)) if counts is None else counts.sqrt() + 0.1
    directions = principal_directions(embedding, factors.factors.embedding_dim, weights)
    # project each row to the nearest point of that space
    factors.factors.weight.copy_(embedding @ directions)
    factors.projection.weight.copy_(directions)
    squares = weights.double() * embedding.double().square().sum(1)
    retained = weights.double() * (embedding @ directions).double().square().sum(1)
    how = "all tokens alike" if counts is None else "tokens by the root of how often they occur"
    share = float(retained.sum() / squares.sum())
    return f"teacher, rank {directions.shape[1]} of {directions.shape[0]}: {share:.1%} of its squared norm, {how}"


def _load_trunk(student: Student, weights: TrunkWeights) -> list[InheritedPart]:
    visual: Any = student.model.visual
    if not hasattr(visual, "trunk"):
        raise UsageError(f"--trunk-weights: the student's image tower is {type(visual).__name__}, not a timm model")
    loaded = load_trunk(visual.trunk, weights, student.preprocess.mean, student.preprocess.std)
    parts = [InheritedPart(part="image trunk", parameters=loaded, source=f"trunk weights {weights.name}")]
    if rest := _parameters(visual) - loaded:
        parts.append(_random("image projection", rest, "the trunk was trained with another"))
    return parts


def _inherit_transformer(
    student: Student, theirs: Any, directions: Directions, layers: tuple[int, ...] | None
) -> list[InheritedPart]:
    tower: Any = student.model.visual
    new_state, state = dict(tower.state_dict()), dict(theirs.state_dict())
    fit = _fit("image", tower, theirs, layers)
    if isinstance(fit, str):
        return [_random("image tower", _parameters(tower), fit)]
    old, new, chosen = fit
    patches, note = state["conv1.weight"], ""
    if patches.shape[2:] != new_state["conv1.weight"].shape[2:]:
        note = f", patches resampled from {patches.shape[-1]} to {tower.patch_size[0]}"
        patches = resample_patch_embed(patches, list(tower.patch_size))
    positions = {"visual.positional_embedding": state["positional_embedding"]}
    resize_pos_embed(positions, student.model)  # to the student's grid, if it differs
    position = positions["visual.positional_embedding"]
    around = [state["conv1.weight"].flatten(1).T, state["positional_embedding"], state["proj"].T]
    channels = most_important_channels(state, chosen, around, new.width)
    smaller = {
        **{
            name: state[name][channels] for name in state if name.startswith(("ln_pre.", "ln_post.", "class_embedding"))
        },
        "conv1.weight": patches[channels],
        "positional_embedding": position[:, channels],
        **shrink_blocks(state, old, new, chosen, channels),
    }
    body = {name: value for name, value in new_state.items() if name != "proj"}
    if reason := _other_tensors(smaller, body):
        return [_random("image tower", _parameters(tower), reason)]
    source = _cut(old, new, chosen) + note
    parts = [InheritedPart(part="image transformer", parameters=_parameters(body), source=source, layers=chosen)]
    if directions.wider:
        parts.append(_random("image projection", new_state["proj"].numel(), "the teacher's embed_dim is smaller"))
    else:
        smaller["proj"] = directions.project(state["proj"][channels])
        parts.append(_projection("image projection", new_state["proj"].numel(), directions))
    tower.load_state_dict(smaller, strict=False)
    return parts


def _fit(
    name: str, tower: Any, taught: Any, layers: tuple[int, ...] | None, reason: str | None = None
) -> tuple[TowerShape, TowerShape, tuple[int, ...]] | str:
    """Return the shapes of teacher and student and the chosen layers, or the reason why they do not fit."""
    old, new = tower_shape(getattr(taught, "transformer", None)), tower_shape(getattr(tower, "transformer", None))
    if old is None or new is None:
        reason = f"the {'teacher' if old is None else 'student'}'s is no transformer of open_clip's own"
    elif new.head_width != old.head_width:
        reason = f"heads of {new.head_width} channels, the teacher's have {old.head_width}"
    else:
        larger = [size for size in ("layers", "width", "mlp_width") if getattr(new, size) > getattr(old, size)]
        if larger:
            reason = f"{larger[0]} is {getattr(new, larger[0])}, the teacher's only {getattr(old, larger[0])}"
        if reason is None:
            return old, new, choose_layers(old.layers, new.layers, layers, name)
    if layers is not None:
        raise UsageError(f"--{name}-layers: the teacher's {name} tower does not fit: {reason}")
    return str(reason)


def _text_misfit(
    new: dict[str, Tensor], state: dict[str, Tensor], config: dict[str, Any], taught_config: dict[str, Any]
) -> str | None:
    own, taught_tokens = (
        f"{one['text_cfg'].get('vocab_size', 49408)} of {one['text_cfg'].get('hf_tokenizer_name') or 'CLIP'}"
        for one in (config, taught_config)
    )
    if own != taught_tokens:
        return f"its tokens are others: {own}, the teacher's {taught_tokens}"
    context, taught = new["positional_embedding"].shape[0], state["positional_embedding"].shape[0]
    return f"its captions have {context} tokens, the teacher's {taught}" if context > taught else None


def _other_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """Return how these differ from the expected tensors. None: they do not."""
    for name in sorted({*tensors, *expected}):
        shapes = [tuple(one[name].shape) if name in one else "not there" for one in (expected, tensors)]
        if shapes[0] != shapes[1]:
            return f"it is built in another way: {name} is {shapes[0]}, the teacher's {shapes[1]}"
    return None


def _text_state(tower: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in tower.state_dict().items() if name.split(".")[0] in _TEXT}


def _text_projection(tower: Any) -> Tensor | None:
    """Return (width, embed_dim), if the tower's projection is a plain matrix."""
    projection = getattr(tower, "text_projection", None)
    return projection.detach() if isinstance(projection, nn.Parameter) else None


def _image_projection(visual: Any) -> Tensor | None:
    """Return (channels, embed_dim) of any image tower that ends in a plain matrix."""
    state = visual.state_dict()
    heads = [state[f"{name}.weight"].T for name in _HEADS if f"{name}.weight" in state]
    return state["proj"] if "proj" in state else heads[0] if heads else None


def _is_transformer(visual: Any) -> bool:
    return all(hasattr(visual, name) for name in ("conv1", "class_embedding", "transformer", "proj"))


def _image_name(visual: Any, config: dict[str, Any]) -> str:
    return str(config["vision_cfg"].get("timm_model_name") or type(visual).__name__)


def _parameters(part: nn.Module | dict[str, Tensor], prefix: str = "", exclude: str = "") -> int:
    """Count the parameters, without buffers."""
    named = dict(part.named_parameters()) if isinstance(part, nn.Module) else part
    return sum(
        value.numel()
        for name, value in named.items()
        if name.startswith(prefix) and not (exclude and name.startswith(exclude))
    )


def _cut(old: TowerShape, new: TowerShape, layers: tuple[int, ...]) -> str:
    cut = f"teacher layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))} of {old.layers}"
    if (old.width, old.mlp_width) == (new.width, new.mlp_width):
        return cut
    return f"{cut}; {new.width} of {old.width} channels, {new.heads} of {old.heads} heads"


def _projection(part: str, parameters: int, directions: Directions) -> InheritedPart:
    matrix = directions.matrix
    source = (
        "teacher" if matrix is None else f"teacher, its {matrix.shape[1]} principal directions of {matrix.shape[0]}"
    )
    return InheritedPart(part=part, parameters=parameters, source=source)


def _random(part: str, parameters: int, reason: str) -> InheritedPart:
    return InheritedPart(part=part, parameters=parameters, source=f"random: {reason}", random=True)
