"""A worker of a fan-out: a process that holds one teacher on one device and encodes the spans it is given.

No engine is imported here; whatever starts it calls :meth:`EncodeWorker.start` once, then :meth:`EncodeWorker.encode`.
Nothing is raised across the process border: an error comes back as a value, with what this side knows about it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

from teacher_cache.pipeline.models.teacher import LiveTeacher, load_teacher
from teacher_cache.pipeline.precompute.encode import encode_shared
from teacher_cache.pipeline.precompute.reuse import known_rows
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.files.transient import is_transient
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.write.writer import EmbeddingWriter

__all__ = ["EncodeWorker", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """How a call ended.

    Attributes:
        encoded: chunks that this worker encoded.
        error: what stopped it, or None.
        transient: whether another try, here or elsewhere, may succeed.
    """

    encoded: int = 0
    error: Exception | None = None
    transient: bool = False


class EncodeWorker:
    """One teacher on one device. For one call at a time."""

    def start(self, config: PrecomputeConfig, folder: str) -> Outcome:
        """Load the teacher and open the planned cache, which has to be the teacher's.

        Args:
            folder: where the run was started: relative paths are relative to it, on machines that have it.
        """

        def begin() -> int:
            with contextlib.suppress(OSError):
                os.chdir(folder)
            self._config = config
            self._teacher: LiveTeacher = load_teacher(
                config.teacher, config.pretrained, config.device, config.precision, config.decoder
            )
            self._writer = EmbeddingWriter(config.cache)
            self._teacher.require(self._writer.manifest.identity, config.cache)
            self._known = known_rows(config.reuse, self._writer)
            return 0

        return _outcome(begin)

    def encode(self, refs: Sequence[ChunkRef]) -> Outcome:
        """Encode these chunks, unless others have them or they are there; each is committed then."""
        return _outcome(lambda: encode_shared(self._config, self._teacher, refs, None, self._known, self._writer))


def _outcome(call: Callable[[], int]) -> Outcome:
    try:
        return Outcome(call())
    except Exception as error:
        return Outcome(error=_portable(error), transient=is_transient(error))


def _portable(error: Exception) -> Exception:
    """The error as it survives the way to another process: its cause does not, and some libraries' not at all."""
    where = f"(a worker on {socket.gethostname()})"
    with contextlib.suppress(Exception):
        made = deepcopy(error)  # made anew in the way that the other process makes it
        if type(made) is type(error) and str(made) == str(error):
            if made.args == (str(error),):
                made.args = (f"{error} {where}",)
            return made
    return OSError(f"{type(error).__name__}: {error} {where}")
