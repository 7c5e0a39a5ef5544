"""Prometheus metrics of a run, counted from its events and served over HTTP.

On if ``TEACHER_CACHE_METRICS_PORT`` names a port (``--metrics-port`` sets it). If off, nothing is counted and
prometheus-client is not imported. Served on ``TEACHER_CACHE_METRICS_HOST``, by default 127.0.0.1: everyone who can
reach the port can read it.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.logs import (
    event,
    events_are_counted,
    events_counted_by,
    json_logs,
    log_fields,
    logger,
    say,
    start_json_logs_if_asked,
)

METRICS_PORT = "TEACHER_CACHE_METRICS_PORT"
METRICS_HOST = "TEACHER_CACHE_METRICS_HOST"
_REQUIRED = "TEACHER_CACHE_METRICS_REQUIRED"

_LOG = logger("metrics")
_PREFIX = "teacher_cache"
_Result = TypeVar("_Result")

# seconds; an image is decoded in milliseconds, a forward pass or a chunk may take a minute
_FINE = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_COARSE = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Metrics in a registry of their own, listed in docs/howto/observe.md.

    Call it with the message and the fields of an event; events without a metric are ignored.
    """

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector

        self.registry = CollectorRegistry()
        self._counts: dict[str, Callable[..., None]] = {**self._of_encoding(), **self._of_training()}
        self.registry.register(_GpuCollector())
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def __call__(self, message: str, fields: dict[str, Any]) -> None:
        """Count one event."""
        count = self._counts.get(message)
        if count is not None:
            count(**fields)

    def _of_encoding(self) -> dict[str, Callable[..., None]]:
        from prometheus_client import Counter, Gauge, Histogram

        own: dict[str, Any] = {"namespace": _PREFIX, "registry": self.registry}
        rows = Counter("rows", "Rows that this process encoded, or copied from an earlier cache.", ["tower"], **own)
        decode = Histogram(
            "decode_seconds",
            "One image read, proven, decoded and resized, or one batch of captions tokenized.",
            ["tower"],
            buckets=_FINE,
            **own,
        )
        wait = Counter("decode_wait_seconds", "The teacher waited for images or captions.", ["tower"], **own)
        teacher = Histogram("teacher_seconds", "One batch through the teacher.", ["tower"], buckets=_COARSE, **own)
        write = Histogram(
            "write_seconds", "One chunk written, synced and committed.", ["tower"], buckets=_COARSE, **own
        )
        queue = Gauge(
            "queue_depth",
            "decode: inputs being prepared, or tickets of them for processes; write: chunks being written.",
            ["queue"],
            **own,
        )
        decode_queue = queue.labels("decode")
        bad = Counter("bad_samples", "Samples that could not be used, by kind.", ["kind"], **own)
        done = Gauge("progress_rows", "Rows of this run that are done, by any process.", ["tower"], **own)
        planned = Gauge("wanted_rows", "Rows that this run began with as its work.", ["tower"], **own)

        def count_batch(tower: str, num_rows: int, decode_wait_seconds: float, teacher_seconds: float | None) -> None:
            rows.labels(tower).inc(num_rows)
            wait.labels(tower).inc(decode_wait_seconds)
            if teacher_seconds is not None:
                teacher.labels(tower).observe(teacher_seconds)

        def plan_rows(tower: str, num_rows: int) -> None:
            planned.labels(tower).set(num_rows)
            done.labels(tower).set(0)

        return {
            "input queued": decode_queue.inc,
            "input done": decode_queue.dec,
            "input prepared": lambda tower, seconds: decode.labels(tower).observe(seconds),
            "batch encoded": count_batch,
            "chunks in flight": lambda chunks: queue.labels("write").set(chunks),
            "chunk committed": lambda chunk, write_seconds, **_: write.labels(chunk.partition("/")[0]).observe(
                write_seconds
            ),
            "row quarantined": lambda reason, **_: bad.labels(reason).inc(),
            "problem in the dataset": lambda kind, **_: bad.labels(kind).inc(),
            "rows planned": plan_rows,
            "rows done": lambda tower, num_rows: done.labels(tower).inc(num_rows),
        }

    def _of_training(self) -> dict[str, Callable[..., None]]:
        from prometheus_client import Counter, Gauge, Histogram

        own: dict[str, Any] = {"namespace": _PREFIX, "registry": self.registry}
        samples = Counter("train_samples", "Images that this process trained on, each with its captions.", **own)
        step = Histogram("train_step_seconds", "One optimizer step, without the wait for data.", buckets=_COARSE, **own)
        data_wait = Counter("train_data_wait_seconds", "Steps waited for pixels and tokens.", **own)
        last_loss = Gauge("train_loss", "Loss of the last step.", **own)

        def count_step(num_samples: int, loss: float, data_wait_seconds: float, seconds: float) -> None:
            samples.inc(num_samples)
            last_loss.set(loss)
            data_wait.inc(data_wait_seconds)
            step.observe(seconds)

        return {"step finished": count_step}


class _GpuCollector:
    """CUDA memory and utilization of the devices that this process sees, read when Prometheus asks.

    Reports nothing before torch has started CUDA: a context takes memory on every card. Utilization needs
    nvidia-ml-py.
    """

    def collect(self) -> Iterable[Any]:
        """Return the metrics of this moment."""
        from prometheus_client.core import GaugeMetricFamily

        memory = GaugeMetricFamily(
            f"{_PREFIX}_gpu_memory_bytes",
            "Memory of a device: allocated and reserved by this process, and total.",
            labels=["device", "kind"],
        )
        used = GaugeMetricFamily(
            f"{_PREFIX}_gpu_utilization_ratio", "Share of the last second or so with a kernel.", labels=["device"]
        )
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
            for index in range(torch.cuda.device_count()):
                name = str(index)
                memory.add_metric([name, "allocated"], torch.cuda.memory_allocated(index))
                memory.add_metric([name, "reserved"], torch.cuda.memory_reserved(index))
                memory.add_metric([name, "total"], torch.cuda.get_device_properties(index).total_memory)
                # no nvidia-ml-py, or the driver reports nothing: NVML's errors are plain exceptions
                with suppress(Exception):
                    used.add_metric([name], torch.cuda.utilization(index) / 100)
        yield memory
        yield used


def count_input(future: Future[_Result], tower: str, seconds: Callable[[_Result], Iterable[float]]) -> None:
    """Count a job that decodes images or tokenizes captions: its time, and its place in the queue until it ends.

    Args:
        seconds: from the job's result, what each of its inputs took.
    """
    if not events_are_counted():
        return

    def done(future: Future[_Result]) -> None:
        event(_LOG, logging.DEBUG, "input done")
        if not future.cancelled() and future.exception() is None:
            for duration in seconds(future.result()):
                event(_LOG, logging.DEBUG, "input prepared", tower=tower, seconds=duration)

    event(_LOG, logging.DEBUG, "input queued")
    future.add_done_callback(done)  # also called if the job fails or is cancelled


def require_metrics(port: int) -> None:
    """Make this process and its children serve metrics on a port, and fail if it is taken.

    A taken port from the environment alone is only a warning: all runs of a machine may share that variable.
    """
    os.environ[METRICS_PORT] = str(port)
    os.environ[_REQUIRED] = "1"


@contextmanager
def observed(process: int = 0, **fields: Any) -> Iterator[None]:
    """Count, serve and log as the environment asks while the block runs. An inner block only adds its fields.

    A taken port is a warning, and nothing is counted, unless :func:`require_metrics` named it.

    Args:
        process: index of this process within its run on this machine. It is added to the port, except to port 0, which
            takes any free port.
        fields: added to every event of the block.

    Raises:
        UsageError: the port is invalid, or taken and required; or the log format is unknown.
    """
    global _is_observed
    start_json_logs_if_asked()
    with log_fields(**fields):
        port = os.environ.get(METRICS_PORT, "")
        if not port or _is_observed:
            yield
            return
        metrics = Metrics()
        served = _serve(metrics, port, process)
        _is_observed = True
        try:
            if served is None:
                yield
            else:
                with events_counted_by(metrics):
                    yield
        finally:
            _is_observed = False
            if served is not None:
                server, thread = served
                server.shutdown()
                server.server_close()
                thread.join()


_is_observed = False


def _serve(metrics: Metrics, first_port: str, process: int) -> tuple[Any, Any] | None:
    from prometheus_client import start_http_server

    host = os.environ.get(METRICS_HOST, "") or "127.0.0.1"
    if not first_port.isdecimal() or int(first_port) + process > 65_535:
        raise UsageError(f"{METRICS_PORT} is {first_port!r}: a port from 0 to 65535 is wanted; 0 takes a free one")
    port = int(first_port) + process if int(first_port) else 0
    try:
        server, thread = start_http_server(port, host, metrics.registry)
    except OSError as error:
        problem = f"metrics cannot be served on {host}:{port}: {error.strerror or error}"
        if os.environ.get(_REQUIRED):
            raise UsageError(f"{problem}. Choose another --metrics-port, or 0 for a free one") from error
        if json_logs():
            event(_LOG, logging.WARNING, "metrics are not served", detail=problem)
        else:
            say(f"warning: {problem}. This run goes on without; {METRICS_PORT}=0 takes a free one")
        return None
    url = f"http://{host}:{server.server_port}/metrics"
    if json_logs():
        event(_LOG, logging.INFO, "metrics are served", url=url)
    else:
        say(f"metrics: {url}")
    return server, thread
