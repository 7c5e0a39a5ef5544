"""Runs and deployed students of a report, read from their folders. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from teacher_cache.pipeline.deploy.table import StudentTable
from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.report.data import RunReport, Step, of_other_data
from teacher_cache.storage.errors import UsageError

_STEPS = 1_000
_TABLE = "table.json"
_NO_LOSS = {"step", "epoch", "loss", "learning_rate", "grad_norm", "logit_scale"}


def read_runs(paths: Sequence[str], manifest_digest: str) -> tuple[tuple[RunReport, ...], list[str]]:
    """Return the runs in the order of ``paths``, and notes on them.

    Args:
        manifest_digest: manifest digest of the report's cache.

    Raises:
        UsageError: a folder has no run.
    """
    notes: list[str] = []
    names = [Path(path).resolve().name for path in paths]
    reports = []
    for path, name in zip(paths, names, strict=True):
        folder = RunFolder(path)
        record = folder.read()
        lines = folder.logged()
        evaluations = _evaluations(folder, notes)
        if not evaluations and record.checkpoint is not None:
            notes.append(
                f"{path}: not measured yet, or by an older version: teacher-cache evaluate --run {path} --split SPLIT "
                "leaves recall and retention in the run."
                if record.identity.dataset.captions
                else f"{path}: learned from images without captions: teacher-cache evaluate --run {path} --cache "
                "CACHE-WITH-CAPTIONS measures its recall, zero-shot its classes."
            )
        same_cache = manifest_digest in record.manifest_digests
        others = [result.cache for result in evaluations if of_other_data(result, manifest_digest)]
        only_elsewhere = len(others) == len(evaluations) > 0
        if only_elsewhere and not same_cache:
            raise UsageError(
                f"{path}: is of {record.config.cache}, and not measured on this cache. Report that one, or measure it "
                f"here first: teacher-cache evaluate --run {path} --cache CACHE"
            )
        if only_elsewhere:
            why = "" if record.identity.dataset.captions else " (no captions)"
            newest = f"teacher-cache report {others[0]} --run {path}"
            notes.append(f"{path} was measured on {others[0]}, not here{why}: {newest} shows it.")
        elif others:
            elsewhere = ", ".join(sorted(set(others)))
            notes.append(f"{path}: also measured on {elsewhere}: rows of the table that say so, no more.")
        shown = thinned([line["epoch"] for line in lines], _STEPS)
        reports.append(
            RunReport(
                # the path distinguishes two runs with one name
                name=name if names.count(name) == 1 else str(path),
                record=record,
                steps=tuple(_step(lines[at]) for at in shown),
                steps_of=len(lines),
                evaluations=evaluations,
                same_cache=same_cache,
            )
        )
    return tuple(reports), notes


def thinned(epochs: Sequence[int], most: int) -> list[int]:
    """Return the positions of evenly spaced steps, including the first step and the last of each epoch.

    Args:
        epochs: epoch of each step, in order.
        most: maximum number of steps; with more epochs, only the last steps of evenly spaced epochs.
    """
    total = len(epochs)
    if total <= most:
        return list(range(total))
    edges = [0, *(at for at in range(total) if at + 1 == total or epochs[at + 1] != epochs[at])]
    if len(edges) > most:
        edges = [edges[int(at)] for at in np.linspace(0, len(edges) - 1, most)]
    even = np.linspace(0, total - 1, most - len(edges)).astype(int)
    return sorted({*edges, *even.tolist()})


def _step(line: dict[str, Any]) -> Step:
    parts = {name: value for name, value in line.items() if name not in _NO_LOSS}
    return Step(
        step=line["step"], epoch=line["epoch"], loss=line["loss"], learning_rate=line.get("learning_rate"), parts=parts
    )


def _evaluations(folder: RunFolder, notes: list[str]) -> tuple[EvaluateResult, ...]:
    """Read evaluations, newest first; a file that cannot be read becomes a note."""
    results = []
    for path in folder.evaluation_files():
        try:
            results.append(EvaluateResult.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError) as error:
            why = error.strerror if isinstance(error, OSError) else f"{error.error_count()} fields do not fit"
            notes.append(f"{path}: not an evaluation that can be shown ({why}). Run teacher-cache evaluate again.")
    return tuple(sorted(results, key=lambda result: result.date or "", reverse=True))


def read_deployments(paths: Sequence[str], manifest_digest: str) -> tuple[tuple[StudentTable, ...], list[str]]:
    """Return the table of each deployed student, and notes on them.

    Args:
        manifest_digest: manifest digest of the report's cache.

    Raises:
        UsageError: a folder has no table.
    """
    tables, notes = [], []
    for path in paths:
        file = Path(path) / _TABLE
        try:
            table = StudentTable.model_validate_json(file.read_bytes())
        except OSError as error:
            raise UsageError(
                f"{path}: no deployed student here ({file}: {error.strerror}). Name a folder that teacher-cache deploy "
                "has made."
            ) from error
        except ValidationError as error:
            raise UsageError(
                f"{file}: not a table of a deployed student ({error.error_count()} fields do not fit). Deploy the run "
                "again, to another --out."
            ) from error
        tables.append(table)
        if table.cache_manifest_digest != manifest_digest:
            notes.append(f"{path}: measured on another state of the cache, or another cache, than this report is of.")
    return tuple(tables), notes
