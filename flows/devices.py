"""One flow run at a time on a GPU, whichever deployments, workers and hosts share the server.

A GPU is a global concurrency limit of Prefect with one slot, ``gpu:UUID``, made when it is first wanted; give it more
slots in the UI to let runs share it. The UUID is the card's own, the same in every container that sees the card; where
torch tells none the limit is ``gpu:0@HOST``, and containers, each a host of its own, take no turns.

A run holds its slots from loading the first model to the last forward pass. They are leased: those of a run that was
killed are free after two minutes. On a CPU there is no limit.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists

__all__ = ["device_slots", "gpu_limits"]

_LEASE_SECONDS = 120.0  # renewed all the while; how long a killed run still holds its slots


def gpu_limits(device: str, devices: int = 1) -> list[str]:
    """Names of the limits of the GPUs that a stage will use, none for a CPU: ``gpu:UUID``, else ``gpu:N@HOST``.

    Args:
        device: as in the settings: auto, cpu, cuda or cuda:N.
        devices: how many; the first ones of the machine where there are several.

    Raises:
        UsageError: the device is not there.
    """
    if device == "cpu":
        return []
    # here, not above: prefect deploy imports this file too and needs no torch
    from teacher_cache.pipeline.models.device import device_uuid, resolve_device

    found = resolve_device(device)
    if found.type != "cuda":
        return []
    first = found.index or 0
    # CUDA counts what it may see: two workers that each see one card both call theirs cuda:0
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]

    def name(index: int) -> str:
        if uuid := device_uuid(index):
            return f"gpu:{uuid}"
        return f"gpu:{visible[index] if index < len(visible) else index}@{socket.gethostname()}"

    return [name(index) for index in range(first, first + devices)]


@contextlib.contextmanager
def device_slots(device: str, devices: int = 1) -> Iterator[None]:
    """Hold the GPUs of a stage while the block runs; wait until they are free.

    Raises:
        UsageError: the device is not there.
    """
    names = gpu_limits(device, devices)
    if not names:
        yield
        return
    for name in names:
        # one that is there may have been given more slots: it stays as it is
        with contextlib.suppress(ObjectAlreadyExists), get_client(sync_client=True) as client:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
    logger = get_run_logger()
    logger.info(f"waits for {', '.join(names)}")
    # all of them in one request, so that two runs cannot each hold one and wait for the other's; not strict: a server
    # that is away for minutes must not end a training that runs
    with concurrency(names, occupy=1, lease_duration=_LEASE_SECONDS):
        logger.info(f"holds {', '.join(names)}")
        yield
