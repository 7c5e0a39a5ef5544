"""The record of a deployed student on disk: its files, their origin and digests. No torch.

    deploy.json                 this module's record
    image.onnx  text.onnx       ``pixels`` float32 (batch, 3, height, width) to ``image_features`` float32 (batch, dim),
                                and ``tokens`` int64 (batch, length) to ``text_features``; both of unit norm, any batch
    image.int8.onnx  text.int8.onnx     the same with int8 weights, where the tower can be quantised
    openvino/                   the same for OpenVINO, if asked for
    tokenizer.json              in the format of Hugging Face's tokenizers
    open_clip_model.safetensors  open_clip_config.json    for ``open_clip.create_model("local-dir:...")``
    README.md  table.*          the model card and its table

The record lists every file that is checked.
"""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from teacher_cache.storage.errors import CacheError, MissingPackageError, UsageError
from teacher_cache.storage.files.places import DEPLOYED, misplaced

RECORD = "deploy.json"

Variant = Literal["fp32", "int8", "openvino"]


class DeploymentError(CacheError):
    """A file that differs from the deployed one, or fails its gate."""


class Artefact(BaseModel, frozen=True):
    """One file of a deployment."""

    file: str = Field(pattern=r"^(openvino/)?[\w-][\w.-]*$", description="Name in the folder.")
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Artefact:
        """Return the artefact of a file."""
        data = path.read_bytes()
        return cls(file=path.name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


class Tokenization(BaseModel, frozen=True):
    """The conversion of text to ``tokens``."""

    artefact: Artefact = Field(description="tokenizer.json.")
    clean: Literal["lower", "whitespace", "canonicalize"] = Field(description="Name of open_clip's text cleaning.")
    context_length: int = Field(description="Maximum number of tokens, start and end included; longer text is cut.")
    start_token: int
    end_token: int = Field(description="Id of the end token, the highest one; rows are padded with 0 after it.")
    shortens: bool = Field(
        description="True if ``tokens`` may be shorter than context_length, cut after the longest text of the batch."
    )


class Deployment(BaseModel):
    """``deploy.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["teacher-cache-deployment"] = "teacher-cache-deployment"
    format_version: Literal[1] = 1
    name: str = Field(description="Name of the student.")
    teacher: str
    parameters: int
    embed_dim: int
    logit_scale: float = Field(description="Learned multiplier of cosines.")
    logit_bias: float | None = Field(
        None,
        description="Learned addend: sigmoid(logit_scale x cosine + logit_bias) is the probability of a match. None if "
        "no sigmoid loss trained it.",
    )
    preprocess: dict[str, Any] = Field(description="open_clip's preprocess_cfg: size, mean, std, interpolation, ...")
    tokenization: Tokenization
    towers: dict[Variant, dict[Literal["image", "text"], Artefact]] = Field(
        description="Files by precision and tower. A tower without an int8 file is in ``not_quantised``."
    )
    openvino_graphs: dict[Literal["image", "text"], Artefact] = Field(
        {}, description="OpenVINO's .xml by tower; ``towers`` has the .bin beside it."
    )
    not_quantised: dict[str, str] = Field({}, description="Reason why a tower has no int8 file, by tower.")
    weights: Artefact = Field(description="open_clip_model.safetensors, for open_clip.")
    run: str
    checkpoint: str
    cache_manifest_digest: str = Field(description="Manifest digest of the cache that the student learned from.")
    made_with: dict[str, str]

    @classmethod
    def read(cls, folder: str | Path) -> Deployment:
        """Return the record of a folder without reading its files.

        Raises:
            UsageError: there is no deployment, or its record cannot be read.
        """
        path = Path(folder) / RECORD
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            none = f"{folder}: no deployed student here ({RECORD} not found). Make one by teacher-cache deploy --out."
            raise UsageError(misplaced(str(folder), DEPLOYED) or none) from error
        except ValidationError as error:
            raise UsageError(f"{path}: {error}") from error

    def write(self, folder: Path) -> None:
        """Write the record. Called last."""
        (folder / RECORD).write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n")

    def artefacts(self) -> tuple[Artefact, ...]:
        """Return all files whose digests the record holds."""
        towers = (artefact for made in self.towers.values() for artefact in made.values())
        return (*towers, *self.openvino_graphs.values(), self.tokenization.artefact, self.weights)

    def tower(self, folder: str | Path, tower: Literal["image", "text"], variant: Variant) -> bytes:
        """Return the checked bytes of a tower's ONNX file, or of OpenVINO's .bin.

        Raises:
            UsageError: this tower has no file of this variant; the message says why.
            DeploymentError: the file is not the one that was deployed.
        """
        artefact = self.towers.get(variant, {}).get(tower)
        if artefact is None:
            why = self.not_quantised.get(tower, "it was not made")
            raise UsageError(f"{folder}: no {variant} file of the {tower} tower: {why}. Use fp32.")
        return self.proven(folder, artefact)

    def proven(self, folder: str | Path, artefact: Artefact) -> bytes:
        """Return a file's bytes after checking their digest.

        Raises:
            DeploymentError: the file is missing or has other bytes.
        """
        path = Path(folder) / artefact.file
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise DeploymentError(f"{path}: missing. Copy it again, or deploy the run anew.") from error
        if hashlib.sha256(data).hexdigest() != artefact.sha256:
            raise DeploymentError(
                f"{path}: not the file that was deployed (another sha256; {len(data):,} bytes found, "
                f"{artefact.bytes:,} wanted). Copy it again, or deploy the run anew."
            )
        return data


def require_packages(*others: str) -> None:
    """Check that the packages of deploy, and the others named, are installed. Called before hours of work.

    Raises:
        MissingPackageError: a package is not installed.
    """
    for name in ("onnx", "onnxscript", "onnxruntime", "tokenizers", "ftfy", "matplotlib", *others):
        if find_spec(name) is None:
            raise MissingPackageError(name, "deploy")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that make and measure a deployment."""
    modules = {"torch": "torch", "open_clip_torch": "open_clip", "onnx": "onnx", "onnxruntime": "onnxruntime"}
    modules |= {"tokenizers": "tokenizers", "pillow": "PIL", "numpy": "numpy"}
    # versions of modules: a distribution may have another name, such as onnxruntime-gpu or pillow-simd
    packages = {name: str(getattr(import_module(module), "__version__", "unknown")) for name, module in modules.items()}
    return {"python": platform.python_version(), **packages}
