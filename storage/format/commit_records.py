"""Commit records of a cache in memory, about two hundred bytes each.

A reader keeps them while it is open, in each process that reads. As Python objects they would take 3.5 kB each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.files.location import in_parallel
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.format.commits import (
    ChunkCommit,
    ChunkRef,
    ObjectDigest,
    QuarantinedRow,
    all_chunks,
    commits_sha256,
    read_commit,
)
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.format.manifest import CacheManifest


class CommitRecords(Mapping[ChunkRef, ChunkCommit]):
    """Commit records of one cache, in the order of :func:`teacher_cache.storage.format.commits.all_chunks`.

    Args:
        manifest: manifest of the cache, against which each record is proven.
    """

    def __init__(self, manifest: CacheManifest) -> None:
        self._manifest = manifest
        self._tables: dict[Tower, NDArray[Any]] = {}
        self._objects: dict[Tower, dict[str, int]] = {}
        self._quarantined: dict[ChunkRef, tuple[QuarantinedRow, ...]] = {}
        for tower in get_args(Tower):
            objects = {name: at for at, name in enumerate(ChunkRef(tower, 0, 0).object_keys(manifest.layout))}
            self._objects[tower] = objects
            self._tables[tower] = np.zeros((self._views(tower), manifest.layout.chunks(tower)), _row(len(objects)))

    def read(self, files: CacheFiles) -> str:
        """Read all commits; return the sha256 over key and bytes of each, in the order of the chunks.

        Each record is one request; in an object store many run at once.

        Raises:
            CacheCorruptError: a record is damaged or belongs elsewhere.
        """
        refs = all_chunks(self._manifest.layout)
        commits = in_parallel(files, partial(read_commit, files, self._manifest), refs)
        return commits_sha256(self._add(commit) for commit in commits if commit is not None)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all objects."""
        return sum(int(table["nbytes"].sum()) for table in self._tables.values())

    def digest(self, ref: ChunkRef, array: str) -> ObjectDigest:
        """Return the digests of one object of a chunk.

        Raises:
            KeyError: there is no record of this chunk, or no such array.
        """
        record, at = self._record(ref), self._objects[ref.tower][array]
        sha256 = record["sha256"][at].tobytes().hex()
        return ObjectDigest(nbytes=int(record["nbytes"][at]), crc32c=int(record["crc32c"][at]), sha256=sha256)

    def quarantined(self, ref: ChunkRef) -> tuple[QuarantinedRow, ...]:
        """Return the rows of a chunk that have no embedding."""
        return self._quarantined.get(ref, ())

    def with_quarantined(self) -> Iterator[ChunkCommit]:
        """Return the records that name quarantined rows."""
        return (self[ref] for ref in self._quarantined)

    def __getitem__(self, ref: ChunkRef) -> ChunkCommit:
        record, rows = self._record(ref), ref.rows(self._manifest.layout)
        return ChunkCommit(
            tower=ref.tower,
            view=ref.view,
            chunk=ref.chunk,
            rows=(rows.start, rows.stop),
            encoder_digest=self._manifest.identity.encoder_digest,
            rows_sha256=record["rows_sha256"].tobytes().hex(),
            objects={name: self.digest(ref, name) for name in self._objects[ref.tower]},
            quarantined=self.quarantined(ref),
        )

    def __contains__(self, ref: object) -> bool:
        if not isinstance(ref, ChunkRef):
            return False
        table = self._tables[ref.tower]
        is_one = 0 <= ref.view < table.shape[0] and 0 <= ref.chunk < table.shape[1]
        return is_one and bool(table["committed"][ref.view, ref.chunk])

    def __iter__(self) -> Iterator[ChunkRef]:
        return (ref for ref in all_chunks(self._manifest.layout) if ref in self)

    def __len__(self) -> int:
        return sum(int(table["committed"].sum()) for table in self._tables.values())

    def _record(self, ref: ChunkRef) -> Any:
        if ref not in self:
            raise KeyError(ref)
        return self._tables[ref.tower][ref.view, ref.chunk]

    def _views(self, tower: Tower) -> int:
        return self._manifest.layout.views if tower == "image" else 1

    def _add(self, commit: ChunkCommit) -> ChunkCommit:
        ref = commit.ref
        digests = [commit.objects[name] for name in self._objects[ref.tower]]
        self._tables[ref.tower][ref.view, ref.chunk] = (
            True,
            bytes.fromhex(commit.rows_sha256),
            [digest.nbytes for digest in digests],
            [digest.crc32c for digest in digests],
            [bytes.fromhex(digest.sha256) for digest in digests],
        )
        if commit.quarantined:
            self._quarantined[ref] = commit.quarantined
        return commit


def _row(objects: int) -> np.dtype[Any]:
    """Return the dtype of one record. Digests are void bytes: numpy's byte strings would lose trailing zeros."""
    digests = [("nbytes", "<i8", (objects,)), ("crc32c", "<u4", (objects,)), ("sha256", "V32", (objects,))]
    return np.dtype([("committed", "?"), ("rows_sha256", "V32"), *digests])
