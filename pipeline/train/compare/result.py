"""The result of a comparison of teachers, and its file. No torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from teacher_cache.pipeline.evaluate.intervals import LEVEL
from teacher_cache.storage.errors import UsageError

RESULT = "comparison.json"


class Between(BaseModel, frozen=True):
    """A number with its interval."""

    value: float
    low: float
    high: float


class ComparedTeacher(BaseModel, frozen=True):
    """One teacher, its students, and its cost."""

    cache: str
    cache_manifest_digest: str
    teacher: str
    embed_dim: int
    recall: float = Field(description="The teacher's own mean recall on the measured split, in percent.")
    image_rank: float = Field(description="Effective rank of the image rows; see stats.")
    text_rank: float
    students: tuple[float, ...] = Field(description="Mean recall of each student by seed, in percent.")
    student: Between = Field(description="Their mean, with its interval over images and seeds.")
    encode_seconds: float | None = Field(
        description="Seconds to encode all images and captions at the rate, and on the device, of the cache; None "
        "where it has no record of that, for example if its rows were copied."
    )


class ComparedPair(BaseModel, frozen=True):
    """The difference between the students of two teachers, in points of mean recall."""

    better: str = Field(description="Cache of the teacher with the better students.")
    worse: str
    points: Between
    certain: bool = Field(description="True if the interval does not hold 0.")


class SharedNeighbours(BaseModel, frozen=True):
    """Share of each row's ten nearest rows that two teachers have in common, in percent; None for too few rows."""

    first: str
    second: str
    image: float | None
    text: float | None


class Comparison(BaseModel, frozen=True):
    """Result of ``compare``."""

    teachers: tuple[ComparedTeacher, ...] = Field(description="The teachers, the one with the best students first.")
    pairs: tuple[ComparedPair, ...] = Field(description="All differences; empty with one seed.")
    neighbours: tuple[SharedNeighbours, ...]
    neighbours_by_chance: float = Field(description="Share in percent that unrelated teachers have in common.")
    choice: str = Field(description="Cache of the teacher with the best students.")
    rivals: tuple[str, ...] = Field(description="Caches of the teachers that it is not certainly better than.")
    student: str
    epochs: int
    seeds: int
    split: str
    learned_images: int
    measured_split: str
    images: int
    captions: int
    chance: float = Field(description="Mean recall of a random order, in percent.")
    level: float = Field(LEVEL, description="Probability that an interval holds; of the pairs, that all hold.")
    encode_images: int = Field(description="Number of images that the cost is of.")
    seconds: float = Field(description="Seconds of this call; students of earlier calls are not in it.")
    date: str


def read_comparison(folder: str) -> Comparison:
    """Read the result in the folder that ``compare --out`` wrote.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    path = Path(folder) / RESULT
    try:
        return Comparison.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{folder}: no {RESULT} here; name a folder of teacher-cache compare --out") from error
    except (ValidationError, OSError) as error:
        raise UsageError(f"{path}: {error}") from error
