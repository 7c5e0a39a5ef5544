"""Process from which decoding workers are forked. It can be started before this process imports torch."""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver
from typing import Any

_MODULES = (
    "teacher_cache.pipeline.data.service.quiet_start",
    "teacher_cache.pipeline.data.service.worker",
    "teacher_cache.pipeline.data.datasets.samples",
    "teacher_cache.pipeline.data.images.views",
    "teacher_cache.pipeline.data.images.decoders",
    "teacher_cache.pipeline.data.tokens",
)


def start_fork_server(*modules: str) -> Any:
    """Start the process from which workers are forked, and return its context. A second call only returns it.

    It holds no torch, model, thread, store or GPU. The first caller in a process decides what it imports.

    Args:
        modules: further modules to import once, for all workers.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_MODULES, *modules])
    forkserver.ensure_running()
    return context
