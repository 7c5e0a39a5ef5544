"""One flow run at a time on a GPU, across deployments, workers and hosts of one server.

A GPU is a global concurrency limit of Prefect with one slot, ``gpu:UUID``, created at its first use. Give it more slots
in the UI to let runs share it. The UUID is the card's, the same in every container. If torch reports none, the limit is
``gpu:0@HOST``; containers have different host names, so they do not wait for each other then.

A run holds its slots from loading the first model to the last forward pass. They are leased: the slots of a killed run
are free after two minutes. A run whose server or network is away for less keeps them; away for longer, it takes them
again unless another run has them by then. A CPU has no limit.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import socket
import threading
from collections.abc import Iterator
from http import HTTPStatus
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.exceptions import ObjectAlreadyExists, PrefectHTTPStatusError

_LOG = logging.getLogger(__name__)
_LEASE_SECONDS = 120.0  # renewed while a run lives; a killed run holds its slots for this long
_RENEW_SECONDS = 15.0
_WAIT_SECONDS = 5.0  # between two requests for slots that others hold


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
    with _leased(names):
        logger.info(f"holds {', '.join(names)}")
        yield


@contextlib.contextmanager
def _leased(names: list[str]) -> Iterator[None]:
    # not Prefect's `concurrency`: it never takes a lease again that has ended, and the next run would share the GPU
    over = threading.Event()
    while (lease := _take(names)) is None:
        over.wait(_WAIT_SECONDS)
    leases = [lease]
    # the context names the server, and the run in whose log a loss is told
    renewing = threading.Thread(
        target=contextvars.copy_context().run, args=(_renew, names, leases, over), name="device-lease", daemon=True
    )
    renewing.start()
    try:
        yield
    finally:
        over.set()
        renewing.join(_WAIT_SECONDS)
        # an absent server must not end a run that has finished: the lease ends by itself
        with contextlib.suppress(Exception), get_client(sync_client=True) as client:
            client.release_concurrency_slots_with_lease(leases[-1])


def _take(names: list[str]) -> UUID | None:
    """Return the lease of a slot of each limit; None if one of them is taken."""
    # one request, so that two runs cannot each hold one GPU and wait for the other's
    with get_client(sync_client=True) as client:
        try:
            answer = client.increment_concurrency_slots_with_lease(names, 1, "concurrency", _LEASE_SECONDS)
        except PrefectHTTPStatusError as error:
            if error.response.status_code != HTTPStatus.LOCKED:
                raise
            return None
        except httpx.TransportError:  # the server went away while others held them: asked again
            return None
    return UUID(answer.json()["lease_id"])


def _renew(names: list[str], leases: list[UUID], over: threading.Event) -> None:
    """Renew the last of the leases until the work is over; take another if the server has given it up."""
    while not over.wait(_RENEW_SECONDS):
        try:
            with get_client(sync_client=True) as client:
                client.renew_concurrency_lease(leases[-1], _LEASE_SECONDS)
        except PrefectHTTPStatusError as error:
            if error.response.status_code == HTTPStatus.GONE:
                _LOG.warning("the lease of %s ended while the server was away: it is taken again", ", ".join(names))
                with contextlib.suppress(Exception):
                    leases += filter(None, [_take(names)])
        except Exception as error:  # the server is away: the next renewal may reach it
            _LOG.debug("the lease of %s was not renewed: %s", ", ".join(names), error)
