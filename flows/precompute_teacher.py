"""Flow ``precompute-teacher``: plan the cache, encode its pending chunks span by span, seal it.

The cache, not Prefect, records what is done: a new run reads the missing chunks from the cache. Spans run one after
another in one process, since they share the device and the loaded teacher. With the executor ``ray`` one task hands all
chunks to a cluster.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.runtime import flow_run
from pydantic import Field

from teacher_cache.flows.devices import device_slots
from teacher_cache.flows.markdown import cache_text, problem_lines
from teacher_cache.flows.parameters import ReportPage, named, parameters_of
from teacher_cache.flows.progress import LoggedProgress, Share, hints_logged, progress_artifact
from teacher_cache.flows.report_artifacts import leave_report, page_beside, teacher_recall
from teacher_cache.flows.retries import TRIED_AGAIN
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.run_file import check_config
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.observe.telemetry import observed

if TYPE_CHECKING:
    from teacher_cache.pipeline.models.teacher import LiveTeacher
    from teacher_cache.pipeline.precompute.run import PrecomputeResult

ARTIFACT = "precompute-teacher"


@flow(
    name="precompute-teacher",
    flow_run_name=named("{dataset} x {teacher} -> {cache}"),
    persist_result=False,
    validate_parameters=False,
)
@parameters_of(PrecomputeConfig, ("dataset", "teacher", "pretrained", "cache", "reuse", "device", "report"))
def precompute_teacher(
    *,
    chunks_per_span: Annotated[
        int | None, Field(gt=0, description="Number of chunks per task run. Default: about 16 task runs.")
    ] = None,
    report: ReportPage = True,
    **settings: Any,
) -> dict[str, Any]:
    """Run a teacher once over a dataset and keep its embeddings. Run it again to resume after a stop."""
    started = time.perf_counter()
    config = check_config(PrecomputeConfig, settings, ARTIFACT)
    encoded = 0
    fans_out = config.executor != "local"  # the workers use their own devices: no slot of this machine is held
    slots = contextlib.nullcontext() if fans_out else device_slots(config.device)
    with progress_artifact(ARTIFACT, config.cache) as progress:
        with slots, observed(run=flow_run.name, cache=config.cache):
            with hints_logged() as hints:
                spans = plan(config, chunks_per_span, progress.part(0, 0))
            if spans and fans_out:
                encoded, spans = fan_out(config, spans, progress.part(0, 1)), []
            chunks, done = sum(map(len, spans)), 0
            for span in spans:
                before, done = done, done + len(span)
                encoded += encode_span(config, span_name(span), span, progress.part(before / chunks, done / chunks))
        result = seal(config.cache, encoded, time.perf_counter() - started, config.reuse)
        LoggedProgress(get_run_logger(), progress).end(f"finished, {encoded:,} chunks encoded by this run")
    create_table_artifact(summary_table(result), key=ARTIFACT, description=f"`{result.cache}`")
    describe(result, report, hints)
    return result.model_dump(mode="json", exclude={"problem_details", "splits"})


@task(name="plan", task_run_name="plan", **TRIED_AGAIN)
def plan(config: PrecomputeConfig, chunks_per_span: int | None, share: Share) -> list[list[ChunkRef]]:
    """Write the cache's manifest and tables, or check them, and return the spans to encode.

    Args:
        share: part of the flow's progress, of width 0: the length of this stage is unknown.
    """
    # imported here: prefect deploy imports this file and needs no torch
    from teacher_cache.pipeline.data.datasets.spec import check_dataset
    from teacher_cache.pipeline.precompute.executors import chunk_spans, open_executor
    from teacher_cache.pipeline.precompute.plan import plan_precompute

    logger = get_run_logger()
    check_dataset(config.dataset)  # a typing error fails before the teacher is loaded
    if config.executor == "local":
        pending = plan_precompute(config, _teacher(config), LoggedProgress(logger, share))
    else:
        with open_executor(config) as executor:
            pending = executor.plan(config, LoggedProgress(logger, share))
    spans = chunk_spans(pending, chunks_per_span)
    logger.info(f"{config.cache}: {len(pending)} chunks to encode in {len(spans)} spans")
    return spans


def span_name(span: Sequence[ChunkRef]) -> str:
    """Return the name of a span by its first and last chunk, without views: ``image-000000-000003``."""
    return f"{span[0].tower}-{span[0].chunk:06d}-{span[-1].chunk:06d}"


@task(name="encode", task_run_name="encode-{name}", **TRIED_AGAIN)
def encode_span(config: PrecomputeConfig, name: str, span: list[ChunkRef], share: Share) -> int:
    """Encode the chunks of one span. All are committed when it returns. Return the number that this run encoded.

    Args:
        name: name of the span, for the task run.
        share: this span's part of the flow's progress.
    """
    from teacher_cache.pipeline.precompute.encode import encode_shared

    logger = get_run_logger()
    started = time.perf_counter()
    # skips chunks that an earlier try or another run has committed
    encoded = encode_shared(config, _teacher(config), span, LoggedProgress(logger, share))
    logger.info(f"{name}: {encoded} of {len(span)} chunks in {time.perf_counter() - started:,.1f} s")
    return encoded


@task(name="fan-out", task_run_name="encode-on-{config.executor}", **TRIED_AGAIN)
def fan_out(config: PrecomputeConfig, spans: list[list[ChunkRef]], share: Share) -> int:
    """Encode the chunks of all spans on the workers of the executor. Return the number of chunks encoded."""
    from teacher_cache.pipeline.precompute.executors import open_executor

    refs = [ref for span in spans for ref in span]
    with open_executor(config) as executor:
        return executor.encode(config, refs, LoggedProgress(get_run_logger(), share))


@task(name="seal", task_run_name="seal", **TRIED_AGAIN)
def seal(cache: str, chunks_encoded: int, seconds: float, reuse: str | None) -> PrecomputeResult:
    """Seal the finished cache, log its first problems, and return its summary."""
    from teacher_cache.pipeline.precompute.run import seal_and_summarize

    result = seal_and_summarize(cache, chunks_encoded, seconds, reuse)
    log_problems(result)
    get_run_logger().info(f"{cache}: {result.images:,} images, {result.captions:,} captions by {result.teacher}")
    return result


def log_problems(result: PrecomputeResult) -> None:
    """Log the first problems as warnings, in the run that encoded the cache."""
    for line in problem_lines(result) if result.chunks_encoded else ():
        get_run_logger().warning(line)


@task(name="report", task_run_name="report", **TRIED_AGAIN)
def describe(result: PrecomputeResult, report: bool, hints: Sequence[str]) -> None:
    """Create a Markdown artifact of the finished cache with the hints and, with ``report``, its page and chart."""
    from teacher_cache.storage.look.info import describe_cache

    cache = result.cache
    page = leave_report(ARTIFACT, cache, page_beside(cache)) if report else None
    recall = page.recall if page and page.collected else teacher_recall(cache)
    text = cache_text(describe_cache(cache), recall, problem_lines(result), hints) + (page.line() if page else "")
    create_markdown_artifact(text, key=f"{ARTIFACT}-report")


def summary_table(result: PrecomputeResult) -> list[dict[str, Any]]:
    """Return the result as rows of a table artifact."""
    rows: dict[str, Any] = {
        "cache": result.cache,
        "teacher": result.teacher,
        "images": result.images,
        "captions": result.captions,
        **{f"split {name}": images for name, images in result.splits.items() if name},
        "chunks": result.chunks,
        "chunks encoded by this run": result.chunks_encoded,
        "rows copied": ", ".join(f"{tower} {rows:,}" for tower, rows in result.rows_reused.items()),
        "quarantined": result.quarantined,
        "lost images": result.lost_images,
        **{f"problem {kind}": count for kind, count in result.problems.items()},
        "seconds": round(result.seconds, 1),
        "images/s": _rounded(result.images_per_second),
        "captions/s": _rounded(result.captions_per_second),
        "identity digest": result.identity_digest,
        "manifest digest": result.manifest_digest,
    }
    if result.replaced_manifest_digest is not None:
        rows["replaced manifest digest"] = result.replaced_manifest_digest
    return [{"what": what, "value": value} for what, value in rows.items()]


def _rounded(rate: float | None) -> float | str:
    return "-" if rate is None else round(rate, 1)


def _teacher(config: PrecomputeConfig) -> LiveTeacher:
    from teacher_cache.pipeline.models.teacher import cached_teacher

    return cached_teacher(config.teacher, config.pretrained, config.device, config.precision, config.decoder)
