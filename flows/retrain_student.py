"""Flow ``retrain-student``: look for new data; encode it, train, measure beside the champion, ship and promote.

Meant for a schedule: without new data it ends in seconds. The folders, not Prefect, record what is done: the next run
resumes a crashed one. As in ``train-student``, training is not retried at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from teacher_cache.flows.devices import device_slots
from teacher_cache.flows.markdown import retraining_text
from teacher_cache.flows.parameters import ReportPage, TimeoutSeconds, named, parameters_of
from teacher_cache.flows.precompute_teacher import log_problems
from teacher_cache.flows.progress import LoggedProgress, hints_logged
from teacher_cache.flows.report_artifacts import leave_report
from teacher_cache.flows.retries import TRIED_AGAIN
from teacher_cache.pipeline.settings.promote import RetrainConfig
from teacher_cache.pipeline.settings.run_file import check_config
from teacher_cache.storage.observe.logs import log_fields

if TYPE_CHECKING:
    from teacher_cache.pipeline.precompute.run import PrecomputeResult
    from teacher_cache.pipeline.promote.gate import PromoteResult
    from teacher_cache.pipeline.promote.look import Look
    from teacher_cache.pipeline.train.loop import StepProgress

ARTIFACT = "retrain-student"


@flow(
    name="retrain-student",
    flow_run_name=named("{student} on {dataset} -> {home}"),
    persist_result=False,
    validate_parameters=False,
)
@parameters_of(
    RetrainConfig,
    (
        *("dataset", "teacher", "pretrained", "home", "student", "start", "train"),
        *("split", "margin", "ship", "device", "report"),
    ),
)
def retrain_student(
    *,
    timeout_seconds: TimeoutSeconds = None,
    report: ReportPage = True,
    **settings: Any,
) -> dict[str, Any]:
    """Retrain if the dataset has changed, and promote the student if it is not worse than the champion."""
    config = check_config(RetrainConfig, settings, ARTIFACT)
    state = look(config)
    encoded = verdict = None
    if state.judged is None:
        with device_slots(config.device, config.train.get("devices", 1)), log_fields(run=flow_run.name):
            encoded = encode(config, state)
            train.with_options(timeout_seconds=timeout_seconds)(config, state)
            verdict = promote(config, state)
    outcome = verdict.outcome if verdict else "nothing-new"
    describe(outcome, state, encoded, verdict, report)
    candidate = verdict.candidate if verdict else state.judged
    return {
        "outcome": outcome,
        "cache": state.cache,
        "changes": state.changes and state.changes.model_dump(),
        "rows_reused": encoded and encoded.rows_reused,
        "run": state.run,
        "student": candidate and candidate.number,
        "reason": candidate and candidate.reason,
    }


@task(name="look", task_run_name="look", **TRIED_AGAIN)
def look(config: RetrainConfig) -> Look:
    """Read the dataset and the home, and log what is to be done."""
    # imported here: prefect deploy imports this file and needs no torch
    from teacher_cache.pipeline.promote.retrain import Retraining

    logger = get_run_logger()
    with hints_logged() as hints:
        state = Retraining(config).look(LoggedProgress(logger))
    if state.judged is not None:
        logger.info(f"nothing new: student {state.judged.number} was trained from {state.cache}, which is up to date")
    elif state.changes is not None:
        changes = state.changes
        logger.info(
            f"against the newest cache: {changes.new_images:,} new images, {changes.removed_images:,} gone, "
            f"{changes.new_captions:,} new captions, {changes.removed_captions:,} gone"
        )
    for notice in state.notices:
        logger.warning(notice)
    return state.model_copy(update={"notices": (*state.notices, *hints)})


@task(name="encode", task_run_name="encode", **TRIED_AGAIN)
def encode(config: RetrainConfig, state: Look) -> PrecomputeResult | None:
    """Encode a cache of the current dataset, unless it is finished, and verify it. Old rows are copied.

    The first problems of the dataset are logged.
    """
    from teacher_cache.pipeline.promote.retrain import Retraining

    encoded = Retraining(config).encode(state, LoggedProgress(get_run_logger()))
    if encoded is not None:
        log_problems(encoded)
    return encoded


@task(name="train", task_run_name="train", cache_policy=NO_CACHE, persist_result=False)
def train(config: RetrainConfig, state: Look) -> str:
    """Train the student, or resume a run that died."""
    from teacher_cache.pipeline.promote.retrain import Retraining

    progress = LoggedProgress(get_run_logger())

    def say(at: StepProgress) -> None:
        progress("step", at.step, at.total_steps, f"loss {at.loss:.3f}")

    return Retraining(config).train(state, say)


@task(name="promote", task_run_name="promote", **TRIED_AGAIN)
def promote(config: RetrainConfig, state: Look) -> PromoteResult:
    """Compare the student with the champion; ship and promote it if it passes."""
    from teacher_cache.pipeline.promote.retrain import Retraining

    result = Retraining(config).promote(state, LoggedProgress(get_run_logger()))
    get_run_logger().info(f"student {result.candidate.number} {result.outcome}: {result.candidate.reason}")
    return result


@task(name="report", task_run_name="report", **TRIED_AGAIN)
def describe(
    outcome: str, state: Look, encoded: PrecomputeResult | None, verdict: PromoteResult | None, report: bool
) -> None:
    """Create a Markdown artifact of the retraining and, with ``report``, the page and its chart."""
    text = retraining_text(outcome, state, encoded, verdict.candidate if verdict else state.judged)
    if report and verdict is not None:
        text += leave_report(ARTIFACT, state.cache, Path(state.run) / "report.html", [state.run]).line()
    create_markdown_artifact(text, key=ARTIFACT)
