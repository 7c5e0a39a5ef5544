"""Cost of models, side by side: size, FLOPs, latency, images and captions per second, peak memory.

All models of one comparison are timed interleaved (``teacher_cache.pipeline.evaluate.cost.latency``), whether torch or
ONNX Runtime runs them. No torch at import.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from teacher_cache.pipeline.evaluate.cost.latency import Timing, interleaved, speed_ratio
from teacher_cache.pipeline.evaluate.cost.peak_memory import PeakMemory, ProbeRequest, measure_peak_memory
from teacher_cache.pipeline.evaluate.cost.results import CostResult, MeasuredModel, ModelCost, SpeedRatios
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.settings.evaluate import CostConfig
from teacher_cache.storage.errors import UsageError

_TOWERS = ("images", "texts")
_ROUNDS_OF_SINGLE = 4  # times as many: calls at batch 1 are short, and users wait for their 95th percentile

Progress = Callable[[str, int, int], None]


def measure_cost(
    models: Mapping[str, MeasuredModel],
    batches: Sequence[int] = (1, 32),
    rounds: int = 15,
    progress: Progress | None = None,
) -> CostResult:
    """Time models interleaved: for each tower and batch, every round runs each model once.

    Peak memory is measured first, in a process per model, so that nothing else runs during the timing.

    Args:
        models: models by name, at least one. The others are compared with the first.
        batches: numbers of images, and of captions, per call.
        rounds: number of measured calls at each batch; four times as many at batch 1.
        progress: called with (stage, done, total).

    Raises:
        ChildProcessError: a process that measures memory failed.
    """
    started = time.perf_counter()
    report = progress or (lambda stage, done, total: None)
    peaks = _peaks({name: model.probe for name, model in models.items() if model.probe is not None}, report)
    counts = {batch: rounds * (_ROUNDS_OF_SINGLE if batch == 1 else 1) for batch in sorted(set(batches))}
    times = {tower: _tower_times(models, tower, counts, report) for tower in _TOWERS}
    reference = next(iter(models))
    return CostResult(
        models={
            name: ModelCost(
                facts=model.facts,
                **{tower: {batch: timings[name] for batch, timings in times[tower].items()} for tower in _TOWERS},
                memory=peaks.get(name),
            )
            for name, model in models.items()
        },
        reference=reference,
        speed={name: _speed(times, name, reference) for name in models if name != reference},
        memory_batch=max(batches),
        rounds=counts,
        made_with={"python": platform.python_version()},
        seconds=time.perf_counter() - started,
    )


def _peaks(probes: Mapping[str, ProbeRequest], report: Progress) -> dict[str, PeakMemory]:
    peaks: dict[str, PeakMemory] = {}
    for name, request in probes.items():
        report("peak memory", len(peaks), len(probes))
        peaks[name] = measure_peak_memory(request)
    report("peak memory", len(peaks), len(probes))
    return peaks


def _tower_times(
    models: Mapping[str, MeasuredModel], tower: str, counts: Mapping[int, int], report: Progress
) -> dict[int, dict[str, Timing]]:
    """Time one tower of all models, by batch."""
    times: dict[int, dict[str, Timing]] = {}
    for batch, count in counts.items():

        def done(rounds: int, stage: str = f"{tower} by {batch}", count: int = count) -> None:
            report(stage, rounds, count)

        work = {name: getattr(model.timed, tower)(batch) for name, model in models.items()}
        # two rounds: what the first call compiles or packs may be used only from the second
        times[batch] = interleaved(work, count, warmup=2, batch=batch, progress=done)
    return times


def _speed(times: Mapping[str, Mapping[int, Mapping[str, Timing]]], name: str, reference: str) -> SpeedRatios:
    ratios = {
        tower: {batch: speed_ratio(timings[name], timings[reference]) for batch, timings in of_tower.items()}
        for tower, of_tower in times.items()
    }
    return SpeedRatios(**ratios)


def cost(config: CostConfig, progress: Progress | None = None) -> CostResult:
    """Measure a teacher, a run's student or both, in float32. No dataset is needed.

    Raises:
        UsageError: neither is set, the run has no such checkpoint, or a model or device cannot be used.
        ChildProcessError: a process that measures memory failed.
    """
    if config.run is None and config.teacher is None:
        raise UsageError("nothing to measure: give --run, --teacher or both")
    folder = RunFolder(config.run) if config.run is not None else None
    checkpoint = folder.checkpoint_path(config.checkpoint) if folder is not None else None

    import torch  # takes seconds

    from teacher_cache.pipeline.evaluate.cost.torch_models import load_student_model, load_teacher_model, loaded
    from teacher_cache.pipeline.models.device import keep_freed_memory, resolve_device

    device = resolve_device(config.device)
    keep_freed_memory(device)  # as precompute and train do
    before = torch.get_num_threads()
    threads = config.threads or before
    torch.set_num_threads(threads)
    try:
        models = {}
        if config.teacher is not None:
            arguments = {"name": config.teacher, "pretrained": config.pretrained, "device": config.device}
            models["teacher"] = loaded(load_teacher_model, arguments, max(config.batch), threads)
        if checkpoint is not None:
            arguments = {"folder": str(checkpoint), "device": config.device}
            models["student"] = loaded(load_student_model, arguments, max(config.batch), threads)
        result = measure_cost(models, config.batch, config.rounds, progress)
    finally:
        torch.set_num_threads(before)
    return result.model_copy(
        update={
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
            "threads": threads if device.type == "cpu" else None,
            "made_with": {**result.made_with, "torch": torch.__version__},
            "run": config.run,
            "checkpoint": checkpoint.relative_to(folder.path).as_posix() if folder and checkpoint else None,
            "teacher_name": config.teacher,
        }
    )


def processor() -> str:
    """Return the name of the processor, where the system has it, and its number of cores."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux
    return f"{name}, {os.cpu_count()} cores"
