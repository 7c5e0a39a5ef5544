"""The data of a report: collected once, drawn by ``teacher_cache.pipeline.report.page``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field

from teacher_cache.pipeline.deploy.table import StudentTable
from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult
from teacher_cache.pipeline.evaluate.sampled import SampledRecall
from teacher_cache.pipeline.models.run_record import RunRecord
from teacher_cache.pipeline.train.compare.result import Comparison
from teacher_cache.storage.look.info import CacheInfo
from teacher_cache.storage.look.stats import CacheStats


def as_utf8(text: str) -> str:
    """Return the text with a question mark for each byte of a path that is not UTF-8."""
    return text.encode(errors="replace").decode()


Shown = Annotated[str, AfterValidator(as_utf8)]
"""Text that may name a path."""


class MapPoint(BaseModel, frozen=True):
    """An image or a caption on the map."""

    x: float
    y: float
    tower: Literal["image", "text"]
    row: int
    image_row: int = Field(description="Row of the image, the key of its picture.")
    label: str = Field(description="Caption, or sample_id of an image.")
    split: str
    class_name: str = Field("", description="Folder of an image in a dataset of class folders.")


class RowMap(BaseModel, frozen=True):
    """Images and captions in two dimensions."""

    points: tuple[MapPoint, ...]
    method: str = Field(description="Description of the projection, with the seed.")
    images_of: int = Field(description="Number of images that the points were sampled from.")


class RetrievedPair(BaseModel, frozen=True):
    """A query, its own match, and the teacher's first result."""

    direction: Literal["i2t", "t2i"]
    image_row: int
    caption_row: int
    caption: str
    rank: int = Field(description="Rank of the query's best own match, from 1.")
    cosine: float = Field(description="Cosine of image and caption.")
    first_image_row: int | None = Field(description="Row of the first result for t2i, if it is another image.")
    first_caption: str | None = Field(description="First result for i2t, if it is another image's caption.")
    first_cosine: float


class LostImage(BaseModel, frozen=True):
    """A quarantined image."""

    row: int
    sample_id: str
    uri: str
    reason: str


class Step(BaseModel, frozen=True):
    """A training step. Long runs have evenly spaced ones only."""

    step: int
    epoch: int
    loss: float
    learning_rate: float | None
    parts: dict[str, float] = Field({}, description="Losses by name, before weighting.")


class RunReport(BaseModel, frozen=True):
    """A run with its logged steps and evaluations."""

    name: Shown = Field(description="Name of the run's folder; its path if two runs share a name.")
    record: RunRecord
    steps: tuple[Step, ...]
    steps_of: int
    evaluations: tuple[EvaluateResult, ...] = Field(description="Evaluations in the run folder, newest first.")
    same_cache: bool = Field(description="True if the report's cache is one that the run was trained on.")


def of_other_data(result: EvaluateResult, manifest_digest: str) -> bool:
    """Return whether an evaluation is on a cache with other data or another teacher."""
    return bool(result.accepted_mismatches) and result.cache_manifest_digest != manifest_digest


class TeacherBeside(BaseModel, frozen=True):
    """One of several teachers, on the same images and captions."""

    location: Shown = Field(description="Location of its cache.")
    teacher: str
    separation: float | None = Field(description="Probability that a true pair has a greater cosine than a random one.")
    image_rank: float | None = Field(description="Effective rank of the rows of images.")
    text_rank: float | None = Field(description="The same of captions.")
    recall: SampledRecall | None


class ReportData(BaseModel, frozen=True):
    """The data of a report."""

    location: Shown
    made: str = Field(description="Date and time, UTC.")
    version: str
    info: CacheInfo
    stats: CacheStats | None = Field(None, description="Statistics. None if the cache is not sealed.")
    recall: SampledRecall | None = Field(None, description="Recall of the teacher among the images that were read.")
    row_map: RowMap | None = None
    hardest: tuple[RetrievedPair, ...] = ()
    best: tuple[RetrievedPair, ...] = ()
    pairs_of: int = Field(0, description="Number of queries that the pairs were chosen from, in both directions.")
    lost: tuple[LostImage, ...]
    runs: tuple[RunReport, ...]
    deployments: tuple[StudentTable, ...]
    teachers: tuple[TeacherBeside, ...] = Field((), description="This cache's teacher and others, of several caches.")
    compared: Comparison | None = Field(None, description="Comparison of this cache's teacher with others.")
    pictures: dict[int, str] = Field({}, description="Pictures as data URIs, by row of the image.")
    notes: tuple[Shown, ...] = Field((), description="Notes on samples and missing parts, with the remedy.")
