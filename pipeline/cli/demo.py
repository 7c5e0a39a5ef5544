"""The ``demo`` command: cache and distill a small trained teacher on rendered scenes, without download or service."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from teacher_cache.pipeline.evaluate.recall import mean_recall
from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult, evaluate
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.storage.cli.app import command, json_flag, option, print_result
from teacher_cache.storage.cli.tables import Table
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.progress import StageProgress

if TYPE_CHECKING:
    from teacher_cache.pipeline.train.loop import StepProgress

# reaches most of this student's recall in a minute and a half on two cores
STUDENT = "scenes-small"
SETTINGS: dict[str, Any] = {
    "epochs": 32,
    "batch_size": 64,
    "learning_rate": 3e-3,
    "weight_decay": 0.05,
    "clip_grad_norm": 5.0,
    "losses": {"contrastive": 1.0, "relational": 1.0, "feature": 2000.0},
}

# files of a cache and a run, finished or not: only folders with nothing else are replaced
CACHE_NAMES = {"manifest.json", "manifest.backup.json", "samples", "captions", "problems", "targets.zarr"}
CACHE_NAMES |= {"commits", "claims", "journal"}
RUN_NAMES = {"run.json", "log.jsonl", "checkpoints", "tensorboard", "evaluations", ".lock", ".tracker-id"}


class DemoResult(BaseModel):
    """Result of ``demo``."""

    model_config = ConfigDict(frozen=True)

    evaluation: EvaluateResult
    teacher_parameters: int
    student_parameters: int
    seconds: dict[str, float] = Field(description="Wall clock by stage, in seconds.")


@command("demo", example="demo --out runs/demo")
@option("--out", "Folder of the demo. Its cache and run are replaced.", Path("runs/demo"), type=Path, metavar="TEXT")
@json_flag
def demo(out: Path, as_json: bool) -> None:
    """Download nothing; the run takes about two minutes on a laptop."""
    with StageProgress() as progress:
        result = run_demo(out, progress)
    print_result(result, as_json, lambda _: [demo_table(result)])


def run_demo(out: Path, progress: StageProgress) -> DemoResult:
    """Precompute, train and evaluate below ``out``. Rendered scenes are reused; cache and run are replaced."""
    from teacher_cache.pipeline.models.run_folder import RunFolder
    from teacher_cache.pipeline.models.teacher import load_teacher
    from teacher_cache.pipeline.precompute.run import precompute
    from teacher_cache.pipeline.train.loop import train

    cache, run = out / "scenes.cache", out / "student"
    _remove(cache, CACHE_NAMES)
    _remove(run, RUN_NAMES)
    seconds: dict[str, float] = {}

    def report(at: StepProgress) -> None:
        progress("train", at.step, at.total_steps, f"loss {at.loss:.3f}  {at.samples_per_second:,.0f} samples/s")

    with _timed("precompute", seconds):
        teacher = load_teacher("bundled:scenes", device="cpu").model
        teacher_parameters = sum(parameter.numel() for parameter in teacher.parameters())
        dataset = f"scenes:{out / 'scenes'}"
        precompute(PrecomputeConfig(dataset=dataset, teacher="bundled:scenes", cache=str(cache)), progress)
    with _timed("train", seconds):
        train(TrainConfig(cache=str(cache), student=STUDENT, out=str(run), **SETTINGS), report)
    with _timed("evaluate", seconds):
        config = EvaluateConfig(cache=str(cache), run=str(run), split="test")
        evaluation = evaluate(config, lambda stage, done, total: progress(f"test {stage}", done, total))
    return DemoResult(
        evaluation=evaluation,
        teacher_parameters=teacher_parameters,
        student_parameters=RunFolder(run).read().student_parameters,
        seconds=seconds,
    )


def demo_table(result: DemoResult) -> Table:
    """Return the table of recalls and parameters of teacher and student, the retention, and the seconds by stage."""
    measured = result.evaluation
    assert measured.student is not None  # the demo evaluates a run
    assert measured.retention is not None
    columns = [(direction, name) for direction, recalls in measured.teacher.items() for name in recalls]
    table = Table(
        f"{measured.images} test scenes, {measured.captions} captions; chance R@1 is {100 / measured.images:.2f} %",
        ["", "parameters", *("\n".join(column) for column in columns), "\nmean"],
        caption=f"seconds spent: {', '.join(f'{stage} {spent:.0f} s' for stage, spent in result.seconds.items())}",
    )
    for label, parameters, recalls in (
        ("teacher", result.teacher_parameters, measured.teacher),
        ("student", result.student_parameters, measured.student),
    ):
        cells = (f"{recalls[direction][name]:.1f}" for direction, name in columns)
        table.add_row(label, f"{parameters:,}", *cells, f"{mean_recall(recalls):.1f}")
    shares = [measured.retention[direction][name] for direction, name in columns]
    table.add_row(
        "retention",
        f"{result.student_parameters / result.teacher_parameters:.0%}".replace("%", " %"),
        *("-" if share is None else f"{share:.0f} %" for share in shares),
        f"{measured.retention['mean']:.0f} %",
    )
    return table


def _remove(folder: Path, known: set[str]) -> None:
    """Remove the folder of an earlier demo.

    Raises:
        UsageError: it contains files that the demo did not make.
    """
    if not folder.exists():
        return
    strange = sorted(path.name for path in folder.iterdir() if path.name not in known)
    if strange:
        raise UsageError(f"{folder}: not made by the demo, it holds {strange[0]!r}. Choose another --out.")
    shutil.rmtree(folder)


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started
