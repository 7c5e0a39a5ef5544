"""Settings of the stages that make and verify a cache: precompute, import, verify with a sample."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from teacher_cache.pipeline.settings.base import (
    Decoder,
    Device,
    ImageRoot,
    Precision,
    Pretrained,
    StageConfig,
    StoredDtype,
    TeacherName,
)


class PrecomputeConfig(StageConfig):
    """Run a teacher once over a dataset."""

    dataset: str = Field(
        description="Dataset as KIND:PATH. Kinds: coco, karpathy, flickr, webdataset, imagefolder, images, table, "
        "scenes, labelled."
    )
    teacher: TeacherName
    cache: str = Field(description="Folder or URL of the cache. A new one is made, an unfinished one is continued.")
    part: str | None = Field(
        None,
        pattern=r"^\d{1,9}/\d{1,9}$",
        description="Part of the dataset to encode, such as 3/100, its third hundredth.",
    )
    pretrained: Pretrained = None
    device: Device = "auto"
    precision: Precision = Field("fp32", description="The teacher's arithmetic, part of the identity.")
    dtype: StoredDtype | None = Field(
        None,
        description="Storage type: float16, or int8 at half the size. Part of the identity. "
        "Default: the existing cache's, else float16.",
    )
    compress: bool = Field(False, description="Compressed arrays: fewer bytes, slower to read. Default: off.")
    batch_size: int | None = Field(
        None,
        gt=0,
        description="Number of images or captions per forward pass. Default: the existing cache's, else 16 on a CPU "
        "and 1,024 on a GPU.",
    )
    chunk_rows: int | None = Field(
        None, gt=0, description="Number of rows per chunk. Default: chosen from the number of rows."
    )
    reuse: str | None = Field(
        None,
        description="Finished cache of the same teacher whose rows are copied, so that only new rows are encoded. "
        "Default: none.",
    )
    decode_threads: int | None = Field(
        None,
        gt=0,
        description="Number of threads that decode, where no processes do. Default: one per core, at most 16.",
    )
    decode_processes: int | None = Field(
        None,
        ge=0,
        description="Number of processes that decode; 0: threads. Default: for a GPU with more than 4 cores all of "
        "them but one, at most 32; else 0.",
    )
    decoder: Decoder = Field(
        "pillow",
        description="Image decoder: pillow, as in open_clip, or jpeg-scaled: faster, other pixels. Part of the "
        "identity.",
    )
    views: int | None = Field(
        None,
        gt=0,
        description="Number of crops per image: the evaluation crop, then random crops. Default: the existing "
        "cache's, else 1.",
    )
    crop_scale: tuple[float, float] | None = Field(
        None, description="Range of the share of an image's area that a random crop covers. Default: 0.3 to 1."
    )
    crop_ratio: tuple[float, float] | None = Field(
        None, description="Range of a random crop's width divided by its height. Default: 3/4 to 4/3."
    )
    crop_flip: float | None = Field(
        None, ge=0, le=1, description="Probability that a random crop is mirrored. Default: 0.5."
    )
    view_seed: int | None = Field(None, ge=0, lt=2**32, description="Seed of the random crops. Default: 0.")
    max_problems: str | None = Field(
        None,
        description="Number of images that may be missing or unreadable, and of captions that may be left out: a "
        "number, or a share such as 5%. Default: 10%, at least 10.",
    )
    executor: str = Field(
        "local", description="Executor: local (this process), ray (a cluster, or this machine) or ray://HOST:PORT."
    )
    workers: int | None = Field(None, gt=0, description="Number of workers at most. Default: the cluster's room.")

    @model_validator(mode="before")
    @classmethod
    def _part_is_of_the_dataset(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Add the part to the dataset's name, which a cache records."""
        part, dataset = settings.get("part"), settings.get("dataset")
        if part is None or not isinstance(dataset, str) or f"part={part}" in re.split("[?&]", dataset):
            return settings
        return {**settings, "dataset": f"{dataset}{'&' if re.search('[?][^?]*=', dataset) else '?'}part={part}"}

    @field_validator("max_problems", mode="before")
    @classmethod
    def _check_max_problems(cls, limit: Any) -> str | None:
        if limit is not None and not re.fullmatch(r"\d+|\d+(\.\d+)?%", str(limit)):
            raise ValueError(f"a number of images or a share such as 5% is required, not {limit}")
        return None if limit is None else str(limit)

    def allowed_problems(self, images: int) -> int:
        """Return how many of the images, or captions, that a dataset lists may have no row."""
        limit = self.max_problems
        if limit is None:
            return max(images // 10, 10)
        return int(float(limit[:-1]) * images / 100) if limit.endswith("%") else int(limit)

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _check_range(cls, span: tuple[float, float] | None, info: ValidationInfo) -> tuple[float, float] | None:
        most = 1.0 if info.field_name == "crop_scale" else 100.0
        if span is not None and not 0 < span[0] <= span[1] <= most:
            raise ValueError(f"0 < least <= greatest <= {most:g} is required, not {span[0]:g} and {span[1]:g}")
        return span


class ImportConfig(PrecomputeConfig):
    """Make a cache from rows of clip-retrieval or of DataCompDR, once a sample of them is proven."""

    folder: str = Field(
        description="Folder with img_emb, text_emb and metadata, as clip-retrieval writes it, or tars of DataCompDR."
    )
    columns: str | None = Field(
        None,
        pattern=r"^\d{1,6}:\d{1,6}$",
        description="Columns FIRST:STOP of the teacher in DataCompDR's rows, which are an ensemble's. Default: all.",
    )
    sample: int = Field(500, gt=0, description="Number of rows of each tower to compare with the live teacher first.")
    seed: int = Field(0, ge=0, description="Seed of the sample.")
    threshold: float = Field(
        0.999, gt=0, le=1, description="Minimum cosine between an imported row and the live teacher's."
    )

    @field_validator("views")
    @classmethod
    def _check_one_view(cls, views: int | None) -> int | None:
        if views not in (None, 1):
            raise ValueError(
                "such folders hold the evaluation crop alone; for more, precompute --views N --reuse this one"
            )
        return views


class ProofConfig(StageConfig):
    """Compare random rows of a cache with the live teacher."""

    cache: str = Field(description="Folder or URL of a finished cache.")
    sample: int = Field(
        gt=0,
        description="Number of random images, and of captions, to encode again with the live teacher and compare; 459 "
        "if no number is given, which finds a fault in 1 % of the rows with 99 % probability: ln(1-p)/ln(1-f).",
        json_schema_extra={"bare": 459},
    )
    teacher: str | None = Field(
        None, description="Teacher, as for precompute. Default: the name recorded in the manifest."
    )
    pretrained: Pretrained = None
    dataset: str | None = Field(None, description="Dataset as KIND:PATH, if it moved. Default: the recorded one.")
    image_root: ImageRoot = None
    seed: int = Field(0, ge=0, description="Seed of the sample.")
    # float16 storage and another device lower the cosine by less than 1e-5, int8 by about 1e-4, bf16 against fp32 by
    # 1e-3 and in a few rows 3e-2 (benchmarks/cpu_precisions.md), a wrong row or a mirrored crop by far more
    threshold: float = Field(0.999, gt=0, le=1, description="Minimum cosine between a cached row and the live one.")
    device: Device = "auto"
    precision: Precision | None = Field(
        None, description="Precision of the live teacher: fp32, bf16, pure_bf16 or fp16. Default: the cache's."
    )
