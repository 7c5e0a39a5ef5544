"""The journal: when, where and how fast each chunk was made. Observation only; never read to decide anything.

Kept apart from commits so that all the rest of a cache is the same, byte for byte, whoever made it and
however often the work was interrupted. A note carries its own digest and that of the commit that it is about, which
is how ``verify`` can name a chunk that was put back in an older state.
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

__all__ = ["JOURNAL", "ChunkCost", "ChunkNote", "note_key", "read_cost", "read_note", "write_cost"]

JOURNAL = "journal"


class ChunkCost(BaseModel):
    """What one chunk took."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    rows: int = Field(ge=0)
    encoded_rows: int | None = Field(
        None, ge=0, description="Of those, that the teacher saw, where others were copied; left out: all of them."
    )
    seconds: float = Field(ge=0, description="Wall clock from first decode to commit.")
    decode_wait_seconds: float = Field(0.0, ge=0, description="Of those, the teacher waiting for pixels or tokens.")
    teacher_seconds: float = Field(0.0, ge=0, description="Of those, in the forward pass.")
    write_seconds: float = Field(0.0, ge=0, description="Digest, write, sync and commit.")
    device: str = ""
    host: str = Field(default_factory=socket.gethostname)
    finished_at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


class ChunkNote(ChunkCost):
    """A cost as it is kept: with the chunk and the commit that it is of."""

    chunk: str = Field(description="ChunkRef.name.")
    commit_sha256: str = Field(description="Of the commit record that was written just before.")

    def is_of(self, commit: ChunkCommit) -> bool:
        """Whether this very record was noted."""
        return self.commit_sha256 == _commit_sha256(commit)


def note_key(name: str) -> str:
    """Where the note of a chunk lies, by ``ChunkRef.name``."""
    return f"{JOURNAL}/{name}.json"


def write_cost(files: CacheFiles, ref: ChunkRef, cost: ChunkCost, commit: ChunkCommit) -> None:
    """Note what a chunk took, after its commit; encoding it again replaces the note."""
    note = ChunkNote(**cost.model_dump(), chunk=ref.name, commit_sha256=_commit_sha256(commit))
    files.write(note_key(ref.name), _note_bytes(note.model_dump(mode="json", exclude_none=True)))


def read_note(files: CacheFiles, name: str) -> ChunkNote:
    """The note of one chunk.

    Raises:
        FileNotFoundError: there is none.
        CacheCorruptError: it is not as it was written, or of another chunk.
    """
    where = f"{files.location}/{note_key(name)}"
    data = files.read(note_key(name))
    try:
        fields = without_digest(json.loads(data))
        # bytes, not values: white space or another way to write a number is damage too
        if data != _note_bytes(fields):
            raise CacheCorruptError(f"{where}: not the bytes that were written. {_REMEDY}")
        note = ChunkNote.model_validate(fields)
    except (ValueError, RecursionError) as error:  # pydantic's error is a ValueError
        raise CacheCorruptError(f"{where}: not a journal note ({error}). {_REMEDY}") from error
    if note.chunk != name:
        raise CacheCorruptError(f"{where}: holds the note of {note.chunk}, not of {name}. {_REMEDY}")
    return note


def read_cost(files: CacheFiles, name: str) -> ChunkCost | None:
    """What one chunk took, by its note; None when that is damaged or cannot be read."""
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


_REMEDY = "It decides nothing; teacher-cache repair CACHE drops it."
