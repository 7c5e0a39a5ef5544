"""A student of sigmoid losses has a logit bias: from its config, from its teacher, or from SigLIP's paper."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from teacher_cache.pipeline.models.student import load_student
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.errors import UsageError
from tests.conftest import make_model_folder
from tests.pipeline.train.train_work import make_cache, make_student, trace, train_config

LOSSES = {"cosine": 1.0, "sigmoid": 0.5, "sigmoid_relational": 1.0}


@pytest.fixture(scope="module")
def siglip_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of a teacher with scale 50 and bias -9."""
    folder = tmp_path_factory.mktemp("siglip")
    changes = {"init_logit_scale": math.log(50), "init_logit_bias": -9.0}
    return make_cache(folder, make_model_folder(folder / "teacher", **changes), images=20)


def test_it_starts_with_its_teachers_scale_and_bias_and_trains_them(siglip_cache: Path, tmp_path: Path) -> None:
    student = make_student(tmp_path / "student.json")
    record = train(train_config(siglip_cache, student, tmp_path / "run", losses=LOSSES)).record
    assert record.student_config["init_logit_bias"] == -9.0
    assert record.student_config["init_logit_scale"] == pytest.approx(math.log(50))
    steps = trace(tmp_path / "run")
    assert steps[0]["logit_scale"] == pytest.approx(50, rel=1e-5)
    assert set(LOSSES) <= set(steps[0])
    loaded, _ = load_student(tmp_path / "run" / str(record.checkpoint))
    assert loaded.logit_bias is not None
    assert -9.1 < float(loaded.logit_bias.detach()) < -8.9
    assert float(loaded.logit_bias.detach()) != -9.0
    # from there another run goes on, by softmax or by sigmoid
    again = make_student(tmp_path / "again.json")
    init = str(tmp_path / "run" / str(record.checkpoint))
    for losses in (LOSSES, {"relational": 1.0}):
        out = tmp_path / f"more{len(losses)}"
        record = train(train_config(siglip_cache, again, out, losses=losses, init=init, epochs=1)).record
        started = trace(out)[0]["logit_scale"]
        assert started == pytest.approx(float(loaded.model.logit_scale.detach().exp()), rel=1e-6)  # type: ignore[operator]
        assert ("init_logit_bias" in record.student_config) == (len(losses) > 1)


def test_a_config_with_a_bias_keeps_its_own(siglip_cache: Path, tmp_path: Path) -> None:
    student = make_student(tmp_path / "student.json")
    student.write_text(json.dumps(json.loads(student.read_text()) | {"init_logit_bias": -4.0}))
    record = train(train_config(siglip_cache, student, tmp_path / "run", losses={"sigmoid": 1.0}, epochs=1)).record
    assert record.student_config["init_logit_bias"] == -4.0
    assert "init_logit_scale" not in record.student_config


def test_a_teacher_without_a_bias_has_no_probability_of_a_pair(photo_cache: Path, tmp_path: Path) -> None:
    student = make_student(tmp_path / "student.json")
    with pytest.raises(
        UsageError, match=r"sigmoid_relational learns .* local-dir:tiny has no logit bias.*Use relational"
    ):
        train(train_config(photo_cache, student, tmp_path / "run", losses=LOSSES))
    assert not (tmp_path / "run" / "log.jsonl").exists()
    record = train(train_config(photo_cache, student, tmp_path / "b", losses={"sigmoid": 1.0}, epochs=1)).record
    assert record.student_config["init_logit_bias"] == -10.0
    assert trace(tmp_path / "b")[0]["logit_scale"] == pytest.approx(10)
