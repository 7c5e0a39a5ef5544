"""What ``evaluate`` says beside its table."""

from __future__ import annotations

from typing import Any

import pytest

from teacher_cache.pipeline.cli.evaluate import _remarks
from teacher_cache.pipeline.evaluate.recall import chance_recall
from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult


def recalls(percent: float) -> dict[str, dict[str, float]]:
    return {direction: {f"R@{k}": percent for k in (1, 5, 10)} for direction in ("i2t", "t2i")}


def remarks(**changes: Any) -> list[str]:
    settled = {"images": 200, "captions": 400, "distinct_captions": 390, "dataset": "table:x.csv", "run": "r"}
    measured = {"teacher": recalls(60), "student": recalls(40), "chance": chance_recall(200, 400), "not_kept": None}
    return list(_remarks(EvaluateResult.model_construct(**settled | measured | changes)))


def test_a_plain_result_needs_no_remark() -> None:
    assert remarks() == []


@pytest.mark.parametrize("low", ["teacher", "student"])
def test_a_model_at_chance_makes_the_retention_worthless(low: str) -> None:
    assert remarks(**{low: recalls(2)}) == [f"the {low} is hardly above chance: the retention says nothing"]
    alone = {"teacher": recalls(2), "student": None, "run": None}
    assert remarks(**alone)[-1] == "the teacher is hardly above chance: a student's retention will say nothing"


def test_captions_that_images_share_are_said_for_few_images_too() -> None:
    (said,) = remarks(captions=75, distinct_captions=15, dataset="imagefolder:p?holdout=20%", student=None)
    assert said.startswith("15 different captions among 75: recall and retention say little")
    assert said.endswith("teacher-cache zero-shot 'imagefolder:p?holdout=20%' --run r")
