"""Peak memory of a model in its own process: ``python -m teacher_cache.pipeline.evaluate.cost.peak_memory``, with a
request as JSON on stdin and the result as JSON on stdout.

In the process that compares models, the memory of the other models would count too. No torch here, so that a deployed
student can be measured without it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, computed_field

_CALLS = 2  # of each tower: the first one may leave memory allocated


class ProbeRequest(BaseModel, frozen=True):
    """A model to load, and the calls to make."""

    loader: str = Field(
        description="MODULE:FUNCTION that returns a teacher_cache.pipeline.evaluate.cost.results.CostModel."
    )
    arguments: dict[str, Any] = Field({}, description="Keyword arguments of the loader, as JSON.")
    batch: int = Field(32, gt=0, description="Number of images, then of captions, per call.")
    threads: int | None = Field(None, gt=0, description="Number of torch's threads, if the loader imports torch.")

    @classmethod
    def of(cls, load: Callable[..., Any], arguments: dict[str, Any], batch: int, threads: int | None) -> ProbeRequest:
        """Return the request to load a model by a function of a module."""
        return cls(loader=f"{load.__module__}:{load.__name__}", arguments=arguments, batch=batch, threads=threads)


class PeakMemory(BaseModel, frozen=True):
    """Resident bytes of the process, mapped libraries and files included.

    Measured without ``teacher_cache.pipeline.models.device.keep_freed_memory``, which keeps memory that no model needs.
    """

    imported_bytes: int = Field(description="Bytes before the model is loaded: Python and the libraries.")
    loading_peak_bytes: int = Field(description="Peak while the model is loaded.")
    loaded_bytes: int = Field(description="Bytes with the model loaded and nothing encoded.")
    encoding_peak_bytes: int = Field(
        description="Peak while it encodes. On systems other than Linux, peak since the start."
    )
    cuda_peak_bytes: int | None = Field(None, description="Peak of torch's allocations on the GPU, if it used one.")

    @computed_field(description="Peak of loading and encoding.")  # type: ignore[prop-decorator]
    @property
    def peak_bytes(self) -> int:
        """Peak of loading and encoding."""
        return max(self.loading_peak_bytes, self.encoding_peak_bytes)

    @computed_field(description="Peak of encoding without Python and libraries: weights and activations.")  # type: ignore[prop-decorator]
    @property
    def encoding_bytes(self) -> int:
        """Peak of encoding without Python and libraries: weights and activations."""
        return self.encoding_peak_bytes - self.imported_bytes


def measure_peak_memory(request: ProbeRequest) -> PeakMemory:
    """Run a request in a fresh process.

    Raises:
        ChildProcessError: the process failed or was killed, perhaps for lack of memory. The message has its last line.
    """
    paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    done = subprocess.run(
        # -P: do not import a folder named pipeline from the working directory
        [sys.executable, "-P", "-m", "teacher_cache.pipeline.evaluate.cost.peak_memory"],
        input=request.model_dump_json(),
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise ChildProcessError(
            f"peak memory by {request.loader}: the process that measures it ended with {done.returncode}: {last[0]}. "
            "-9 is the kernel's, for want of memory: measure smaller batches."
        )
    return PeakMemory.model_validate_json(done.stdout.splitlines()[-1])


def probe(request: ProbeRequest) -> PeakMemory:
    """Load a model and encode in this process, which must be fresh."""
    module, _, function = request.loader.partition(":")
    load = getattr(importlib.import_module(module), function)
    torch = sys.modules.get("torch")
    if torch is not None and request.threads is not None:
        torch.set_num_threads(request.threads)
    imported, _ = _resident_bytes()
    model = load(**request.arguments)
    gc.collect()
    loaded, loading_peak = _resident_bytes()
    _forget_peak()
    for call in (model.images(request.batch), model.texts(request.batch)):
        for _ in range(_CALLS):
            call()
    return PeakMemory(
        imported_bytes=imported,
        loading_peak_bytes=loading_peak,
        loaded_bytes=loaded,
        encoding_peak_bytes=_resident_bytes()[1],
        cuda_peak_bytes=_cuda_peak(torch),
    )


def _resident_bytes() -> tuple[int, int]:
    """Return the resident bytes now, and their peak so far."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        # not Linux: only the peak is known; macOS counts bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return peak, peak
    # not ru_maxrss: on Linux a child inherits its parent's peak
    kilobytes = {
        name: int(rest.split()[0])
        for name, _, rest in (line.partition(":") for line in status.splitlines())
        if name in ("VmRSS", "VmHWM")
    }
    return 1024 * kilobytes["VmRSS"], 1024 * kilobytes["VmHWM"]


def _forget_peak() -> None:
    # not Linux, or not allowed: the peak of encoding then includes loading
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to VmRSS


def _cuda_peak(torch: Any) -> int | None:
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return max(int(torch.cuda.max_memory_allocated(index)) for index in range(torch.cuda.device_count()))


if __name__ == "__main__":
    sys.stdout.write(probe(ProbeRequest.model_validate_json(sys.stdin.read())).model_dump_json() + "\n")
