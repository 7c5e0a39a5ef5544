"""A report with every section filled: made-up numbers and pictures, and captions that try to break out of the page."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np

from teacher_cache.pipeline.deploy.table import Cosine, Gate, Retained, Retention, StudentTable, TableRow
from teacher_cache.pipeline.evaluate.cost.latency import Ratio, Timing
from teacher_cache.pipeline.evaluate.cost.peak_memory import PeakMemory
from teacher_cache.pipeline.evaluate.cost.results import ModelCost, ModelFacts, SpeedRatios, TowerFlops
from teacher_cache.pipeline.evaluate.intervals import Interval, RecallIntervals
from teacher_cache.pipeline.evaluate.recall import mean_recall, retention
from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult, TowerResult
from teacher_cache.pipeline.evaluate.sampled import SampledRecall
from teacher_cache.pipeline.models.run_record import BestRecord, EpochRecord, RunRecord, Selection
from teacher_cache.pipeline.report.data import (
    CoverageCell,
    CoverageMap,
    LostImage,
    MapPoint,
    ReportData,
    RetrievedPair,
    RowMap,
    RunReport,
    Step,
)
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.storage.format.commits import QuarantinedRow
from teacher_cache.storage.format.layout import Layout
from teacher_cache.storage.format.manifest import Seal
from teacher_cache.storage.look.info import CacheInfo, Coverage
from teacher_cache.storage.look.stats import CacheStats, Distribution, NearPair, TowerStats
from tests.conftest import make_identity

__all__ = ["HOSTILE", "RTL", "odd_report", "report_data", "unfinished_report"]

HOSTILE = (
    '<script>document.title="broken"</script><img src=x onerror=alert(1)> & "quotes" \'single\' </script>\u2028end'
)
RTL = "كلب يركض على العشب الأخضر"
IMAGES, CAPTIONS = 40, 120
_KS = ("R@1", "R@5", "R@10")
Recalls = dict[str, dict[str, float]]


def report_data(**changes: Any) -> ReportData:
    """40 images and 120 captions, two students, one deployed; image 3 is quarantined."""
    report = ReportData(
        location="/data/caches/made up & <odd>.cache",
        made="2026-11-24 10:00 UTC",
        version="0.1.0",
        info=_info(),
        coverage=(
            *(_coverage("image", view, 10, quarantined=view == 0) for view in range(2)),
            _coverage("text", 0, 15),
        ),
        stats=_stats(),
        recall=SampledRecall(
            images=IMAGES - 1,
            captions=CAPTIONS - 3,
            i2t={"R@1": 78.2, "R@5": 95.1, "R@10": 99.0},
            t2i={"R@1": 70.6, "R@5": 92.8, "R@10": 98.3},
        ),
        row_map=_row_map(),
        hardest=_pairs(hard=True),
        best=_pairs(hard=False),
        pairs_of=IMAGES + CAPTIONS - 4,
        lost=(
            LostImage(row=3, sample_id="img-3", uri="photos/<b>img-3</b>.jpg", reason="truncated: 17 bytes of image"),
        ),
        runs=(_run("small", 0, 71.0), _run("smaller", 1, 55.0)),
        deployments=(_table(),),
        pictures={row: _picture(row) for row in range(IMAGES) if row != 3},
        notes=("The map shows all 39 images with one caption each.", f"A note with a caption in it: {HOSTILE}"),
    )
    return report.model_copy(update=changes)


def unfinished_report() -> ReportData:
    """A cache with 6 of 35 chunks and nothing else: what a report shows first."""
    info = _info()
    coverage = tuple(part.model_copy(update={"chunks_committed": 2, "rows_committed": 8}) for part in info.coverage)
    info = info.model_copy(
        update={
            "sealed": False,
            "chunks_committed": 6,
            "coverage": coverage,
            "images_encoded": None,
            "images_quarantined": None,
            "quarantine": None,
            "quarantined_rows": (),
            "remaining_seconds": 125.0,
        }
    )
    cells = (
        CoverageCell(first_chunk=0, chunks=4, committed=4, quarantined=None),
        CoverageCell(first_chunk=4, chunks=4, committed=2, quarantined=None),
        CoverageCell(first_chunk=8, chunks=2, committed=0, quarantined=None),
    )
    return report_data(
        info=info,
        coverage=(CoverageMap(tower="image", view=0, chunks=10, cells=cells),),
        stats=None,
        recall=None,
        row_map=None,
        hardest=(),
        best=(),
        pairs_of=0,
        lost=(),
        runs=(),
        deployments=(),
        pictures={},
        notes=("The cache is not sealed: finish it by precompute.",),
    )


def _picture(row: int) -> str:
    from PIL import Image

    colours = np.random.default_rng(row).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((96, 72), Image.Resampling.BICUBIC).save(file, "JPEG", quality=60)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _caption(row: int) -> str:
    return {0: HOSTILE, 1: RTL, 2: "a caption " + "with many words " * 12}.get(
        row, f"picture {row // 3}, caption {row}"
    )


def _info() -> CacheInfo:
    coverage = [("image", 0, 10, IMAGES), ("image", 1, 10, IMAGES), ("text", 0, 15, CAPTIONS)]
    layout = Layout(
        embed_dim=8,
        views=2,
        image_rows=IMAGES,
        text_rows=CAPTIONS,
        image_chunk_rows=4,
        text_chunk_rows=8,
        batch_rows=2,
    )
    seal = Seal(commits_sha256="a" * 64, images_encoded=IMAGES - 1, images_quarantined=1, captions_encoded=CAPTIONS)
    return CacheInfo(
        location="/data/caches/made up & <odd>.cache",
        format_version=1,
        sealed=True,
        manifest_digest="1" * 64,
        identity_digest="2" * 64,
        identity=make_identity(IMAGES, CAPTIONS),
        layout=layout,
        seal=seal,
        dataset="flickr:/data/photos",
        image_root="/data/photos",
        chunks=35,
        chunks_committed=35,
        coverage=tuple(
            Coverage.model_validate(
                {"tower": t, "view": v, "chunks": c, "chunks_committed": c, "rows": r, "rows_committed": r}
            )
            for t, v, c, r in coverage
        ),
        images_encoded=IMAGES - 1,
        images_quarantined=1,
        quarantine={"truncated": 1},
        quarantined_rows=(QuarantinedRow(row=3, sample_id="img-3", reason="truncated", detail="17 bytes of image"),),
        lost_images=2,
        problems={"image missing": 2},
        target_bytes=123_456,
        encode_seconds=8.5,
        notes=35,
        notes_read=35,
        images_per_second=12.0,
        captions_per_second=80.0,
        remaining_seconds=0.0,
        made_with={"torch": "2.14.1", "open_clip_torch": "3.3.0"},
    )


def _coverage(tower: Any, view: int, chunks: int, quarantined: bool = False) -> CoverageMap:
    cells = [
        CoverageCell(first_chunk=number, chunks=1, committed=1, quarantined=int(quarantined and number == 0))
        for number in range(chunks)
    ]
    return CoverageMap(tower=tower, view=view, chunks=chunks, cells=tuple(cells))


def _distribution(centre: float, width: float, seed: int) -> Distribution:
    found = Distribution.of(np.random.default_rng(seed).normal(centre, width, 500))
    assert found is not None
    return found


def _tower(rows: int, seed: int, missing: int = 0) -> TowerStats:
    return TowerStats(
        rows=rows,
        rows_read=rows,
        missing=missing,
        zero=0,
        norm=_distribution(10 + seed, 0.5, seed),
        cosine=_distribution(0.5, 0.1, seed + 1),
        equal_rows=2,
        dead_dimensions=(5,),
        effective_rank=6.5,
    )


def _stats() -> CacheStats:
    return CacheStats(
        location="made-up.cache",
        manifest_digest="1" * 64,
        split=None,
        view=0,
        seed=0,
        sampled=False,
        image=_tower(IMAGES, 1, missing=1),
        text=_tower(CAPTIONS, 5),
        without_caption=0,
        true_pairs=_distribution(0.31, 0.03, 11),
        random_pairs=_distribution(0.12, 0.05, 12),
        separation=0.987,
        near_cosine=0.99,
        near_images=2,
        near_pairs=1,
        nearest_pairs=(NearPair(rows=(7, 8), sample_ids=("img-7", "img-8"), cosine=0.9987, same_bytes=True),),
    )


def _row_map() -> RowMap:
    rng = np.random.default_rng(5)
    points = []
    for row in range(IMAGES):
        if row != 3:
            x, y = (float(value) for value in rng.normal(0, 3, 2))
            split = "test" if row >= 32 else "train"
            points.append(
                MapPoint(x=x, y=y, tower="image", row=row, image_row=row, label=f"img-{row}", split=split),
            )
            points.append(
                MapPoint(
                    x=x + 1, y=y + 1, tower="text", row=3 * row, image_row=row, label=_caption(3 * row), split=split
                )
            )
    return RowMap(points=tuple(points), method="PCA of images and captions, seed 0.", images_of=IMAGES)


def _pairs(hard: bool) -> tuple[RetrievedPair, ...]:
    t2i = [
        RetrievedPair(
            direction="t2i",
            image_row=row // 3,
            caption_row=row,
            caption=_caption(row),
            rank=40 - row if hard else 1,
            cosine=0.2,
            first_image_row=20 if hard else None,
            first_caption=None,
            first_cosine=0.3 if hard else 0.2,
        )
        for row in (0, 1, 2, 30)
    ]
    i2t = [
        RetrievedPair(
            direction="i2t",
            image_row=row,
            caption_row=3 * row,
            caption=_caption(3 * row),
            rank=30 if hard else 1,
            cosine=0.21,
            first_image_row=None,
            first_caption="another caption" if hard else None,
            first_cosine=0.33 if hard else 0.21,
        )
        for row in (10, 11)
    ]
    return (*t2i, *i2t)


def _recalls(first: float, step: float) -> Recalls:
    return {
        direction: {name: min(100.0, first - 6 * (direction == "t2i") + step * at) for at, name in enumerate(_KS)}
        for direction in ("i2t", "t2i")
    }


def _intervals(recalls: Recalls, mean: float, by: float) -> RecallIntervals:
    ends = {
        direction: {name: Interval(low=value - by, high=value + by) for name, value in found.items()}
        for direction, found in recalls.items()
    }
    return RecallIntervals(**ends, mean=Interval(low=mean - by, high=mean + by))  # type: ignore[arg-type]


def _tower_alone(first: float, teacher: Recalls) -> TowerResult:
    return TowerResult(recall=_recalls(first, 11), retention=retention(_recalls(first, 11), teacher))


def _evaluation(run: str, first: float, split: str, chosen_on: str | None) -> EvaluateResult:
    teacher, student = _recalls(78.0, 9), _recalls(first, 11)
    kept = retention(student, teacher)
    return EvaluateResult(
        split=split,
        images=8,
        captions=24,
        quarantined=0,
        cache="made-up.cache",
        cache_manifest_digest="1" * 64,
        accepted_mismatches=(),
        run=run,
        checkpoint="checkpoints/best-epoch-0003" if chosen_on else "checkpoints/epoch-0004",
        chosen_on=chosen_on,
        teacher=teacher,
        student=student,
        retention=kept,
        towers={"image": _tower_alone(first + 1, teacher), "text": _tower_alone(first + 7, teacher)}
        if split == "test"
        else None,
        student_parameters=1_952_477,
        teacher_intervals=_intervals(teacher, mean_recall(teacher), 3),
        student_intervals=_intervals(student, mean_recall(student), 3),
        retention_intervals=_intervals({d: kept[d] for d in ("i2t", "t2i")}, kept["mean"], 4),
        ranks=None,
        seconds=1.0,
    )


def _run(name: str, seed: int, first: float) -> RunReport:
    rng = np.random.default_rng(seed)
    epochs = tuple(
        EpochRecord(
            epoch=number,
            loss=4.0 / (number + 1),
            parts={"cosine": 0.3, "relational": 1.2},
            seconds=10.0,
            samples_per_second=300.0,
            data_wait_share=0.02,
            selection=Selection(
                split="dev", mean_recall=first - 20 + 4 * number, recalls=_recalls(first - 30 + 4 * number, 11)
            ),
        )
        for number in range(4)
    )
    record = RunRecord(
        config=TrainConfig(cache="made-up.cache", student="scenes-small", out=f"runs/{name}", epochs=4 + seed),
        student_config={"embed_dim": 8},
        student_parameters=1_952_477 // (seed + 1),
        teacher="tiny",
        identity=make_identity(IMAGES, CAPTIONS),
        cache_manifest_digest="1" * 64,
        view="the evaluation crop",
        image_root="/data/photos",
        train_images=32,
        steps=40,
        seconds=40.0,
        epochs=epochs,
        checkpoint="checkpoints/epoch-0004",
        best=BestRecord(epoch=3, split="dev", mean_recall=80.0, checkpoint="checkpoints/best-epoch-0003"),
    )
    steps = tuple(
        Step(
            step=number,
            epoch=number // 10,
            # the loss of one step is not finite, as happens: it must not break the page
            loss=float("nan") if number == 17 else 4 * 0.95**number + 0.1 * float(rng.random()),
            learning_rate=5e-4,
            parts={"cosine": 0.9**number, "relational": 3 * 0.95**number},
        )
        for number in range(40)
    )
    evaluations = (
        _evaluation(f"runs/{name}", first, "test", None),
        _evaluation(f"runs/{name}", first + 4, "dev", "dev"),
    )
    return RunReport(name=name, record=record, steps=steps, steps_of=400, evaluations=evaluations, same_cache=seed == 0)


def _table() -> StudentTable:
    teacher = _recalls(78.0, 9)

    def row(name: str, engine: str, nbytes: int, parameters: int, first: float, speed: float) -> TableRow:
        recalls = _recalls(first, 9)
        kept = retention(recalls, teacher)
        is_teacher = name.startswith("teacher")
        timing = {
            batch: Timing(batch=batch, seconds=tuple(batch * 0.02 / speed * (1 + 0.01 * i) for i in range(5)))
            for batch in (1, 32)
        }
        ratio = {batch: Ratio(median=speed, low=0.9 * speed, high=1.1 * speed, rounds=5) for batch in (1, 32)}

        def retained(share: float) -> Retained:
            return Retained(share=share, interval=Interval(low=share - 2, high=share + 2))

        return TableRow(
            name=name,
            engine=engine,
            bytes=nbytes,
            parameters=parameters,
            int8_share=0.98 if "int8" in name else None,
            cost=ModelCost(
                facts=ModelFacts(
                    parameters=parameters,
                    flops=TowerFlops(image=10**9, text=10**8, text_tokens=77, caption=10**7, caption_tokens=14),
                ),
                images=timing,
                texts=timing,
                memory=PeakMemory(
                    imported_bytes=10**8,
                    loading_peak_bytes=2 * 10**8,
                    loaded_bytes=2 * 10**8,
                    encoding_peak_bytes=3 * 10**8,
                ),
            ),
            speed=None if is_teacher else SpeedRatios(images=ratio, texts=ratio),
            recalls=recalls,
            mean_recall=mean_recall(recalls),
            cosine={tower: Cosine(mean=0.9999, least=0.999) for tower in ("image", "text")} if "ONNX" in name else None,
            retention=None
            if is_teacher
            else Retention(
                i2t={k: retained(v) for k, v in kept["i2t"].items()},
                t2i={k: retained(v) for k, v in kept["t2i"].items()},
                mean=retained(kept["mean"]),
            ),
        )

    return StudentTable(
        student="small",
        teacher="tiny",
        run="runs/small",
        checkpoint="checkpoints/best-epoch-0003",
        chosen_on="dev",
        cache_manifest_digest="1" * 64,
        split="test",
        images=8,
        captions=24,
        quarantined=0,
        teacher_precision="fp32",
        zero_shot_dataset=None,
        zero_shot_images=None,
        zero_shot_lost=0,
        zero_shot_classes=None,
        zero_shot_prompts=(),
        rounds={1: 5, 32: 5},
        threads=1,
        date="2026-11-24",
        hardware="2 cores",
        versions={"torch": "2.14.1"},
        rows=(
            row("teacher fp32", "torch", 18_820_196, 4_705_049, 78.0, 1.0),
            row("student fp32", "torch", 7_809_908, 1_952_477, 71.0, 2.1),
            row("ONNX fp32", "onnxruntime", 7_900_000, 1_952_477, 71.0, 2.6),
            row("ONNX int8", "onnxruntime", 2_300_000, 1_952_477, 70.0, 3.9),
        ),
        gates=(Gate(name="int8 R@1, points below float32", found=0.4, wanted="at most 1"),),
        int8={},
    )


def odd_report() -> ReportData:
    """What may be missing or equal: one point, norms that are one number, nothing kept of nothing, no picture."""
    full = report_data()
    assert full.stats is not None
    assert full.row_map is not None
    one = Distribution.of(np.ones(3))
    bare = full.stats.image.model_copy(update={"norm": one, "cosine": None, "effective_rank": None})
    stats = full.stats.model_copy(
        update={
            "image": bare,
            "text": bare,
            "true_pairs": None,
            "random_pairs": None,
            "separation": None,
            "recall": None,
            "nearest_pairs": (),
        }
    )
    run, other = full.runs
    none = {"R@1": None, "R@5": None, "R@10": None}
    zero: Recalls = {direction: dict.fromkeys(_KS, 0.0) for direction in ("i2t", "t2i")}
    evaluation = run.evaluations[0].model_copy(
        update={
            "teacher": zero,
            "student": zero,
            "retention": {"i2t": none, "t2i": none, "mean": None},
            "retention_intervals": RecallIntervals(i2t=none, t2i=none, mean=None),
        }
    )
    begun = other.record.model_copy(update={"epochs": (), "best": None, "checkpoint": None, "steps": 0})
    runs = (
        run.model_copy(update={"evaluations": (evaluation,), "steps": run.steps[17:18], "steps_of": 1}),
        other.model_copy(update={"record": begun, "steps": (), "steps_of": 0, "evaluations": ()}),
    )
    return full.model_copy(
        update={
            "stats": stats,
            "row_map": full.row_map.model_copy(update={"points": full.row_map.points[:1]}),
            "runs": runs,
            "deployments": full.deployments * 2,
            "pictures": {},
            "notes": (),
        }
    )
