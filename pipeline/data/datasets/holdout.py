"""Images held out of training: ``holdout=10%`` makes a tenth of the images the split test, the others train."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from fractions import Fraction

from teacher_cache.pipeline.data.datasets.records import Sample
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.safe_text import printable

HELD_OUT = "test"


def held_out_share(text: str) -> Fraction:
    """Return the number that ``10%`` or ``0.1`` stands for.

    Raises:
        UsageError: it is no number between 0 and 1.
    """
    match = re.fullmatch(r"(\d{1,2}(?:\.\d{1,9})?)(%?)", text, re.ASCII)
    share = Fraction(match[1]) / (100 if match[2] else 1) if match else Fraction(0)
    if not 0 < share < 1:
        raise UsageError(f"holdout={printable(text)!r} is no share of the images; write for example holdout=10%")
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
    drawn = int.from_bytes(hashlib.sha256(sample.sample_id.encode()).digest()[:8])
    return replace(sample, split=HELD_OUT if drawn < share * 2**64 else "train")
