"""Flow ``train-student``: train one student from a finished cache, and measure it if a split is given.

Training is not retried at once: its usual failures (a wrong setting, a damaged cache, a loss that is not finite) would
recur. Run the flow again with the same ``out``, or retry the flow run, to resume from the last checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from pydantic import Field

from teacher_cache.flows.devices import device_slots
from teacher_cache.flows.evaluate_student import evaluate_run
from teacher_cache.flows.markdown import code, run_text
from teacher_cache.flows.parameters import ReportPage, TimeoutSeconds, default_out, named, parameters_of
from teacher_cache.flows.progress import LoggedProgress, Share, progress_artifact
from teacher_cache.flows.report_artifacts import leave_report
from teacher_cache.flows.retries import TRIED_AGAIN
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import RunRecord
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.recipes import RECIPE_SETTINGS
from teacher_cache.pipeline.settings.run_file import check_config
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.logs import log_fields

if TYPE_CHECKING:
    from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult

ARTIFACT = "train-student"


@flow(
    name="train-student",
    flow_run_name=named("{student} from {cache} -> {out}", "runs"),
    persist_result=False,
    validate_parameters=False,
)
@parameters_of(
    TrainConfig,
    (
        *("cache", "student", "out", "init", "recipe", "epochs", "batch_size", "seed"),
        *("split", "select_split", "evaluate_split", "device", "report"),
    ),
    filled_by_config={*RECIPE_SETTINGS, "split"},
)
def train_student(
    *,
    out: Annotated[
        str | None,
        Field(
            description="Folder of the run; an unfinished run in it is resumed. Default: runs/STUDENT-ID, the student "
            "and the first 8 digits of this flow run's ID."
        ),
    ] = None,
    evaluate_split: Annotated[
        str | None, Field(description="Split to measure teacher and student on afterwards. Default: none.")
    ] = None,
    evaluate_checkpoint: Annotated[
        Literal["last", "best"],
        Field(description="Checkpoint to measure: last, or best on select_split. Default: last."),
    ] = "last",
    report: ReportPage = True,
    timeout_seconds: TimeoutSeconds = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train a student from a finished cache. No teacher is loaded."""
    config = check_config(TrainConfig, {**settings, "out": out or default_out("runs", settings)}, ARTIFACT)
    if evaluate_split and evaluate_checkpoint == "best" and config.select_split is None:
        raise UsageError("evaluate_checkpoint is 'best', but select_split, on which it is chosen, is not given")
    measured = None
    slots = device_slots(config.device, config.devices)
    with progress_artifact(ARTIFACT, config.out) as progress, slots, log_fields(run=flow_run.name):
        record = train_run.with_options(timeout_seconds=timeout_seconds)(config, progress)
        if evaluate_split:
            measured = evaluate_run(evaluate_config(config, evaluate_split, evaluate_checkpoint))
    create_table_artifact(summary_table(record, measured), key=ARTIFACT, description=code(config.out))
    describe(record, measured, report)
    returned = {
        "run": config.out,
        "checkpoint": f"{config.out}/{record.checkpoint}",
        "student_parameters": record.student_parameters,
        "steps": record.steps,
        "resumed_at": list(record.resumed_at),
        "loss": record.epochs[-1].loss,
        "cache_manifest_digest": record.cache_manifest_digest,
    }
    if measured is not None:
        returned |= {"recall": measured.student, "retention": measured.retention}
    return returned


def goes_on(out: str, run_count: int) -> bool:
    """Return whether to resume the run in a folder.

    An unfinished run with a checkpoint is resumed. A finished run is accepted only if this flow run finished it and is
    retried (``run_count`` above 1) for a later step; otherwise training refuses the folder.
    """
    folder = RunFolder(out)
    return folder.resumable() or (run_count > 1 and folder.exists())


@task(name="train", task_run_name="train", cache_policy=NO_CACHE, persist_result=False)
def train_run(config: TrainConfig, share: Share) -> RunRecord:
    """Train to the end of the last epoch, from the first step or the last checkpoint.

    Args:
        share: the flow's progress.
    """
    # imported here: prefect deploy imports this file and needs no torch
    from teacher_cache.pipeline.train.loop import StepProgress, train

    logger = get_run_logger()
    progress = LoggedProgress(logger, share)

    def report(at: StepProgress) -> None:
        note = f"loss {at.loss:.3f}  {at.samples_per_second:,.0f} samples/s  data wait {at.data_wait_share:.0%}"
        progress("step", at.step, at.total_steps, note)

    resume = goes_on(config.out, flow_run.run_count or 1)
    if resume:
        logger.info(f"{config.out}: goes on after step {RunFolder(config.out).read().steps}")
    record = train(config, report, resume=resume).record
    progress.end(f"all {record.steps:,} steps, loss {record.epochs[-1].loss:.4f}")
    logger.info(f"{config.out}: {record.steps} steps in {record.seconds:,.1f} s, loss {record.epochs[-1].loss:.4f}")
    return record


def evaluate_config(config: TrainConfig, split: str, checkpoint: Literal["last", "best"]) -> EvaluateConfig:
    """Return the settings to measure the trained student beside the cached teacher."""
    return EvaluateConfig(
        cache=config.cache,
        run=str(RunFolder(config.out).path),
        checkpoint=checkpoint,
        split=split,
        image_root=config.image_root,
        device=config.device,
        workers=config.workers,
    )


@task(name="report", task_run_name="report", **TRIED_AGAIN)
def describe(record: RunRecord, measured: EvaluateResult | None, report: bool) -> None:
    """Create a Markdown artifact of the run and, with ``report``, the page and its chart."""
    config, text = record.config, run_text(record, measured)
    if report:
        page = RunFolder(config.out).path / "report.html"
        text += leave_report(ARTIFACT, config.cache, page, [config.out], config.image_root).line()
    create_markdown_artifact(text, key=f"{ARTIFACT}-report")


def summary_table(record: RunRecord, measured: EvaluateResult | None) -> list[dict[str, Any]]:
    """Return the run as rows of a table artifact: student, losses by epoch, and recalls."""
    rows: dict[str, Any] = {
        "checkpoint": f"{record.config.out}/{record.checkpoint}",
        "cache": record.config.cache,
        "cache manifest digest": record.cache_manifest_digest,
        "teacher": record.teacher,
        "student": record.config.student,
        "student parameters": record.student_parameters,
        "train images": record.train_images,
        "steps": record.steps,
        "seconds": round(record.seconds, 1),
    }
    if record.best is not None:
        rows["best checkpoint"] = f"{record.config.out}/{record.best.checkpoint}"
        rows["best epoch"] = f"{record.best.epoch + 1}, chosen on {record.best.split}"
    for epoch in record.epochs:
        parts = ", ".join(f"{name} {value:.4g}" for name, value in epoch.parts.items())
        rows[f"loss of epoch {epoch.epoch + 1}"] = f"{epoch.loss:.4f} ({parts})"
    if measured is not None:
        rows["measured checkpoint"] = measured.checkpoint
        rows[f"{measured.split} images"] = measured.images
        for label, recalls in (("teacher", measured.teacher), ("student", measured.student or {})):
            for direction, values in recalls.items():
                for name, value in values.items():
                    rows[f"{label} {direction} {name} %"] = round(value, 1)
        if measured.retention is not None:
            mean = measured.retention["mean"]
            rows["mean retention %"] = "-" if mean is None else round(mean, 1)
    return [{"what": what, "value": value} for what, value in rows.items()]
