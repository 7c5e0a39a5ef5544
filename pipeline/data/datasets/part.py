"""One part of a dataset: ``part=3/100`` is the third of a hundred equal parts, in the order of the rows."""

from __future__ import annotations

import re
from typing import NamedTuple, Self

from teacher_cache.pipeline.data.datasets.records import SampleSet, WholeList
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.safe_text import printable


class Part(NamedTuple):
    """The part with this number, from 1."""

    number: int
    parts: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``3/100``.

        Raises:
            UsageError: it names no part.
        """
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
        part = cls(int(match[1]), int(match[2])) if match else cls(0, 0)
        if not 1 <= part.number <= part.parts:
            raise UsageError(f"part={printable(text)!r} is no part; write 3/100 for the third of a hundred")
        return part

    def of(self, listed: SampleSet) -> SampleSet:
        """Return this part of a listed dataset. What was wrong with the listing is told with the first part.

        Raises:
            UsageError: there are fewer images than parts.
        """
        count = len(listed.samples)
        if count < self.parts:
            raise UsageError(f"{listed.kind}:{listed.root}: {count} images cannot be cut into {self.parts} parts")
        first, stop = (count * number // self.parts for number in (self.number - 1, self.number))
        problems = [*listed.problems] if self.number == 1 else []
        whole = WholeList(count, listed.num_captions, tuple(listed.problems))
        return SampleSet(listed.kind, listed.root, listed.samples[first:stop], problems, whole)
