"""The main job on an embedded default: rendered scenes and a small trained teacher, no download, no service."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from rich.box import SIMPLE_HEAD
from rich.table import Table

from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult, evaluate
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.progress import StageProgress

__all__ = ["DemoResult", "demo_table", "run_demo"]

# what the student needs for most of what it will ever reach, in a minute and a half on two cores
STUDENT = "scenes-small"
SETTINGS: dict[str, Any] = {
    "epochs": 32,
    "batch_size": 64,
    "learning_rate": 3e-3,
    "weight_decay": 0.05,
    "clip_grad_norm": 5.0,
    "losses": {"contrastive": 1.0, "relational": 1.0, "feature": 2000.0},
}


# what a cache and a run hold, finished or not: only such folders are replaced
_CACHE_NAMES = {"manifest.json", "manifest.backup.json", "samples", "captions", "problems", "targets.zarr"}
_CACHE_NAMES |= {"commits", "claims", "journal"}
_RUN_NAMES = {"run.json", "log.jsonl", "checkpoints", "tensorboard", "evaluations", ".lock"}


class DemoResult(BaseModel, frozen=True):
    """What the demo measured."""

    evaluation: EvaluateResult
    teacher_parameters: int
    student_parameters: int
    seconds: dict[str, float] = Field(description="Wall clock by stage.")


def run_demo(out: Path, progress: StageProgress) -> DemoResult:
    """Precompute, train and evaluate below ``out``. Scenes rendered before are used again; cache and run are not."""
    from teacher_cache.pipeline.models.teacher import load_teacher
    from teacher_cache.pipeline.precompute.run import precompute
    from teacher_cache.pipeline.train.loop import StepProgress, train

    cache, run = out / "scenes.cache", out / "student"
    for old, known in ((cache, _CACHE_NAMES), (run, _RUN_NAMES)):
        if old.exists():
            strange = sorted(path.name for path in old.iterdir() if path.name not in known)
            if strange:
                raise UsageError(f"{old}: not made by the demo, it holds {strange[0]!r}. Choose another --out.")
            shutil.rmtree(old)
    seconds: dict[str, float] = {}

    started = time.perf_counter()
    teacher = load_teacher("bundled:scenes", device="cpu")
    teacher_parameters = sum(parameter.numel() for parameter in teacher.model.parameters())
    del teacher
    precompute(
        PrecomputeConfig(dataset=f"scenes:{out / 'scenes'}", teacher="bundled:scenes", cache=str(cache)), progress
    )
    seconds["precompute"] = time.perf_counter() - started

    def report(at: StepProgress) -> None:
        progress("train", at.step, at.total_steps, f"loss {at.loss:.3f}  {at.samples_per_second:,.0f} samples/s")

    started = time.perf_counter()
    train(
        TrainConfig(
            cache=str(cache),
            student=STUDENT,
            out=str(run),
            **SETTINGS,
        ),
        report,
    )
    seconds["train"] = time.perf_counter() - started

    def scored(stage: str, done: int, total: int) -> None:
        progress(f"test {stage}", done, total)

    started = time.perf_counter()
    evaluation = evaluate(EvaluateConfig(cache=str(cache), run=str(run), split="test"), scored)
    seconds["evaluate"] = time.perf_counter() - started
    return DemoResult(
        evaluation=evaluation,
        teacher_parameters=teacher_parameters,
        student_parameters=RunFolder(run).read().student_parameters,
        seconds=seconds,
    )


def demo_table(result: DemoResult) -> Table:
    """One table: teacher and student, recalls both ways, retention, parameters, seconds by stage."""
    found = result.evaluation
    assert found.student is not None  # the demo evaluates a run
    assert found.retention is not None
    stages = ", ".join(f"{stage} {spent:.0f} s" for stage, spent in result.seconds.items())
    table = Table(
        title=f"{found.images} test scenes, {found.captions} captions; chance R@1 is {100 / found.images:.2f} %",
        caption=f"seconds spent: {stages}",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    cells: dict[str, list[Any]] = {
        "teacher": [f"{result.teacher_parameters:,}"],
        "student": [f"{result.student_parameters:,}"],
        "retention": [f"{100 * result.student_parameters / result.teacher_parameters:.0f} %"],
    }
    for direction, recalls in found.teacher.items():
        for name in recalls:
            table.add_column(f"{direction}\n{name}", justify="right", no_wrap=True)
            cells["teacher"].append(f"{recalls[name]:.1f}")
            cells["student"].append(f"{found.student[direction][name]:.1f}")
            kept = found.retention[direction][name]
            cells["retention"].append("-" if kept is None else f"{kept:.0f} %")
    table.add_column("\nmean", justify="right", no_wrap=True)
    for label, values in (("teacher", found.teacher), ("student", found.student)):
        recalls_all = [value for recalls in values.values() for value in recalls.values()]
        cells[label].append(f"{sum(recalls_all) / len(recalls_all):.1f}")
    cells["retention"].append(f"{found.retention['mean']:.0f} %")
    for label, row in cells.items():
        table.add_row(label, *row)
    return table
