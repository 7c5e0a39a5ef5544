"""The commands that make, prove and mend a cache: ``precompute``, ``verify``, ``repair``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from teacher_cache.pipeline.cli.flags import LogFlag, LogFormat, MetricsFlag, RunFile, how_to_go_on, say, setting
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig, ProofConfig
from teacher_cache.pipeline.settings.run_file import load_config
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.cli.app import CacheArgument, JsonFlag, app, counted, print_json, rates
from teacher_cache.storage.cli.compare import print_findings, print_report
from teacher_cache.storage.errors import CacheUnreachableError, UsageError
from teacher_cache.storage.observe.progress import StageProgress

if TYPE_CHECKING:
    from teacher_cache.pipeline.precompute.sample_proof import ProofResult
import math
from datetime import timedelta
from typing import TYPE_CHECKING

from teacher_cache.storage.cli.app import byte_size

if TYPE_CHECKING:
    from teacher_cache.pipeline.precompute.forecast import Forecast
from typing import TYPE_CHECKING

from teacher_cache.pipeline.settings.precompute import ImportConfig

if TYPE_CHECKING:
    from teacher_cache.pipeline.precompute.import_folder import ImportResult

__all__ = ["import_folder", "plan", "precompute", "repair", "verify"]

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
        from teacher_cache.pipeline.precompute.run import (
            precompute as run_precompute,  # takes seconds, in which it may be stopped
        )

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
            from teacher_cache.pipeline.precompute.sample_proof import ProvenReport, prove_sample

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
    from teacher_cache.pipeline.precompute.repair import repair as run_repair

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
    from teacher_cache.pipeline.precompute.sample_proof import fraction_shown

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


@app.command()
def plan(
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
    probe: Annotated[
        int | None, typer.Option("--probe", min=2, help="Images to encode for it; eight batches if left out.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Say what precompute with the same flags will take: rows, bytes, hours, and from which epoch on it pays.

    Encodes a few images in a temporary folder; with --reuse, reads every file for its digest too. Exit 1 if there is no
    room for the cache, or another one is there.
    """
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
    }
    config = load_config(PrecomputeConfig, "precompute", run_file, flags)
    from teacher_cache.pipeline.precompute.forecast import forecast
    from teacher_cache.storage.observe.progress import StageProgress

    with StageProgress() as progress:
        found = forecast(config, probe, progress)
    if json:
        print_json(found)
    else:
        for line in _lines(found):
            Console(highlight=False).print(line, markup=False, soft_wrap=True)
    if not found.fits:
        wanted, free = byte_size(found.needed_bytes), byte_size(found.free_bytes or 0)
        say(f"{found.cache}: {wanted} wanted, {free} free there. Make room, or name another --cache.")
        raise typer.Exit(1)


def _lines(found: Forecast) -> list[str]:
    seen = "" if found.views == 1 else f" in {found.views} views"
    room = "" if found.free_bytes is None else f"; {byte_size(found.free_bytes)} free"
    there = f", of which {found.committed_rows:,} rows are there" if found.committed_rows else ""
    lost = f", {counted(found.probe_lost, 'image')} of it could not be read" if found.probe_lost else ""
    image, text = found.image, found.text
    epochs = "never: the teacher took no time"
    if found.epochs_to_pay is not None:
        epochs = f"from {counted(found.epochs_to_pay, 'epoch')} on, over all students"
    rate = f"{1 / image.seconds_per_row:,.1f} images/s ({1 / image.teacher_seconds_per_row:,.1f} in the teacher)"
    if text.rows:
        rate += f", {1 / text.seconds_per_row:,.1f} captions/s"
    size = f"{byte_size(found.target_bytes)} of embeddings, about {byte_size(found.table_bytes)} of tables"
    reused = []
    if found.reuse is not None:
        copied, left = found.rows_reused, found.rows_to_encode
        reused = [
            f"reuse      {copied['image']:,} image and {copied['text']:,} caption rows are copied from {found.reuse}; "
            f"the teacher encodes {left['image']:,} and {left['text']:,}"
        ]
    return [
        f"{found.teacher} on {found.device} in {found.precision}, {found.dataset}",
        f"rows       {found.images:,} images{seen} and {found.captions:,} captions in {found.chunks:,} chunks{there}",
        *reused,
        f"bytes      {size}{room}",
        f"probe      {rate}, by {counted(image.rows, 'image')} and {counted(text.rows, 'caption')}{lost}",
        f"time       {_clock(found.encode_seconds)} to encode on {found.device} after {_clock(found.check_seconds)} to "
        f"check all files; {found.encode_seconds / 3600:,.2f} device hours",
        f"online     {_clock(found.online_epoch_seconds)} of teacher in every epoch without a cache",
        f"it pays    {epochs}",
    ]


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=math.ceil(seconds)))


@app.command("import")
def import_folder(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help=ImportConfig.model_fields["folder"].description)],
    dataset: Annotated[str | None, setting(ImportConfig, "dataset")] = None,
    teacher: Annotated[str | None, setting(ImportConfig, "teacher")] = None,
    pretrained: Annotated[str | None, setting(ImportConfig, "pretrained")] = None,
    cache: Annotated[str | None, setting(ImportConfig, "cache")] = None,
    sample: Annotated[int | None, setting(ImportConfig, "sample")] = None,
    seed: Annotated[int | None, setting(ImportConfig, "seed")] = None,
    threshold: Annotated[float | None, setting(ImportConfig, "threshold")] = None,
    device: Annotated[str | None, setting(ImportConfig, "device")] = None,
    precision: Annotated[str | None, setting(ImportConfig, "precision")] = None,
    dtype: Annotated[str | None, setting(ImportConfig, "dtype")] = None,
    batch_size: Annotated[int | None, setting(ImportConfig, "batch_size")] = None,
    chunk_rows: Annotated[int | None, setting(ImportConfig, "chunk_rows")] = None,
    json: JsonFlag = False,
) -> None:
    """Make a cache of embeddings that clip-retrieval wrote, once a sample of them is proven against the teacher.

    Images and captions that the folder lacks are encoded. Stop it at any time; run it again to go on.
    """
    flags = {
        "folder": folder,
        "dataset": dataset,
        "teacher": teacher,
        "pretrained": pretrained,
        "cache": cache,
        "sample": sample,
        "seed": seed,
        "threshold": threshold,
        "device": device,
        "precision": precision,
        "dtype": dtype,
        "batch_size": batch_size,
        "chunk_rows": chunk_rows,
    }
    config = load_config(ImportConfig, "import", None, flags)
    try:
        from teacher_cache.pipeline.precompute.import_folder import (
            import_rows,  # takes seconds, in which it may be stopped
        )

        with StageProgress() as progress:
            result = import_rows(config, progress)
    except KeyboardInterrupt:
        say(f"stopped: {how_to_go_on(config.cache)}")
        raise typer.Exit(1) from None
    except OSError as error:  # a full disk, a missing right, a share or a store that is away
        say(f"error: {str(error).rstrip('.')}. {how_to_go_on(config.cache)}")
        raise typer.Exit(1) from None
    if json:
        print_json(result)
        return
    console = Console(highlight=False)
    for line in _import_lines(result):
        console.print(line, markup=False, soft_wrap=True)


def _import_lines(result: ImportResult) -> list[str]:
    matched = result.matched
    least = "" if result.least_cosine is None else f", least cosine {result.least_cosine:.5f}"
    lines = [
        f"{result.cache}: {result.images:,} images and {result.captions:,} captions by {result.teacher}",
        f"images: {result.images_imported:,} imported, {result.images_encoded:,} encoded, {result.quarantined:,} "
        f"quarantined; captions: {result.captions_imported:,} imported, {result.captions_encoded:,} encoded",
        f"proven: {counted(result.images_proven, 'image')} and {counted(result.captions_proven, 'caption')} against "
        f"the live teacher{least}",
    ]
    left = {
        "of images that are not in the dataset": matched.strange,
        "ambiguous": matched.ambiguous,
        "not finite or zero": matched.unusable,
    }
    if any(left.values()):
        said = ", ".join(f"{count:,} {what}" for what, count in left.items() if count)
        lines.append(f"rows of the folder ({matched.folder_rows:,} in all) that were left aside: {said}")
    if result.problems:
        lines.append("problems: " + ", ".join(f"{kind} {count}" for kind, count in result.problems.items()))
    return [*lines, f"{result.chunks_written} of {result.chunks} chunks written in {result.seconds:,.1f} s"]
