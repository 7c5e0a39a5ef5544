"""Record of a training run, ``run.json``, and the settings that may change when it resumes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from teacher_cache.pipeline.settings.names import CHECKPOINT_CONFIG
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.format.identity import CacheIdentity

_ORIGIN = {"teacher", "identity", "accepted_mismatches", "cache_manifest_digest", "view", "config"}
# places, save intervals, waits and trackers: these may change when a run resumes
_MAY_DIFFER = {"cache", "out", "image_root", "pixels", "device", "workers", "checkpoint_seconds", "checkpoint_steps"}
_MAY_DIFFER |= {"other_caches", "rank_timeout_seconds", "report_to", "exclude"}

# a record of somebody else must not name a folder outside: a training removes old checkpoints
CHECKPOINT_NAME = r"^checkpoints/[\w-]+$"
# beside CHECKPOINT_CONFIG in a checkpoint; both names are open_clip's
CHECKPOINT_WEIGHTS = "open_clip_model.safetensors"


class Selection(BaseModel, frozen=True):
    """Recall of a student on the select split, in percent."""

    split: str
    mean_recall: float = Field(description="Mean of the six recalls; the best epoch is the one with the highest.")
    recalls: dict[str, dict[str, float]]


class EpochRecord(BaseModel, frozen=True):
    """Means over one epoch."""

    epoch: int
    loss: float
    parts: dict[str, float] = Field(description="Each named loss before weighting.")
    seconds: float
    samples_per_second: float
    data_wait_share: float = Field(
        description="Share of the seconds spent waiting for batches; on a GPU, which works meanwhile, an upper limit."
    )
    selection: Selection | None = Field(None, description="Recall on the select split after this epoch.")


class BestRecord(BaseModel, frozen=True):
    """Best epoch, and how it was chosen."""

    epoch: int
    split: str = Field(description="Split that it was chosen on. Its score there is no test result.")
    mean_recall: float
    checkpoint: str = Field(pattern=CHECKPOINT_NAME, description="Folder of the checkpoint, relative to the run.")


class AveragedRun(BaseModel, frozen=True):
    """Run that was averaged into a student."""

    run: str = Field(description="Absolute path of the run's folder.")
    checkpoint: str = Field(description="Folder of its checkpoint, relative to the run.")
    weights_sha256: str = Field(description="Digest of that checkpoint's weights file.")
    config: TrainConfig
    chosen_on: str | None = Field(None, description="Split that the checkpoint was chosen on, if any.")


class ResizedRun(BaseModel, frozen=True):
    """Run whose student was resized to another image size."""

    run: str = Field(description="Absolute path of the run's folder.")
    checkpoint: str = Field(description="Folder of its checkpoint, relative to the run.")
    weights_sha256: str = Field(description="Digest of that checkpoint's weights file.")
    image_size: tuple[int, int] = Field(description="Height and width of that run's images.")
    interpolated: tuple[str, ...] = Field((), description="Weights that were interpolated: a transformer's positions.")
    chosen_on: str | None = Field(None, description="Split that the checkpoint was chosen on, if any.")


class OtherTeacher(BaseModel, frozen=True):
    """Further teacher of a run, whose cache was joined to the first one."""

    teacher: str
    cache_manifest_digest: str
    identity: CacheIdentity = Field(description="Identity of its cache.")


class Excluded(BaseModel, frozen=True):
    """Images that a run left out by a list."""

    path: str = Field(description="File of the list, absolute.")
    sha256: str = Field(description="Digest of the file.")
    images: int = Field(description="Number of images of the list that the split has.")

    @property
    def name(self) -> str:
        """The file and the start of its digest."""
        return f"{self.path} (sha256 {self.sha256[:12]})"


class RunRecord(BaseModel):
    """Content of ``run.json``: student, cache, settings and progress.

    For a mean of runs (``teacher_cache.pipeline.models.derive.average``) ``config`` is the first run's, and steps and
    seconds are sums.
    """

    model_config = ConfigDict(frozen=True)

    config: TrainConfig
    student_config: dict[str, Any] = Field(description="Model config in open_clip's form.")
    student_parameters: int
    teacher: str = Field(description="Name of the teacher; of several: A and B.")
    identity: CacheIdentity = Field(description="Identity of the cache.")
    accepted_mismatches: tuple[str, ...] = Field(
        (), description="Differences from the expected identity that the user accepted: field and both values."
    )
    cache_manifest_digest: str = Field(description="Digest of the manifest of the cache that the student learned from.")
    others: tuple[OtherTeacher, ...] = Field((), description="Further teachers, in the order of config.other_caches.")
    view: str = Field(description="Crops of each image that the student saw, in words.")
    image_root: str
    train_images: int
    dropped_images: int = Field(0, description="Images of the split that another teacher's cache lacked.")
    excluded: Excluded | None = Field(None, description="Images of the split that config.exclude left out.")
    initial_weights_sha256: str | None = Field(
        None, description="Digest of the student's weights before its first step, projections included."
    )
    averaged: tuple[AveragedRun, ...] = Field((), description="Runs whose mean this is. Default: none.")
    resized: ResizedRun | None = Field(None, description="Run that was resized into this one. Default: none.")
    steps: int = Field(0, description="Steps taken up to the newest checkpoint.")
    seconds: float = Field(0.0, description="Seconds of the finished epochs.")
    epochs: tuple[EpochRecord, ...] = Field((), description="Finished epochs.")
    checkpoint: str | None = Field(
        None, pattern=CHECKPOINT_NAME, description="Folder of the newest checkpoint, relative to the run."
    )
    best: BestRecord | None = Field(None, description="Best epoch on config.select_split.")
    resumed_at: tuple[int, ...] = Field((), description="Steps after which another process went on.")

    def facts(self) -> dict[str, Any]:
        """Return the settings and the origin of the run, as a tracker lists them."""
        origin = self.model_dump(include={"teacher", "cache_manifest_digest", "student_parameters", "train_images"})
        return self.config.model_dump(mode="json") | origin

    @property
    def finished(self) -> bool:
        """True if all epochs are trained, or for a mean of runs."""
        return bool(self.averaged) or len(self.epochs) >= self.config.epochs

    @property
    def manifest_digests(self) -> tuple[str, ...]:
        """Digest of the manifest of every cache that the student learned from, the first one first."""
        return (self.cache_manifest_digest, *(other.cache_manifest_digest for other in self.others))

    @property
    def unfinished(self) -> str | None:
        """Trained and wanted epochs of an unfinished run, in words."""
        return None if self.finished else f"{len(self.epochs)} of {self.config.epochs} epochs are trained"

    def chosen_on(self, which: Literal["last", "best"]) -> str | None:
        """Return the split that a checkpoint was chosen on, whose score is no test result. None: it was not chosen."""
        if self.resized is not None:
            return self.resized.chosen_on
        if self.averaged:
            return next((run.chosen_on for run in self.averaged if run.chosen_on), None)
        return self.best.split if self.best is not None and which == "best" else None

    def fitted(self, config: TrainConfig) -> TrainConfig:
        """Return settings for the cache of this run, as training would record them."""
        return config.fitted(self.identity.dataset.splits, lambda split: self.train_images)

    def other_settings(self, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Return the settings that differ from the run's but must not, as (set, recorded)."""
        new, old = config.model_dump(mode="json"), self.config.model_dump(mode="json")
        differ = {name: (new[name], old[name]) for name in old if name not in _MAY_DIFFER and new[name] != old[name]}
        own, other = self.excluded, _listed(config.exclude, self.excluded)
        if (own and own.sha256) != (other and other.sha256):
            differ["exclude"] = other and other.name, own and own.name
        return differ

    def origin(self) -> dict[str, Any]:
        """Return the fields of the record that a checkpoint keeps."""
        made_of = {name for name in ("averaged", "resized", "others") if getattr(self, name)}
        return self.model_dump(mode="json", include=_ORIGIN | made_of)


def _listed(path: str | None, before: Excluded | None) -> Excluded | None:
    """Return the list of images in a file. One that is gone counts as unchanged."""
    if path is None:
        return None
    file = Path(path).expanduser().absolute()
    try:
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        sha256 = before.sha256 if before is not None and before.path == str(file) else "not readable"
    return Excluded(path=str(file), sha256=sha256, images=0)


def require_checkpoint(folder: Path) -> None:
    """Check that a folder has the files of a student's checkpoint.

    Raises:
        UsageError: it has not. The message names the newest checkpoint if the folder is a run.
    """
    if not (folder / CHECKPOINT_CONFIG).is_file() or not (folder / CHECKPOINT_WEIGHTS).is_file():
        newest = max(folder.glob("checkpoints/epoch-*"), default=None)
        hint = f"; {folder} is a run: write {newest}" if newest else ""
        needed = f"{CHECKPOINT_CONFIG} and {CHECKPOINT_WEIGHTS} wanted"
        raise UsageError(f"{folder}: no student checkpoint here ({needed}){hint}")


def open_clip_config(checkpoint: Path) -> str:
    """Return a checkpoint's config as open_clip publishes it, without settings of ours."""
    settings = json.loads((checkpoint / CHECKPOINT_CONFIG).read_text())
    return json.dumps({key: settings[key] for key in ("model_cfg", "preprocess_cfg")}, indent=2) + "\n"


def checkpoint_image_size(checkpoint: Path) -> tuple[int, int]:
    """Return height and width of the images that a checkpoint's student sees."""
    height, width = json.loads((checkpoint / CHECKPOINT_CONFIG).read_text())["preprocess_cfg"]["size"]
    return int(height), int(width)


def weights_file_sha256(checkpoint: Path) -> str:
    """Return the digest of a checkpoint's weights file."""
    with (checkpoint / CHECKPOINT_WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
