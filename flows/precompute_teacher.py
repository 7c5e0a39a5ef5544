"""Flow ``precompute-teacher``: plan the cache, encode its pending chunks, seal it.

The cache, not Prefect, records what is done: a new run reads the missing chunks from the cache. One task encodes all of
them, so that the teacher never waits between two chunks; with the executor ``ray`` it hands them to a cluster.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.runtime import flow_run

from teacher_cache.flows.devices import device_slots
from teacher_cache.flows.markdown import cache_text, code, problem_lines
from teacher_cache.flows.parameters import ReportPage, named, parameters_of
from teacher_cache.flows.progress import LoggedProgress, Share, hints_logged, progress_artifact
from teacher_cache.flows.report_artifacts import leave_report, page_beside, teacher_recall
from teacher_cache.flows.retries import TRIED_AGAIN, tried_again_while
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.run_file import check_config
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.observe.telemetry import observed

if TYPE_CHECKING:
    from teacher_cache.pipeline.models.teacher import LiveTeacher
    from teacher_cache.pipeline.precompute.run import PrecomputeResult
    from teacher_cache.storage.write.writer import EmbeddingWriter

ARTIFACT = "precompute-teacher"


@flow(
    name="precompute-teacher",
    flow_run_name=named("{dataset} x {teacher} -> {cache}"),
    persist_result=False,
    validate_parameters=False,
)
@parameters_of(PrecomputeConfig, ("dataset", "teacher", "pretrained", "cache", "reuse", "device", "report"))
def precompute_teacher(*, report: ReportPage = True, **settings: Any) -> dict[str, Any]:
    """Run a teacher once over a dataset and keep its embeddings. Run it again to resume after a stop."""
    started = time.perf_counter()
    config = check_config(PrecomputeConfig, settings, ARTIFACT)
    encoded = 0
    fans_out = config.executor != "local"  # the workers use their own devices: no slot of this machine is held
    slots = contextlib.nullcontext() if fans_out else device_slots(config.device)
    with progress_artifact(ARTIFACT, config.cache) as progress:
        with slots, observed(run=flow_run.name, cache=config.cache):
            with hints_logged() as hints:
                pending = plan(config, progress.part(0, 0))
            if pending and fans_out:
                encoded = fan_out(config, pending, progress)
            elif pending:
                encoded = encode_here(config, pending, progress)
        result = seal(config.cache, encoded, time.perf_counter() - started, config.reuse, pending)
        LoggedProgress(get_run_logger(), progress).end(f"finished, {encoded:,} chunks encoded by this run")
    create_table_artifact(summary_table(result), key=ARTIFACT, description=code(result.cache))
    describe(result, report, hints)
    return result.model_dump(mode="json", exclude={"problem_details", "splits"})


@task(name="plan", task_run_name="plan", **TRIED_AGAIN)
def plan(config: PrecomputeConfig, share: Share) -> list[ChunkRef]:
    """Write the cache's manifest and tables, or check them, and return the chunks to encode.

    Args:
        share: part of the flow's progress, of width 0: the length of this stage is unknown.
    """
    # imported here: prefect deploy imports this file and needs no torch
    from teacher_cache.pipeline.data.datasets.spec import check_dataset
    from teacher_cache.pipeline.precompute.executors import open_executor
    from teacher_cache.pipeline.precompute.plan import plan_precompute

    logger = get_run_logger()
    check_dataset(config.dataset)  # a typing error fails before the teacher is loaded
    if config.executor == "local":
        pending = plan_precompute(config, _teacher(config), LoggedProgress(logger, share))
    else:
        with open_executor(config) as executor:
            pending = executor.plan(config, LoggedProgress(logger, share))
    logger.info(f"{config.cache}: {len(pending)} chunks to encode")
    return pending


def encode_here(config: PrecomputeConfig, pending: Sequence[ChunkRef], share: Share) -> int:
    """Encode chunks in this process, together with others on this cache. Return the number that this run encoded.

    The tries of one task begin anew with each that commits a chunk: a run of hours may lose its connection often.
    """
    from teacher_cache.storage.write.writer import EmbeddingWriter

    writer = EmbeddingWriter(config.cache)
    encode.with_options(**tried_again_while(lambda: len(writer.written)))(config, pending, writer, share)
    return len(writer.written)


@task(name="encode", task_run_name="encode", **TRIED_AGAIN)
def encode(config: PrecomputeConfig, pending: Sequence[ChunkRef], writer: EmbeddingWriter, share: Share) -> None:
    """Encode chunks in this process. All are committed when it returns, by any process.

    Args:
        writer: writer of the cache, which counts the chunks that it commits over all tries.
        share: this stage's part of the flow's progress.
    """
    from teacher_cache.pipeline.precompute.encode import encode_shared

    logger = get_run_logger()
    started, before = time.perf_counter(), len(writer.written)
    progress = LoggedProgress(logger, share, _chunks_by_stage(pending))
    # skips chunks that an earlier try or another run has committed
    encode_shared(config, _teacher(config), pending, progress, writer=writer)
    done = len(writer.written) - before
    logger.info(f"{done} of {len(pending)} chunks in {time.perf_counter() - started:,.1f} s")


@task(name="fan-out", task_run_name="encode-on-{config.executor}", **TRIED_AGAIN)
def fan_out(config: PrecomputeConfig, pending: Sequence[ChunkRef], share: Share) -> int:
    """Encode chunks on the workers of the executor. Return the number of chunks encoded."""
    from teacher_cache.pipeline.precompute.executors import open_executor

    progress = LoggedProgress(get_run_logger(), share, _chunks_by_stage(pending))
    with open_executor(config) as executor:
        return executor.encode(config, pending, progress)


def _chunks_by_stage(refs: Iterable[ChunkRef]) -> Counter[str]:
    return Counter("images" if ref.tower == "image" else "captions" for ref in refs)


@task(name="seal", task_run_name="seal", **TRIED_AGAIN)
def seal(
    cache: str, chunks_encoded: int, seconds: float, reuse: str | None, pending: Sequence[ChunkRef]
) -> PrecomputeResult:
    """Seal the finished cache, log its first problems, and return its summary."""
    from teacher_cache.pipeline.precompute.run import seal_and_summarize

    result = seal_and_summarize(cache, chunks_encoded, seconds, reuse, pending)
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
