"""Several sealed caches of one identity, read as one: the parts of a dataset, in the order of their names.

A part keeps its own chunks, the last of which may be short. So a row has two numbers: readers count the rows of all
parts one after another; its place counts the rows of all chunks, the padding of short ones included. A single cache
is its own only part, and the two are equal.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from teacher_cache.storage.errors import CacheMismatchError, CacheNotFoundError, UsageError
from teacher_cache.storage.files.location import in_parallel, is_several, open_files
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.files.transient import read_error
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.format.layout import Layout, Tower
from teacher_cache.storage.format.manifest import MANIFEST_KEY, CacheManifest
from teacher_cache.storage.format.manifest_file import read_manifest, require_sealed
from teacher_cache.storage.observe.logs import say
from teacher_cache.storage.observe.quantities import counted
from teacher_cache.storage.read.rows import RowPlaces
from teacher_cache.storage.read.several.joined_manifest import joined_manifest, missing_parts

_DIGITS = re.compile(r"(\d+)")
_NAMED = 10


def part_locations(location: str | os.PathLike[str]) -> list[str]:
    """Return the locations that a pattern names, in the order of their rows: 9 before 10. A plain one names itself.

    Raises:
        CacheNotFoundError: No folder matches.
        UsageError: A pattern is in the folder's name, not in the last name.
    """
    location = os.fspath(location)
    if not is_several(location):
        return [location]
    above, slash, pattern = location.rstrip("/").rpartition("/")
    if "*" in above:
        raise UsageError(f"{location}: a * may stand for parts in one folder, as in parts/*.cache, not for the folder")
    folder = above + slash
    names = open_files(folder or ".").folders()
    matching = re.compile(".*".join(map(re.escape, pattern.split("*"))))
    matched = [name for name in names if matching.fullmatch(name) and (not name.startswith(".") or pattern[0] == ".")]
    if not matched:
        raise CacheNotFoundError(f"{location}: none of the {len(names)} folders in {folder or '.'} has such a name")
    return [f"{folder}{name}" for name in sorted(matched, key=_in_order)]


@cache
def _say_once(line: str) -> None:
    say(line)


def _in_order(name: str) -> list[Any]:
    return [int(part) if part.isdecimal() else part for part in _DIGITS.split(name)]


@dataclass(frozen=True)
class Part:
    """One sealed cache."""

    files: CacheFiles
    manifest: CacheManifest


class Parts:
    """One sealed cache, or several that are read as one.

    Args:
        location: Folder, URL, or pattern of the parts' names.
        members: The parts, in the order of their rows.

    Attributes:
        location, members: As above.
        manifest: Manifest of the cache; of several parts one that stands for all. It names the digest of each.
        layout: Layout of the manifest. Its rows are those of all parts.

    Raises:
        CacheMismatchError: The parts are not of one identity and layout, or one is there twice.
    """

    def __init__(self, location: str, members: Sequence[Part]) -> None:
        self.location, self.members = location, tuple(members)
        manifests = {part.files.location: part.manifest for part in members}
        self.manifest = joined_manifest(manifests) if len(members) > 1 else members[0].manifest
        self.layout = self.manifest.layout
        self._rows, self._chunks = (
            {
                tower: np.cumsum([0, *(count(part.manifest.layout, tower) for part in self.members)])
                for tower in get_args(Tower)
            }
            for count in (Layout.rows, Layout.chunks)
        )

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def _places(self) -> dict[Tower, RowPlaces]:
        return {tower: self._places_of(tower) for tower in get_args(Tower)}

    def places(self, tower: Tower) -> RowPlaces:
        """Return the places of a tower's rows."""
        return self._places[tower]

    def _places_of(self, tower: Tower) -> RowPlaces:
        rows, chunks, size = self._rows[tower], self._chunks[tower], self.layout.chunk_rows(tower)
        views = self.layout.views if tower == "image" else 1
        places = RowPlaces(self.location, tower, int(rows[-1]), size, int(chunks[-1]), views)
        if len(self) == 1:
            return places
        return replace(places, firsts=rows[:-1], shifts=chunks[:-1] * size - rows[:-1])

    def first_rows(self, tower: Tower) -> NDArray[np.int64]:
        """Return the first row of each part, and the number of all rows, (parts + 1,) int64."""
        return self._rows[tower]

    def local(self, ref: ChunkRef) -> tuple[int, ChunkRef]:
        """Return the number of the part that holds a chunk, and the chunk in it."""
        chunks = self._chunks[ref.tower]
        number = int(np.searchsorted(chunks, ref.chunk, side="right")) - 1
        return number, ref._replace(chunk=ref.chunk - int(chunks[number]))

    def of_part(self, number: int, ref: ChunkRef) -> ChunkRef:
        """Return a part's chunk as one of all chunks."""
        return ref._replace(chunk=ref.chunk + int(self._chunks[ref.tower][number]))

    def rows(self, ref: ChunkRef) -> range:
        """Return the rows of a chunk."""
        number, own = self.local(ref)
        first, rows = int(self._rows[ref.tower][number]), own.rows(self.members[number].manifest.layout)
        return range(rows.start + first, rows.stop + first)


def open_parts(location: str, manifest_digest: str | None = None) -> Parts:
    """Open a sealed cache, or the parts that a pattern names. Reads their manifests only.

    Args:
        manifest_digest: Digest that the manifest, of several parts the one for all, must have.

    Raises:
        CacheNotFoundError, CacheFormatError, CacheCorruptError: There is no cache, or it cannot be read.
        CacheIncompleteError: One is not sealed; the message says how many chunks are committed.
        CacheMismatchError: The manifest has another digest, or the parts do not belong together.
    """
    files = [open_files(name) for name in part_locations(location)]
    parts = Parts(location, [*map(Part, files, in_parallel(files[0], _sealed_manifest, files))])
    if missing := missing_parts([part.manifest for part in parts.members]) if is_several(location) else []:
        names = ", ".join(map(str, missing[:_NAMED])) + ", ..." * (len(missing) > _NAMED)
        _say_once(f"{location}: {counted(len(missing), 'part')} of the dataset missing: {names}")
    if manifest_digest not in (None, parts.manifest.digest):
        raise CacheMismatchError(
            f"{location}: its manifest is {parts.manifest.digest[:12]}, {str(manifest_digest)[:12]} was asked for. It "
            f"is another cache{', has other parts' if len(parts) > 1 else ''}, or a repair has changed it."
        )
    return parts


def named_manifest(location: str) -> CacheManifest:
    """Return the manifest of a cache, sealed or not; for a pattern that of its parts, which must be sealed.

    Raises:
        CacheError: As :func:`open_parts`.
    """
    return open_parts(location).manifest if is_several(location) else read_manifest(open_files(location))


def _sealed_manifest(files: CacheFiles) -> CacheManifest:
    try:
        manifest = read_manifest(files)
    except OSError as error:
        raise read_error(f"{files.location}/{MANIFEST_KEY}", error) from error
    require_sealed(files, manifest)
    return manifest
