"""Flow ``deploy-student``: export a run's student, prove each file, measure all of them, and ship one folder.

A file that fails its gate fails the flow with the reason. Nothing is shipped then, and the flow is not retried: the
same weights fail the same gate. Teacher and student are timed in turns on the CPU. Other runs would distort the times,
so ``teacher_cache.flows.serve`` runs one flow at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from pydantic import Field

from teacher_cache.flows.markdown import deployment_text
from teacher_cache.flows.parameters import TimeoutSeconds, default_out, named, parameters_of
from teacher_cache.flows.progress import LoggedProgress
from teacher_cache.flows.report_artifacts import leave_image
from teacher_cache.flows.retries import TRIED_AGAIN
from teacher_cache.pipeline.settings.deploy import DeployConfig
from teacher_cache.pipeline.settings.run_file import check_config

if TYPE_CHECKING:
    from teacher_cache.pipeline.deploy.run import DeployResult

ARTIFACT = "deploy-student"


@flow(
    name="deploy-student",
    flow_run_name=named("{run} -> {out}", "runs/deployed"),
    persist_result=False,
    validate_parameters=False,
)
@parameters_of(DeployConfig, ("run", "out", "checkpoint", "split", "teacher", "pretrained", "int8"))
def deploy_student(
    *,
    out: Annotated[
        str | None,
        Field(
            description="Folder to write; it must not exist. Default: runs/deployed/RUN-ID, the run's folder and the "
            "first 8 digits of this flow run's ID."
        ),
    ] = None,
    timeout_seconds: TimeoutSeconds = None,
    **settings: Any,
) -> dict[str, Any]:
    """Ship a run's student as ONNX, int8 and open_clip weights, each file proven, with a table of its worth."""
    config = check_config(DeployConfig, {**settings, "out": out or default_out("runs/deployed", settings)}, ARTIFACT)
    result = deploy_run.with_options(timeout_seconds=timeout_seconds)(config)
    describe(result)
    deployment = result.deployment
    return {
        "out": result.out,
        "run": deployment.run,
        "checkpoint": deployment.checkpoint,
        "cache_manifest_digest": deployment.cache_manifest_digest,
        "parameters": deployment.parameters,
        "files": {artefact.file: artefact.sha256 for artefact in deployment.artefacts()},
        "not_quantised": deployment.not_quantised,
        "mean_recall": {row.name: row.mean_recall for row in result.table.rows},
    }


@task(name="deploy", task_run_name="deploy", **TRIED_AGAIN)
def deploy_run(config: DeployConfig) -> DeployResult:
    """Export, check, measure and write. An error leaves no files."""
    from teacher_cache.pipeline.deploy.record import require_packages

    require_packages()
    # imported here: prefect deploy imports this file and needs no torch
    from teacher_cache.pipeline.deploy.run import deploy

    return deploy(config, LoggedProgress(get_run_logger()))


@task(name="report", task_run_name="report", **TRIED_AGAIN)
def describe(result: DeployResult) -> None:
    """Create artifacts of the table: Markdown and an image."""
    leave_image(ARTIFACT, (Path(result.out) / "table.png").read_bytes, result.out)
    create_markdown_artifact(deployment_text(result), key=ARTIFACT)
