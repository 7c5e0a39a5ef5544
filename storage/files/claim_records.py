"""Records of claims, by which the processes that write a cache are known."""

from __future__ import annotations

from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, ValidationError

from teacher_cache.storage.files.processes import ProcessName
from teacher_cache.storage.files.protocol import CacheFiles

CLAIMS = "claims"
BEATS_MISSED = 4
"""Number of missed heartbeats after which a process is given up."""
_CLAIMS_READ = 200


class ClaimRecord(BaseModel):
    """Claim of a process: the content of an object below ``claims``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    owner: str
    process: ProcessName
    beat_seconds: float

    @property
    def beat_key(self) -> str:
        """Key of the heartbeat of the claim's process."""
        return f"{CLAIMS}/alive/{self.owner}.json"


def read_claim(files: CacheFiles, key: str) -> ClaimRecord | None:
    """Return a claim; None if it was released, or is damaged."""
    try:
        return ClaimRecord.model_validate_json(files.read(key))
    except (FileNotFoundError, ValidationError):
        return None


def working_processes(files: CacheFiles) -> tuple[str, ...]:
    """Return the names of the processes that work on a cache, for people. Reads at most 200 claims.

    A process elsewhere counts while its heartbeat is fresh by this machine's clock.
    """
    keys = files.list(CLAIMS)
    waiting = {key for key in keys if key.startswith(f"{CLAIMS}/alive/")}
    names = []
    for key in [key for key in reversed(keys) if key not in waiting][:_CLAIMS_READ]:
        if not waiting:
            break
        claim = read_claim(files, key)
        if claim is not None and claim.beat_key in waiting:
            waiting.remove(claim.beat_key)
            if _is_working(files, claim):
                names.append(claim.process.shown)
    return tuple(names)


def _is_working(files: CacheFiles, claim: ClaimRecord) -> bool:
    alive = claim.process.alive()
    if alive is not None:
        return alive
    try:
        modified = files.stat(claim.beat_key).modified
    except FileNotFoundError:
        return False
    age = None if modified is None else (datetime.now(UTC) - modified).total_seconds()
    return age is not None and age < BEATS_MISSED * claim.beat_seconds
