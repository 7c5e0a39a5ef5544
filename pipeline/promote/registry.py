"""The registry of students: candidates with their lineage, and promotions. No torch.

    students/
      candidates/000003.json  a student, its comparison with the champion of its day, and the verdict
      promotions/0002.json    makes a candidate the champion

Both are written once and never changed. The champion is the candidate of the promotion with the greatest number. A
promotion creates one file, so readers see either the old champion or the new one. If two processes replace the same
champion, one of them is refused, in a folder and on S3. A rollback is a promotion too.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from teacher_cache.pipeline.evaluate.intervals import Interval
from teacher_cache.pipeline.evaluate.learned import learned_words
from teacher_cache.pipeline.models.run_record import CHECKPOINT_NAME
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.observe.quantities import counted

_CANDIDATES = "candidates"
_PROMOTIONS = "promotions"

_Record = TypeVar("_Record", bound=BaseModel)


class Comparison(BaseModel, frozen=True):
    """A comparison of a challenger with the champion, on the same images, captions and resamples."""

    champion: int = Field(description="Number of the candidate that was champion.")
    champion_recalls: dict[str, dict[str, float]]
    share: float | None = Field(description="The challenger's mean recall as percent of the champion's.")
    interval: Interval | None = Field(description="Interval of the share at this level. None if it is undefined.")
    level: float
    margin: float = Field(description="Percent below 100 at which the interval may start.")
    champion_learned_images: int | None = Field(
        None, description="Number of these images that the champion learned from; None where its cache cannot be read."
    )
    other_images: str | None = Field(
        None, description="Accepted difference between these images and those that the champion was measured on before."
    )


class Candidate(BaseModel, frozen=True):
    """A student that was measured for promotion."""

    number: int = Field(ge=1)
    date: str = Field(description="Date and time, UTC.")
    run: str = Field(description="Absolute folder of the training run.")
    checkpoint: str = Field(pattern=CHECKPOINT_NAME, description="Folder of the checkpoint, relative to the run.")
    weights_sha256: str = Field(description="SHA-256 of the checkpoint's weights.")
    deployed: str | None = Field(description="Folder that deploy made of the student.")
    student: str
    student_parameters: int
    teacher: str
    cache: str
    cache_manifest_digest: str = Field(description="Manifest digest of the cache that the student learned from.")
    settings: dict[str, Any] = Field(description="Settings of the training; of the first run, for a mean of runs.")
    averaged: tuple[str, ...] = Field((), description="Folders of the averaged runs, for a mean of runs.")
    split: str
    measured_on: str = Field(description="Manifest digest of the cache that was measured on.")
    measured_cache: str | None = Field(None, description="Location of that cache. None in earlier records.")
    learned_images: int | None = Field(
        None, description="Number of these images that the student learned from; None where its cache cannot be read."
    )
    images: int
    captions: int
    recalls: dict[str, dict[str, float]]
    mean_recall: float
    retention: float | None = Field(description="Mean recall as percent of the teacher's.")
    retention_interval: Interval | None
    comparison: Comparison | None = Field(description="Comparison with the champion. None for the first student.")
    passed: bool
    reason: str = Field(description="Reason of the verdict.")

    def learned_lines(self) -> Iterator[str]:
        """Yield from how many of the measured images student and champion learned, if from any."""
        of, versus = f"these {counted(self.images, 'image')}", self.comparison
        if words := learned_words(self.learned_images, of):
            yield words
        if versus and (words := learned_words(versus.champion_learned_images, of, f"champion {versus.champion}")):
            yield f"{words}: the comparison favours it" if versus.champion_learned_images else words


class Promotion(BaseModel, frozen=True):
    """A change of the champion."""

    number: int = Field(ge=1)
    date: str = Field(description="Date and time, UTC.")
    candidate: int
    before: int | None = Field(description="Number of the previous champion.")
    kind: Literal["gate", "rollback"]
    nonce: str = Field(description="Random text that makes this file differ from another writer's.")


class Students(BaseModel, frozen=True):
    """The answer of ``teacher-cache students``."""

    registry: str
    champion: int | None
    students: tuple[Candidate, ...]
    promotions: tuple[Promotion, ...]


class StudentRegistry:
    """A registry of candidates and promotions. Several processes may use it at once.

    Args:
        location: folder or URL, as for a cache; created by the first candidate.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self._files = open_files(location)

    def candidates(self) -> tuple[Candidate, ...]:
        """Return all candidates, oldest first."""
        return tuple(self._read(key, Candidate) for key in self._keys(_CANDIDATES))

    def promotions(self) -> tuple[Promotion, ...]:
        """Return all promotions, oldest first."""
        return tuple(self._read(key, Promotion) for key in self._keys(_PROMOTIONS))

    def champion(self) -> Candidate | None:
        """Return the candidate of the last promotion, or None before the first."""
        keys = self._keys(_PROMOTIONS)
        return self.candidate(self._read(keys[-1], Promotion).candidate) if keys else None

    def candidate(self, number: int) -> Candidate:
        """Return a candidate by number.

        Raises:
            UsageError: there is no such candidate.
        """
        try:
            return self._read(_key(_CANDIDATES, number), Candidate)
        except FileNotFoundError:
            known = [int(key.rpartition("/")[2].removesuffix(".json")) for key in self._keys(_CANDIDATES)]
            raise UsageError(
                f"{self.location}: no student {number}; there are {', '.join(map(str, known)) or 'none'}"
            ) from None

    def add(self, fields: dict[str, Any]) -> Candidate:
        """Store a candidate under the next free number.

        Args:
            fields: fields of :class:`Candidate` without ``number`` and ``date``.
        """
        number = len(self._keys(_CANDIDATES)) + 1
        while True:
            made = Candidate(number=number, date=_now(), **fields)
            if self._files.create(_key(_CANDIDATES, number), _bytes(made)):
                return made
            number += 1

    def promote(self, candidate: Candidate, before: Candidate | None, kind: Literal["gate", "rollback"]) -> Promotion:
        """Make a candidate the champion if ``before`` still is.

        Args:
            before: champion at the time of the comparison, if any.

        Raises:
            UsageError: another student became champion meanwhile.
        """
        promotions = self._keys(_PROMOTIONS)
        was = before.number if before else None
        current = self._read(promotions[-1], Promotion).candidate if promotions else None
        made = Promotion(
            number=len(promotions) + 1,
            date=_now(),
            candidate=candidate.number,
            before=was,
            kind=kind,
            nonce=secrets.token_hex(8),
        )
        if current != was or not self._files.create(_key(_PROMOTIONS, made.number), _bytes(made)):
            raise UsageError(
                f"{self.location}: another student became champion meanwhile, where {_named(was)} was expected. "
                "See teacher-cache students, and measure against the new champion"
            )
        return made

    def earlier_champion(self, number: int | None = None) -> Candidate:
        """Return a candidate that was champion before the present one.

        Args:
            number: number of the candidate. Default: the previous champion; a second call after a rollback goes back
                one more.

        Raises:
            UsageError: there is no earlier champion, or this candidate never was champion.
        """
        promotions = self.promotions()
        if not promotions:
            raise UsageError(f"{self.location}: no student was promoted yet, so there is nothing to go back to")
        now = promotions[-1].candidate
        if number is None:
            line = _line(promotions)
            if len(line) < 2:
                raise UsageError(f"{self.location}: student {now} has no champion before it to go back to")
            number = line[-2]
        elif number == now:
            raise UsageError(f"{self.location}: student {number} is the champion already")
        elif number not in {promotion.candidate for promotion in promotions}:
            raise UsageError(f"{self.location}: student {number} never was champion; it has to pass its gate first")
        return self.candidate(number)

    def _keys(self, folder: str) -> list[str]:
        return [key for key in self._files.list(folder) if key.endswith(".json")]

    def _read(self, key: str, kind: type[_Record]) -> _Record:
        try:
            return kind.model_validate_json(self._files.read(key))
        except ValidationError as error:
            raise UsageError(f"{self.location}/{key}: {error}") from error


def _line(promotions: tuple[Promotion, ...]) -> list[int]:
    """Return the champions up to the present one; a rollback removes those after its candidate."""
    line: list[int] = []
    for promotion in promotions:
        if promotion.kind == "rollback" and promotion.candidate in line:
            del line[len(line) - line[::-1].index(promotion.candidate) :]
        else:
            line.append(promotion.candidate)
    return line


def _key(folder: str, number: int) -> str:
    return f"{folder}/{number:06d}.json"


def _bytes(record: BaseModel) -> bytes:
    return (record.model_dump_json(indent=2) + "\n").encode()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _named(number: int | None) -> str:
    return "none" if number is None else f"student {number}"
