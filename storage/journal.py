"""The journal: when, where and how fast each chunk was made. Observation only; never read to decide anything.

Kept apart from commits so that all the rest of a cache is the same, byte for byte, whoever made it and
however often the work was interrupted.
"""

from __future__ import annotations

import json
import socket
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage.commits import ChunkRef
from storage.files import CacheFiles

__all__ = ["JOURNAL", "ChunkCost", "read_journal", "write_cost"]

JOURNAL = "journal"


class ChunkCost(BaseModel):
    """What one chunk took."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    rows: int = Field(ge=0)
    seconds: float = Field(ge=0, description="Wall clock from first decode to commit.")
    decode_wait_seconds: float = Field(0.0, ge=0, description="Of those, the teacher waiting for pixels or tokens.")
    teacher_seconds: float = Field(0.0, ge=0, description="Of those, in the forward pass.")
    write_seconds: float = Field(0.0, ge=0, description="Digest, write, sync and commit.")
    device: str = ""
    host: str = Field(default_factory=socket.gethostname)
    finished_at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def write_cost(files: CacheFiles, ref: ChunkRef, cost: ChunkCost) -> None:
    """Note what a chunk took; encoding it again replaces the note."""
    files.write(f"{JOURNAL}/{ref.name}.json", cost.model_dump_json().encode() + b"\n")


def read_journal(files: CacheFiles) -> dict[str, ChunkCost]:
    """Notes by chunk name. A damaged note is left out: nothing depends on it."""
    costs = {}
    for key in files.list(JOURNAL):
        try:
            costs[key.removeprefix(f"{JOURNAL}/").removesuffix(".json")] = ChunkCost.model_validate(
                json.loads(files.read(key))
            )
        except (ValueError, ValidationError):
            continue
    return costs
