"""What models cost: the command with a real run, and each part against what is known of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file

from teacher_cache.pipeline.cli.app import app
from teacher_cache.pipeline.evaluate.cost.measure import cost, measure_cost
from teacher_cache.pipeline.evaluate.cost.peak_memory import ProbeRequest, measure_peak_memory
from teacher_cache.pipeline.evaluate.cost.results import (
    CAPTIONS,
    CostResult,
    MeasuredModel,
    ModelFacts,
    TowerFlops,
    captions,
)
from teacher_cache.pipeline.evaluate.cost.table import cost_table
from teacher_cache.pipeline.evaluate.cost.torch_models import load_student_model, load_teacher_model
from teacher_cache.pipeline.settings.evaluate import CostConfig
from teacher_cache.pipeline.settings.run_file import load_config
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.errors import UsageError
from tests.conftest import TINY_MODEL, make_model_folder
from tests.pipeline.evaluate.memory_models import MB
from tests.pipeline.train.train_work import make_cache, make_student, train_config

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def run(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cost")
    cache = make_cache(folder, tiny_teacher)
    student = make_student(folder / "student.json", layers=1)
    train(train_config(cache, student, folder / "run", epochs=1))
    return folder / "run"


def test_the_command_measures_teacher_and_student(run: Path, tiny_teacher: Path) -> None:
    models = ("--teacher", f"local-dir:{tiny_teacher}", "--run", str(run), "--device", "cpu")
    flags = ("--rounds", "3", "--batch", "4,1", "--threads", "1", "--json")
    done = CliRunner().invoke(app, ["student", "cost", *models, *flags], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    assert "peak memory" in done.stderr
    found = json.loads(done.stdout)
    assert found["rounds"] == {"1": 12, "4": 3}
    assert (found["reference"], found["threads"], found["memory_batch"]) == ("teacher", 1, 4)
    assert found["checkpoint"] == "checkpoints/epoch-0001"
    files = {
        "teacher": tiny_teacher / "open_clip_model.safetensors",
        "student": run / "checkpoints/epoch-0001/open_clip_model.safetensors",
    }
    for name, file in files.items():
        facts = found["models"][name]["facts"]
        tensors = load_file(file)  # these models have no buffers among their weights
        assert facts["parameters"] == sum(array.size for array in tensors.values())
        assert facts["state_bytes"] == sum(array.nbytes for array in tensors.values())
        assert facts["weights_bytes"] == file.stat().st_size
        memory = found["models"][name]["memory"]
        assert memory["imported_bytes"] <= memory["loaded_bytes"] <= memory["peak_bytes"]
        assert memory["encoding_bytes"] == memory["encoding_peak_bytes"] - memory["imported_bytes"] > 0
        for tower in ("images", "texts"):
            timings = found["models"][name][tower]
            assert {batch: len(timing["seconds"]) for batch, timing in timings.items()} == {"1": 12, "4": 3}
            assert timings["4"]["per_second"] == pytest.approx(4 / np.median(timings["4"]["seconds"]))
    for tower in ("images", "texts"):
        for batch in ("1", "4"):
            theirs, ours = (np.array(found["models"][name][tower][batch]["seconds"]) for name in files)
            assert found["speed"]["student"][tower][batch]["median"] == pytest.approx(np.median(theirs / ours))
    # one layer of two: 17 tokens of 32 channels, 2 x (12 w^2 a token and 2 products of attention)
    layer = 2 * (17 * 12 * 32**2 + 2 * 17**2 * 32)
    flops = [found["models"][name]["facts"]["flops"]["image"] for name in files]
    assert flops[0] - flops[1] == layer + 2 * 32 * (16 - 12)  # and a projection to 12 channels, not 16

    result = CostResult.model_validate(found)
    text = shown(result)
    assert f"{result.models['student'].facts.parameters:,}" in text
    ratio = result.speed["student"].images[4]
    assert f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})" in text
    assert "4 captions, p50 / p95 ms" in text


def shown(result: CostResult) -> str:
    return "\n".join(cost_table(result).lines(None))


class Recorded:
    """A model that records its calls."""

    def __init__(self, name: str, calls: list[tuple[str, str, int]]) -> None:
        self._name, self._calls = name, calls

    def images(self, batch: int) -> Callable[[], object]:
        return lambda: self._calls.append((self._name, "images", batch))

    def texts(self, batch: int) -> Callable[[], object]:
        return lambda: self._calls.append((self._name, "texts", batch))


def test_any_number_of_models_are_timed_in_turns() -> None:
    calls: list[tuple[str, str, int]] = []
    stages: list[tuple[str, int, int]] = []
    names = ("student", "teacher", "onnx fp32", "onnx int8")
    models = {name: MeasuredModel(Recorded(name, calls)) for name in names}
    models["onnx int8"] = MeasuredModel(Recorded("onnx int8", calls), facts=ModelFacts(weights_bytes=5 * MB))
    result = measure_cost(models, batches=(1, 32), rounds=5, progress=lambda *stage: stages.append(stage))
    # each group of four calls is a round of one tower at one batch, and holds every model once
    rounds = [calls[start : start + 4] for start in range(0, len(calls), 4)]
    assert [len({name for name, *_ in each}) for each in rounds] == [4] * len(rounds)
    assert all(len({(tower, batch) for _, tower, batch in each}) == 1 for each in rounds)
    assert len(rounds) == 2 * (20 + 5 + 2 * 2)  # and two for warming up, at each tower and batch
    assert list(result.models) == list(models)
    assert set(result.speed) == {"teacher", "onnx fp32", "onnx int8"}
    assert stages[-1] == ("texts by 32", 5, 5)
    text = shown(result)
    assert "weights on disk, MB" in text
    assert "parameters" not in text  # known of none of them


def test_what_is_timed_is_the_model(run: Path, tiny_teacher: Path) -> None:
    """The calls embed what open_clip would, captions without their padding included."""
    folder = run / "checkpoints/epoch-0001"
    models = {
        tiny_teacher: load_teacher_model(f"local-dir:{tiny_teacher}", device="cpu"),
        folder: load_student_model(str(folder), "cpu"),
    }
    for path, measured in models.items():
        model = open_clip.create_model(f"local-dir:{path}").eval()
        tokenizer = open_clip.get_tokenizer(f"local-dir:{path}", context_length=16)
        pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            image = model.encode_image(pixels, normalize=True)
            text = model.encode_text(tokenizer(captions(34)), normalize=True)
        torch.testing.assert_close(measured.images(3)(), image, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(measured.texts(34)(), text, rtol=1e-4, atol=1e-5)


def test_captions_have_usual_lengths() -> None:
    lengths = open_clip.tokenize(list(CAPTIONS)).argmax(dim=1) + 1  # up to the end-of-text token
    assert lengths[0] == 14  # the one that is encoded alone; Flickr8k's median
    assert 12 <= float(lengths.float().mean()) <= 15
    assert lengths.max() == 22  # Flickr8k: half of all batches of 32 have a longer one than 24, half a shorter one
    assert len(set(CAPTIONS)) == len(CAPTIONS) == 32
    assert captions(33)[-1] == CAPTIONS[0]


def test_flops_of_captions_with_and_without_padding(tmp_path: Path) -> None:
    text_cfg = {**TINY_MODEL["text_cfg"], "context_length": 77}
    short, padded = (
        load_teacher_model(f"local-dir:{make_model_folder(tmp_path / name, text_cfg=text_cfg, **changes)}", None, "cpu")
        for name, changes in (("short", {}), ("padded", {"custom_text": True}))
    )
    width, layers = TINY_MODEL["text_cfg"]["width"], TINY_MODEL["text_cfg"]["layers"]
    own, full = (
        2 * layers * (tokens * 12 * width**2 + 2 * tokens**2 * width) + 2 * width * TINY_MODEL["embed_dim"]
        for tokens in (16, 77)
    )
    flops = [model.facts().flops for model in (short, padded)]
    for found, wanted in zip(flops, [(full, 77, own, 16), (full, 77, full, 77)], strict=True):
        assert isinstance(found, TowerFlops)
        assert (found.text, found.text_tokens, found.caption, found.caption_tokens) == wanted


def probe(**arguments: Any) -> Any:
    return measure_peak_memory(
        ProbeRequest(loader="tests.pipeline.evaluate.memory_models:load", arguments=arguments, batch=4)
    )


def test_peak_memory_is_that_of_the_model_alone() -> None:
    """Neither what loading took and gave back, nor what the asking process holds or held, counts as encoding."""
    held = np.ones(600 * MB, np.uint8)  # a peak that Linux would hand on as ru_maxrss
    found = probe(kept_mb=50, image_mb=20, loading_mb=300)
    del held
    assert 125 * MB < found.encoding_bytes < 145 * MB  # 50 and 4 x 20
    assert 45 * MB < found.loaded_bytes - found.imported_bytes < 65 * MB
    assert 295 * MB < found.loading_peak_bytes - found.imported_bytes < 315 * MB
    assert found.peak_bytes == found.loading_peak_bytes
    assert found.imported_bytes < 150 * MB  # no torch
    assert found.cuda_peak_bytes is None


def test_a_folder_called_pipeline_where_the_user_is_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("raise RuntimeError('somebody else')")
    monkeypatch.chdir(tmp_path)
    assert probe(kept_mb=1, image_mb=1, loading_mb=1).peak_bytes > 0


def test_a_probe_that_fails_says_why() -> None:
    with pytest.raises(ChildProcessError, match=r"memory_models:refused: .* ended with 1: ValueError: nothing here"):
        measure_peak_memory(ProbeRequest(loader="tests.pipeline.evaluate.memory_models:refused"))
    with pytest.raises(ChildProcessError, match=r"ended with -9: it said nothing.* measure smaller batches"):
        measure_peak_memory(ProbeRequest(loader="tests.pipeline.evaluate.memory_models:killed"))


def test_what_cannot_be_measured(tmp_path: Path, run: Path) -> None:
    with pytest.raises(UsageError, match="nothing to measure: give --run, --teacher or both"):
        cost(CostConfig())
    with pytest.raises(UsageError, match="no: no run here"):
        cost(CostConfig(run=str(tmp_path / "no")))
    with pytest.raises(UsageError, match="no best checkpoint"):
        cost(CostConfig(run=str(run), checkpoint="best"))
    for batch, message in (
        ("0,4", "batch sizes must be 1 or more, not 0,4"),
        ("1 32", "'1 32' is not a whole number"),
    ):
        with pytest.raises(UsageError, match=message):
            load_config(CostConfig, "cost", None, {"batch": batch})
    assert load_config(CostConfig, "cost", None, {"batch": "32,1,32"}).batch == (1, 32)


def test_threads_are_given_back(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def measure(*arguments: Any, **settings: Any) -> None:
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    before = torch.get_num_threads()
    monkeypatch.setattr("teacher_cache.pipeline.evaluate.cost.measure.measure_cost", measure)
    with pytest.raises(KeyboardInterrupt):
        cost(CostConfig(teacher=f"local-dir:{tiny_teacher}", device="cpu", threads=before + 1))
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_measuring_needs_no_torch() -> None:
    """So that a deployed student's memory can be measured without it."""
    code = "import sys, teacher_cache.pipeline.evaluate.cost.measure, teacher_cache.pipeline.evaluate.cost.peak_memory; sys.exit('torch' in sys.modules)"  # noqa: E501
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
