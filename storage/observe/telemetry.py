"""What a run counts while it works, for Prometheus to read over HTTP: images, seconds, queues, bad samples, GPUs.

Off unless ``TEACHER_CACHE_METRICS_PORT`` names a port (the flag ``--metrics-port`` sets it): then every call below does
nothing, and prometheus-client is not imported. Served on ``TEACHER_CACHE_METRICS_HOST``, 127.0.0.1 if left out, since
whoever can reach the port can read it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.logs import event, json_logs, log_fields, logger, say, start_json_logs_if_asked

__all__ = [
    "METRICS_HOST",
    "METRICS_PORT",
    "PrometheusTelemetry",
    "Telemetry",
    "observed",
    "require_metrics",
    "telemetry",
]

METRICS_PORT = "TEACHER_CACHE_METRICS_PORT"
METRICS_HOST = "TEACHER_CACHE_METRICS_HOST"
_REQUIRED = "TEACHER_CACHE_METRICS_REQUIRED"

_LOG = logger("metrics")
_PREFIX = "teacher_cache"

# seconds; one image is decoded in milliseconds, a forward pass or a chunk may take a minute
_FINE = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_COARSE = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Telemetry:
    """What the stages tell of their work. This one listens to nothing; times are in seconds."""

    def prepared(self, tower: str, job: Callable[[], Any]) -> Callable[[], Any]:
        """The same job, which decodes an image or tokenizes a batch of captions, timed."""
        return job

    def queued(self, job: Future[Any]) -> None:
        """Such a job is with the threads, until it is done, has failed or is cancelled."""

    def encoded(self, tower: str, rows: int, decode_wait_seconds: float, teacher_seconds: float | None) -> None:
        """A batch went through the teacher, which had waited for it; no seconds of the teacher if it was copied."""

    def writing(self, chunks: int) -> None:
        """So many chunks are on their way to the store."""

    def written(self, tower: str, seconds: float) -> None:
        """A chunk was committed."""

    def bad_samples(self, kinds: Mapping[str, int]) -> None:
        """So many samples more could not be used, by kind."""

    def wanted(self, tower: str, rows: int) -> None:
        """A run's work is planned, and this is what is still to be done of it; nothing is done yet."""

    def done(self, tower: str, rows: int) -> None:
        """So many rows more of those that the run wants are encoded, or committed by whomever; fewer if negative."""

    def step(self, samples: int, loss: float, data_wait_seconds: float, seconds: float) -> None:
        """An optimizer step of this process: its samples, and the seconds after the wait for them."""


class PrometheusTelemetry(Telemetry):
    """Counts into a registry of its own; its metrics are listed in docs/howto/observe.md."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

        self.registry = CollectorRegistry()
        mine: dict[str, Any] = {"namespace": _PREFIX, "registry": self.registry}
        self._rows = Counter(
            "rows", "Rows that this process encoded, or copied from an earlier cache.", ["tower"], **mine
        )
        self._decode = Histogram(
            "decode_seconds",
            "One image read, proven, decoded and resized, or one batch of captions tokenized.",
            ["tower"],
            buckets=_FINE,
            **mine,
        )
        self._decode_wait = Counter(
            "decode_wait_seconds", "The teacher waited for images or captions.", ["tower"], **mine
        )
        self._teacher = Histogram(
            "teacher_seconds", "One batch through the teacher.", ["tower"], buckets=_COARSE, **mine
        )
        self._write = Histogram(
            "write_seconds", "One chunk written, synced and committed.", ["tower"], buckets=_COARSE, **mine
        )
        self._queue = Gauge(
            "queue_depth",
            "decode: samples with the threads; write: chunks on their way.",
            ["queue"],
            **mine,
        )
        # looked up once: the two that are counted for each image
        self._decode_queue = self._queue.labels("decode")
        self._decode_by_tower = {tower: self._decode.labels(tower) for tower in ("image", "text")}
        self._bad = Counter("bad_samples", "Samples that could not be used, by kind.", ["kind"], **mine)
        self._done = Gauge("progress_rows", "Rows of this run that are done, by whomever.", ["tower"], **mine)
        self._wanted = Gauge("wanted_rows", "Rows that this run began with as its work.", ["tower"], **mine)
        self._samples = Counter("train_samples", "Images that this process trained on, each with its captions.", **mine)
        self._step = Histogram(
            "train_step_seconds", "One optimizer step, without the wait for data.", buckets=_COARSE, **mine
        )
        self._data_wait = Counter("train_data_wait_seconds", "Steps waited for pixels and tokens.", **mine)
        self._loss = Gauge("train_loss", "Of the last step.", **mine)
        self.registry.register(_GpuCollector())
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def prepared(self, tower: str, job: Callable[[], Any]) -> Callable[[], Any]:
        """See :class:`Telemetry`."""
        seconds = self._decode_by_tower[tower]

        def timed() -> Any:
            started = time.perf_counter()
            try:
                return job()
            finally:
                seconds.observe(time.perf_counter() - started)

        return timed

    def queued(self, job: Future[Any]) -> None:
        """See :class:`Telemetry`."""
        self._decode_queue.inc()
        job.add_done_callback(lambda _: self._decode_queue.dec())

    def encoded(self, tower: str, rows: int, decode_wait_seconds: float, teacher_seconds: float | None) -> None:
        """See :class:`Telemetry`."""
        self._rows.labels(tower).inc(rows)
        self._decode_wait.labels(tower).inc(decode_wait_seconds)
        if teacher_seconds is not None:
            self._teacher.labels(tower).observe(teacher_seconds)

    def writing(self, chunks: int) -> None:
        """See :class:`Telemetry`."""
        self._queue.labels("write").set(chunks)

    def written(self, tower: str, seconds: float) -> None:
        """See :class:`Telemetry`."""
        self._write.labels(tower).observe(seconds)

    def bad_samples(self, kinds: Mapping[str, int]) -> None:
        """See :class:`Telemetry`."""
        for kind, count in kinds.items():
            self._bad.labels(kind).inc(count)

    def wanted(self, tower: str, rows: int) -> None:
        """See :class:`Telemetry`."""
        self._wanted.labels(tower).set(rows)
        self._done.labels(tower).set(0)

    def done(self, tower: str, rows: int) -> None:
        """See :class:`Telemetry`."""
        self._done.labels(tower).inc(rows)

    def step(self, samples: int, loss: float, data_wait_seconds: float, seconds: float) -> None:
        """See :class:`Telemetry`."""
        self._samples.inc(samples)
        self._loss.set(loss)
        self._data_wait.inc(data_wait_seconds)
        self._step.observe(seconds)


class _GpuCollector:
    """CUDA memory and use of the devices that this process sees, read when Prometheus asks.

    Nothing while torch has not started CUDA: a question must not take a context's memory on every card. Use needs
    nvidia-ml-py, which torch asks NVML through; without it there is memory alone.
    """

    def collect(self) -> Iterable[Any]:
        """The metrics of this moment."""
        from prometheus_client.core import GaugeMetricFamily

        memory = GaugeMetricFamily(
            f"{_PREFIX}_gpu_memory_bytes",
            "Of a device: allocated and reserved by this process's torch, and total.",
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
                try:
                    used.add_metric([name], torch.cuda.utilization(index) / 100)
                except (ImportError, RuntimeError, OSError):  # no nvidia-ml-py, or a driver that tells nothing
                    continue
        yield memory
        yield used


_OFF = Telemetry()
_current: Telemetry = _OFF


def telemetry() -> Telemetry:
    """Who listens to the stages of this process."""
    return _current


def require_metrics(port: int) -> None:
    """Let this process and those that it starts count and serve on a port, or refuse to work, where it is taken.

    One that the environment alone names is passed over then: it may be that of every run on a machine.
    """
    os.environ[METRICS_PORT] = str(port)
    os.environ[_REQUIRED] = "1"


@contextmanager
def observed(process: int = 0, **fields: Any) -> Iterator[None]:
    """Count, serve and log as the environment asks while the block runs; a block inside another one adds fields alone.

    A port that is taken is a warning, and nothing is counted, unless :func:`require_metrics` named it.

    Args:
        process: number of this process among those that a run has on a machine; added to the port, but not to 0,
            which is a free port each.
        fields: of every event meanwhile.

    Raises:
        UsageError: the port is no port, or is taken and required; the format of logs is none.
    """
    global _current
    start_json_logs_if_asked()
    with log_fields(**fields):
        asked = os.environ.get(METRICS_PORT, "")
        if not asked or _current is not _OFF:
            yield
            return
        counting = PrometheusTelemetry()
        served = _serve(counting, asked, process)
        _current = counting if served else Telemetry()
        try:
            yield
        finally:
            _current = _OFF
            if served:
                server, thread = served
                server.shutdown()
                server.server_close()
                thread.join()


def _serve(counting: PrometheusTelemetry, asked: str, process: int) -> tuple[Any, Any] | None:
    from prometheus_client import start_http_server

    host = os.environ.get(METRICS_HOST, "") or "127.0.0.1"
    if not asked.isdecimal() or int(asked) + process > 65_535:
        raise UsageError(f"{METRICS_PORT} is {asked!r}: a port from 0, which takes a free one, to 65535 is wanted")
    port = int(asked) + process if int(asked) else 0
    try:
        server, thread = start_http_server(port, host, counting.registry)
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
