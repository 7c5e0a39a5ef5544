"""Executors: this process, or workers on many machines, behind the same two calls.

An executor decides where and when chunks are encoded. Every executor makes the same cache, byte for byte, so neither
the identity nor the manifest names one.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from teacher_cache.pipeline.models.teacher import LiveTeacher, load_teacher
from teacher_cache.pipeline.precompute.encode import encode_shared
from teacher_cache.pipeline.precompute.plan import Progress, ReadDataset, plan_precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.errors import MissingPackageError, UsageError
from teacher_cache.storage.format.commits import ChunkRef


class Executor(Protocol):
    """Context manager that plans a cache and encodes its chunks. Leaving it releases its resources."""

    def plan(
        self, config: PrecomputeConfig, progress: Progress | None = None, read: ReadDataset | None = None
    ) -> list[ChunkRef]:
        """Plan the cache with :func:`teacher_cache.pipeline.precompute.plan.plan_precompute` for the devices used."""
        ...

    def encode(self, config: PrecomputeConfig, refs: Sequence[ChunkRef], progress: Progress | None = None) -> int:
        """Encode chunks of a planned cache. When it returns, every chunk is committed, by any process.

        Returns:
            Number of chunks that this executor encoded.

        Raises:
            OSError: a chunk could not be read or written, or workers died repeatedly. Committed chunks stay.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class LocalExecutor:
    """Executor in this process, on its device. The first call loads the teacher."""

    def __init__(self) -> None:
        self._teacher: LiveTeacher | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._teacher = None

    def plan(
        self, config: PrecomputeConfig, progress: Progress | None = None, read: ReadDataset | None = None
    ) -> list[ChunkRef]:
        """See :class:`Executor`."""
        return plan_precompute(config, self._load(config), progress, read=read)

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
        UsageError: the executor is unknown, or needs a package that is not installed.
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
        raise MissingPackageError("ray", f"executor {config.executor!r}") from error
    return RayExecutor(None if config.executor == "ray" else config.executor, config.workers)
