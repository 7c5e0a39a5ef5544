"""The commands that make, prove and mend a cache: ``precompute``, ``verify``, ``repair``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pipeline.cli_flags import LogFlag, LogFormat, MetricsFlag, RunFile, how_to_go_on, say, setting
from pipeline.config import PrecomputeConfig, ProofConfig
from pipeline.run_file import load_config
from storage.cli import CacheArgument, JsonFlag, app, counted, print_json, rates
from storage.cli_findings import print_findings, print_report
from storage.console import StageProgress
from storage.errors import CacheUnreachableError, UsageError
from storage.integrity import verify_cache

if TYPE_CHECKING:
    from pipeline.proof import ProofResult

__all__ = ["precompute", "repair", "verify"]

_ROWS_SHOWN = 20

# by repair: an unfinished cache is precompute's, and a file that nobody knows or can read is left to its owner
_NOT_MENDED = {"incomplete", "unknown-file", "unreadable"}


@app.command()
def precompute(
    run_file: RunFile = None,
    dataset: Annotated[str | None, setting(PrecomputeConfig, "dataset")] = None,
    teacher: Annotated[str | None, setting(PrecomputeConfig, "teacher")] = None,
    pretrained: Annotated[str | None, setting(PrecomputeConfig, "pretrained")] = None,
    cache: Annotated[str | None, setting(PrecomputeConfig, "cache")] = None,
    reuse: Annotated[str | None, setting(PrecomputeConfig, "reuse")] = None,
    device: Annotated[str | None, setting(PrecomputeConfig, "device")] = None,
    precision: Annotated[str | None, setting(PrecomputeConfig, "precision")] = None,
    dtype: Annotated[str | None, setting(PrecomputeConfig, "dtype")] = None,
    batch_size: Annotated[int | None, setting(PrecomputeConfig, "batch_size")] = None,
    chunk_rows: Annotated[int | None, setting(PrecomputeConfig, "chunk_rows")] = None,
    decoder: Annotated[str | None, setting(PrecomputeConfig, "decoder")] = None,
    views: Annotated[int | None, setting(PrecomputeConfig, "views")] = None,
    crop_scale: Annotated[tuple[float, float] | None, setting(PrecomputeConfig, "crop_scale")] = None,
    executor: Annotated[str | None, setting(PrecomputeConfig, "executor")] = None,
    workers: Annotated[int | None, setting(PrecomputeConfig, "workers")] = None,
    metrics_port: MetricsFlag = None,
    log_format: LogFlag = LogFormat.text,
    json: JsonFlag = False,
) -> None:
    """Run a teacher once over a dataset and keep its embeddings. Stop it at any time; run it again to go on."""
    flags = {
        "dataset": dataset,
        "teacher": teacher,
        "pretrained": pretrained,
        "cache": cache,
        "reuse": reuse,
        "device": device,
        "precision": precision,
        "dtype": dtype,
        "batch_size": batch_size,
        "chunk_rows": chunk_rows,
        "decoder": decoder,
        "views": views,
        "crop_scale": crop_scale,
        "executor": executor,
        "workers": workers,
    }
    config = load_config(PrecomputeConfig, "precompute", run_file, flags)
    try:
        from pipeline.precompute import precompute as run_precompute  # takes seconds, in which it may be stopped

        with StageProgress() as progress:
            result = run_precompute(config, progress)
    except KeyboardInterrupt:
        say(f"stopped: {how_to_go_on(config.cache)}")
        raise typer.Exit(1) from None
    except CacheUnreachableError as error:  # it says how to go on; asking what is there would take as long again
        say(f"error: {str(error).rstrip('.')}. What is committed stays.")
        raise typer.Exit(1) from None
    except OSError as error:  # a full disk, a missing right, a share that is away
        say(f"error: {error}. {how_to_go_on(config.cache)}")
        raise typer.Exit(1) from None
    if json:
        print_json(result)
        return
    seen = "" if result.views == 1 else f" in {result.views} views"
    speed = rates(result.images_per_second, result.captions_per_second)
    for line in result.problem_details:
        say(line)
    if result.replaced_manifest_digest:
        say(_replaced(result.manifest_digest, result.replaced_manifest_digest))
    problems = ", ".join(f"{kind} {count}" for kind, count in result.problems.items()) or "none"
    reused = result.rows_reused
    if any(reused.values()):
        copied = f"{counted(reused['image'], 'image')} and {counted(reused['text'], 'caption')}"
        say(f"copied: {copied}; the others were encoded")
    Console().print(
        f"{result.cache}: {result.images:,} images{seen} and {result.captions:,} captions by {result.teacher}\n"
        f"{result.chunks_encoded} of {result.chunks} chunks encoded by this run in {result.seconds:,.1f} s ({speed})\n"
        f"problems: {problems}; {result.lost_images} images without a row, {result.quarantined} quarantined",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def verify(
    cache: CacheArgument,
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample",
            help="Also encode so many random images, and captions, with the live teacher and compare. To find a fault "
            "in a fraction f of all rows with probability p: N = ln(1-p)/ln(1-f), 459 for 1 % at 99 %.",
        ),
    ] = None,
    teacher: Annotated[str | None, setting(ProofConfig, "teacher")] = None,
    pretrained: Annotated[str | None, setting(ProofConfig, "pretrained")] = None,
    dataset: Annotated[str | None, setting(ProofConfig, "dataset")] = None,
    image_root: Annotated[str | None, setting(ProofConfig, "image_root")] = None,
    seed: Annotated[int | None, setting(ProofConfig, "seed")] = None,
    threshold: Annotated[float | None, setting(ProofConfig, "threshold")] = None,
    device: Annotated[str | None, setting(ProofConfig, "device")] = None,
    precision: Annotated[str | None, setting(ProofConfig, "precision")] = None,
    log_format: LogFlag = LogFormat.text,
    json: JsonFlag = False,
) -> None:
    """Read all of a cache and prove digests, counts, finite values and unit norms. Exit 1 if anything is wrong.

    With --sample also prove random rows against the live teacher: digests do not show that the right rows were written.
    """
    flags = {
        "teacher": teacher,
        "pretrained": pretrained,
        "dataset": dataset,
        "image_root": image_root,
        "seed": seed,
        "threshold": threshold,
        "device": device,
        "precision": precision,
    }
    config = None
    if sample is not None:
        config = load_config(ProofConfig, "verify", None, {"cache": cache, "sample": sample, **flags})
    elif given := [name for name, value in flags.items() if value is not None]:
        raise UsageError(f"--{given[0].replace('_', '-')} needs --sample: plain verify loads no teacher")
    proof = None
    with StageProgress() as progress:
        report = verify_cache(cache, lambda done, total: progress("verify chunks", done, total))
        if config is not None and report.ok:
            from pipeline.proof import ProvenReport, prove_sample

            proof = prove_sample(config, progress)
            report = ProvenReport(**{**dict(report), "ok": proof.ok}, proof=proof)
    if json:
        print_json(report)
    else:
        print_report(report)
        if proof is not None:
            _print_proof(proof)
        elif config is not None:
            say("no row was drawn: the cache is damaged or not complete.")
        if {finding.kind for finding in report.findings} - _NOT_MENDED:
            say(f"Readers refuse what is damaged. Run teacher-cache repair {cache} to mend it.")
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def repair(
    cache: CacheArgument,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="KIND:PATH, where the dataset is now, if not where it was.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="As for precompute; needed for a local-dir teacher only.")
    ] = None,
    pretrained: Annotated[str | None, setting(PrecomputeConfig, "pretrained")] = None,
    device: Annotated[str, setting(PrecomputeConfig, "device")] = "auto",
    json: JsonFlag = False,
) -> None:
    """Mend what is damaged: manifest, tables and metadata are restored, bad chunks encoded again; then verify."""
    from pipeline.repair import repair as run_repair

    try:
        with StageProgress() as progress:
            result = run_repair(cache, dataset, teacher, pretrained, device, progress)
    except KeyboardInterrupt:
        say("stopped: what is mended stays. Run the same command again to go on.")
        raise typer.Exit(1) from None
    if json:
        print_json(result)
    else:
        console = Console(highlight=False)
        for line in result.done:
            console.print(line, markup=False, soft_wrap=True)
        print_findings(result.findings)
        verdict = "sound" if result.ok else f"{counted(len(result.findings), 'finding')} left"
        work = counted(len(result.done), "repair") if result.done else "nothing to repair"
        console.print(f"{result.cache}: {work}, {verdict}", markup=False, soft_wrap=True)
    if result.left:
        what = "imported rows, and the teacher would give other bytes. Run the same teacher-cache import command again"
        say(f"left as they are: {', '.join(result.left)} of {what}: it mends them.")
    if result.replaced_manifest_digest:
        say(_replaced(result.manifest_digest, result.replaced_manifest_digest))
    if not result.ok:
        raise typer.Exit(1)


def _print_proof(proof: ProofResult) -> None:
    console = Console(highlight=False)
    for row in proof.wrong[:_ROWS_SHOWN]:
        view = f", view {row.view}" if row.view else ""
        line = f"wrong: {row.tower} row {row.row}{view} ({row.sample_id}): {row.what}"
        console.print(line, markup=False, soft_wrap=True)
    if len(proof.wrong) > _ROWS_SHOWN:
        console.print(f"... and {len(proof.wrong) - _ROWS_SHOWN} more; --json lists all")
    least = "" if proof.least_cosine is None else f", least cosine {proof.least_cosine:.5f} at {proof.least_cosine_row}"
    from pipeline.proof import fraction_shown

    images = proof.images_compared + proof.quarantined_checked
    shown = fraction_shown(min(images, proof.captions_compared))
    verdict = "as the teacher makes them" if proof.ok else f"{len(proof.wrong)} rows are wrong"
    console.print(
        f"{proof.cache}: {verdict}: {proof.images_compared} images and {proof.captions_compared} captions against "
        f"{proof.teacher} on {proof.device} in {proof.precision}, {proof.quarantined_checked} quarantined tried again, "
        f"threshold {proof.threshold:g}{least}\n"
        f"a fault in {shown:.2%} of all images, or captions, would have shown with 99 % probability",
        markup=False,
        soft_wrap=True,
    )


def _replaced(now: str, before: str) -> str:
    return (
        f"repaired chunks differ from the sealed ones: the manifest is {now[:12]} now, it was {before[:12]}. "
        "Runs that name the old one learned from the old bytes."
    )
