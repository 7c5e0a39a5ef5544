"""Process from which decoding workers are forked. It can be started before this process imports torch."""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver
from typing import Any


def start_fork_server() -> Any:
    """Start the process from which workers are forked, and return its context. A second call only returns it.

    It imports torch once, in parallel to this process, and holds no model, thread or store. The first caller in a
    process decides which modules it imports.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["teacher_cache.pipeline.data.batches.inputs"])
    forkserver.ensure_running()
    return context
