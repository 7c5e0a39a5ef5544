"""Images drawn by a hash of their ids: ``holdout=10%`` makes some the split test, ``sample=5%`` keeps only some."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from fractions import Fraction

from teacher_cache.pipeline.data.datasets.records import Problem, Sample
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.safe_text import printable

HELD_OUT = "test"


def parse_share(setting: str, text: str) -> Fraction:
    """Return the number that ``10%`` or ``0.1`` stands for.

    Args:
        setting: name of the setting, for the error.

    Raises:
        UsageError: it is no number between 0 and 1.
    """
    match = re.fullmatch(r"(\d{1,2}(?:\.\d{1,9})?)(%?)", text, re.ASCII)
    share = Fraction(match[1]) / (100 if match[2] else 1) if match else Fraction(0)
    if not 0 < share < 1:
        raise UsageError(f"{setting}={printable(text)!r} is no share of the images; write for example {setting}=10%")
    return share


def with_drawn_split(sample: Sample, share: Fraction, where: str) -> Sample:
    """Return the sample in the split ``test`` or ``train``, drawn by its id alone: other samples do not matter.

    Raises:
        UsageError: the dataset names its split.
    """
    if sample.split:
        raise UsageError(
            f"{where}: holdout is for datasets without splits, and {printable(sample.sample_id)} is in the split "
            f"{printable(sample.split)!r}; leave holdout out"
        )
    return replace(sample, split=HELD_OUT if _drawn(sample.sample_id, share) else "train")


def in_sample(record: Sample | Problem, share: Fraction) -> bool:
    """Return whether a record is drawn: an image by its id alone, a problem by its place.

    The draw is independent of ``holdout``. A file of samples that is broken is always told.
    """
    if isinstance(record, Sample):
        return _drawn("sample " + record.sample_id, share)
    return record.kind == "broken-file" or _drawn("sample " + record.where, share)


def _drawn(text: str, share: Fraction) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < share * 2**64
