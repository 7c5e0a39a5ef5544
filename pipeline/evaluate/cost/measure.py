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
from typing import Any

from teacher_cache.pipeline.evaluate.cost.latency import Timing, interleaved, speed_ratio
from teacher_cache.pipeline.evaluate.cost.peak_memory import PeakMemory, ProbeRequest, measure_peak_memory
from teacher_cache.pipeline.evaluate.cost.results import CostModel, CostResult, ModelCost, ModelFacts, SpeedRatios
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.settings.evaluate import CostConfig
from teacher_cache.storage.errors import UsageError

__all__ = ["cost", "measure_cost", "processor"]

_TOWERS = ("images", "texts")
_ROUNDS_OF_SINGLE = 4  # times as many: calls at batch 1 are short, and users wait for their 95th percentile

Progress = Callable[[str, int, int], None]


def measure_cost(
    models: Mapping[str, CostModel],
    facts: Mapping[str, ModelFacts] | None = None,
    memory: Mapping[str, ProbeRequest] | None = None,
    reference: str | None = None,
    batches: Sequence[int] = (1, 32),
    rounds: int = 15,
    progress: Progress | None = None,
) -> CostResult:
    """Time models interleaved: for each tower and batch, every round runs each model once.

    Peak memory is measured first, in a process per model, so that nothing else runs during the timing.

    Args:
        models: loaded models by name.
        facts: size and FLOPs by name, where known.
        memory: requests to load a model in a fresh process, by name of the models whose peak memory is measured.
        reference: model that the others are compared with. Default: the first one.
        batches: numbers of images, and of captions, per call.
        rounds: number of measured calls at each batch; four times as many at batch 1.
        progress: called with (stage, done, total).

    Raises:
        UsageError: no model, or an unknown reference or name in ``facts`` or ``memory``.
        ChildProcessError: a process that measures memory failed.
    """
    started = time.perf_counter()
    facts, memory = facts or {}, memory or {}
    reference = reference if reference is not None else next(iter(models), "")
    unknown = sorted({reference, *facts, *memory} - set(models))
    if unknown or not batches:
        raise UsageError(
            f"cost of {', '.join(unknown) or 'no batch'} asked for, but there are the models "
            f"{', '.join(models) or '(none)'}; name some of these and one batch or more"
        )
    report = progress or (lambda stage, done, total: None)
    peaks = _peaks(memory, report)
    counts = {batch: rounds * (_ROUNDS_OF_SINGLE if batch == 1 else 1) for batch in sorted(set(batches))}
    times = {tower: _tower_times(models, tower, counts, report) for tower in _TOWERS}
    return CostResult(
        models={
            name: ModelCost(
                facts=facts.get(name, ModelFacts()),
                **{tower: {batch: timings[name] for batch, timings in times[tower].items()} for tower in _TOWERS},
                memory=peaks.get(name),
            )
            for name in models
        },
        reference=reference,
        speed={name: _speed(times, name, reference) for name in models if name != reference},
        memory_batch=max(batches),
        rounds=counts,
        made_with={"python": platform.python_version()},
        seconds=time.perf_counter() - started,
    )


def _peaks(memory: Mapping[str, ProbeRequest], report: Progress) -> dict[str, PeakMemory]:
    peaks: dict[str, PeakMemory] = {}
    for number, (name, request) in enumerate(memory.items()):
        report("peak memory", number, len(memory))
        peaks[name] = measure_peak_memory(request)
        report("peak memory", number + 1, len(memory))
    return peaks


def _tower_times(
    models: Mapping[str, CostModel], tower: str, counts: Mapping[int, int], report: Progress
) -> dict[int, dict[str, Timing]]:
    """Time one tower of all models, by batch."""
    times: dict[int, dict[str, Timing]] = {}
    for batch, count in counts.items():

        def done(rounds: int, stage: str = f"{tower} by {batch}", count: int = count) -> None:
            report(stage, rounds, count)

        work = {name: getattr(model, tower)(batch) for name, model in models.items()}
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

    from teacher_cache.pipeline.models.device import keep_freed_memory, resolve_device

    device = resolve_device(config.device)
    keep_freed_memory(device)  # as precompute and train do
    loaders: dict[str, dict[str, Any]] = {}
    if config.teacher is not None:
        loaders["teacher"] = {"name": config.teacher, "pretrained": config.pretrained, "device": config.device}
    if checkpoint is not None:
        loaders["student"] = {"folder": str(checkpoint), "device": config.device}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(config.threads or before)
        result = _measure_loaded(config, loaders, torch.get_num_threads(), progress)
        threads = torch.get_num_threads() if device.type == "cpu" else None
    finally:
        torch.set_num_threads(before)
    return result.model_copy(
        update={
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
            "threads": threads,
            "made_with": {**result.made_with, "torch": torch.__version__},
            "run": config.run,
            "checkpoint": checkpoint.relative_to(folder.path).as_posix() if folder and checkpoint else None,
            "teacher_name": config.teacher,
        }
    )


def _measure_loaded(
    config: CostConfig, loaders: Mapping[str, dict[str, Any]], threads: int, progress: Progress | None
) -> CostResult:
    """Load teacher and student, and measure them."""
    from teacher_cache.pipeline.evaluate.cost import torch_models

    models = {name: getattr(torch_models, f"load_{name}_model")(**arguments) for name, arguments in loaders.items()}
    probes = {
        name: ProbeRequest(
            loader=f"{torch_models.__name__}:load_{name}_model",
            arguments=arguments,
            batch=max(config.batch),
            threads=threads,
        )
        for name, arguments in loaders.items()
    }
    facts = {name: model.facts() for name, model in models.items()}
    return measure_cost(models, facts, probes, batches=config.batch, rounds=config.rounds, progress=progress)


def processor() -> str:
    """Return the name of the processor, where the system has it, and its number of cores."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux
    return f"{name}, {os.cpu_count()} cores"
