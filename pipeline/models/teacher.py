"""Frozen teachers: any model of open_clip, or a CLIP or SigLIP of transformers; its identity, and encoding with it."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import platform
import warnings
from functools import cached_property, lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.pretrained import get_pretrained_cfg
from PIL import __version__ as pillow_version
from safetensors import SafetensorError
from safetensors.torch import load_file

from teacher_cache.pipeline.data.images.decoders import JPEG_SCALED, PILLOW, require_decoder
from teacher_cache.pipeline.data.images.preprocess import Preprocess, handed_on
from teacher_cache.pipeline.data.service.pinned import CopyStream
from teacher_cache.pipeline.data.tokens import tokenizer_identity
from teacher_cache.pipeline.models.device import for_copy, full_float32, mark, multiplies_bfloat16, resolve_device
from teacher_cache.pipeline.models.hub import hub_config, hub_within_reach
from teacher_cache.pipeline.models.safe_loading import (
    foreign_model,
    load_tokenizer,
    quiet_root,
    require_plain_files,
    require_plain_settings,
)
from teacher_cache.pipeline.models.text_length import can_shorten, encode_text, shorten
from teacher_cache.pipeline.models.transformers_teacher import load_transformers
from teacher_cache.pipeline.models.weights import digest_tensors
from teacher_cache.pipeline.settings.base import Precision
from teacher_cache.pipeline.settings.names import BUNDLED, HUB, TRANSFORMERS, check_teacher, teacher_folder
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.format.identity import CacheIdentity, TeacherIdentity, TokenizerIdentity
from teacher_cache.storage.observe.logs import hint
from teacher_cache.storage.observe.safe_text import printable

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Encoded:
    """Embeddings of one batch for a cache. Reading them waits for the GPU.

    Args:
        embedding: (batch, embed_dim) float16, unit norm; on the device.
        norm: (batch,) float32, the norm before normalising: raw = embedding * norm.
        started: event recorded before the work of a GPU.
    """

    def __init__(self, embedding: torch.Tensor, norm: torch.Tensor, started: torch.cuda.Event | None = None) -> None:
        # queue the copy right after the work: a later copy would wait for later batches
        self._embedding = embedding.to("cpu", non_blocking=True)
        self._norm = norm.to("cpu", non_blocking=True)
        self._started, self._there = started, mark(embedding.device)

    @property
    def embedding(self) -> NDArray[np.float16]:
        """Embeddings, (batch, embed_dim), unit norm."""
        self._wait()
        return self._embedding.numpy()

    @property
    def norm(self) -> NDArray[np.float32]:
        """Norms before normalising, (batch,)."""
        self._wait()
        return self._norm.numpy()

    def device_seconds(self) -> float | None:
        """Return the seconds of the GPU, waits for launches included. None: on a CPU."""
        if self._there is None or self._started is None:
            return None
        self._wait()
        return float(self._started.elapsed_time(self._there)) / 1000

    def _wait(self) -> None:
        if self._there is not None:
            self._there.synchronize()


class LiveTeacher:
    """Model with open_clip's methods in evaluation mode, with its own preprocessing and tokenizer."""

    def __init__(
        self,
        name: str,
        pretrained: str | None,
        model: torch.nn.Module,
        tokenizer: Any,
        architecture: dict[str, Any],
        device: torch.device,
        precision: Precision,
        preprocess: Preprocess,
    ) -> None:
        self.name = name
        self.pretrained = pretrained
        self.device = device
        self.precision = precision
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.architecture = architecture
        self.weights_sha256 = digest_tensors(model.state_dict())
        # the multiplier of cosines; on the CPU, since a GPU's exp may differ in the last bit
        self.logit_scale = math.exp(float(model.logit_scale.detach().cpu()))  # type: ignore[operator]
        self._shortens = can_shorten(model)
        self._copies = CopyStream(device)
        dtype = torch.bfloat16 if precision == "pure_bf16" else None
        self.model = model.to(device, dtype).eval().requires_grad_(False)

    def encode_images(self, pixels: torch.Tensor) -> Encoded:
        """Embed (batch, 3, height, width) float32 pixels, preprocessed."""
        return self._finish(self.model.encode_image, pixels)

    def encode_shown(self, shown: torch.Tensor) -> Encoded:
        """Embed (batch, height, width, 3) uint8 pixels, normalised on the device."""
        moved, _ = self._copies.copied(shown)
        return self.encode_images(self.preprocess.normalized_batch(moved))

    def encode_texts(self, tokens: torch.Tensor | NDArray[np.int64]) -> Encoded:
        """Embed (batch, context_length) int64 token ids."""
        return self._finish(*self._text(tokens))

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed pixels as (batch, embed_dim) float32 of unit norm on the CPU, not rounded to float16."""
        return self._features(self.model.encode_image, pixels)[0].cpu()

    def text_features(self, tokens: torch.Tensor | NDArray[np.int64]) -> torch.Tensor:
        """Embed tokens as (batch, embed_dim) float32 of unit norm on the CPU."""
        return self._features(*self._text(tokens))[0].cpu()

    def _text(self, tokens: Any) -> tuple[Any, torch.Tensor]:
        tokens = torch.as_tensor(tokens)
        tokens = shorten(tokens) if self._shortens else tokens
        return partial(encode_text, self.model), for_copy(tokens, self.device)

    def _finish(self, encode: Any, batch: torch.Tensor) -> Encoded:
        started = mark(self.device)
        features, norm = self._features(encode, batch)
        return Encoded(features.half(), norm.squeeze(-1), started)

    def _features(self, encode: Any, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return normalised features and their norms before, (batch, 1); float32."""
        cast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.precision in _AUTOCAST:
            cast = torch.autocast(self.device.type, _AUTOCAST[self.precision])
        batch = batch.to(self.device, non_blocking=True)
        if self.precision == "pure_bf16" and batch.is_floating_point():
            batch = batch.bfloat16()
        with torch.inference_mode(), cast, full_float32():
            features = encode(batch)
        features = features.float()
        norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
        return features / norm, norm

    @cached_property
    def embed_dim(self) -> int:
        """Width of the embeddings."""
        probe = torch.zeros(1, 3, *self.preprocess.size)
        return int(self._features(self.model.encode_image, probe)[0].shape[-1])

    def identity(self) -> TeacherIdentity:
        """Return the teacher's part of a cache's identity."""
        bias = getattr(self.model, "logit_bias", None)
        return TeacherIdentity(
            name=self.name,
            pretrained=self.pretrained,
            weights_sha256=self.weights_sha256,
            architecture=self.architecture,
            activation=_activations(self.model),
            embed_dim=self.embed_dim,
            precision=self.precision,
            logit_scale=self.logit_scale,
            logit_bias=None if bias is None else float(bias.item()),
        )

    def library_versions(self) -> dict[str, str]:
        """Return the versions of the libraries that affect pixels and rows, for a manifest."""
        names: tuple[str, ...] = ("torch", "torchvision", "open_clip_torch", "numpy", "pyarrow", "zarr")
        if self.preprocess.decoder == JPEG_SCALED:
            names = (*names, "simplejpeg")
        if self.name.startswith(TRANSFORMERS):
            names = (*names, "transformers", "tokenizers")
        libraries = {name: version(name) for name in (*names, "teacher-cache")}
        return {"python": platform.python_version(), "pillow": pillow_version, **libraries}

    def require(self, identity: CacheIdentity, cache: str) -> None:
        """Check that a cache's identity has this teacher.

        Raises:
            CacheMismatchError: it has another one. The message names each different field with both values.
        """
        identity.require(identity.model_copy(update=self._parts_of_identity), cache)

    @cached_property
    def _parts_of_identity(self) -> dict[str, Any]:
        """Return the parts of the identity, computed once: the probes take a tenth of a second."""
        return {
            "teacher": self.identity(),
            "preprocess": self.preprocess.identity(),
            "tokenizer": self.tokenizer_identity(),
        }

    def tokenizer_identity(self) -> TokenizerIdentity:
        """Return the tokenizer's part of a cache's identity."""
        return tokenizer_identity(self.tokenizer, int(self.tokenizer.context_length))


def load_teacher(
    name: str,
    pretrained: str | None = None,
    device: str = "auto",
    precision: Precision = "fp32",
    decoder: str | None = None,
) -> LiveTeacher:
    """Build a model with its trained weights.

    Args:
        name: a built-in name of open_clip with ``pretrained``, ``hf-hub:ORG/REPO``, ``local-dir:PATH``,
            ``bundled:scenes``, or ``transformers:`` and a folder or ORG/REPO.
        pretrained: open_clip's tag or a weights file; for a built-in name only.
        decoder: image decoder, by its name in a cache's identity. Default: Pillow.

    Raises:
        UsageError: unknown name or tag, no weights (a random teacher is never used), weights that hold more than
            tensors, a config that would run a model's own code, no such device or decoder, or a missing package.
    """
    where = resolve_device(device)
    _warn_of_slow(precision, where)
    require_decoder(decoder or PILLOW)  # before the weights are read
    what = f"teacher {printable(name)!r}"
    check_teacher(name, pretrained, open_clip.list_models, open_clip.list_pretrained_tags_by_model)
    local = teacher_folder(name) is not None or Path(pretrained or "").is_file()
    hub = contextlib.nullcontext() if local else hub_within_reach(what)
    if name.startswith(TRANSFORMERS):
        with hub, foreign_model(what):
            model, tokenizer, preprocess, architecture = load_transformers(name.removeprefix(TRANSFORMERS), what)
    else:
        with hub, foreign_model(what), quiet_root(logging.CRITICAL), warnings.catch_warnings():
            model, tokenizer, architecture = _load_open_clip(name, pretrained, what)
        preprocess = Preprocess.of_model(model)
    preprocess = preprocess.decoded_by(decoder)
    return LiveTeacher(recorded_name(name), pretrained, model, tokenizer, architecture, where, precision, preprocess)


def _warn_of_slow(precision: Precision, device: torch.device) -> None:
    if precision == "fp32" and device.type == "cuda":
        hint(
            "warning: on a GPU precision fp32 is slower than pure_bf16, whose rows differ by rounding. The precision "
            "is part of a cache's identity: choose it before the cache is planned"
        )
    if precision == "fp16" and device.type == "cpu":
        hint("warning: precision fp16 is many times slower than fp32 on a CPU, and meant for a GPU")
    if precision in ("bf16", "pure_bf16") and device.type == "cpu" and not multiplies_bfloat16():
        hint(
            f"warning: precision {precision} is emulated and slower than fp32 on this CPU, which has neither "
            "AVX512-BF16 nor AMX"
        )


def _load_open_clip(name: str, pretrained: str | None, what: str) -> tuple[torch.nn.Module, Any, dict[str, Any]]:
    """Return model, tokenizer and config."""
    path, schema = BUNDLED.get(name), name.partition(":")[0] if ":" in name else ""
    source = f"local-dir:{path}" if path else name
    quick_gelu = not schema and get_pretrained_cfg(name.replace("/", "-"), pretrained).get("quick_gelu", False)
    if source.startswith(HUB):
        architecture = hub_config(source, what)
    else:
        architecture = open_clip.get_model_config(source if schema else source.replace("/", "-"))
    require_plain_settings(architecture, what)
    if source.startswith("local-dir:"):
        require_plain_files(Path(source.removeprefix("local-dir:")), what)
    warnings.filterwarnings("ignore", message="Detected pickle protocol")  # torch refuses the file afterwards
    # open_clip only warns when the weights were trained with another activation
    warnings.filterwarnings("error", message="QuickGELU mismatch")
    model = open_clip.create_model(
        source,
        pretrained=pretrained,
        force_quick_gelu=bool(quick_gelu),
        require_pretrained=True,
        weights_only=True,
        # without this, open_clip would fill missing weights from the towers' own
        pretrained_image=False,
        pretrained_text=False,
    )
    tokenizer = load_tokenizer(source, architecture or {})
    if not architecture:
        raise UsageError(f"{what}: open_clip built it, but gives no model config to record")
    return model, tokenizer, {**architecture, "quick_gelu": True} if quick_gelu else architecture


def recorded_name(name: str) -> str:
    """Return the name that a cache records: for a folder without its path."""
    folder, (schema, _, _) = teacher_folder(name), name.partition(":")
    return name if folder is None or name in BUNDLED else f"{schema}:{folder.name}"


@lru_cache(maxsize=1)
def cached_teacher(
    name: str, pretrained: str | None, device: str, precision: Precision, decoder: str | None = None
) -> LiveTeacher:
    """Return :func:`load_teacher`, cached per process, for callers that encode in parts."""
    return load_teacher(name, pretrained, device, precision, decoder)


def is_surely(name: str, pretrained: str | None, identity: CacheIdentity) -> bool:
    """Return whether a teacher is known to be the cache's without building it.

    A folder of an open_clip model is compared by weights and config; a built-in name with its tag, or a model of a hub,
    by name. False means unknown: then :meth:`LiveTeacher.require` decides. Precision is ignored: loading chooses it.
    """
    teacher, preprocess = identity.teacher, identity.preprocess
    path = teacher_folder(name)
    if (pretrained and Path(pretrained).exists()) or (path is not None and name.startswith(TRANSFORMERS)):
        return False
    if path is None:
        return (teacher.name, teacher.pretrained) == (name, pretrained)
    try:
        config = json.loads((path / "open_clip_config.json").read_bytes())
        stored = load_file(path / "open_clip_model.safetensors")
        # models are built in float32, whatever the file's dtype
        weights = {key: value.float() if value.is_floating_point() else value for key, value in stored.items()}
        seen = {"size": preprocess.image_size, "mode": "RGB", "fill_color": 0, **config["preprocess_cfg"]}
        return (
            pretrained is None
            and config["model_cfg"] == teacher.architecture
            and Preprocess.from_config(seen) == Preprocess.from_config({**handed_on(preprocess), "size": seen["size"]})
            and digest_tensors(weights) == teacher.weights_sha256
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False


def _activations(model: torch.nn.Module) -> str:
    """Return the names of the model's activation modules, for example ``GELU`` or ``QuickGELU``."""
    kinds = {type(module).__name__ for module in model.modules()}
    ends = ("GELU", "ReLU", "ReLU6", "SiLU", "Swish", "GELUActivation", "GELUTanh")
    names = sorted(name for name in kinds if name.endswith(ends))
    return "+".join(names) or "none"
