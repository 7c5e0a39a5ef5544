"""Executors: this process, or workers on many machines, behind the same two calls.

An executor decides where and when. What is done the store says, and what the rows are the teacher: a cache is the same,
byte for byte, whichever executor made it, and neither its identity nor its manifest names one.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from teacher_cache.pipeline.models.teacher import LiveTeacher, load_teacher
from teacher_cache.pipeline.precompute.encode import encode_shared
from teacher_cache.pipeline.precompute.plan import Progress, plan_precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.format.commits import ChunkRef

__all__ = ["Executor", "LocalExecutor", "open_executor"]


class Executor(Protocol):
    """Planning of a cache and encoding of its chunks. A context manager: leaving it releases what it holds."""

    def plan(self, config: PrecomputeConfig, progress: Progress | None = None) -> list[ChunkRef]:
        """Plan the cache, as :func:`teacher_cache.pipeline.precompute.plan.plan_precompute`, for the devices that will
        encode."""
        ...

    def encode(self, config: PrecomputeConfig, refs: Sequence[ChunkRef], progress: Progress | None = None) -> int:
        """Encode chunks of a planned cache. When it returns each is committed, by any process.

        Returns:
            How many of them this executor encoded.

        Raises:
            OSError: what a chunk met, or that workers ended again and again; what is committed stays.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class LocalExecutor:
    """This process and its device; the teacher is loaded once, at the first call."""

    def __init__(self) -> None:
        self._teacher: LiveTeacher | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._teacher = None

    def plan(self, config: PrecomputeConfig, progress: Progress | None = None) -> list[ChunkRef]:
        """See :class:`Executor`."""
        return plan_precompute(config, self._load(config), progress)

    def encode(self, config: PrecomputeConfig, refs: Sequence[ChunkRef], progress: Progress | None = None) -> int:
        """See :class:`Executor`. Other processes on this cache share its chunks."""
        return encode_shared(config, self._load(config), refs, progress)

    def _load(self, config: PrecomputeConfig) -> LiveTeacher:
        if self._teacher is None:
            self._teacher = load_teacher(
                config.teacher, config.pretrained, config.device, config.precision, config.decoder
            )
        return self._teacher


def open_executor(config: PrecomputeConfig) -> Executor:
    """Open the executor that ``config`` names.

    Raises:
        UsageError: it is not known, or needs a package that is not installed.
    """
    if config.executor == "local":
        if config.workers not in (None, 1):
            raise UsageError(
                f"--workers {config.workers} needs --executor ray: local is this process. It may be started several "
                "times on one cache, and they share its chunks"
            )
        return LocalExecutor()
    if config.executor != "ray" and not config.executor.startswith("ray://"):
        raise UsageError(f"executor {config.executor!r} is not known; use local, ray or ray://HOST:PORT")
    try:
        from teacher_cache.pipeline.precompute.ray_executor import RayExecutor  # the only module that imports ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UsageError(
            f"executor {config.executor!r} needs ray, which is not installed: pip install 'teacher-cache[ray]'"
        ) from error
    return RayExecutor(None if config.executor == "ray" else config.executor, config.workers)
