"""One flow run at a time on a GPU, across deployments, workers and hosts of one server.

A GPU is a global concurrency limit of Prefect with one slot, ``gpu:UUID``, created at its first use. Give it more slots
in the UI to let runs share it. The UUID is the card's, the same in every container. If torch reports none, the limit is
``gpu:0@HOST``; containers have different host names, so they do not wait for each other then.

A run holds its slots from loading the first model to the last forward pass. They are leased: the slots of a killed run
are free after two minutes. A CPU has no limit.
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

_LEASE_SECONDS = 120.0  # renewed while a run lives; a killed run holds its slots for this long


def gpu_limits(device: str, devices: int = 1) -> list[str]:
    """Return the names of the limits of a stage's GPUs: ``gpu:UUID``, else ``gpu:N@HOST``; none for a CPU.

    Args:
        device: as in the settings: auto, cpu, cuda or cuda:N.
        devices: number of GPUs, from the first one of the machine.

    Raises:
        UsageError: the machine has no such device.
    """
    if device == "cpu":
        return []
    # imported here: prefect deploy imports this file and needs no torch
    from teacher_cache.pipeline.models.device import device_uuid, resolve_device

    resolved = resolve_device(device)
    if resolved.type != "cuda":
        return []
    first = resolved.index or 0
    # CUDA numbers the visible cards: two workers with one card each both call it cuda:0
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]

    def name(index: int) -> str:
        if uuid := device_uuid(index):
            return f"gpu:{uuid}"
        return f"gpu:{visible[index] if index < len(visible) else index}@{socket.gethostname()}"

    return [name(index) for index in range(first, first + devices)]


@contextlib.contextmanager
def device_slots(device: str, devices: int = 1) -> Iterator[None]:
    """Hold the GPUs of a stage while the block runs. Waits until they are free.

    Raises:
        UsageError: the machine has no such device.
    """
    names = gpu_limits(device, devices)
    if not names:
        yield
        return
    for name in names:
        # an existing limit may have more slots
        with contextlib.suppress(ObjectAlreadyExists), get_client(sync_client=True) as client:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
    logger = get_run_logger()
    logger.info(f"waits for {', '.join(names)}")
    # one request, so that two runs cannot each hold one GPU and wait for the other's; not strict: an absent server
    # must not end a running training
    with concurrency(names, occupy=1, lease_duration=_LEASE_SECONDS):
        logger.info(f"holds {', '.join(names)}")
        yield
