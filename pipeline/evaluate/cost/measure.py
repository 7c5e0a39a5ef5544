"""What models cost, side by side: size, FLOPs, latency, images and captions per second, peak memory.

All models of one comparison are timed in turns (``teacher_cache.pipeline.evaluate.cost.latency``), whatever runs them:
torch, ONNX Runtime. No torch at import: a model brings what it needs.
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
_ROUNDS_OF_SINGLE = 4  # times as many: they are short, and their 95th percentile is what a user waits for

Progress = Callable[[str, int, int], None]


def measure_cost(
    models: Mapping[str, CostModel],
    facts: Mapping[str, ModelFacts] | None = None,
    memory: Mapping[str, ProbeRequest] | None = None,
    reference: str | None = None,
    batches: Sequence[int] = (1, 32),
    rounds: int = 15,
    device: str = "cpu",
    threads: int | None = None,
    made_with: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> CostResult:
    """Time models in turns: for each tower and batch, every round runs each model once.

    Memory comes first and in processes of its own, one after the other, so that nothing runs beside what is timed.

    Args:
        models: by name, loaded.
        facts: of those for which there are some.
        memory: how to load, in a fresh process, those whose peak memory is wanted.
        reference: the model that the others are compared with; the first one if left out.
        batches: images, and captions, per call.
        rounds: measured calls at each batch; four times as many at batch 1.
        device, threads, made_with: what is recorded, versions of libraries by name; they choose nothing here.
        progress: called with (stage, done, in all).

    Raises:
        UsageError: no model, an unknown reference, or one of those named in ``facts`` or ``memory`` is not there.
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
    peaks: dict[str, PeakMemory] = {}
    for number, (name, request) in enumerate(memory.items()):
        _report(progress, "peak memory", number, len(memory))
        peaks[name] = measure_peak_memory(request)
        _report(progress, "peak memory", number + 1, len(memory))
    times: dict[str, dict[int, dict[str, Timing]]] = {tower: {} for tower in _TOWERS}
    counts = {batch: rounds * (_ROUNDS_OF_SINGLE if batch == 1 else 1) for batch in sorted(set(batches))}
    for tower, found in times.items():
        for batch, count in counts.items():

            def report(done: int, stage: str = f"{tower} by {batch}", count: int = count) -> None:
                _report(progress, stage, done, count)

            work = {name: getattr(model, tower)(batch) for name, model in models.items()}
            # two rounds: what is compiled, packed or planned at a first call may be used from the second one on
            found[batch] = interleaved(work, count, warmup=2, batch=batch, progress=report)
    return CostResult(
        models={
            name: ModelCost(
                facts=facts.get(name, ModelFacts()),
                **{tower: {batch: found[name] for batch, found in times[tower].items()} for tower in _TOWERS},
                memory=peaks.get(name),
            )
            for name in models
        },
        reference=reference,
        speed={
            name: SpeedRatios(
                **{
                    tower: {batch: speed_ratio(found[name], found[reference]) for batch, found in times[tower].items()}
                    for tower in _TOWERS
                }
            )
            for name in models
            if name != reference
        },
        memory_batch=max(batches),
        rounds=counts,
        device=device,
        threads=threads,
        made_with={"python": platform.python_version(), **(made_with or {})},
        seconds=time.perf_counter() - started,
    )


def cost(config: CostConfig, progress: Progress | None = None) -> CostResult:
    """Measure a teacher, a run's student or both, in float32; no images and no captions of a dataset are needed.

    Raises:
        UsageError: neither named, a run without such a checkpoint, or a model or device that cannot be used.
        ChildProcessError: a process that measures memory failed.
    """
    if config.run is None and config.teacher is None:
        raise UsageError("nothing to measure: give --run, --teacher or both")
    folder = RunFolder(config.run) if config.run is not None else None
    checkpoint = folder.checkpoint_path(config.checkpoint) if folder is not None else None

    import torch  # takes seconds

    from teacher_cache.pipeline.evaluate.cost.torch_models import TorchModel, load_student_model, load_teacher_model
    from teacher_cache.pipeline.models.device import keep_freed_memory, resolve_device

    device = resolve_device(config.device)
    keep_freed_memory(device)  # as precompute and train do
    threads = torch.get_num_threads()
    models: dict[str, TorchModel] = {}
    loaders: dict[str, dict[str, Any]] = {}
    try:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.teacher is not None:
            loaders["teacher"] = {"name": config.teacher, "pretrained": config.pretrained, "device": config.device}
            models["teacher"] = load_teacher_model(**loaders["teacher"])
        if checkpoint is not None:
            loaders["student"] = {"folder": str(checkpoint), "device": config.device}
            models["student"] = load_student_model(**loaders["student"])
        result = measure_cost(
            models,
            {name: model.facts() for name, model in models.items()},
            {
                name: ProbeRequest(
                    loader=f"teacher_cache.pipeline.evaluate.cost.torch_models:load_{name}_model",
                    arguments=arguments,
                    batch=max(config.batch),
                    threads=torch.get_num_threads(),
                )
                for name, arguments in loaders.items()
            },
            batches=config.batch,
            rounds=config.rounds,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
            threads=torch.get_num_threads() if device.type == "cpu" else None,
            made_with={"torch": torch.__version__},
            progress=progress,
        )
    finally:
        torch.set_num_threads(threads)
    where = checkpoint.relative_to(folder.path).as_posix() if folder and checkpoint else None
    return result.model_copy(update={"run": config.run, "checkpoint": where, "teacher_name": config.teacher})


def processor() -> str:
    """The processor's name and its cores, as far as the system tells."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux
    return f"{name}, {os.cpu_count()} cores"


def _report(progress: Progress | None, stage: str, done: int, total: int) -> None:
    if progress is not None:
        progress(stage, done, total)
