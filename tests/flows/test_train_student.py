"""Which runs the flow goes on with, without a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.train_student import goes_on
from pipeline.train import train
from tests.pipeline.train_work import make_cache, make_student, train_config


class WorkerDied(Exception): ...


def test_a_run_whose_worker_died_is_gone_on_with_and_a_finished_one_is_not(tiny_teacher: Path, tmp_path: Path) -> None:
    config = train_config(make_cache(tmp_path, tiny_teacher), make_student(tmp_path / "s.json"), tmp_path / "run")
    assert not goes_on(config.out, 1)
    assert not goes_on(config.out, 2)  # the first try came to nothing at all

    def die(at):
        if at.step == 6:
            raise WorkerDied

    with pytest.raises(WorkerDied):
        train(config, die)
    assert goes_on(config.out, 1)
    record = train(config, resume=goes_on(config.out, 1)).record
    assert record.resumed_at == (4,)
    assert record.steps == 8
    assert not goes_on(config.out, 1)
    # the flow run that trained it is tried again, for its evaluation
    assert goes_on(config.out, 2)
    assert train(config, resume=True).record == record
