"""State of several caches that are read as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from teacher_cache.storage.format.commits import QuarantinedRow
from teacher_cache.storage.look.info import CacheInfo, CacheProblems, Coverage, describe_cache, list_problems
from teacher_cache.storage.read.several.parts import open_parts

_SUMS = ("chunks", "chunks_committed", "target_bytes", "encode_seconds", "notes", "notes_read")


def describe_parts(location: str) -> CacheInfo:
    """Return the state of the finished caches that a pattern names, as one.

    Raises:
        CacheIncompleteError: one is not finished. ``teacher-cache info`` of their folder shows how far each is.
        CacheError: as :func:`teacher_cache.storage.read.several.parts.open_parts`.
    """
    parts = open_parts(location)
    infos = [describe_cache(part.files.location) for part in parts.members]
    manifest, firsts = parts.manifest, parts.first_rows("image").tolist()
    seal, first = manifest.seal, infos[0]
    assert seal is not None  # open_parts refuses unfinished caches
    quarantine = [info.quarantine for info in infos if info.quarantine is not None]
    changed = {
        "location": location,
        "parts": len(parts),
        "manifest_digest": manifest.digest,
        "identity_digest": manifest.identity_digest,
        "identity": manifest.identity,
        "layout": manifest.layout,
        "seal": manifest.seal,
        "dataset": manifest.source.dataset,
        "image_root": manifest.source.image_root,
        "coverage": _coverage([info.coverage for info in infos]),
        "images_encoded": seal.images_encoded,
        "images_quarantined": seal.images_quarantined,
        "quarantine": dict(sum(map(Counter, quarantine), Counter())) if len(quarantine) == len(infos) else None,
        "quarantined_rows": tuple(_moved(infos, firsts)),
        "lost_images": manifest.lost_images,
        "problems": manifest.problems,
        "images_per_second": None,
        "captions_per_second": None,
        "made_with": manifest.made_with,
    }
    sums = {name: sum(getattr(info, name) for info in infos) for name in _SUMS}
    return first.model_copy(update=changed | sums)


def list_problems_of_parts(location: str) -> CacheProblems:
    """Return all problems of the caches that a pattern names. Raises as :func:`describe_parts`."""
    parts = [list_problems(part.files.location) for part in open_parts(location).members]
    return CacheProblems(location=location, problems=tuple(problem for part in parts for problem in part.problems))


def _coverage(parts: Sequence[Sequence[Coverage]]) -> tuple[Coverage, ...]:
    counts = ("chunks", "chunks_committed", "rows", "rows_committed")
    return tuple(
        views[0].model_copy(update={name: sum(getattr(view, name) for view in views) for name in counts})
        for views in zip(*parts, strict=True)
    )


def _moved(infos: Sequence[CacheInfo], firsts: Sequence[int]) -> Iterable[QuarantinedRow]:
    for info, first in zip(infos, firsts, strict=False):
        for row in info.quarantined_rows:
            yield row.model_copy(update={"row": row.row + first})
