"""The folder of a training run: its record, its step log and where its checkpoint lies. No torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.config import TrainConfig
from storage.errors import UsageError
from storage.files import LocalFiles
from storage.manifest import CacheIdentity

__all__ = ["EpochRecord", "RunFolder", "RunRecord"]

_RECORD, _LOG, _CHECKPOINTS = "run.json", "log.jsonl", "checkpoints"


class EpochRecord(BaseModel, frozen=True):
    """Means over one epoch."""

    epoch: int
    loss: float
    parts: dict[str, float] = Field(description="Each named loss before weighting.")
    seconds: float
    samples_per_second: float
    data_wait_share: float = Field(description="Share of the seconds in which the step waited for its batch.")


class RunRecord(BaseModel):
    """``run.json``: what was trained on what, and how far it is."""

    model_config = ConfigDict(frozen=True)

    config: TrainConfig
    student_config: dict[str, Any] = Field(description="open_clip model config.")
    student_parameters: int
    teacher: str
    identity: CacheIdentity = Field(description="Of the cache.")
    accepted_mismatches: tuple[str, ...] = Field(
        (), description="Differences from the expected identity that the user accepted: field and both values."
    )
    cache_manifest_digest: str = Field(description="Of the very bytes that the student learned from.")
    view: str = Field(description="What the student saw of each image.")
    image_root: str
    train_images: int
    steps: int = 0
    seconds: float = 0.0
    epochs: tuple[EpochRecord, ...] = ()
    checkpoint: str | None = Field(None, description="Folder of the newest checkpoint, relative to the run.")


class RunFolder:
    """Reads and writes one run. The record is replaced atomically and names the checkpoint that goes with it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files = LocalFiles(str(path))

    def start(self, record: RunRecord) -> None:
        """Begin a run in a folder that holds none, or one that never came to a checkpoint.

        Raises:
            UsageError: there is a run with a checkpoint; nothing is overwritten.
        """
        if (self.path / _RECORD).exists():
            if self.read().checkpoint is None:
                (self.path / _LOG).unlink(missing_ok=True)
                self.write(record)
                return
            raise UsageError(f"{self.path}: holds a run already. Choose another --out, or delete the folder.")
        self.write(record)

    def write(self, record: RunRecord) -> None:
        """Replace the record."""
        self._files.write(_RECORD, (record.model_dump_json(indent=2) + "\n").encode())

    def read(self) -> RunRecord:
        """The record.

        Raises:
            UsageError: no run here, or one that cannot be read.
        """
        try:
            return RunRecord.model_validate_json((self.path / _RECORD).read_bytes())
        except FileNotFoundError as error:
            raise UsageError(f"{self.path}: no run here ({_RECORD} not found). Train one with --out.") from error
        except ValidationError as error:
            raise UsageError(f"{self.path / _RECORD}: {error}") from error

    def log(self, line: dict[str, Any]) -> None:
        """Append one step to ``log.jsonl``."""
        with (self.path / _LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def checkpoint(self, record: RunRecord, name: str, save: Callable[[Path], None]) -> RunRecord:
        """Save a checkpoint, switch the record to it, then remove the one before.

        A crash leaves the record with the checkpoint that it names; at most a folder more lies beside it.
        """
        folder = self.path / _CHECKPOINTS / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save(folder)
        switched = record.model_copy(update={"checkpoint": f"{_CHECKPOINTS}/{name}"})
        self.write(switched)
        if record.checkpoint and record.checkpoint != switched.checkpoint:
            shutil.rmtree(self.path / record.checkpoint, ignore_errors=True)
        return switched

    def checkpoint_path(self) -> Path:
        """Folder of the newest checkpoint.

        Raises:
            UsageError: the run has none yet.
        """
        record = self.read()
        if record.checkpoint is None:
            raise UsageError(f"{self.path}: no checkpoint yet; one is written at the end of each epoch")
        return self.path / record.checkpoint
