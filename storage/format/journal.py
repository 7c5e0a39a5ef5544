"""The journal: when, where and how fast each chunk was made. No row depends on it.

It is separate from the commits, so that the rest of a cache is the same, byte for byte, on every machine and after
every interruption. A note carries its own digest and that of its commit: with them, ``verify`` names a chunk that was
replaced by an older copy.
"""

from __future__ import annotations

import hashlib
import json
import socket
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, Field

from teacher_cache.storage.errors import CacheAccessError, CacheCorruptError
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.format.commits import ChunkCommit, ChunkRef
from teacher_cache.storage.format.identity import canonical_json, with_digest, without_digest

JOURNAL = "journal"


class ChunkCost(BaseModel):
    """The cost of one chunk."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    rows: int = Field(ge=0)
    encoded_rows: int | None = Field(
        None, ge=0, description="Rows that the teacher encoded; others were copied. Default: all."
    )
    seconds: float = Field(ge=0, description="Wall clock from first decode to commit.")
    decode_wait_seconds: float = Field(0.0, ge=0, description="Seconds that the teacher waited for pixels or tokens.")
    teacher_seconds: float = Field(0.0, ge=0, description="Seconds of the forward pass.")
    write_seconds: float = Field(0.0, ge=0, description="Digest, write, sync and commit.")
    device: str = ""
    host: str = Field(default_factory=socket.gethostname)
    finished_at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


class ChunkNote(ChunkCost):
    """The stored cost of a chunk, with the names of chunk and commit."""

    chunk: str = Field(description="ChunkRef.name.")
    commit_sha256: str = Field(description="Digest of the commit record that was written just before.")

    def is_of(self, commit: ChunkCommit) -> bool:
        """Return whether the note belongs to exactly this record."""
        return self.commit_sha256 == _commit_sha256(commit)


def note_key(name: str) -> str:
    """Return the key of the note of a chunk, by ``ChunkRef.name``."""
    return f"{JOURNAL}/{name}.json"


def write_cost(files: CacheFiles, ref: ChunkRef, cost: ChunkCost, commit: ChunkCommit) -> None:
    """Write the cost of a chunk after its commit. Encoding the chunk again replaces the note."""
    note = ChunkNote(**cost.model_dump(), chunk=ref.name, commit_sha256=_commit_sha256(commit))
    files.write(note_key(ref.name), _note_bytes(note.model_dump(mode="json", exclude_none=True)))


def read_note(files: CacheFiles, name: str) -> ChunkNote:
    """Return the note of one chunk.

    Raises:
        FileNotFoundError: there is none.
        CacheCorruptError: it is damaged, or belongs to another chunk.
    """
    where = f"{files.location}/{note_key(name)}"
    data = files.read(note_key(name))
    try:
        fields = without_digest(json.loads(data))
        # bytes, not values: different white space or number formats are damage too
        if data != _note_bytes(fields):
            raise CacheCorruptError(f"{where}: not the bytes that were written. {_REMEDY}")
        note = ChunkNote.model_validate(fields)
    except (ValueError, RecursionError) as error:  # pydantic's error is a ValueError
        raise CacheCorruptError(f"{where}: not a journal note ({error}). {_REMEDY}") from error
    if note.chunk != name:
        raise CacheCorruptError(f"{where}: holds the note of {note.chunk}, not of {name}. {_REMEDY}")
    return note


def read_cost(files: CacheFiles, name: str) -> ChunkCost | None:
    """Return the cost of one chunk, or None if its note is damaged or cannot be read."""
    try:
        return read_note(files, name)
    except ConnectionError:
        raise  # the store, not this note
    except (CacheCorruptError, CacheAccessError, OSError):
        return None


def _commit_sha256(commit: ChunkCommit) -> str:
    return hashlib.sha256(commit.to_bytes()).hexdigest()


def _note_bytes(fields: dict[str, object]) -> bytes:
    return canonical_json(with_digest(fields)) + b"\n"


_REMEDY = "No row depends on it; teacher-cache repair CACHE drops it."
