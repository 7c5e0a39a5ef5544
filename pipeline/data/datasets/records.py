"""Records of all dataset adapters: samples with their captions, and problems."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.safe_text import CONTROL, MAX_NAME_CHARACTERS, NOT_TEXT, printable, redact

# A teacher reads about 77 tokens, 300 characters. Byte-pair encoding is quadratic in the length of a word: 4 s for a
# word of this length, half an hour for 500,000.
MAX_CAPTION_CHARACTERS = 16_384

_KIND = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MOST_KINDS = 16

ProblemKind = Literal[
    "missing-file",  # listed by the dataset, not on disk
    "broken-file",  # a tar, Parquet or Arrow file of many samples that is missing, or broken before its end
    "unreadable-file",  # on disk, but its bytes cannot be read
    "no-caption",  # an image that no caption names
    "no-image",  # a caption whose image is not in the dataset
    "empty-caption",  # only white space
    "duplicate-id",  # a second sample with the same sample_id; the first one stays
    "bad-record",  # a line, row or member without the published form
]


@dataclass(frozen=True)
class Sample:
    """Image and its captions, as listed in the published dataset.

    Attributes:
        sample_id: permanent name of the image, unique in the dataset (a file name, a COCO id, a tar key).
        uri: path relative to the dataset's root, an absolute path, or a URL.
        split: published name of the split, ``""`` if there is none.
        captions: in published order, stripped of surrounding white space; may be empty.
        offset: first byte of the image inside ``uri`` (a member of a tar), -1 for the whole file.
        length: number of bytes from ``offset``, -1 for the whole file.
        sha256: digest of the image's bytes, if they were read while listing.
        kinds: kind of each caption, sorted, if the dataset names kinds; else empty.
    """

    sample_id: str
    uri: str
    split: str
    captions: tuple[str, ...]
    offset: int = -1
    length: int = -1
    sha256: str = ""
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """Part of the dataset that gets no row in the cache, and why.

    Attributes:
        kind: one of the fixed kinds, for counting.
        where: the sample_id, file, line or row concerned.
        detail: description in one sentence. Both are made printable.
        lost_image: True if an image gets no row because of this. A lost caption or a second listing loses no image, so
            that images = rows + lost images.
        lost_captions: number of captions that are left out although their image may have a row.
    """

    kind: ProblemKind
    where: str
    detail: str
    lost_image: bool
    lost_captions: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("where", "detail"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    def __str__(self) -> str:
        return f"{self.where}: {self.detail.removeprefix(f'{self.where}: ')}"


@dataclass(frozen=True)
class Uncaptioned(Problem):
    """Image that no caption names. ``teacher_cache.pipeline.data.datasets.adapters.adapter`` makes it one of the two.

    Attributes:
        sample: the image without captions, if such images are kept.
    """

    sample: Sample

    def problem(self) -> Problem:
        """Return the plain problem, if they are not."""
        return Problem(self.kind, self.where, self.detail, self.lost_image)


Record: TypeAlias = Sample | Problem


class WholeList(NamedTuple):
    """Counts of a listed dataset, and what was wrong with it."""

    images: int
    captions: int
    problems: tuple[Problem, ...]


@dataclass
class SampleSet:
    """Dataset as read from disk: ``samples`` in row order, ``problems`` in the order of reading.

    Attributes:
        whole: of a part: the list that it was cut from. Its problems are those of the first part, too.
    """

    kind: str
    root: str
    samples: list[Sample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    whole: WholeList | None = None

    @property
    def num_captions(self) -> int:
        """Number of captions of all samples."""
        return sum(len(sample.captions) for sample in self.samples)


def clean_captions(sample_id: str, captions: Iterable[str]) -> tuple[tuple[str, ...], list[Problem]]:
    """Strip captions, drop empty and overlong ones, and repair invalid UTF-8.

    Adapters decode with ``errors="surrogateescape"``. Here each invalid byte, and each lone surrogate from JSON's
    ``\\ud83d``, becomes U+FFFD; the caption stays and gets a ``bad-record`` problem. A caption of more than
    ``MAX_CAPTION_CHARACTERS`` is dropped with a ``bad-record`` problem. All other text stays unchanged, also line
    breaks, NUL, HTML entities and ``<end_of_text>``. None of these problems loses the image.
    """
    texts: list[str] = []
    problems: list[Problem] = []
    for number, caption in enumerate(captions):
        text, replaced = NOT_TEXT.subn("\ufffd", caption.strip())
        kind, detail = _caption_problem(number, text, replaced)
        if kind is not None:
            dropped = int(len(text) > MAX_CAPTION_CHARACTERS)
            problems.append(Problem(kind, sample_id, detail, lost_image=False, lost_captions=dropped))
        if text and len(text) <= MAX_CAPTION_CHARACTERS:
            texts.append(text)
    return tuple(texts), problems


def require_few_kinds(place: str, kinds: Collection[str]) -> None:
    """Check that captions are of at most 16 kinds: each takes a byte per image in a reader's memory.

    Raises:
        UsageError: they are of more; the message begins with ``place``.
    """
    if len(kinds) > _MOST_KINDS:
        raise UsageError(f"{place}: {len(kinds)} kinds of captions, and a cache has at most {_MOST_KINDS}; name fewer")


def require_kind_of_captions(kind: str) -> str:
    """Return a kind of captions if it is a word.

    Raises:
        UsageError: it is not.
    """
    if not _KIND.fullmatch(kind):
        raise UsageError(
            f"{printable(kind)!r} is no kind of captions: it is a word of letters, digits, - and _ such as real"
        )
    return kind


def kinds_and_places(option: str) -> dict[str, str]:
    """Return the places of captions by kind that an option names, ``real:alt,synthetic:blip``; {} if it names none.

    Raises:
        UsageError: only some of the places have a kind, or two have the same.
    """
    pairs = [part.partition(":") for part in option.split(",")]
    if not any(colon for _, colon, _ in pairs):
        return {}
    places = {require_kind_of_captions(kind): place for kind, colon, place in pairs if colon and place}
    if len(places) < len(pairs):
        raise UsageError(f"captions {printable(option)!r}: write each kind once, as KIND:PLACE,KIND:PLACE")
    return places


def _caption_problem(number: int, text: str, replaced: int) -> tuple[ProblemKind | None, str]:
    if not text:
        return "empty-caption", f"caption {number} is empty"
    if len(text) > MAX_CAPTION_CHARACTERS:
        return "bad-record", f"caption {number} has {len(text):,} characters, the most is {MAX_CAPTION_CHARACTERS:,}"
    if replaced:
        return "bad-record", f"caption {number} is not UTF-8; {replaced} byte(s) became U+FFFD"
    return None, ""


def sample_or_problem(
    sample_id: str,
    uri: str,
    split: str,
    captions: Iterable[str] | Mapping[str, Iterable[str]] | None,
    offset: int = -1,
    length: int = -1,
    sha256: str = "",
) -> Iterator[Record]:
    """Yield the sample with its clean captions, or a problem: no caption, or a name that no cache can hold.

    Args:
        captions: texts, or texts by kind. None: the image is meant to have none.
    """
    for what, text in (("sample_id", sample_id), ("path", uri), ("split", split)):
        unfit = _unfit_name(text)
        if unfit:
            detail = f"the {what} {printable(text)!r} holds {unfit}"
            yield Problem("bad-record", sample_id, detail, lost_image=True)
            return
    by_kind = captions if isinstance(captions, Mapping) else {"": captions or ()}
    cleaned = {kind: clean_captions(sample_id, by_kind[kind]) for kind in sorted(by_kind)}
    problems = [problem for _, of_kind in cleaned.values() for problem in of_kind]
    yield from problems
    texts = tuple(text for own, _ in cleaned.values() for text in own)
    kinds = tuple(kind for kind, (own, _) in cleaned.items() for _ in own if kind)
    sample = Sample(sample_id, uri, split, texts, offset, length, sha256, kinds)
    if texts or captions is None:
        yield sample
    else:
        empty = any(problem.kind == "empty-caption" for problem in problems)
        why = "its caption is empty" if empty else "no caption names this image"
        yield Uncaptioned("no-caption", sample_id, f"{uri}: {why}", lost_image=True, sample=sample)


def _unfit_name(text: str) -> str:
    """Return why a cache cannot hold a name, or an empty text if it can."""
    if len(text) > MAX_NAME_CHARACTERS:
        return f"{len(text):,} characters, the most is {MAX_NAME_CHARACTERS:,}"
    if NOT_TEXT.search(text):
        return "bytes that are not UTF-8; rename the file"
    if CONTROL.search(text):
        return "a NUL, a line break or another control character; rename the file"
    if redact(text) != text:
        return (
            "a password, a signature or a key, which a cache would keep for as long as it lives; "
            "name the file without it (credentials belong into the environment), or download it"
        )
    return ""


@dataclass(frozen=True)
class Listing:
    """Images of a dataset with their classes.

    Attributes:
        images: images without captions, in order.
        problems: problems of the same split, and of whole tars.
        keys: class of each image, by the dataset's own key: a folder name or a number.
        own: the dataset's own class names by key, in its order.
        named: whether these are names, not only numbers.
        templates: the dataset's own templates, if any.
        order_of: prompt set whose class names are in the dataset's order, if known; ``any`` if every list of names is
            taken to be in this order.
    """

    where: str
    images: list[Sample]
    keys: list[str]
    problems: list[Problem]
    own: dict[str, str]
    named: bool
    templates: tuple[str, ...] = ()
    order_of: str = ""
