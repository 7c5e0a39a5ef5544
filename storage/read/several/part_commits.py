"""Commit records of several parts that are read as one cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

from teacher_cache.storage.format.commit_records import CommitRecords
from teacher_cache.storage.format.commits import ChunkCommit, ChunkRef, ObjectDigest, QuarantinedRow
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.read.several.parts import Parts


class PartCommits(Mapping[ChunkRef, ChunkCommit]):
    """Commit records of several parts, as one cache's: with the chunks and rows of all parts.

    Args:
        parts: The parts.
        records: The commit records of each.
    """

    def __init__(self, parts: Parts, records: Sequence[CommitRecords]) -> None:
        self._parts, self.records = parts, records

    def digest(self, ref: ChunkRef, array: str) -> ObjectDigest:
        """See :meth:`teacher_cache.storage.format.commit_records.CommitRecords.digest`."""
        number, own = self._parts.local(ref)
        return self.records[number].digest(own, array)

    def quarantined(self, ref: ChunkRef) -> tuple[QuarantinedRow, ...]:
        """See :meth:`teacher_cache.storage.format.commit_records.CommitRecords.quarantined`."""
        number, own = self._parts.local(ref)
        return self._moved(number, ref.tower, self.records[number].quarantined(own))

    def with_quarantined(self) -> Iterator[ChunkCommit]:
        """See :meth:`teacher_cache.storage.format.commit_records.CommitRecords.with_quarantined`."""
        for number, records in enumerate(self.records):
            for commit in records.with_quarantined():
                yield self._as_one(number, commit)

    def __getitem__(self, ref: ChunkRef) -> ChunkCommit:
        if ref not in self:
            raise KeyError(ref)
        number, own = self._parts.local(ref)
        return self._as_one(number, self.records[number][own])

    def __contains__(self, ref: object) -> bool:
        if not isinstance(ref, ChunkRef) or not 0 <= ref.chunk < self._parts.places(ref.tower).chunks:
            return False
        number, own = self._parts.local(ref)
        return own in self.records[number]

    def __iter__(self) -> Iterator[ChunkRef]:
        for tower in get_args(Tower):
            places = self._parts.places(tower)
            yield from map(places.ref, range(places.views * places.chunks))

    def __len__(self) -> int:
        return sum(map(len, self.records))

    def _as_one(self, number: int, commit: ChunkCommit) -> ChunkCommit:
        ref = self._parts.of_part(number, commit.ref)
        rows, quarantined = self._parts.rows(ref), self._moved(number, commit.tower, commit.quarantined)
        moved = {"chunk": ref.chunk, "rows": (rows.start, rows.stop), "quarantined": quarantined}
        return commit.model_copy(update=moved)

    def _moved(self, number: int, tower: Tower, rows: Sequence[QuarantinedRow]) -> tuple[QuarantinedRow, ...]:
        first = int(self._parts.first_rows(tower)[number])
        return tuple(row.model_copy(update={"row": row.row + first}) for row in rows)
