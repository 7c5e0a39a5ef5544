"""Launch of a run: on one device in this process, on several by Fabric, or in a process of torchrun."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from teacher_cache.pipeline.models.device import deterministic_kernels, keep_freed_memory, resolve_device
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.stop_signals import StopRequests, interrupt
from teacher_cache.storage.errors import CacheError, UsageError
from teacher_cache.storage.observe.telemetry import observed

Progress = Callable[[Any], None]

# environment variables that torchrun sets
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# error classes that callers distinguish; each can be rebuilt from its text
_ERRORS = (CacheError, UsageError, OSError, FloatingPointError)

# Fabric would log the number of processes once more
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)


def launched_rank() -> int | None:
    """Return the rank of this process among torchrun's, or None if torchrun did not start it."""
    if all(os.environ.get(name) for name in _TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1:
        return int(os.environ["RANK"])
    return None


def launch(config: TrainConfig, work: Callable[..., None], *args: Any, progress: Progress | None = None) -> None:
    """Call ``work(fabric, config, report, *args)`` on every device of the settings, and wait for all.

    One device is used in this process. For several, Fabric starts new processes and joins them into a group (NCCL on
    CUDA, gloo on CPUs). ``work`` and ``args`` are pickled; rank 0 reports to ``progress``. If a process fails, the
    others are ended and its error is raised here: with its own class if that is in ``_ERRORS``, else as torch's error.
    A rank that hangs fails the others after ``rank_timeout_seconds``.

    Under torchrun, this process calls ``work`` for its own device.

    If metrics are on, each process serves them, on the port plus its local rank
    (``teacher_cache.storage.observe.telemetry``).

    Raises:
        UsageError: a device is missing, the port of metrics is taken, or torchrun's processes cannot share a batch.
        ChildProcessError: a process was killed.
        TimeoutError: a process waited too long for another one.
    """
    device = resolve_device(config.device)
    precision: Any = "bf16-mixed" if config.precision == "bf16" else "32-true"
    # an explicit environment: in a Slurm job Fabric would take the job's processes for its own
    make = partial(Fabric, accelerator=device.type, precision=precision, plugins=[LightningEnvironment()])
    if launched_rank() is not None:
        fabric = _torchrun_fabric(config, device, make)
        fabric.launch()
        _work_on_rank(fabric, config, progress if fabric.global_rank == 0 else None, work, args)
        # not after an error: NCCL would wait there for ranks that wait for this one, and hide the message
        torch.distributed.destroy_process_group()
    elif config.devices == 1:
        fabric = make(devices=[device.index or 0] if device.type == "cuda" else 1)
        _work_on_rank(fabric, config, progress, work, args)
    else:
        _spawn(config, device, make, progress, work, args)


def _work_on_rank(
    fabric: Fabric, config: TrainConfig, report: Progress | None, work: Callable[..., None], args: Any
) -> None:
    keep_freed_memory(fabric.device)
    kernels = deterministic_kernels() if config.deterministic else contextlib.nullcontext()
    try:
        with kernels, observed(fabric.local_rank, rank=fabric.global_rank) if fabric.world_size > 1 else observed():
            work(fabric, config, report, *args)
    except RuntimeError as error:
        if "Timed out waiting" not in str(error):  # gloo's words
            raise
        raise TimeoutError(
            f"rank {fabric.global_rank} waited {config.rank_timeout_seconds:g} s for another rank, which hangs or is "
            "still at work. Go on by --resume; --set rank_timeout_seconds=N waits longer"
        ) from error


def _torchrun_fabric(config: TrainConfig, device: torch.device, make: Callable[..., Fabric]) -> Fabric:
    processes, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device.index is not None or config.devices != 1:
        raise UsageError("torchrun starts a process for each device: leave --devices out, and choose cards by torchrun")
    if processes % local:
        raise UsageError(
            f"torchrun started {local} of {processes} processes on this machine: the same number on each is wanted. "
            "Give every machine the same --nproc-per-node"
        )
    if config.batch_size % processes:
        raise UsageError(f"batch_size {config.batch_size} cannot be shared evenly by torchrun's {processes} processes")
    nodes = processes // local
    return make(devices=local, num_nodes=nodes, strategy=_ddp(config), plugins=[TorchElasticEnvironment()])


def _ddp(config: TrainConfig, **kwargs: Any) -> DDPStrategy:
    # the other ranks wait while rank 0 measures the student; torch's 30 minutes are too short for a large split
    timeout = timedelta(seconds=config.rank_timeout_seconds)
    return DDPStrategy(timeout=timeout, gradient_as_bucket_view=True, **kwargs)


def _spawn(
    config: TrainConfig,
    device: torch.device,
    make: Callable[..., Fabric],
    progress: Progress | None,
    work: Callable[..., None],
    args: Any,
) -> None:
    """Start a process for each device and wait for all."""
    if device.index is not None:
        raise UsageError(f"device {config.device!r} names one device, but devices is {config.devices}; use cuda or cpu")
    if device.type == "cuda" and torch.cuda.device_count() < config.devices:
        raise UsageError(
            f"{config.devices} CUDA devices asked for, this machine has {torch.cuda.device_count()}. Lower --devices."
        )
    # spawn: flows, tests and notebooks cannot be started again as a command, and a fork server that already runs
    # would not pass on the port, which Fabric sets in the environment
    fabric = make(devices=config.devices, strategy=_ddp(config, start_method="spawn"))
    pipes = [multiprocessing.get_context("spawn").Pipe(duplex=False) for _ in range(config.devices)]
    receivers, senders = [pipe[0] for pipe in pipes], [pipe[1] for pipe in pipes]
    errors: list[BaseException] = []
    before = set(multiprocessing.active_children())
    failed: BaseException | None = None
    with StopRequests() as stop, _relayed(receivers, senders, progress, errors, stop), _own_environment():
        try:
            fabric.launch(_rank, senders, config, work, args)
        except ProcessRaisedException as error:
            failed = error
        except ProcessExitedException as error:
            failed = ChildProcessError(
                f"rank {error.error_index} was ended by {error.signal_name or f'exit code {error.exit_code}'}; SIGKILL "
                "is most often want of memory. Go on by --resume"
            )
        except BaseException:  # a second Ctrl-C: the ranks would go on
            for child in set(multiprocessing.active_children()) - before:
                child.terminate()
            raise
    if failed is not None:
        raise errors[0] if errors else failed


def _rank(fabric: Fabric, senders: list[Connection], config: TrainConfig, work: Callable[..., None], args: Any) -> None:
    sender = senders[fabric.global_rank]
    signal.signal(signal.SIGTERM, interrupt)
    sender.send(("pid", os.getpid()))
    report = (lambda at: sender.send(("progress", at))) if fabric.global_rank == 0 else None
    try:
        _work_on_rank(fabric, config, report, work, args)
    except Exception as error:
        if isinstance(error, _ERRORS):
            sender.send(("error", (type(error), str(error))))
        raise
    except KeyboardInterrupt:
        raise SystemExit(1) from None  # torch would take the rank for finished


@contextlib.contextmanager
def _relayed(
    receivers: list[Connection],
    senders: list[Connection],
    progress: Progress | None,
    errors: list[BaseException],
    stop: StopRequests,
) -> Iterator[None]:
    """Relay the messages of the ranks during the block, the last ones when it ends, and to them a request to stop."""
    over, pids = threading.Event(), list[int]()

    def read() -> None:
        while True:
            last = over.is_set()
            ready: list[Any] = wait(receivers, timeout=0 if last else 0.1)
            for receiver in ready:
                kind, value = receiver.recv()
                if kind == "pid":
                    pids.append(value)
                elif kind == "error":
                    error, text = value
                    errors.append(error(text))
                elif progress is not None:
                    progress(value)
            if stop.request is not None and len(pids) == len(receivers):
                while pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pids.pop(), signal.SIGTERM)
            if last and not ready:
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield
    finally:
        over.set()
        reader.join(timeout=10)  # half a message of a killed rank blocks the reader
        for pipe in [*receivers, *senders] if not reader.is_alive() else []:
            pipe.close()


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    """Restore the environment that Fabric changes: the next launch chooses a port of its own."""
    before = os.environ.copy()
    try:
        yield
    finally:
        for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]
