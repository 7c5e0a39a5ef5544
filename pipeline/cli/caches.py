"""The commands that make, verify and repair a cache: ``precompute``, ``import``, ``verify``, ``repair``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from teacher_cache.pipeline.cli.options import Settings, log_format_option, metrics_option, settings_command
from teacher_cache.pipeline.cli.stopping import chunks_committed, resumable
from teacher_cache.pipeline.settings.names import first_student, next_run
from teacher_cache.pipeline.settings.precompute import ImportConfig, PrecomputeConfig, ProofConfig
from teacher_cache.storage.check.parts import verify_parts
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.cli.app import (
    cache_argument,
    command,
    json_flag,
    option,
    print_json,
    print_lines,
    print_result,
    refuse_unused,
)
from teacher_cache.storage.cli.caches import leftover_lines, print_findings, print_report
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.location import is_several
from teacher_cache.storage.observe.logs import say, suggest_next
from teacher_cache.storage.observe.progress import StageProgress
from teacher_cache.storage.observe.quantities import byte_size, counted, duration, rates

if TYPE_CHECKING:
    from teacher_cache.pipeline.precompute.forecast import Forecast
    from teacher_cache.pipeline.precompute.foreign.import_folder import ImportResult
    from teacher_cache.pipeline.precompute.run import PrecomputeResult
    from teacher_cache.pipeline.precompute.sample_proof import ProofResult

_ROWS_SHOWN = 20

# repair leaves these: precompute finishes a cache, and the owner decides on unknown and unreadable files
_NOT_MENDED = {"incomplete", "unknown-file", "unreadable"}


@settings_command(
    "precompute",
    PrecomputeConfig,
    flags=(
        *("dataset", "teacher", "pretrained", "cache", "reuse", "views", "dtype", "compress", "decoder"),
        *("precision", "batch_size", "device", "executor", "workers", "max_problems", "part"),
    ),
    example="precompute --dataset coco:data --teacher local-dir:teacher --cache coco.cache",
)
@click.option("--dry-run", is_flag=True, help="Only say what it takes: rows, bytes, time. Exit 1 without room.")
@metrics_option
@log_format_option
@json_flag
def precompute(config: PrecomputeConfig, dry_run: bool, as_json: bool) -> None:
    """Stop it at any time and run it again to continue."""
    if dry_run:
        _forecast(config, as_json)
        return
    with resumable(chunks_committed(config.cache)):
        from teacher_cache.pipeline.precompute.run import precompute as run  # takes seconds, and may be interrupted

        with StageProgress() as progress:
            result = run(config, progress)
    print_result(result, as_json, _precomputed_lines)
    if not as_json:
        _suggest_use(config, result.teacher, result.splits)


def _suggest_use(config: PrecomputeConfig, teacher: str, splits: Iterable[str]) -> None:
    if config.dataset.startswith("labelled:"):
        suggest_next("zero-shot", config.dataset, cache=config.cache)
    else:
        split = "" if "train" in splits else next((name for name in splits if "train" in name.lower()), "")
        named = {"split": split} if split else {}
        suggest_next("train", cache=config.cache, **named, student=first_student(teacher), out=next_run())


@settings_command(
    "import",
    ImportConfig,
    flags=(
        *("dataset", "teacher", "pretrained", "cache", "columns", "sample", "seed", "threshold", "dtype"),
        *("precision", "batch_size", "device"),
    ),
    argument="folder",
    example="import folder --dataset coco:data --teacher bundled:scenes --cache a.cache",
)
@json_flag
def import_folder(config: ImportConfig, as_json: bool) -> None:
    """Compare a sample of the rows with the live teacher first, and encode what the folder lacks.

    Stop it at any time and run it again to continue.
    """
    from teacher_cache.pipeline.precompute.foreign.datacomp_dr import open_foreign  # pyarrow

    open_foreign(config.folder, config.columns)  # a wrong one is refused before torch is imported
    with resumable(chunks_committed(config.cache)):
        from teacher_cache.pipeline.precompute.foreign.import_folder import import_rows  # as above

        with StageProgress() as progress:
            result = import_rows(config, progress)
    print_result(result, as_json, _import_lines)
    if not as_json:
        _suggest_use(config, result.teacher, ())


@settings_command(
    "verify",
    ProofConfig,
    argument="cache",
    optional=["sample"],
    example="verify coco.cache --sample 459",
    checked=False,
)
@log_format_option
@json_flag
def verify(settings: Settings[ProofConfig], as_json: bool) -> None:
    """Check digests, counts, finite values and unit norms. Exit 1 if anything is wrong.

    Digests cannot show that the right rows were written: --sample encodes random rows again with the live teacher.
    """
    cache = settings.flags["cache"]
    config = None
    if is_several(cache) and settings.flags["sample"] is not None:
        raise UsageError(f"{cache}: --sample takes one cache: name a part")
    if settings.flags["sample"] is not None:
        config = settings.load()
        from teacher_cache.pipeline.precompute.sample_proof import ProvenReport, prove_sample  # refused first: no torch
    else:
        _refuse_without_sample(settings.flags)
    proof = None
    with StageProgress() as progress:
        if is_several(cache):
            report = verify_parts(cache, lambda done, total: progress("verify parts", done, total))
        else:
            report = verify_cache(cache, lambda done, total: progress("verify chunks", done, total))
        if config is not None and report.ok:
            proof = prove_sample(config, progress)
            report = ProvenReport(**{**dict(report), "ok": proof.ok}, proof=proof)
    if as_json:
        print_json(report)
    else:
        print_report(report)
        if proof is not None:
            _print_proof(proof)
        elif config is not None:
            say("no row was drawn: the cache is damaged or not complete.")
        _suggest_mending(cache, {finding.kind for finding in report.findings})
    if not report.ok:
        sys.exit(1)


@command("repair", example="repair coco.cache")
@cache_argument()
@click.option("--dataset", help="Dataset as KIND:PATH, if it moved. Default: the recorded one.")
@click.option("--teacher", help="Teacher, as for precompute. Required for a teacher in a folder only.")
@click.option("--pretrained", help=PrecomputeConfig.model_fields["pretrained"].description)
@click.option("--device", default="auto", help=f"{PrecomputeConfig.model_fields['device'].description} Default: auto.")
@option(
    "--leftovers", "List files that belong to nothing instead: cut-off writes, claims of ended processes.", is_flag=True
)
@option("--delete", "Delete these files, but for unknown ones.", is_flag=True)
@option("--unknown", "Delete unknown files too, with --delete. Look at them first.", is_flag=True)
@json_flag
def repair(cache: str, as_json: bool, leftovers: bool, delete: bool, unknown: bool, **options: Any) -> None:
    """Restore manifest, tables and metadata, encode damaged chunks again, then verify the cache."""
    if leftovers:
        refuse_unused(("dataset", "teacher", "pretrained", "device"), "with --leftovers")
        _leftovers(cache, delete, unknown, as_json)
        return
    refuse_unused(("delete", "unknown"), "without --leftovers")
    with resumable(lambda: "what is mended stays. Run the same command again to go on.", errors=False):
        from teacher_cache.pipeline.precompute.repair import repair as run

        with StageProgress() as progress:
            result = run(cache, **options, progress=progress)
    if as_json:
        print_json(result)
    else:
        print_lines(*result.done)
        print_findings(result.findings)
        verdict = "sound" if result.ok else f"{counted(len(result.findings), 'finding')} left"
        work = counted(len(result.done), "repair") if result.done else "nothing to repair"
        print_lines(f"{result.cache}: {work}, {verdict}")
    if result.left:
        rows = "imported rows, and the teacher would give other bytes. Run the same teacher-cache import command again"
        say(f"left as they are: {', '.join(result.left)} of {rows}: it mends them.")
    if result.replaced_manifest_digest:
        say(_replaced(result.manifest_digest, result.replaced_manifest_digest))
    if not as_json:
        _suggest_mending(cache, {finding.kind for finding in result.findings} & _NOT_MENDED)
    if not result.ok:
        sys.exit(1)


def _leftovers(cache: str, delete: bool, unknown: bool, as_json: bool) -> None:
    """List files that belong to nothing, or delete them."""
    from teacher_cache.storage.check.garbage import collect_garbage

    report = collect_garbage(cache, delete, unknown)
    print_result(report, as_json, leftover_lines)
    if report.found and not delete and not as_json:
        more = [] if any(file.kind != "unknown-file" for file in report.found) else ["--unknown"]
        suggest_next("repair", cache, "--leftovers", "--delete", *more)


def _suggest_mending(cache: str, kinds: set[str]) -> None:
    """Say which command mends what verify found; the finding of an unfinished cache names its own."""
    if kinds - _NOT_MENDED:
        say("readers refuse what is damaged")
        suggest_next("repair", cache)
    elif "unknown-file" in kinds:
        suggest_next("repair", cache, "--leftovers")


def _refuse_without_sample(flags: dict[str, Any]) -> None:
    for name, value in flags.items():
        if value is not None and name not in ("cache", "sample"):
            raise UsageError(f"--{name.replace('_', '-')} needs --sample: plain verify loads no teacher")


def _precomputed_lines(result: PrecomputeResult) -> list[str]:
    """Return the lines of stdout. Problems and notes go to stderr."""
    views = "" if result.views == 1 else f" in {result.views} views"
    if result.replaced_manifest_digest:
        say(_replaced(result.manifest_digest, result.replaced_manifest_digest))
    lost = f"{counted(result.lost_images, 'image')} without a row, {result.quarantined} quarantined"
    done = "already complete: this run had nothing to encode"
    if result.chunks_encoded:
        speed = rates(result.images_per_second, result.captions_per_second)
        done = f"{result.chunks_encoded} of {counted(result.chunks, 'chunk')} encoded by this run in "
        done += f"{duration(result.seconds)} ({speed})"
        for line in result.problem_details:
            say(line)
    problems = ", ".join(f"{kind} {count}" for kind, count in result.problems.items()) or "none"
    if result.problems:
        lost += f"; teacher-cache info {result.cache} --problems lists them"
    return [
        f"{result.cache}: {counted(result.images, 'image')}{views} and {counted(result.captions, 'caption')} by "
        f"{result.teacher}",
        done,
        f"problems: {problems}; {lost}",
    ]


def _print_proof(proof: ProofResult) -> None:
    from teacher_cache.pipeline.precompute.sample_proof import fraction_shown

    for row in proof.wrong[:_ROWS_SHOWN]:
        view = f", view {row.view}" if row.view else ""
        print_lines(f"wrong: {row.tower} row {row.row}{view} ({row.sample_id}): {row.what}")
    if len(proof.wrong) > _ROWS_SHOWN:
        print_lines(f"... and {len(proof.wrong) - _ROWS_SHOWN} more; --json lists all")
    least = "" if proof.least_cosine is None else f", least cosine {proof.least_cosine:.5f} at {proof.least_cosine_row}"
    images = proof.images_compared + proof.quarantined_checked
    shown = fraction_shown(min(images, proof.captions_compared or images))
    verdict = "as the teacher makes them" if proof.ok else f"{len(proof.wrong)} rows are wrong"
    print_lines(
        f"{proof.cache}: {verdict}: {proof.images_compared} images and {proof.captions_compared} captions against "
        f"{proof.teacher} on {proof.device} in {proof.precision}, {proof.quarantined_checked} quarantined tried again, "
        f"threshold {proof.threshold:g}{least}",
        f"a fault in {shown:.2%} of all images, or captions, would have shown with 99 % probability",
    )


def _replaced(now: str, before: str) -> str:
    return (
        f"repaired chunks differ from the sealed ones: the manifest is {now[:12]} now, it was {before[:12]}. "
        "Runs that name the old one learned from the old bytes."
    )


def _forecast(config: PrecomputeConfig, as_json: bool) -> None:
    from teacher_cache.pipeline.precompute.forecast import forecast

    with StageProgress() as progress:
        result = forecast(config, progress=progress)
    print_result(result, as_json, _forecast_lines)
    if not result.fits:
        needed, free = byte_size(result.needed_bytes), byte_size(result.free_bytes or 0)
        say(f"{result.cache}: {needed} needed, {free} free. Make room, or name another --cache.")
        sys.exit(1)


def _forecast_lines(result: Forecast) -> list[str]:
    views = "" if result.views == 1 else f" in {result.views} views"
    room = "" if result.free_bytes is None else f"; {byte_size(result.free_bytes)} free"
    packed = " before compression" if result.compress else ""
    committed = f", {result.committed_rows:,} of these rows are committed" if result.committed_rows else ""
    return [
        f"{result.teacher} on {result.device} in {result.precision}, {result.dataset}",
        f"rows       {counted(result.images, 'image')}{views} and {counted(result.captions, 'caption')} in "
        f"{counted(result.chunks, 'chunk')}{committed}",
        *([f"reuse      {result.reuse_line}"] if result.reuse_line else []),
        f"bytes      {byte_size(result.target_bytes)} of embeddings{packed}, about {byte_size(result.table_bytes)} of "
        f"tables{room}",
        f"probe      {_probed(result)}",
        f"time       {duration(result.encode_seconds)} to encode on one {result.device}, after "
        f"{duration(result.check_seconds)} to check all files",
        f"without    {duration(result.online_epoch_seconds)} of the teacher in each epoch of each student, if it ran "
        "while they train",
        "it pays    never: the teacher took no time"
        if result.epochs_to_pay is None
        else f"it pays    once the students train {counted(result.epochs_to_pay, 'epoch')} in all: from then on the "
        "teacher would have run longer without a cache",
    ]


def _probed(result: Forecast) -> str:
    image, text = result.image, result.text
    lost = f", {counted(result.probe_lost, 'image')} of it could not be read" if result.probe_lost else ""
    speed = f"{1 / image.seconds_per_row:,.1f} images/s ({1 / image.teacher_seconds_per_row:,.1f} in the teacher)"
    if text.rows:
        speed += f", {1 / text.seconds_per_row:,.1f} captions/s"
    return f"{speed}, by {counted(image.rows, 'image')} and {counted(text.rows, 'caption')}{lost}"


def _import_lines(result: ImportResult) -> list[str]:
    matched = result.matched
    least = "" if result.least_cosine is None else f", least cosine {result.least_cosine:.5f}"
    lines = [
        f"{result.cache}: {counted(result.images, 'image')} and {counted(result.captions, 'caption')} by "
        f"{result.teacher}",
        f"images: {result.images_imported:,} imported, {result.images_encoded:,} encoded, {result.quarantined:,} "
        f"quarantined; captions: {result.captions_imported:,} imported, {result.captions_encoded:,} encoded",
        f"proven: {counted(result.images_proven, 'image')} and {counted(result.captions_proven, 'caption')} against "
        f"the live teacher{least}",
    ]
    unused = {
        "of images that are not in the dataset": matched.strange,
        "named by different rows": matched.ambiguous,
        "not finite or zero": matched.unusable,
    }
    if any(unused.values()):
        counts = ", ".join(f"{count:,} {reason}" for reason, count in unused.items() if count)
        lines.append(f"rows of the folder ({matched.folder_rows:,} in all) that were left aside: {counts}")
    if result.problems:
        lines.append("problems: " + ", ".join(f"{kind} {count}" for kind, count in result.problems.items()))
    return [*lines, f"{result.chunks_written} of {result.chunks} chunks written in {duration(result.seconds)}"]
