"""Claims of processes on chunks, so that several processes share the work on one cache.

A claim is an object that only one process can create. It saves work, but is not needed for correct rows: a chunk that
two processes encode has the objects and the commit record that came first.

A process shows that it is alive by a heartbeat, an object that it changes every few seconds. A claim is stale when its
process has ended, if this machine can tell, or when its heartbeat has not changed for a while by the observer's clock.
No two clocks are compared. The claim of the next attempt then takes over.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType

from pydantic import ValidationError

from teacher_cache.storage.errors import CacheUnreachableError
from teacher_cache.storage.files.claim_records import BEATS_MISSED, CLAIMS, ClaimRecord, read_claim
from teacher_cache.storage.files.location import in_parallel
from teacher_cache.storage.files.processes import ProcessName, this_process
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.format.commits import COMMITS, ChunkRef

_ENDED: set[str] = set()  # owners in this process whose work is over, though the process is alive
PLAN = "plan"  # held by the process that writes the first manifest
_BEAT_SECONDS = 15.0
_LIST_SECONDS = 5.0
_FEW_CHUNKS = 16  # up to this number, no listing: it is a request per 1,000 commits of the whole cache


def claim_name(ref: ChunkRef) -> str:
    """Return the name for claims on a chunk: it names its rows, so the views of the same images share it."""
    return f"{ref.tower}/{ref.chunk:06d}"


class Claims:
    """The claims of one process on one cache; a context manager that releases all of them on exit.

    Not thread-safe. A name is one of :func:`claim_name`, or any other word.
    """

    def __init__(self, files: CacheFiles, beat_seconds: float = _BEAT_SECONDS) -> None:
        self._files = files
        self._claim = ClaimRecord(owner=secrets.token_hex(8), process=this_process(), beat_seconds=beat_seconds)
        self._beat_key = self._claim.beat_key
        self._held: list[str] = []
        self._in_doubt: str | None = None  # key being created: an interrupt may come before the answer
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._over = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="claims", daemon=True)

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._beating.ident is not None:
            self._beating.join()
        _ENDED.add(self._claim.owner)
        if isinstance(error, CacheUnreachableError):
            return  # the store does not answer; a later try here, or others once this process has ended, take over
        if self._in_doubt is not None and self._is_mine(self._in_doubt):
            self._held.append(self._in_doubt)
        for _ in in_parallel(self._files, self._files.delete, self._held):
            pass
        if self._beating.ident is not None:
            self._files.delete(self._beat_key)

    def take(self, name: str, takeovers: int | None = None) -> bool:
        """Claim a name, and return whether that succeeded. The caller then checks whether the work is done already.

        Args:
            takeovers: number of earlier holders that may have ended without finishing. Default: any.

        Raises:
            UsageError: this kind of location has no exclusive creation.
        """
        attempt = 0
        while True:
            key = f"{CLAIMS}/{name.replace('/', '-')}.{attempt}.json"
            if key in self._held or self._create(key):
                return True
            if attempt == takeovers or not self._stale(key):
                return False
            attempt += 1

    def share(
        self, stretches: Iterable[list[ChunkRef]], done: Callable[[ChunkRef], bool], takeovers: int | None = None
    ) -> Iterator[list[ChunkRef]]:
        """Yield the chunks that this process is to encode, by stretch of rows, each claimed just before.

        Skips chunks that are done or claimed by another process; call again for those. Lists all commits now and then
        to find chunks that may be done. For a short sequence it does not: each chunk is checked once claimed.

        Args:
            takeovers: as for :meth:`take`; 0 skips the stretches of processes that ended.
        """
        few = isinstance(stretches, Sequence) and len(stretches) <= _FEW_CHUNKS
        listed, committed = -float("inf"), set[str]()
        pause = _LIST_SECONDS
        for stretch in stretches:
            if not few and time.monotonic() - listed > pause:
                began = time.monotonic()
                committed = set(self._files.list(COMMITS))
                listed = time.monotonic()
                pause = max(_LIST_SECONDS, 20 * (listed - began))  # a large cache is listed less often
            pending = [ref for ref in stretch if not (ref.commit_key in committed and done(ref))]
            if not pending or not self.take(claim_name(pending[0]), takeovers):
                continue
            # checked again after the claim: its last holder may have released it because the chunks are done
            if pending := [ref for ref in pending if not done(ref)]:
                yield pending

    def _create(self, key: str) -> bool:
        if self._beating.ident is None:
            self._write_beat(0)
            self._beating.start()
        self._in_doubt = key
        created = self._files.create(key, self._bytes())
        if created:
            self._held.append(key)
        self._in_doubt = None
        return created

    def _bytes(self) -> bytes:
        return self._claim.model_dump_json().encode()

    def _is_mine(self, key: str) -> bool:
        try:
            return key not in self._held and self._files.read(key) == self._bytes()
        except OSError:  # missing or unreadable: others take over the claim of an ended process
            return False

    def _stale(self, key: str) -> bool:
        try:
            data = self._files.read(key)
        except FileNotFoundError:
            return False  # just released; the next try can claim the name
        try:
            claim = ClaimRecord.model_validate_json(data)
        except ValidationError:
            return True
        if claim.owner in _ENDED:
            return True
        alive = claim.process.alive()
        if alive is not None:
            return not alive
        try:
            beat = self._files.read(claim.beat_key)
        except FileNotFoundError:
            beat = b""
        now = time.monotonic()
        last, since = self._seen.get(claim.owner, (None, now))
        if beat != last:
            since = now
        self._seen[claim.owner] = (beat, since)
        return now - since > BEATS_MISSED * claim.beat_seconds

    def _write_beat(self, number: int) -> None:
        self._files.write(self._beat_key, f"{number}\n".encode())

    def _beat(self) -> None:
        number = 0
        while not self._over.wait(self._claim.beat_seconds):
            number += 1
            try:
                self._write_beat(number)
            except Exception:  # if the store fails, the work itself stops with a better message
                continue


def clear_claims(files: CacheFiles) -> None:
    """Remove all claims of a complete cache, including claims of killed processes."""
    for _ in in_parallel(files, files.delete, files.list(CLAIMS)):
        pass


def claimed_by(files: CacheFiles, process: ProcessName, refs: Iterable[ChunkRef]) -> list[ChunkRef]:
    """Return the chunks that a process has claimed; if it has ended, the chunks that it was working on."""
    keys: dict[str, list[str]] = {}
    for key in files.list(CLAIMS):
        keys.setdefault(key.removeprefix(f"{CLAIMS}/").partition(".")[0], []).append(key)

    def claims(ref: ChunkRef) -> Iterator[ClaimRecord | None]:
        return (read_claim(files, key) for key in keys.get(claim_name(ref).replace("/", "-"), ()))

    return [ref for ref in refs if any(claim is not None and claim.process == process for claim in claims(ref))]


def left_claims(files: CacheFiles) -> list[str]:
    """Return the keys of claims and beats whose process has ended, or has been silent for a day."""
    stale, ended, living = [], set[str](), set[str]()
    keys = files.list(CLAIMS)
    beats = [key for key in keys if key.startswith(f"{CLAIMS}/alive/")]
    for key in sorted(set(keys) - set(beats)):
        try:
            claim = ClaimRecord.model_validate_json(files.read(key))
        except FileNotFoundError:
            continue
        except ValidationError:
            if files.is_old(key):
                stale.append(key)
            continue
        beat = claim.beat_key
        alive = claim.process.alive()
        if alive is False or (alive is None and files.is_old(beat if beat in beats else key)):
            stale.append(key)
            ended.add(claim.owner)
        else:
            living.add(claim.owner)
    for beat in beats:
        owner = beat.removeprefix(f"{CLAIMS}/alive/").removesuffix(".json")
        # a heartbeat without a claim may belong to a process that is about to make its first claim
        if owner not in living and (owner in ended or files.is_old(beat)):
            stale.append(beat)
    return stale
