"""Settings of a retraining. No torch: Prefect reads them to draw a form."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from teacher_cache.pipeline.settings.stages import Decoder, Precision, StageConfig, StoredDtype

__all__ = ["RetrainConfig"]


class RetrainConfig(StageConfig):
    """Look for new data; encode it, train, measure, ship and promote. Nothing new: nothing is done."""

    dataset: str = Field(description="KIND:PATH, as for precompute; looked at anew each time.")
    teacher: str = Field(description="open_clip model, as for precompute.")
    home: str = Field(description="Folder of all that retraining makes: caches, runs, deployed, students.")
    student: str = Field(description="Shipped preset, open_clip model name, or path of an open_clip model config.")
    pretrained: str | None = Field(None, description="open_clip pretrained tag or file, for a built-in model name.")
    precision: Precision = Field("fp32", description="Arithmetic of the teacher's forward pass; part of the identity.")
    dtype: StoredDtype | None = Field(
        None,
        description="Of the stored embeddings, as for precompute; that of the cache before, or float16, if left out.",
    )
    decoder: Decoder | None = Field(
        None, description="Of the images, as for precompute; that of the cache before, or pillow, if left out."
    )
    views: int | None = Field(None, gt=0, description="Crops per image; those of the cache before, or 1, if left out.")
    precompute: dict[str, Any] = Field(
        {},
        description="More settings of precompute by name: batch_size, executor, crop_scale, ... How random crops are "
        "drawn is as in the cache before where it is left out.",
    )
    caches: str | None = Field(None, description="Folder or URL of the caches instead, such as s3://bucket/caches.")
    start: Literal["champion", "scratch"] = Field(
        "champion", description="Begin with the champion's weights where it is the same student, or with none."
    )
    train: dict[str, Any] = Field(
        {}, description="More settings of train by name: epochs, batch_size, losses, select_split, ..."
    )
    split: str = Field("test", description="Split that challenger and champion are measured on.")
    margin: float = Field(3.0, ge=0, lt=100, description="Percent that the challenger may be worse; see promote.")
    min_retention: float | None = Field(
        None, gt=0, description="Percent of the teacher's mean recall that a challenger must reach, too."
    )
    max_removed: float = Field(
        20.0,
        ge=0,
        le=100,
        description="Percent of the cached images that may be gone from the dataset; more, and nothing is done: a "
        "share may not be mounted.",
    )
    ship: bool = Field(True, description="Deploy a student that passed, before it is promoted.")
    deploy: dict[str, Any] = Field(
        {}, description="More settings of deploy by name: int8, max_recall_loss, zero_shot, ..."
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
