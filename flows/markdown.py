"""Markdown texts of flow runs: caches, training runs, recalls, deployments and retrainings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from teacher_cache.storage.observe.safe_text import shown, unmarked

if TYPE_CHECKING:
    from teacher_cache.pipeline.deploy.run import DeployResult
    from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult
    from teacher_cache.pipeline.evaluate.sampled import SampledRecall
    from teacher_cache.pipeline.models.run_record import RunRecord
    from teacher_cache.pipeline.precompute.run import PrecomputeResult
    from teacher_cache.pipeline.promote.look import Changes, Look
    from teacher_cache.pipeline.promote.registry import Candidate
    from teacher_cache.storage.look.info import CacheInfo


def code(value: Any) -> str:
    """Return a value as inline code that is safe in a table cell: file and split names may hold anything."""
    # a pipe behind two backslashes ends a cell, and code has no other escape
    return "`" + re.sub(r"\\*\|", r"\\|", shown(str(value)).replace("`", "'").replace("\n", " ")) + "`"


def cache_text(
    info: CacheInfo, recall: SampledRecall | None, problems: Sequence[str] = (), hints: Sequence[str] = ()
) -> str:
    """Return the text of a finished cache: its identity, the teacher's own recall, problems and hints.

    Args:
        recall: recall of the teacher; None if the captions are prompts of classes.
        problems: the lines of :func:`problem_lines`.
    """
    lines = [f"# {code(info.location)}", "", *_identity_table(info), ""]
    if recall is not None:
        of = f"{recall.images:,} images, {recall.captions:,} captions"
        columns = list(recall.i2t)
        rows = (("image to text", recall.i2t), ("text to image", recall.t2i))
        table = ([name, *(f"{values[column]:.1f}" for column in columns)] for name, values in rows)
        lines += [f"The teacher's own recall, {of}, in percent:", "", *_table(["recall", *columns], table), ""]
    lines += _list("Problems", problems) + _list("Hints", hints)
    return "\n".join([*lines, f"Identity {code(info.identity_digest)}, manifest {code(info.manifest_digest)}."])


def problem_lines(result: PrecomputeResult) -> list[str]:
    """Return the first problems of a cache, and how many more there are. Plain text; empty if there are none."""
    more = sum(result.problems.values()) - len(result.problem_details)
    listed = [f"{more:,} more: teacher-cache info {result.cache} --problems lists them"] if more else []
    return [*result.problem_details, *listed]


def _list(title: str, lines: Sequence[str]) -> list[str]:
    return [f"{title}:", "", *(f"- {code(line)}" for line in lines), ""] if lines else []


def _identity_table(info: CacheInfo) -> list[str]:
    identity = info.identity
    teacher, preprocess, views, dataset = identity.teacher, identity.preprocess, identity.views, identity.dataset
    size = " x ".join(map(str, preprocess.image_size))
    splits = (f"{code(name) if name else 'no split'} {images:,}" for name, images in dataset.splits.items())
    name = teacher.name if teacher.pretrained is None else f"{teacher.name} {teacher.pretrained}"
    rows = {
        "teacher": f"{code(name)}, weights {code(teacher.weights_sha256[:16])}",
        "architecture": f"width {teacher.embed_dim}, {teacher.activation}, {teacher.precision}, "
        f"logit scale {teacher.logit_scale:.4g}",
        "pixels": f"{size}, {preprocess.interpolation}, {preprocess.resize_mode}",
        "tokenizer": f"{code(identity.tokenizer.name)}, {identity.tokenizer.context_length} tokens",
        "views": f"{views.count}, {views.policy}",
        "targets": identity.targets.dtype,
        "dataset": f"{code(info.dataset)}, {dataset.images:,} images, {dataset.captions:,} captions",
        "splits": ", ".join(splits) if any(dataset.splits) else "no splits",
    }
    return ["| what | value |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows.items())]


def run_text(record: RunRecord, measured: EvaluateResult | None) -> str:
    """Return the text of a finished training run: student, losses by epoch, and recall beside the teacher's."""
    out = record.config.out
    lines = [
        f"# {code(out)}",
        "",
        f"{code(record.config.student)}, {record.student_parameters:,} parameters, from {code(record.config.cache)} "
        f"(teacher {code(record.teacher)}, manifest {code(record.cache_manifest_digest[:16])}): {record.steps:,} steps "
        f"on {record.train_images:,} images. Checkpoint {code(f'{out}/{record.checkpoint}')}.",
        "",
    ]
    if measured is not None:
        lines += [recall_text(measured), ""]
    selected = any(epoch.selection for epoch in record.epochs)
    names = list(dict.fromkeys(name for epoch in record.epochs for name in epoch.parts))
    headings = ["epoch", "loss", *names, *(["mean recall on " + code(record.config.select_split)] if selected else [])]
    lines += _table(headings, _epochs(record, names, selected))
    return "\n".join(lines)


def _epochs(record: RunRecord, names: list[str], selected: bool) -> Iterable[list[str]]:
    for epoch in record.epochs:
        row = [f"{epoch.epoch + 1}", f"{epoch.loss:.4f}", *(f"{epoch.parts.get(name, 0.0):.4g}" for name in names)]
        if selected:
            row.append("-" if epoch.selection is None else f"{epoch.selection.mean_recall:.1f}")
        if record.best is not None and record.best.epoch == epoch.epoch:
            row[0] = f"{row[0]} (best)"
        yield row


def recall_text(measured: EvaluateResult) -> str:
    """Return the recalls of teacher and student in percent, and the retention with its interval."""
    # imported here: deploying a flow needs neither numpy nor FAISS
    from teacher_cache.pipeline.evaluate.learned import learned_words

    of = f"{measured.images:,} images, {measured.captions:,} captions"
    if measured.caption_kind is not None:
        of += f" of kind {code(measured.caption_kind)}"
    if measured.quarantined:
        of += f", {measured.quarantined:,} quarantined ones left out"
    lines = [f"Recall on {code(measured.split)}: {of}."]
    if measured.checkpoint is not None:
        chosen = f", which was chosen on {code(measured.chosen_on)}" if measured.chosen_on else ""
        learned = learned_words(measured.learned_images, "them")
        lines[0] += f" Student: {code(measured.checkpoint)}{chosen}{f'; {learned}' if learned else ''}."
    lines.append("")
    level = f"{100 * measured.interval_level:.0f} %"
    return "\n".join([*lines, *_table(["metric", "teacher", "student", f"retention [{level}]"], _recalls(measured))])


def _recalls(measured: EvaluateResult) -> Iterable[list[str]]:
    # imported here: deploying a flow needs neither numpy nor FAISS
    from teacher_cache.pipeline.evaluate.recall import mean_recall

    student, retention = measured.student, measured.retention
    spans = measured.retention_intervals.model_dump() if measured.retention_intervals else None

    def retained(share: float | None, span: dict[str, float] | None) -> str:
        if share is None:
            return "-"
        return f"{share:.1f} %" + ("" if span is None else f" [{span['low']:.1f}, {span['high']:.1f}]")

    for direction, recalls in measured.teacher.items():
        for name, value in recalls.items():
            row = [f"{direction} {name}", f"{value:.1f}", "-", "-"]
            if student is not None and retention is not None:
                row[2] = f"{student[direction][name]:.1f}"
                row[3] = retained(retention[direction][name], spans and spans[direction][name])
            yield row
    means = [f"{mean_recall(recalls):.1f}" if recalls else "-" for recalls in (measured.teacher, student)]
    yield ["mean", *means, retained(retention["mean"], spans and spans["mean"]) if retention else "-"]
    for name, tower in (measured.towers or {}).items():
        share = retained(tower.retention["mean"], None)
        yield [f"mean, {name} tower with the teacher's other", "-", f"{mean_recall(tower.recall):.1f}", share]


def deployment_text(result: DeployResult) -> str:
    """Return the text of a deployed student: its table, the gates, and towers without an int8 file."""
    from teacher_cache.pipeline.deploy.table import to_markdown

    table = result.table
    lines = [f"# {code(result.out)}", "", to_markdown(table)]
    gates = ([unmarked(gate.name), f"{gate.found:.6g}", unmarked(gate.wanted)] for gate in table.gates)
    lines += _table(["gate", "found", "wanted"], gates)
    lines += [
        "",
        *(
            f"- no int8 file of the {tower} tower: {unmarked(why)}"
            for tower, why in result.deployment.not_quantised.items()
        ),
    ]
    return "\n".join(lines)


def retraining_text(outcome: str, found: Look, encoded: PrecomputeResult | None, candidate: Candidate | None) -> str:
    """Return the text of a retraining: the changes, the work done, and the reason of the verdict."""
    lines = [f"# {outcome}", "", f"{code(found.cache)}: {found.images:,} images, {found.captions:,} captions."]
    lines += [line for notice in found.notices for line in ("", unmarked(notice))]
    if found.changes is not None:
        lines += ["", *_table(["against the newest cache", "new", "gone"], _changes(found.changes))]
    if encoded is not None and not encoded.chunks_encoded:
        lines += ["", "Nothing was left to encode: a try before had come to the end."]
    elif encoded is not None:
        copied = " and ".join(f"{rows:,} rows of {tower}" for tower, rows in encoded.rows_reused.items())
        if found.reuse:
            lines += ["", f"Copied from {code(found.reuse)}: {copied}; the teacher saw the others."]
        if problems := problem_lines(encoded):
            lines += ["", *_list("Problems", problems)]
    if candidate is not None:
        lines += ["", f"Student {candidate.number}, {code(candidate.run)}: {unmarked(candidate.reason)}.", ""]
        lines += [line for learned in candidate.learned_lines() for line in (f"{unmarked(learned)}.", "")]
        lines += _table([f"recall on {code(candidate.split)}", "student", "champion before"], _compared(candidate))
    return "\n".join(lines)


def _changes(changes: Changes) -> Iterable[list[str]]:
    yield ["images", f"{changes.new_images:,}", f"{changes.removed_images:,}"]
    yield ["captions", f"{changes.new_captions:,}", f"{changes.removed_captions:,}"]


def _compared(candidate: Candidate) -> Iterable[list[str]]:
    before = candidate.comparison.champion_recalls if candidate.comparison else None
    for direction, recalls in candidate.recalls.items():
        for name, value in recalls.items():
            yield [f"{direction} {name}", f"{value:.1f}", "-" if before is None else f"{before[direction][name]:.1f}"]


def _table(headings: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
