"""Train and measure students as a table of rows: retention with its spread over seeds, minutes, seconds saved.

    python benchmarks/distil.py benchmarks/distil_flickr8k.toml [--only NAME ...] [--seeds 0 1 2] [--out runs/distil]

Every row of the TOML file is one student trained from the cache alone, by the settings of ``teacher-cache train``. A
row with ``inherit = true`` begins with its teacher's weights, by ``student inherit``. A row with ``soup`` is the
mean of ``of`` runs of the row that it names, by ``student mean``: of its seeds 0 to ``of`` - 1 for seed 0, of
the next ``of`` for seed 1. A row with ``resize`` is the row that it names at another ``image_size``, by
``student resize``. A row with ``begins_at`` trains the student of the row that it names, of the same seed, on.
What is finished is kept in ``--out`` and not done again, what was stopped goes on where it was, so that the table may
be made in several sittings. The Markdown table goes to stdout; failed rows stay in it, with their reason.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import tomllib
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from teacher_cache.pipeline.evaluate.recall import mean_recall
from teacher_cache.pipeline.evaluate.retrieval import evaluate
from teacher_cache.pipeline.models.derive.average import mean
from teacher_cache.pipeline.models.derive.resize import resize
from teacher_cache.pipeline.models.inherit.run import inherit
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import CHECKPOINT_CONFIG, RunRecord
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.recipes import in_teacher_space
from teacher_cache.pipeline.settings.student import InheritConfig, MeanConfig, ResizeConfig
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.commits import all_chunks
from teacher_cache.storage.format.journal import read_cost
from teacher_cache.storage.format.manifest_file import read_manifest

# two-sided 95 % of Student's t with n - 1 degrees of freedom
_T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("--only", nargs="*", help="names of rows; all if left out")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/distil"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--show", action="store_true", help="only print the table of what is finished")
    options = parser.parse_args()
    table = tomllib.loads(options.table.read_text())
    rows = {name: with_settings(name, table) for name in table["rows"] if not options.only or name in options.only}
    options.split, options.teacher = table["split"], table["teacher"]
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.show:
        for name in rows:
            for seed in options.seeds:
                run_row(name, table, seed, options)
    print(markdown(options.out, rows, table["split"]))


def with_settings(name: str, table: dict[str, Any]) -> dict[str, Any]:
    """A row with the settings of the one that it is made of, if it is."""
    row: dict[str, Any] = table["rows"][name]
    of = row.get("soup") or row.get("resize")
    return {**with_settings(of, table), **row} if of else row


def run_row(name: str, table: dict[str, Any], seed: int, options: argparse.Namespace) -> None:
    """Train and measure one row with one seed, unless that is done already."""
    out = options.out / f"{name}-{seed}"
    done = out.with_suffix(".json")
    if done.exists():
        return
    make = prepared(name, table, seed, options)
    try:
        record = make()
        towers = in_teacher_space(record.config.losses)
        measured = evaluate(EvaluateConfig(run=str(out), split=options.split, device=options.device, towers=towers))
    except (FloatingPointError, RuntimeError) as error:
        finished: dict[str, Any] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
    else:
        finished = {
            "parameters": record.student_parameters,
            "epochs": record.config.epochs,
            "seconds": record.seconds,
            "teacher_seconds": teacher_seconds(record),
            "data_wait_share": float(np.mean([epoch.data_wait_share for epoch in record.epochs]))
            if record.epochs
            else None,
            "checkpoint": RunFolder(out).read().checkpoint,
            "recall": measured.student,
            "teacher": measured.teacher,
            "retention": measured.retention["mean"] if measured.retention else None,
            "towers": {which: tower.retention["mean"] for which, tower in (measured.towers or {}).items()},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
            "date": date.today().isoformat(),
            "commit": subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], check=False, capture_output=True, text=True
            ).stdout.strip(),
        }
        if begins_at := table["rows"][name].get("begins_at"):
            before = json.loads((options.out / f"{begins_at}-{seed}.json").read_text())
            for part in ("seconds", "teacher_seconds", "epochs"):
                both = (before[part], finished[part])
                finished[part] = None if None in both else sum(both)
    done.write_text(json.dumps(finished, indent=2) + "\n")


def prepared(name: str, table: dict[str, Any], seed: int, options: argparse.Namespace) -> Callable[[], RunRecord]:
    """What makes one row's run with one seed, or goes on with it; what it needs is there when it is called."""
    out, row = options.out / f"{name}-{seed}", {**table.get("train", {}), **table["rows"][name]}
    if "soup" in row:
        seeds = range(seed * row["of"], (seed + 1) * row["of"])
        for each in seeds:
            run_row(row["soup"], table, each, options)
        runs = [options.out / f"{row['soup']}-{each}" for each in seeds]
        return partial(made_of, runs, out, partial(mean, MeanConfig(runs=tuple(map(str, runs)), out=str(out))))
    if "resize" in row:
        run_row(row["resize"], table, seed, options)
        run = options.out / f"{row['resize']}-{seed}"
        config = ResizeConfig(run=str(run), image_size=row["image_size"], out=str(out))
        return partial(made_of, [run], out, partial(resize, config))
    settings = {key: value for key, value in row.items() if key not in ("inherit", "begins_at", "note")}
    if "begins_at" in row:
        run_row(row["begins_at"], table, seed, options)
        return partial(trained_on, options.out / f"{row['begins_at']}-{seed}", settings, out, seed, options)
    if row.get("inherit"):
        settings["init"] = str(inherited(settings["student"], settings["cache"], options))
    return partial(trained, settings, out, seed, options)


def trained(settings: dict[str, Any], out: Path, seed: int, options: argparse.Namespace) -> RunRecord:
    """A run with these settings, or the rest of it."""
    training = TrainConfig(**settings, out=str(out), seed=seed, device=options.device)
    print(f"{out.name}: {training.student}, {training.epochs} epochs", file=sys.stderr)
    return train(training, show, resume=RunFolder(out).exists()).record


def trained_on(run: Path, settings: dict[str, Any], out: Path, seed: int, options: argparse.Namespace) -> RunRecord:
    """As :func:`trained`, beginning at the student of a finished run.

    Raises:
        RuntimeError: that one failed.
    """
    require_made([run])
    checkpoint = RunFolder(run).checkpoint_path()
    begins = {"init": str(checkpoint), "student": str(checkpoint / CHECKPOINT_CONFIG)}
    return trained({**settings, **begins}, out, seed, options)


def made_of(runs: list[Path], out: Path, make: Callable[[], RunRecord]) -> RunRecord:
    """What is made of finished runs, unless it is there already: it was stopped before it was measured.

    Raises:
        RuntimeError: one of them failed.
    """
    require_made(runs)
    return RunFolder(out).read() if RunFolder(out).exists() else make()


def require_made(runs: list[Path]) -> None:
    failed = [run.name for run in runs if "failed" in json.loads(run.with_suffix(".json").read_text())]
    if failed:
        raise RuntimeError(f"{', '.join(failed)} failed")


def teacher_seconds(record: RunRecord) -> float | None:
    """What the teacher would take for a run's images and captions: at its seconds a row when the cache was made.

    On the device that made the cache, in the forward pass alone; None where a chunk has no note, or was copied whole
    from another cache. Of one that was copied in part it is too little.
    """
    config = record.config
    files = open_files(config.cache)
    images = record.steps * config.batch_size
    manifest = read_manifest(files)
    seconds = 0.0
    for tower, rows in (("image", images), ("text", images * config.captions_per_image)):
        costs = [read_cost(files, ref.name) for ref in all_chunks(manifest.layout) if ref.tower == tower]
        known = [cost for cost in costs if cost is not None and cost.teacher_seconds]
        if len(known) < len(costs):
            return None
        seconds += rows * sum(cost.teacher_seconds for cost in known) / sum(cost.rows for cost in known)
    return seconds


def inherited(student: str, cache: str, options: argparse.Namespace) -> Path:
    """The folder that a student begins with; made once."""
    folder: Path = options.out / f"start-{student}"
    if not folder.exists():
        trunk = "package:efficientnet-lite0" if "lite0" in student else None
        made = inherit(
            InheritConfig(teacher=options.teacher, student=student, out=str(folder), cache=cache, trunk_weights=trunk)
        )
        print(f"{folder}: {made.parameters:,} parameters", file=sys.stderr)
    return folder


def show(at: Any) -> None:
    if at.step % 20 == 0 or at.step == at.total_steps:
        rates = f"{at.samples_per_second:.0f} samples/s, data wait {at.data_wait_share:.0%}"
        print(f"step {at.step} of {at.total_steps}: loss {at.loss:.3f}, {rates}", file=sys.stderr, flush=True)


def processor() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def interval(values: list[float]) -> str:
    """Mean and, from two seeds on, the half width of its 95 % t interval."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    half = _T95.get(len(values), 2.262) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f"{np.mean(values):.1f} ± {half:.1f}"


def alone(tower: str, finished: list[dict[str, Any]]) -> str:
    """What a tower keeps beside the teacher's other one; nothing for losses that left it a space of its own."""
    values = [each["towers"][tower] for each in finished if each.get("towers")]
    return interval(values) if values else ""


def markdown(out: Path, rows: dict[str, Any], split: str) -> str:
    lines = [
        f"| row | parameters | views | epochs | seeds | mean recall on {split} | retention % | image tower % | "
        "text tower % | minutes | of a teacher beside it | where |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        finished = [json.loads(path.read_text()) for path in sorted(out.glob(f"{name}-[0-9]*.json"))]
        good = [each for each in finished if "failed" not in each]
        lines += [f"| {name} | | | | | failed: {each['failed']} | | | | | | |" for each in finished if "failed" in each]
        if good:
            minutes = np.mean([each["seconds"] for each in good]) / 60
            beside = [each["teacher_seconds"] for each in good if each.get("teacher_seconds")]
            where = f"{good[0]['device']}, {good[0]['date']}"
            lines.append(
                f"| {name} | {good[0]['parameters'] / 1e6:.1f}M | {row.get('views', 'all')} | {good[0]['epochs']} | "
                f"{len(good)} | {interval([mean_recall(each['recall']) for each in good])} | "
                f"{interval([each['retention'] for each in good])} | {alone('image', good)} | {alone('text', good)} | "
                f"{minutes:.1f} | "
                f"{f'{np.mean(beside) / 60:.1f}' if beside else ''} | {where} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
