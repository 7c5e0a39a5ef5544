"""Settings of promoting a student and of retraining."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from teacher_cache.pipeline.settings.base import (
    AcceptMismatch,
    Checkpoint,
    Decoder,
    Device,
    ImageRoot,
    LoaderWorkers,
    MeasuredSplit,
    Precision,
    Pretrained,
    StageConfig,
    StoredDtype,
    StudentName,
    TeacherName,
)


class PromoteConfig(StageConfig):
    """Measure a student against the champion, and promote it if it is not worse."""

    run: str = Field(description="Folder of a training run.")
    registry: str = Field("students", description="Folder or URL of the registry of champions and challengers.")
    checkpoint: Checkpoint = "last"
    cache: str | None = Field(None, description="Finished cache to measure on. Default: the run's.")
    split: MeasuredSplit = None
    accept_mismatch: AcceptMismatch = ()
    accept_learned: bool = Field(
        False,
        description="Compare even if the student learned from some of the images. The record says from how many.",
    )
    image_root: ImageRoot = None
    margin: float = Field(
        3.0,
        ge=0,
        lt=100,
        description="Margin in percent: the 95 % interval of the challenger's mean recall, as a share of the "
        "champion's, may start this far below 100. Few images make the interval wide: an equal student then needs half "
        "its width.",
    )
    min_retention: float | None = Field(
        None, gt=0, description="Minimum retention in percent of the teacher's mean recall. Default: no minimum."
    )
    deployed: str | None = Field(None, description="Folder that deploy made of this run, recorded in the registry.")
    batch_size: int = Field(256, gt=0, description="Number of images or captions per forward pass.")
    device: Device = "auto"
    workers: LoaderWorkers = None


class RetrainConfig(StageConfig):
    """Look for new data; encode it, train, measure, deploy and promote. Without new data nothing happens."""

    dataset: str = Field(description="Dataset as KIND:PATH. It is read again each time.")
    teacher: TeacherName
    home: str = Field(description="Folder of all results: caches, runs, deployed, students.")
    student: StudentName
    pretrained: Pretrained = None
    precision: Precision = Field("fp32", description="The teacher's arithmetic, part of the identity.")
    dtype: StoredDtype | None = Field(
        None,
        description="Storage type of the embeddings: float16 or int8. Default: the previous cache's, else float16.",
    )
    decoder: Decoder | None = Field(
        None, description="Image decoder: pillow or jpeg-scaled. Default: the previous cache's, else pillow."
    )
    views: int | None = Field(
        None, gt=0, description="Number of crops per image. Default: the previous cache's, else 1."
    )
    precompute: dict[str, Any] = Field(
        {},
        description="Other settings of precompute by name: compress, batch_size, executor, crop_scale and others. "
        "Random crops are drawn as in the previous cache unless set here.",
    )
    caches: str | None = Field(
        None, description="Folder or URL of the caches, for example s3://bucket/caches. Default: caches in home."
    )
    start: Literal["champion", "scratch"] = Field(
        "champion", description="Initial weights: the champion's if the architecture is the same, or scratch."
    )
    train: dict[str, Any] = Field(
        {}, description="Other settings of train by name: epochs, batch_size, losses, select_split and others."
    )
    split: str = Field("test", description="Split on which challenger and champion are measured.")
    margin: float = Field(3.0, ge=0, lt=100, description="Margin in percent, as for promote.")
    min_retention: float | None = Field(
        None, gt=0, description="Minimum retention in percent of the teacher's mean recall. Default: no minimum."
    )
    max_removed: float = Field(
        20.0,
        ge=0,
        le=100,
        description="Maximum share in percent of cached images that may be gone. Above it retraining is refused: the "
        "dataset may not be mounted.",
    )
    ship: bool = Field(True, description="Deploy a student that passes, before it is promoted.")
    deploy: dict[str, Any] = Field(
        {}, description="Other settings of deploy by name: int8, max_recall_loss, zero_shot and others."
    )
    device: Device = "auto"
