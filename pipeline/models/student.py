"""Students: any open_clip model config, with a projection to the teacher's width when the widths differ."""

from __future__ import annotations

import json
import logging
import math
import tempfile
import warnings
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import load_file
from torch import Tensor, nn

from teacher_cache.pipeline.data.images.preprocess import Preprocess
from teacher_cache.pipeline.models.factorized import RANK_KEY, dense_state, factorize, factors_of
from teacher_cache.pipeline.models.hub import hub_config, hub_within_reach
from teacher_cache.pipeline.models.locked_layers import lock_image_layers
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import CHECKPOINT_WEIGHTS, RunRecord, require_checkpoint
from teacher_cache.pipeline.models.safe_loading import (
    foreign_model,
    load_tokenizer,
    quiet_root,
    require_plain_settings,
)
from teacher_cache.pipeline.models.text_length import can_shorten, encode_by_length, encode_text, shorten
from teacher_cache.pipeline.models.weights import write_weights
from teacher_cache.pipeline.settings.names import CHECKPOINT_CONFIG, HUB, presets, unknown_student
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.new_files import new_folder

# 4.6052 = ln(100), CLIP's ceiling on logit_scale
MAX_LOG_LOGIT_SCALE = math.log(100)

_PROJECTION, _ORIGIN = "projection.safetensors", "origin.json"
_FACTORS = "token_embedding.safetensors"
# settings of the model config that only record the origin of weights, or their first values
_NO_ARCHITECTURE = {"vision_cfg.timm_model_pretrained", "text_cfg.hf_model_pretrained"}
_NO_ARCHITECTURE |= {"init_logit_scale", "init_logit_bias"}


class StudentOutput(NamedTuple):
    """Features of one batch, all L2-normalised float32 (see ``teacher_cache.pipeline.train.losses.LossInputs``)."""

    image: Tensor
    text: Tensor
    projected_image: Tensor
    projected_text: Tensor
    logit_scale: Tensor
    logit_bias: Tensor


class Student(nn.Module):
    """open_clip model that learns from a teacher of any width.

    Its own features are evaluated and shipped. Projections map them to the teacher's space, for losses that compare
    features directly. They are trained with the model and saved beside it.

    Each further teacher of ``other_dims`` has projections of its own, which the state of a run keeps and a checkpoint
    does not: only the first teacher's are saved beside the model.

    Attributes:
        config: open_clip model config, with ``token_embedding_rank`` if the token embedding is factorised.
        teacher_dims: width of each teacher.
        shortens: True if token ids may be shorter than the context length.
    """

    def __init__(
        self, model: nn.Module, config: dict[str, Any], teacher_dim: int, other_dims: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.preprocess = Preprocess.of_model(model)
        self.embed_dim = embed_dim = int(config["embed_dim"])
        self.teacher_dim, self.teacher_dims = teacher_dim, (teacher_dim, *other_dims)
        self.shortens = can_shorten(model)
        self._locked: list[nn.Module] = []
        same = embed_dim == teacher_dim
        self.image_projection: nn.Module = nn.Identity() if same else nn.Linear(embed_dim, teacher_dim, bias=False)
        self.text_projection: nn.Module = nn.Identity() if same else nn.Linear(embed_dim, teacher_dim, bias=False)
        # never the identity: the student's own space cannot be that of two teachers
        towers = {tower: [nn.Linear(embed_dim, dim, bias=False) for dim in other_dims] for tower in ("image", "text")}
        self.other_projections = nn.ModuleDict({tower: nn.ModuleList(linears) for tower, linears in towers.items()})

    def projections(self) -> dict[str, Tensor]:
        """Return the first teacher's projections by their names in a checkpoint; empty if the widths are equal."""
        named = (("image.weight", self.image_projection), ("text.weight", self.text_projection))
        return {name: module.weight for name, module in named if isinstance(module, nn.Linear)}

    def load_projections(self, weights: dict[str, Tensor]) -> None:
        """Copy the :meth:`projections` of a student of the same widths."""
        if self.projections():
            self.image_projection.load_state_dict({"weight": weights["image.weight"]})
            self.text_projection.load_state_dict({"weight": weights["text.weight"]})

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embed (batch, 3, height, width) float32 pixels: (batch, embed_dim), normalised."""
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)  # type: ignore[operator]

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embed (batch, length) int64 tokens, at full length or shortened: (batch, embed_dim), normalised."""
        encode = encode_by_length if self.shortens else encode_text
        return F.normalize(encode(self.model, tokens).float(), dim=-1)

    def shorten(self, tokens: Tensor | NDArray[np.int64]) -> Tensor:
        """Cut the padding after the longest caption, if the architecture allows it."""
        tokens = torch.as_tensor(tokens)
        return shorten(tokens) if self.shortens and len(tokens) else tokens

    def forward(self, pixels: Tensor, tokens: Tensor) -> StudentOutput:
        """Run both towers and all projections on a batch. An image may have several captions.

        Projected features of several teachers lie side by side, each normalised. Without tokens the text tower does
        not run, and no output depends on it.
        """
        image = self.encode_image(pixels)
        text, projected_text = image.new_zeros(0, self.embed_dim), image.new_zeros(0, sum(self.teacher_dims))
        if len(tokens):
            text = self.encode_text(tokens)
            projected_text = self._projected("text", self.text_projection, text)
        return StudentOutput(
            image,
            text,
            self._projected("image", self.image_projection, image),
            projected_text,
            self.model.logit_scale.exp(),  # type: ignore[operator]
            image.new_zeros(()) if self.logit_bias is None else self.logit_bias,
        )

    def _projected(self, tower: str, first: nn.Module, rows: Tensor) -> Tensor:
        """Return features in the space of each teacher, side by side, (batch, sum of the widths)."""
        others = self.other_projections[tower].children()
        return torch.cat([F.normalize(project(rows).float(), dim=-1) for project in (first, *others)], dim=-1)

    @property
    def logit_bias(self) -> Tensor | None:
        """Parameter that the sigmoid losses add to the logits; None without ``init_logit_bias`` in the config."""
        bias: Tensor | None = getattr(self.model, "logit_bias", None)
        return bias

    def lock_image(self, unlocked_groups: int) -> None:
        """Lock the first layers of the image tower, in training mode too (:func:`.locked_layers.lock_image_layers`)."""
        self._locked = lock_image_layers(self.model, unlocked_groups)
        self.train(self.training)

    def preprocess_to_learn(self, size: int | None) -> Preprocess:
        """Return the preprocessing of training images.

        Args:
            size: side in pixels, at most the student's own. None: its own.

        Raises:
            UsageError: the student cannot take this size, or its own images are smaller or not square.
        """
        if size is None:
            return self.preprocess
        height, width = self.preprocess.size
        if height != width or size > height:
            raise UsageError(
                f"train_image_size {size}: this student's own images are {height} x {width}, and square ones, at least "
                "as large, are wanted. Lower the setting, or leave it out."
            )
        way_out = "Choose another, or leave the setting out"
        if hasattr(self.model.visual, "grid_size"):  # open_clip's transformers
            way_out = (
                "Leave the setting out, or train a student with that image_size in its config and give the run its "
                "full size by teacher-cache student resize"
            )
        self.require_takes(size, "train_image_size", way_out)
        return replace(self.preprocess, size=(size, size))

    def require_takes(self, size: int, setting: str, way_out: str) -> None:
        """Check that the image tower takes square images of another size than its own.

        Most convolutional trunks do. A transformer does not: it has a position for each patch of its own size. Neither
        does the attention at the end of open_clip's own ResNets.

        Raises:
            UsageError: it does not. The message names ``setting`` and ``way_out``.
        """
        training, (height, width) = self.training, self.preprocess.size
        self.eval()
        try:
            with torch.inference_mode():
                self.encode_image(torch.zeros(1, 3, size, size))
        # errors of towers: timm's assertion, tensors of different lengths, a map smaller than a kernel
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"{setting} {size}: this student takes images of {height} x {width} pixels. {way_out}: a tower with a "
                "position for each patch, as transformers and open_clip's ResNets are, takes its own size alone "
                f"({type(self.model.visual).__name__} at {size} x {size}: {type(error).__name__}: {error})"
            ) from error
        finally:
            self.train(training)

    def train(self, mode: bool = True) -> Student:
        """Set the mode of all layers but the locked ones, which stay in evaluation mode."""
        super().train(mode)
        for module in self._locked:
            module.eval()
        return self

    def clamp_logit_scale(self) -> None:
        """Keep logit_scale at 100 or below; call after every optimizer step."""
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=MAX_LOG_LOGIT_SCALE)  # type: ignore[operator]

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the open_clip model, without the projections."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def student_config(name: str) -> dict[str, Any]:
    """Return the open_clip model config of a student, ``token_embedding_rank`` included.

    Args:
        name: shipped preset, path of a JSON file in the form of open_clip's model configs (or of a checkpoint's
            ``open_clip_config.json``), name of a built-in open_clip model, or ``hf-hub:ORG/NAME``. Only the
            architecture is read.

    Raises:
        UsageError: none of these, or the file is not a model config.
    """
    if name.startswith(HUB):
        return _checked_config(hub_config(name, f"student {name!r}"), name)
    path = presets().get(name) or (Path(name) if name.endswith(".json") else None)
    if path is None:
        config = open_clip.get_model_config(name)
        if config is None:
            raise unknown_student(name)
        return dict(config)
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise unknown_student(name) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"student {name!r}: not JSON: {error}") from error
    if isinstance(config, dict) and isinstance(config.get("model_cfg"), dict):
        config = _checkpoint_config(config)
    return _checked_config(config, name)


def _checked_config(config: Any, name: str) -> dict[str, Any]:
    missing = [
        key for key in ("embed_dim", "vision_cfg", "text_cfg") if not isinstance(config, dict) or key not in config
    ]
    if missing:
        raise UsageError(f"student {name!r}: not an open_clip model config, it lacks {', '.join(missing)}")
    require_plain_settings(config, f"student {name!r}")
    return dict(config)


def build_student(
    config: dict[str, Any], teacher_preprocess: dict[str, Any], teacher_dim: int, other_dims: Sequence[int] = ()
) -> Student:
    """Build a student with random weights, seeded by torch's global generator.

    Args:
        config: open_clip model config; a top-level ``token_embedding_rank`` factorises the token embedding.
        teacher_preprocess: open_clip ``preprocess_cfg`` of the teacher. The student takes all but the image size, so
            that it sees the same region and colours as its teacher.
        teacher_dim: width of the cached embeddings.
        other_dims: width of those of each further teacher.

    Raises:
        UsageError: open_clip cannot build it, or the rank cannot be used.
    """
    preprocess = {key: value for key, value in teacher_preprocess.items() if key != "size"}
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps({"model_cfg": _plain(config), "preprocess_cfg": preprocess})
        (Path(folder) / CHECKPOINT_CONFIG).write_text(text)
        model = _create(f"local-dir:{folder}", load_weights=False, what="this student")
    if RANK_KEY in config:
        factorize(model, config[RANK_KEY], "student")
    return Student(model, config, teacher_dim, other_dims)


def save_student(student: Student, config: dict[str, Any], folder: Path, origin: dict[str, Any]) -> None:
    """Write a checkpoint: an open_clip model folder (``local-dir:``) with projections and ``origin``.

    A factorised token embedding is written twice: as dense product among the weights, for open_clip, and as factors in
    ``token_embedding.safetensors``, for further training.

    ``folder`` must exist; the caller makes the write atomic.
    """
    settings: dict[str, Any] = {"model_cfg": _plain(config), "preprocess_cfg": student.preprocess.to_config()}
    if (factors := factors_of(student.model)) is not None:
        # beside model_cfg, not in it: open_clip refuses unknown keys there, and ignores them here
        settings[RANK_KEY] = config[RANK_KEY]
        write_weights(_contiguous(factors.state_dict()), folder / _FACTORS)
    (folder / CHECKPOINT_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    (folder / _ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")
    write_weights(_contiguous(dense_state(student.model)), folder / CHECKPOINT_WEIGHTS)
    if projections := student.projections():
        write_weights(_contiguous(projections), folder / _PROJECTION)


def save_run(student: Student, record: RunRecord, out: Path, origin: dict[str, Any]) -> None:
    """Write a run that was not trained, such as a mean: its record and the one checkpoint that it names, atomically."""
    assert record.checkpoint is not None
    with new_folder(out) as folder:
        (folder / record.checkpoint).mkdir(parents=True)
        save_student(student, record.student_config, folder / record.checkpoint, {**record.origin(), **origin})
        RunFolder(folder).write(record)


def checkpoint_origin(folder: Path) -> dict[str, Any]:
    """Return the ``origin`` of a checkpoint; empty if its file is missing."""
    path = folder / _ORIGIN
    return dict(json.loads(path.read_text())) if path.exists() else {}


def load_student(folder: Path) -> tuple[Student, dict[str, Any]]:
    """Load a student from its checkpoint, in evaluation mode, with its model config as in :func:`student_config`.

    Raises:
        UsageError: there is no checkpoint, it cannot be used, or the factors of its token embedding are missing or
            disagree with the embedding among the weights.
        OSError: it cannot be read.
    """
    require_checkpoint(folder)
    for name in (CHECKPOINT_CONFIG, CHECKPOINT_WEIGHTS):
        with (folder / name).open("rb"):  # raise PermissionError: open_clip would say that the file is missing
            pass
    with foreign_model(f"student {folder}"):
        config = _checkpoint_config(json.loads((folder / CHECKPOINT_CONFIG).read_text()))
        require_plain_settings(config, f"student {folder}")
        model = _create(f"local-dir:{folder}", load_weights=True, what=f"student {folder}")
        if RANK_KEY in config:
            _load_factors(model, config[RANK_KEY], folder)
        projections = load_file(folder / _PROJECTION) if (folder / _PROJECTION).is_file() else {}
        teacher_dim = int(projections["image.weight"].shape[0]) if projections else int(config["embed_dim"])
        student = Student(model, config, teacher_dim)
        student.load_projections(projections)
    return student.eval(), config


def _hub_student(name: str) -> Student:
    """Load a student from ``hf-hub:ORG/NAME`` by open_clip, without projections, which no repository has."""
    config, what = student_config(name), f"student {name!r}"
    with hub_within_reach(what):
        return Student(_create(name, load_weights=True, what=what), config, int(config["embed_dim"])).eval()


def load_initial(student: Student, init: str) -> None:
    """Start a student from the weights of a checkpoint, of a folder that ``inherit`` wrote, or of ``hf-hub:ORG/NAME``.

    All weights of the model are replaced, except for a logit bias that the checkpoint does not have. The projections
    are replaced only if the teacher's width is the same: others belong to another teacher.

    Raises:
        UsageError: there is no checkpoint, it cannot be used, or its architecture or its pixels' mean or std differ.
            The message names each field with both values.
    """
    if init.startswith(HUB):
        initial, same = _hub_student(init), init
    else:
        initial, same = load_student(Path(init))[0], str(Path(init) / CHECKPOINT_CONFIG)
    if different := architecture_differences(initial, student, {"logit_bias"}):
        raise UsageError(
            f"{init}: a checkpoint of another student: {'; '.join(different)}. Train the same student, for example "
            f"--student {same}, or choose another --init."
        )
    weights = initial.model.state_dict()
    if student.logit_bias is None:
        weights.pop("logit_bias", None)
    else:
        weights.setdefault("logit_bias", student.logit_bias.detach())
    student.model.load_state_dict(weights)
    if student.teacher_dim == initial.teacher_dim:
        student.load_projections(initial.projections())


def architecture_differences(other: Student, student: Student, ignore: Collection[str] = ()) -> list[str]:
    """Return each setting that prevents two students from sharing weights, with both values."""
    theirs, own = _architecture(other.config, other), _architecture(student.config, student)
    return [
        f"{name} is {theirs.get(name, 'not set')} there and {own.get(name, 'not set')} in the student"
        for name in sorted({*theirs, *own} - {*ignore})
        if theirs.get(name) != own.get(name)
    ]


def student_tokenizer(config: dict[str, Any]) -> Any:
    """Load the tokenizer that a model config names, at its context length.

    Raises:
        UsageError: a tokenizer of transformers cannot be loaded from its folder or hub.
    """
    text = config["text_cfg"]
    if name := text.get("hf_tokenizer_name"):
        # open_clip would look for its files in the folder of the model, and a student's has none
        settings = {"context_length": 77, "tokenizer_mode": None, **text.get("tokenizer_kwargs", {})}
        settings |= {key: text[key] for key in ("context_length", "tokenizer_mode") if key in text}
        hub = nullcontext() if Path(name).is_dir() else hub_within_reach(f"tokenizer {name!r}")
        with hub, foreign_model(f"tokenizer {name!r}"):
            return HFTokenizer(name, **{**settings, "trust_remote_code": False})
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CHECKPOINT_CONFIG).write_text(json.dumps({"model_cfg": _plain(config)}))
        return load_tokenizer(f"local-dir:{folder}", config)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Return a model config without our own key."""
    return {name: value for name, value in config.items() if name != RANK_KEY}


def _checkpoint_config(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the model config in a checkpoint's open_clip_config.json, our own key included."""
    config = dict(settings["model_cfg"])
    return {**config, RANK_KEY: settings[RANK_KEY]} if RANK_KEY in settings else config


def _architecture(config: dict[str, Any], student: Student) -> dict[str, Any]:
    """Return the settings that two students must share to share weights, flat: ``vision_cfg.layers`` and so on."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        inner = {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        flat.update(inner)
    # weights fit only pixels with the same normalisation
    others: dict[str, Any] = {"preprocess.mean": student.preprocess.mean, "preprocess.std": student.preprocess.std}
    if student.logit_bias is not None:
        others["logit_bias"] = "trained"
    return {name: value for name, value in {**flat, **others}.items() if name not in _NO_ARCHITECTURE}


def _load_factors(model: nn.Module, rank: Any, folder: Path) -> None:
    what = f"student {folder}"
    if not (folder / _FACTORS).is_file():
        raise UsageError(
            f"{what}: {_FACTORS} is missing, the factors of its token embedding. Copy it too, or remove {RANK_KEY} "
            f"from {CHECKPOINT_CONFIG} to use the dense model."
        )
    dense = model.state_dict()
    factorize(model, rank, what)
    factors = factors_of(model)
    assert factors is not None
    factors.load_state_dict(load_file(folder / _FACTORS))
    name = next(name for name in dense if name.endswith("token_embedding.weight"))
    product = factors.dense()
    # tolerance for rounding on another machine; a changed embedding differs by far more
    if not torch.allclose(product, dense[name].to(product), rtol=1e-3, atol=1e-3 * float(product.abs().max())):
        raise UsageError(
            f"{what}: the factors in {_FACTORS} do not make up {name} in {CHECKPOINT_WEIGHTS}: one of the two was "
            f"changed alone. Restore it, or remove {RANK_KEY} from {CHECKPOINT_CONFIG} to use the dense model."
        )


def _create(source: str, load_weights: bool, what: str) -> nn.Module:
    # open_clip warns through the root logger about random weights, which a new student should have
    with foreign_model(what), quiet_root(logging.ERROR), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model: nn.Module = open_clip.create_model(
            source,
            load_weights=load_weights,
            require_pretrained=load_weights,
            weights_only=True,
            # from scratch: do not download the trunk's ImageNet weights
            pretrained_image=False,
            pretrained_text=False,
        )
    return model


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
