"""Flow ``evaluate-student``: recall of a run's student beside its teacher's, and its retention.

The student runs on the images of the split; the teacher's rows come from its cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from pydantic import Field

from teacher_cache.flows.devices import device_slots
from teacher_cache.flows.markdown import code, recall_text
from teacher_cache.flows.parameters import ReportPage, TimeoutSeconds, named, parameters_of
from teacher_cache.flows.progress import LoggedProgress
from teacher_cache.flows.report_artifacts import leave_report
from teacher_cache.flows.retries import TRIED_AGAIN
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.run_file import check_config

if TYPE_CHECKING:
    from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult

ARTIFACT = "evaluate-student"


@flow(name="evaluate-student", flow_run_name=named("{run} on {split}"), persist_result=False, validate_parameters=False)
@parameters_of(EvaluateConfig, ("run", "split", "checkpoint", "towers", "device", "report"))
def evaluate_student(
    *,
    run: Annotated[str, Field(description="Folder of the training run whose student is measured.")],
    timeout_seconds: TimeoutSeconds = None,
    report: ReportPage = True,
    **settings: Any,
) -> dict[str, Any]:
    """Measure a run's student on a split beside the teacher it learned from. No teacher is loaded."""
    config = check_config(EvaluateConfig, {**settings, "run": run}, ARTIFACT)
    with device_slots(config.device):
        measured = evaluate_run.with_options(timeout_seconds=timeout_seconds)(config)
    describe(measured, run, config.image_root, report)
    return {
        "run": run,
        "checkpoint": measured.checkpoint,
        "split": measured.split,
        "images": measured.images,
        "captions": measured.captions,
        "cache_manifest_digest": measured.cache_manifest_digest,
        "teacher": measured.teacher,
        "student": measured.student,
        "retention": measured.retention,
        "towers": {name: tower.model_dump() for name, tower in (measured.towers or {}).items()} or None,
    }


@task(name="evaluate", task_run_name="evaluate", **TRIED_AGAIN)
def evaluate_run(config: EvaluateConfig) -> EvaluateResult:
    """Measure the cached teacher and a run's student on one split."""
    # imported here: prefect deploy imports this file and needs no torch
    from teacher_cache.pipeline.evaluate.retrieval import evaluate

    return evaluate(config, LoggedProgress(get_run_logger()))


@task(name="report", task_run_name="report", **TRIED_AGAIN)
def describe(measured: EvaluateResult, run: str, image_root: str | None, report: bool) -> None:
    """Create a Markdown artifact of the numbers and, with ``report``, the page and its chart."""
    text = f"# {code(run)}\n\n{recall_text(measured)}"
    if report:
        text += leave_report(ARTIFACT, measured.cache, Path(run) / "report.html", [run], image_root).line()
    create_markdown_artifact(text, key=ARTIFACT)
