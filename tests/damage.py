"""Ways to damage a cache, seeded: for tests that find it, refuse to read it, and mend it.

Each takes the cache's folder and others to steal from, damages one thing, and says which objects verify has to name
and which rows reading has to refuse.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from teacher_cache.storage.check.verify import sound_manifest
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.commits import ChunkRef, all_chunks
from teacher_cache.storage.format.journal import ChunkCost, note_key
from teacher_cache.storage.format.layout import Layout
from teacher_cache.storage.format.manifest import BACKUP_KEY, MANIFEST_KEY, CacheManifest
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.writer import EmbeddingWriter


@dataclass(frozen=True)
class Others:
    """Caches to steal from, of the layout of the one to be damaged and by the same encoder.

    Attributes:
        foreign: of other images and captions.
        older: the cache itself as it was once, each chunk with other last bits and commits that fit them.
    """

    foreign: Path
    older: Path


@dataclass(frozen=True)
class Damage:
    """What was done.

    Attributes:
        named: objects that verify has to name.
        refused: (chunk, array) that no reader may return; None for every chunk.
    """

    named: set[str]
    refused: set[tuple[ChunkRef, str]] | None = field(default_factory=set)


def make_older(cache: Path, older: Path) -> Path:
    """A copy in which every chunk was made with norms one float32 away."""
    shutil.copytree(cache, older)
    writer, reader = EmbeddingWriter(str(older)), EmbeddingReader(str(cache))
    lost = {row.row: row for row in reader.quarantined}
    writer.replaces.update(all_chunks(writer.manifest.layout))
    for ref in all_chunks(writer.manifest.layout):
        rows = ref.rows(writer.manifest.layout)
        here = [lost[row] for row in rows if row in lost and ref.tower == "image"]
        arrays = reader.stored_chunk(ref)
        arrays["norm"] = np.nextafter(arrays["norm"], np.float32(np.inf))
        writer.write(ref, arrays, here, cost=ChunkCost(rows=len(rows), seconds=1.0))
    writer.seal()
    return older


# one file of a cache, changed in place -------------------------------------------------------------------------------


def _flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


_IN_PLACE: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "flipped-bit": _flip,
    "truncated": lambda rng, data: data[: rng.randrange(1, len(data))],
    "emptied": lambda rng, data: b"",
    "appended-byte": lambda rng, data: data + bytes([rng.choice([10, 32, rng.randrange(256)])]),
}

SCALES: dict[str, Callable[[str], bool]] = {
    "image-scale": lambda key: key.startswith("targets.zarr/image/scale/c/"),
    "text-scale": lambda key: key.startswith("targets.zarr/text/scale/c/"),
}
"""Only in a cache of int8."""

FILES: dict[str, Callable[[str], bool]] = {
    "image-embedding": lambda key: key.startswith("targets.zarr/image/embedding/c/"),
    "image-norm": lambda key: key.startswith("targets.zarr/image/norm/c/"),
    "image-view": lambda key: key.startswith("targets.zarr/image/view/c/"),
    "text-embedding": lambda key: key.startswith("targets.zarr/text/embedding/c/"),
    "text-norm": lambda key: key.startswith("targets.zarr/text/norm/c/"),
    "commit": lambda key: key.startswith("commits/"),
    "manifest": lambda key: key == MANIFEST_KEY,
    "backup": lambda key: key == BACKUP_KEY,
    "parquet": lambda key: key.endswith(".parquet"),
    "zarr-json": lambda key: key.endswith("zarr.json"),
    "note": lambda key: key.startswith("journal/"),
}


def _keys(cache: Path) -> list[str]:
    return sorted(path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file())


def _layout_of(cache: Path) -> Layout:
    return sound_manifest(open_files(cache))[0].layout


def _layout_refs(cache: Path) -> list[ChunkRef]:
    return all_chunks(_layout_of(cache))


def _refused_by(layout: Layout, key: str) -> set[tuple[ChunkRef, str]] | None:
    """What cannot be read any more when this object is not as it was; None for all of the cache."""
    if key.startswith("commits/") or key == MANIFEST_KEY:
        return None
    objects = [(ref, *item) for ref in all_chunks(layout) for item in ref.object_keys(layout).items()]
    # embeddings are nothing without their scales
    return {(ref, "embedding" if name == "scale" else name) for ref, name, other in objects if other == key}


def _one_file(kind: str, files: str) -> Callable[[random.Random, Path, Others], Damage]:
    def do(rng: random.Random, cache: Path, others: Others) -> Damage:
        layout = _layout_of(cache)
        key = rng.choice([key for key in _keys(cache) if {**FILES, **SCALES}[files](key)])
        path = cache / key
        if kind == "deleted":
            path.unlink()
        else:
            data = path.read_bytes()
            path.write_bytes(_IN_PLACE[kind](rng, data))
            if key.endswith(".json") and path.read_bytes().strip() == data.strip():
                return Damage({key})  # white space behind JSON: verify names it, readers read the same
        return Damage({key}, _refused_by(layout, key))

    return do


# several objects -----------------------------------------------------------------------------------------------------


def _swap(cache: Path, a: str, b: str) -> None:
    first, second = (cache / a).read_bytes(), (cache / b).read_bytes()
    assert first != second
    (cache / a).write_bytes(second)
    (cache / b).write_bytes(first)


def _swapped(*names: str) -> Callable[[random.Random, Path, Others], Damage]:
    """An object of two chunks of one tower, each in the place of the other: sound by their own checksums."""

    def do(rng: random.Random, cache: Path, others: Others) -> Damage:
        layout = _layout_of(cache)
        tower, name = rng.choice(["image", "text"]), rng.choice(names)
        a, b = rng.sample([ref for ref in all_chunks(layout) if ref.tower == tower], 2)
        left, right = a.object_keys(layout)[name], b.object_keys(layout)[name]
        _swap(cache, left, right)
        read_as = "embedding" if name == "scale" else name
        return Damage({left, right}, {(a, read_as), (b, read_as)})

    return do


def _swapped_towers(rng: random.Random, cache: Path, others: Others) -> Damage:
    refs = _layout_refs(cache)
    name = rng.choice(["embedding", "norm"])
    images, texts = ([ref for ref in refs if ref.tower == tower] for tower in ("image", "text"))
    a = rng.choice(images)
    here = (cache / a.object_keys()[name]).read_bytes()
    b = rng.choice([ref for ref in texts if (cache / ref.object_keys()[name]).read_bytes() != here])
    _swap(cache, a.object_keys()[name], b.object_keys()[name])
    return Damage({a.object_keys()[name], b.object_keys()[name]}, {(a, name), (b, name)})


def _swapped_commits(rng: random.Random, cache: Path, others: Others) -> Damage:
    a, b = rng.sample(_layout_refs(cache), 2)
    _swap(cache, a.commit_key, b.commit_key)
    return Damage({a.commit_key, b.commit_key}, None)


def _swapped_chunks_and_commits(rng: random.Random, cache: Path, others: Others) -> Damage:
    """Two chunks of a tower changed places as a whole: objects, commits and notes."""
    refs = _layout_refs(cache)
    a, b = rng.sample([ref for ref in refs if ref.tower == "text"], 2)
    layout = _layout_of(cache)
    for left, right in zip(a.object_keys(layout).values(), b.object_keys(layout).values(), strict=True):
        _swap(cache, left, right)
    _swap(cache, a.commit_key, b.commit_key)
    return Damage({a.commit_key, b.commit_key}, None)


def _copy(source: Path, cache: Path, keys: list[str]) -> None:
    for key in keys:
        data = (source / key).read_bytes()
        (cache / key).write_bytes(data)


def _stolen(whose: str, *names: str) -> Callable[[random.Random, Path, Others], Damage]:
    """Objects of a chunk as they are in another cache; without names all of them and their commit, sound together."""

    def do(rng: random.Random, cache: Path, others: Others) -> Damage:
        layout = _layout_of(cache)
        ref = rng.choice(all_chunks(layout))
        keys = ref.object_keys(layout)
        stolen = [keys[name] for name in names] or [ref.commit_key, *keys.values()]
        _copy(getattr(others, whose), cache, stolen)
        if not names:
            return Damage({ref.commit_key}, None)
        return Damage(set(stolen), {(ref, "embedding" if name == "scale" else name) for name in names})

    return do


def _unsealed_manifest(rng: random.Random, cache: Path, others: Others) -> Damage:
    """The manifest as it was before the seal, in one place or in both."""
    manifest = CacheManifest.from_bytes((cache / MANIFEST_KEY).read_bytes(), str(cache))
    for key in rng.choice([[MANIFEST_KEY], [MANIFEST_KEY, BACKUP_KEY]]):
        (cache / key).write_bytes(manifest.model_copy(update={"seal": None}).to_bytes())
    return Damage({MANIFEST_KEY}, None)


def _stolen_manifest(whose: str) -> Callable[[random.Random, Path, Others], Damage]:
    """A manifest that was sealed with other commits, in the place of either file."""

    def do(rng: random.Random, cache: Path, others: Others) -> Damage:
        key = rng.choice([MANIFEST_KEY, BACKUP_KEY])
        _copy(getattr(others, whose), cache, [key])
        return Damage({key}, None if key == MANIFEST_KEY else set())

    return do


def _swapped_notes(rng: random.Random, cache: Path, others: Others) -> Damage:
    a, b = rng.sample(_layout_refs(cache), 2)
    _swap(cache, note_key(a.name), note_key(b.name))
    return Damage({note_key(a.name), note_key(b.name)})


KINDS: dict[str, Callable[[random.Random, Path, Others], Damage]] = {
    **{
        f"{kind}:{files}": _one_file(kind, files)
        for kind in (*_IN_PLACE, "deleted")
        for files in FILES
        if (kind, files) != ("deleted", "note")  # observation only; a note that is not there costs nothing
    },
    "swapped-chunks": _swapped("embedding", "norm"),
    "swapped-towers": _swapped_towers,
    "swapped-commits": _swapped_commits,
    "swapped-chunks-and-commits": _swapped_chunks_and_commits,
    "foreign-chunk-and-commit": _stolen("foreign"),
    "foreign-chunk": _stolen("foreign", "embedding"),
    "rolled-back-chunk-and-commit": _stolen("older"),
    "rolled-back-object": _stolen("older", "norm"),
    "unsealed-manifest": _unsealed_manifest,
    "older-manifest": _stolen_manifest("older"),
    "foreign-manifest": _stolen_manifest("foreign"),
    "swapped-notes": _swapped_notes,
}


SCALE_KINDS: dict[str, Callable[[random.Random, Path, Others], Damage]] = {
    **{f"{kind}:{files}": _one_file(kind, files) for kind in (*_IN_PLACE, "deleted") for files in SCALES},
    "swapped-scales": _swapped("scale"),
    "foreign-scale": _stolen("foreign", "scale"),
}
"""What can befall a cache of int8 besides."""


def damage(kind: str, seed: int, cache: Path, others: Others) -> Damage:
    """Do one kind of damage at a seeded place."""
    return {**KINDS, **SCALE_KINDS}[kind](random.Random(f"{kind} {seed}"), cache, others)
