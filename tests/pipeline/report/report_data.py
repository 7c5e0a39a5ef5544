"""A report with every section filled: a real cache, captions that try to break out of the page, made-up students."""

from __future__ import annotations

import base64
import functools
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from teacher_cache.pipeline.deploy.table import Cosine, Gate, Retained, Retention, StudentTable, TableRow
from teacher_cache.pipeline.evaluate.cost.latency import Ratio, Timing
from teacher_cache.pipeline.evaluate.cost.peak_memory import PeakMemory
from teacher_cache.pipeline.evaluate.cost.results import ModelCost, ModelFacts, SpeedRatios, TowerFlops
from teacher_cache.pipeline.evaluate.intervals import Interval, RecallIntervals
from teacher_cache.pipeline.evaluate.recall import mean_recall, retention
from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult, TowerResult
from teacher_cache.pipeline.models.run_record import BestRecord, EpochRecord, RunRecord, Selection
from teacher_cache.pipeline.report.collect import collect_report
from teacher_cache.pipeline.report.data import LostImage, ReportData, RunReport, Step
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.storage.look.stats import Distribution
from tests.conftest import make_identity, plan_known_cache
from tests.storage.look.test_diff import Picture, make
from tests.storage.look.test_look import fill

HOSTILE = (
    '<script>document.title="broken"</script><img src=x onerror=alert(1)> & "quotes" \'single\' </script>\u2028end'
)
RTL = "كلب يركض على العشب الأخضر"
IMAGES, CAPTIONS = 40, 120
LOCATION = "/data/caches/made up & <odd>.cache"
_KS = ("R@1", "R@5", "R@10")
Recalls = dict[str, dict[str, float]]


def report_data(**changes: Any) -> ReportData:
    """40 images and 120 captions, two students, one deployed; image 3 is quarantined."""
    report = _collected()
    assert report.row_map is not None
    info = {
        "manifest_digest": "1" * 64,
        "quarantine": {"truncated": 1},
        "problems": {"image missing": 2},
        "lost_images": 2,
        "encode_seconds": 8.5,
        "images_per_second": 12.0,
        "captions_per_second": 80.0,
    }
    made = {
        "location": LOCATION,
        "info": report.info.model_copy(update=info),
        "row_map": report.row_map.model_copy(update={"images_of": IMAGES}),
        "lost": (LostImage(row=3, sample_id="img-3", uri="photos/<b>img-3</b>.jpg", reason="truncated: 17 bytes"),),
        "runs": (_run("small", 0, 71.0), _run("smaller", 1, 55.0)),
        "deployments": (student_table(),),
        "pictures": {row: _picture(row) for row in range(IMAGES) if row != 3},
        "notes": ("The map shows all 39 images with one caption each.", f"A note with a caption in it: {HOSTILE}"),
    }
    return report.model_copy(update={**made, **changes})


@functools.cache
def _collected() -> ReportData:
    """A cache whose images 0 and 1 are what their first captions say, and 7 and 8 the same."""
    pictures = [
        Picture(
            f"img-{row}",
            {0: HOSTILE, 1: RTL, 8: "photograph 7"}.get(row, f"photograph {row}"),
            tuple(_caption(3 * row + number) for number in range(3)),
            "test" if row >= 32 else "train",
        )
        for row in range(IMAGES)
    ]
    with tempfile.TemporaryDirectory() as folder:
        return collect_report(make(Path(folder) / "a.cache", pictures, lost=(3,)))


@functools.cache
def unfinished_report() -> ReportData:
    """A cache with 6 of 40 chunks and nothing else: what a report shows first."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.cache"
        plan_known_cache(path, IMAGES, CAPTIONS)
        fill(path, chunks=6)
        report = collect_report(str(path))
    info = report.info.model_copy(update={"remaining_seconds": 125.0})
    return report.model_copy(update={"location": LOCATION, "info": info})


def _picture(row: int) -> str:
    from PIL import Image

    colours = np.random.default_rng(row).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((96, 72), Image.Resampling.BICUBIC).save(file, "JPEG", quality=60)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _caption(row: int) -> str:
    return {0: HOSTILE, 3: RTL, 6: "a caption " + "with many words " * 12}.get(
        row, f"picture {row // 3}, caption {row}"
    )


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


def student_table(**changes: Any) -> StudentTable:
    """A teacher, its student and two files of it."""
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

    made = StudentTable(
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
    return made.model_copy(update=changes)


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
