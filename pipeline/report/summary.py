"""The summary of a report: a sentence, the main facts, and what is known about the cache."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from teacher_cache.pipeline.deploy.table import StudentTable
from teacher_cache.pipeline.evaluate.intervals import Interval
from teacher_cache.pipeline.evaluate.learned import learned_words
from teacher_cache.pipeline.evaluate.recall import chance_recall, mean_recall
from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult
from teacher_cache.pipeline.report.charts import newest_evaluations
from teacher_cache.pipeline.report.data import ReportData, RunReport
from teacher_cache.storage.cli.info import encoding_cost, remaining_time
from teacher_cache.storage.look.info import CacheInfo
from teacher_cache.storage.observe.quantities import byte_size, counted

Fact = tuple[str, str, str]
"""Name, number, explanation."""


class _Kept(NamedTuple):
    """Share of the teacher's mean recall that a student keeps."""

    student: str
    split: str
    images: int
    chosen_on: str | None
    learned_images: int | None
    parameters: int | None
    teacher_recall: float
    recall: float
    share: float
    interval: Interval | None
    elsewhere: str

    @property
    def on(self) -> str:
        """The images that it was measured on, in words."""
        return f"{self.images:,} {self.split} images".replace("  ", " ")


def verdict(data: ReportData) -> str:
    """Return one sentence on the best student, or without one on the cache."""
    students = _students(data)
    if not students:
        return _verdict_on_cache(data)
    best = _best(students)
    table = next((table for table in data.deployments if _is_of(table, best)), None)
    size = f" ({best.parameters:,} parameters)" if table is None and best.parameters is not None else ""
    others = len({kept.student for kept in students})
    text = f"{best.student}{size}{f', the best of {others} students,' if others > 1 else ''} keeps {best.share:.0f} %"
    if best.interval is not None:
        text += f" ({best.interval.low:.0f} to {best.interval.high:.0f})"
    text += f" of the teacher's mean recall on {best.on}"
    if table is not None:
        text += _cost(table)
    if best.learned_images:
        text += f". {learned_words(best.learned_images, 'these images', 'It')}, which flatters it"
    elif best.chosen_on == best.split:
        text += ". Its checkpoint was chosen on these images, so this is no test result"
    if best.elsewhere:
        text += f". It {best.elsewhere}, not this cache"
    return f"{text}."


def facts(data: ReportData) -> list[Fact]:
    """Return the main facts. Numbers of teacher and student are of the same images."""
    info, students = data.info, _students(data)
    images = info.identity.dataset.images
    facts: list[Fact] = []
    if info.images_encoded is None:
        facts.append(("Encoded", f"{_done(info):.0f} %", f"{info.chunks_committed:,} of {info.chunks:,} chunks"))
        facts.append(("Images", f"{images:,}", "in the dataset"))
    else:
        share = "all have" if info.images_encoded == images else f"of {images:,} have"
        facts.append(("Images", f"{info.images_encoded:,}", f"{share} an embedding"))
    facts.append(("Captions", f"{info.identity.dataset.captions:,}", f"{info.layout.embed_dim} dimensions each"))
    size = f"{info.identity.targets.dtype}, {counted(info.layout.views, 'view')} an image"
    facts.append(("Embeddings", byte_size(info.target_bytes), size))
    if students:
        best = _best(students)
        facts.append(("Teacher's mean recall", f"{best.teacher_recall:.1f} %", f"on {best.on}"))
        facts.append(("Student's mean recall", f"{best.recall:.1f} %", f"{best.student} on the same images"))
    elif data.recall is not None:
        both = f"{data.recall.i2t['R@1']:.1f} / {data.recall.t2i['R@1']:.1f} %"
        facts.append(("Teacher's R@1", both, f"image → text / text → image, {data.recall.images:,} images"))
    return [*facts, *_quarantine(info)]


def about(data: ReportData) -> dict[str, str]:
    """Return what is known about the cache, by name; empty if not known."""
    info = data.info
    return {
        "location": data.location,
        "dataset": info.dataset,
        "images by split": ", ".join(
            f"{name or 'no name'} {count:,}" for name, count in info.identity.dataset.splits.items()
        ),
        "encoding": encoding_cost(info),
        "remaining": remaining_time(info),
    }


def quarantined(info: CacheInfo) -> int | None:
    """Return the number of images without an embedding, from the commit records if they were read, else the seal."""
    if info.quarantine is None:
        return info.images_quarantined
    # damaged records name no images: then the seal has more
    return max(sum(info.quarantine.values()), info.images_quarantined or 0)


def unread(info: CacheInfo) -> bool:
    """Return whether quarantined images are not counted: too many commit records, and no seal."""
    return info.quarantine is None and not info.sealed


def _students(data: ReportData) -> list[_Kept]:
    """Return the measured students: of the runs, or without any the deployed ones."""
    digest = data.info.manifest_digest
    measured = [
        _Kept(
            run.name,
            item.split,
            item.images,
            item.chosen_on,
            item.learned_images,
            item.student_parameters,
            mean_recall(item.teacher),
            mean_recall(item.student),
            item.retention["mean"],
            item.retention_intervals.mean if item.retention_intervals else None,
            _elsewhere(run, item, digest),
        )
        for run in data.runs
        for item in newest_evaluations(run, digest)
        if item.student and item.retention and item.retention["mean"] is not None
    ]
    return measured or [
        _Kept(
            Path(table.run).name,
            table.split,
            table.images,
            table.chosen_on,
            table.learned_images,
            row.parameters,
            table.rows[0].mean_recall,
            row.mean_recall,
            row.retention.mean.share,
            row.retention.mean.interval,
            "",
        )
        for table in data.deployments
        for row in table.rows[1:2]
        if table.cache_manifest_digest == digest and row.retention and row.retention.mean.share is not None
    ]


def _elsewhere(run: RunReport, result: EvaluateResult, digest: str) -> str:
    """Return from which other cache a run learned, and on which it was measured; empty for the report's cache."""
    learned = "" if run.same_cache else f"learned from {run.record.config.cache}"
    measured = "" if result.cache_manifest_digest == digest else f"was measured on {result.cache}"
    return " and ".join(filter(None, (learned, measured)))


def _best(students: list[_Kept]) -> _Kept:
    """Return the student that keeps most, preferably on images that it did not learn from and was not chosen on."""
    return max(students, key=lambda kept: (not kept.learned_images, kept.chosen_on != kept.split, kept.share))


def _is_of(table: StudentTable, kept: _Kept) -> bool:
    same_name = Path(table.run).name == Path(kept.student).name
    return same_name and kept.parameters in [row.parameters for row in table.rows[1:]]


def _cost(table: StudentTable) -> str:
    """Return size and speed of a deployed student against its teacher's."""
    teacher, student = table.rows[:2]
    text = f", with {100 * student.parameters / teacher.parameters:.0f} % of its parameters"
    speeds = {row.name: row.speed.images for row in table.rows if row.speed is not None}
    ratios = {name: images[max(images)].median for name, images in speeds.items()}
    if ratios:
        fastest = max(ratios, key=ratios.__getitem__)
        text += f"; {fastest} encodes images {ratios[fastest]:.1f} times as fast"
    return text


def _verdict_on_cache(data: ReportData) -> str:
    info, recall = data.info, data.recall
    if not info.sealed:
        return f"{_done(info):.0f} % of this cache is encoded. {info.unfinished}."
    teacher, captions = info.identity.teacher.name, info.identity.dataset.captions
    text = f"{teacher} has embedded {info.images_encoded:,} images and {captions:,} captions."
    if recall is None:
        return text
    chance = chance_recall(recall.images, recall.captions)
    return (
        f"{text} Among {recall.images:,} images its first answer is right for {recall.i2t['R@1']:.0f} % of the images "
        f"and {recall.t2i['R@1']:.0f} % of the captions; chance is {chance['i2t']['R@1']:.2g} % and "
        f"{chance['t2i']['R@1']:.2g} %."
    )


def _done(info: CacheInfo) -> float:
    return 100 * info.chunks_committed / info.chunks if info.chunks else 100.0


def _quarantine(info: CacheInfo) -> list[Fact]:
    lost = quarantined(info)
    if unread(info):
        words = "not counted in this unfinished cache" if lost is None else "images counted so far"
        return [("Quarantined", "–" if lost is None else f"{lost:,}", words)]
    return [("Quarantined", f"{lost:,}", "images without an embedding")] if lost else []
