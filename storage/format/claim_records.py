"""Records of claims, by which the processes that write a cache are known, and the message about an unfinished cache."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, ValidationError

from teacher_cache.storage.errors import CacheIncompleteError
from teacher_cache.storage.files.processes import ProcessName
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.format.commits import all_chunks, committed_chunks
from teacher_cache.storage.format.manifest import IMPORTED_ROWS, CacheManifest

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


def require_sealed(files: CacheFiles, manifest: CacheManifest) -> None:
    """Check that a cache is finished.

    Raises:
        CacheIncompleteError: chunks are missing. The message counts them, and names who works on the cache.
    """
    if not manifest.sealed:
        refs = all_chunks(manifest.layout)
        raise CacheIncompleteError(incomplete_message(files, manifest, len(committed_chunks(files, refs)), len(refs)))


def incomplete_message(files: CacheFiles, manifest: CacheManifest, done: int, total: int) -> str:
    """Return the message about an unfinished cache."""
    return f"{files.location}: {done} of {total} chunks are there. {finished_how(files, manifest)}."


def finished_how(files: CacheFiles, manifest: CacheManifest) -> str:
    """Return who finishes an unfinished cache: the processes that work on it, or a command."""
    names: tuple[str, ...] = ()
    with suppress(OSError):
        names = working_processes(files)
    if names:
        verb = "works" if len(names) == 1 else "work"
        return f"Now {', '.join(names)} {verb} on it: wait until it is finished"
    command = "import" if IMPORTED_ROWS in manifest.made_with else "precompute"
    return f"Run the same {command} command again to finish it"
