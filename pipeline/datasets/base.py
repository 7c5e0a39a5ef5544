"""What every dataset adapter yields: samples with their captions, and the problems met on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

ProblemKind = Literal[
    "missing-file",  # listed by the dataset, not on disk
    "unreadable-file",  # there, but its bytes cannot be read
    "no-caption",  # an image that no caption names
    "no-image",  # a caption whose image is not in the dataset
    "empty-caption",  # nothing left of a caption after stripping white space
    "duplicate-id",  # a second sample with a sample_id already taken; the first one stays
    "bad-record",  # a line, row or member that does not have the published form
]


@dataclass(frozen=True)
class Sample:
    """One image and its captions, as the published form of the dataset lists them.

    Attributes:
        sample_id: names the image for ever; unique in the dataset (a file name, a COCO id, a tar key).
        uri: path relative to the dataset's root, an absolute path, or a URL.
        split: the published name of the split, ``""`` when the form has none.
        captions: one or more, in published order, stripped of surrounding white space.
        offset: first byte of the image inside ``uri`` (a member of a tar), -1 for the whole file.
        length: bytes from ``offset``, -1 for the whole file.
    """

    sample_id: str
    uri: str
    split: str
    captions: tuple[str, ...]
    offset: int = -1
    length: int = -1


@dataclass(frozen=True)
class Problem:
    """Something of the dataset that gets no row in the cache, and why.

    Attributes:
        kind: one of the fixed kinds, so that problems can be counted.
        where: the sample_id, file, line or row concerned.
        detail: one sentence with what was found.
        lost_image: True when an image of the dataset gets no row because of this (a lost caption or a
            second listing of the same image loses none), so that images in = rows + lost images.
    """

    kind: ProblemKind
    where: str
    detail: str
    lost_image: bool


Record: TypeAlias = Sample | Problem


@dataclass
class SampleSet:
    """A dataset as read from disk: ``samples`` in row order, ``problems`` in the order met."""

    kind: str
    root: str
    samples: list[Sample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def num_captions(self) -> int:
        """Captions of all samples."""
        return sum(len(sample.captions) for sample in self.samples)


def clean_captions(sample_id: str, captions: Iterable[str]) -> tuple[tuple[str, ...], list[Problem]]:
    """Strip captions and drop the empty ones, each of which becomes a problem (the image is not lost)."""
    kept: list[str] = []
    problems: list[Problem] = []
    for number, caption in enumerate(captions):
        text = caption.strip()
        if text:
            kept.append(text)
        else:
            problems.append(Problem("empty-caption", sample_id, f"caption {number} is empty", lost_image=False))
    return tuple(kept), problems


def sample_or_problem(
    sample_id: str, uri: str, split: str, captions: Iterable[str], offset: int = -1, length: int = -1
) -> Iterator[Record]:
    """The sample with its clean captions, or a ``no-caption`` problem when none is left."""
    kept, problems = clean_captions(sample_id, captions)
    yield from problems
    if kept:
        yield Sample(sample_id, uri, split, kept, offset, length)
    else:
        yield Problem("no-caption", sample_id, f"{uri}: no caption names this image", lost_image=True)
