"""``deploy`` as its user runs it: a trained run in, a folder of proven files and one table out, or nothing at all."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from teacher_cache.pipeline.cli import deploy as cli_deploy
from teacher_cache.pipeline.data.batches.stored_images import CachedImages
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images.decode import decode_image
from teacher_cache.pipeline.data.images.model_input import ModelInput
from teacher_cache.pipeline.deploy import run as deploy_files
from teacher_cache.pipeline.deploy.card import model_card
from teacher_cache.pipeline.deploy.gates import require_recall
from teacher_cache.pipeline.deploy.record import Deployment, DeploymentError
from teacher_cache.pipeline.deploy.run import DeployResult, calibration_batches, deploy
from teacher_cache.pipeline.deploy.runtime import StudentRuntime
from teacher_cache.pipeline.deploy.table import StudentTable, describe, to_markdown
from teacher_cache.pipeline.evaluate.cost.latency import Ratio
from teacher_cache.pipeline.evaluate.cost.results import SpeedRatios
from teacher_cache.pipeline.evaluate.recall import RetrievalRanks
from teacher_cache.pipeline.evaluate.retrieval import evaluate
from teacher_cache.pipeline.evaluate.split import open_split
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import CHECKPOINT_WEIGHTS, AveragedRun
from teacher_cache.pipeline.models.student import load_student
from teacher_cache.pipeline.settings.deploy import DeployConfig
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.errors import UsageError
from tests.conftest import make_model_folder
from tests.pipeline.cli.test_cli import run
from tests.pipeline.train.train_work import make_cache, make_student, train_config, train_on_images

RATIO = Ratio(median=9, low=8, high=10, rounds=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A run of two epochs, of another width than its teacher, its token embedding factorised; its cache beside it."""
    folder = tmp_path_factory.mktemp("trained")
    cache = make_cache(folder, tiny_teacher)
    student = make_student(folder / "small.json")
    student.write_text(json.dumps({**json.loads(student.read_text()), "token_embedding_rank": 8}))
    train(train_config(cache, student, folder / "run"))
    return folder / "run"


def settings(trained: Path, teacher: Path, out: Path, **changes: Any) -> DeployConfig:
    fixed = {"rounds": 2, "threads": 1, "calibration_images": 8, "max_recall_loss": 100.0}
    return DeployConfig(run=str(trained), out=str(out), teacher=f"local-dir:{teacher}", **{**fixed, **changes})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of five pictures each, and a strip that no model can use."""
    root = tmp_path_factory.mktemp("pictures")
    for name, colour in (("red", (200, 30, 30)), ("green", (30, 200, 30)), ("blue", (30, 30, 200))):
        (root / name).mkdir()
        for number in range(5):
            rng = np.random.default_rng([number, *colour])
            pixels = rng.integers(0, 55, (40, 50, 3)) + np.array(colour)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    Image.new("RGB", (1, 200_000)).save(root / "red" / "strip.png")
    return root


@pytest.fixture(scope="module")
def deployed(
    trained: Path, tiny_teacher: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, DeployResult]:
    out = tmp_path_factory.mktemp("out") / "student"
    return out, deploy(settings(trained, tiny_teacher, out, zero_shot=f"imagefolder:{pictures}", web=True))


def test_every_file_is_there_and_is_the_one_in_the_record(deployed: tuple[Path, DeployResult]) -> None:
    out, result = deployed
    record = Deployment.read(out)
    assert record == result.deployment
    for artefact in record.artefacts():
        assert len(record.proven(out, artefact)) == artefact.bytes
    files = {path.name for path in out.iterdir()}
    named = {artefact.file for artefact in record.artefacts()}
    tables = {"table.json", "table.md", "table.png"}
    assert files == named | tables | {"deploy.json", "open_clip_config.json", "README.md", "web"}
    assert {"text_model.onnx", "vision_model.onnx"} <= {path.name for path in (out / "web" / "onnx").iterdir()}
    assert not list(out.parent.glob(".partial-*"))


def test_anybody_loads_it_by_open_clip_and_gets_the_student(
    deployed: tuple[Path, DeployResult], pictures: Path
) -> None:
    out, _ = deployed
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{out}")
    image = Image.open(pictures / "red" / "0.png")
    texts = ["a photo of something red", "blue"]
    with torch.inference_mode():
        wanted_image = F.normalize(model.eval().encode_image(preprocess(image)[None]), dim=-1).numpy()
        wanted_text = F.normalize(model.encode_text(tokenizer(texts)), dim=-1).numpy()
    runtime = StudentRuntime(out)
    np.testing.assert_allclose(runtime.embed_images([image]), wanted_image, atol=1e-5)
    np.testing.assert_allclose(runtime.embed_texts(texts), wanted_text, atol=1e-5)


def test_the_recalls_are_those_of_evaluate(deployed: tuple[Path, DeployResult], trained: Path) -> None:
    _, result = deployed
    measured = evaluate(EvaluateConfig(run=str(trained), device="cpu", workers=0))
    teacher, student, onnx = result.table.rows[:3]
    assert teacher.recalls == measured.teacher
    assert student.recalls == measured.student
    # equal but for a near-tie that another runtime may break otherwise
    for direction, recalls in onnx.recalls.items():
        for name, value in recalls.items():
            assert value == pytest.approx(student.recalls[direction][name], abs=13)


def test_the_table_is_whole(deployed: tuple[Path, DeployResult]) -> None:
    out, result = deployed
    table = result.table
    assert StudentTable.model_validate_json((out / "table.json").read_bytes()) == table
    assert [row.name for row in table.rows] == ["teacher fp32", "student fp32", "ONNX fp32", "ONNX int8"]
    for row in table.rows:
        assert row.bytes > 0
        assert set(row.cost.images) == set(row.cost.texts) == {1, 32}
        assert row.cost.memory is not None
        assert row.zero_shot is not None
        assert 0 <= row.zero_shot["top-1"] <= 100
    for row in table.rows[1:]:
        assert row.speed is not None
        assert row.retention is not None
        kept = row.retention.mean
        assert kept.interval is not None
        assert kept.share is not None
        assert kept.interval.low <= kept.share <= kept.interval.high
    for row in table.rows[2:]:
        assert row.cosine is not None
    # the process that measures the ONNX files has no torch in it, or this would not hold by far
    teacher, _, onnx = (row.cost.memory for row in table.rows[:3])
    assert onnx.peak_bytes < 0.7 * teacher.peak_bytes  # type: ignore[union-attr]
    assert table.rows[2].cosine["image"].least > 0.99999  # type: ignore[index]
    int8 = table.rows[3]
    assert int8.int8_share is not None
    assert int8.int8_share > 0.5
    assert int8.bytes < 0.5 * table.rows[2].bytes
    markdown = (out / "table.md").read_text()
    assert (table.zero_shot_images, table.zero_shot_classes, table.zero_shot_lost) == (15, 3, 1)
    assert "Left out: 1 of its images" in markdown
    # open_clip's file has the product of the factors, the student and its towers the factors
    assert table.rows[1].bytes < 0.5 * result.deployment.weights.bytes
    assert table.rows[2].bytes == pytest.approx(table.rows[1].bytes, rel=0.1)
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    # of 8 images, any one of 10 is found by chance
    assert lines[0].startswith("| model | retention (95 %) | mean recall (chance ")
    assert "| t2i R@1 (chance 12.5) | t2i R@5 (chance 62.5) | t2i R@10 (chance 100.0) |" in lines[0]
    assert "zero-shot top-1 (chance 33.3)" in lines[0]
    assert markdown in (out / "README.md").read_text()
    with Image.open(out / "table.png") as picture:
        assert picture.width > 1000


@pytest.mark.parametrize(
    ("low", "high", "shown"), [(1.0, 3.0, "| 2.00 (1.00 to 3.00) |"), (1.34, 24.54, "| not measurable |")]
)
def test_a_speed_that_varies_threefold_is_not_measurable(
    deployed: tuple[Path, DeployResult], low: float, high: float, shown: str
) -> None:
    table = deployed[1].table
    varying = RATIO.model_copy(update={"median": 2.0, "low": low, "high": high})
    speed = SpeedRatios(**{tower: {1: varying, 32: RATIO} for tower in ("images", "texts")})
    rows = tuple(row.model_copy(update={"speed": row.speed and speed}) for row in table.rows)
    lines = to_markdown(table.model_copy(update={"rows": rows})).splitlines()
    assert "| images by 1, x teacher |" in lines[0]
    assert [line.count(shown) for line in lines if line.startswith(("| student", "| ONNX"))] == [2, 2, 2]


@pytest.mark.parametrize("learned", [0, 3])
def test_a_table_of_learned_images_says_so(deployed: tuple[Path, DeployResult], learned: int) -> None:
    table = deployed[1].table
    assert table.learned_images == 0
    said = describe(table.model_copy(update={"learned_images": learned}))
    of = f"these {table.images} images"
    assert (f"The student learned from 3 of {of}, so that recall and retention say little" in said) == bool(learned)


def test_it_says_nothing_of_where_it_was_made(
    deployed: tuple[Path, DeployResult], trained: Path, pictures: Path
) -> None:
    out, _ = deployed
    for path in filter(Path.is_file, out.rglob("*")):
        for place in (out.parent, trained.parent, pictures):
            assert str(place).encode() not in path.read_bytes(), path.name


def test_the_card_says_how_and_its_code_runs(
    deployed: tuple[Path, DeployResult], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = deployed
    card = (out / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(out.parent)
    Image.open(pictures / "red" / "0.png").convert("RGB").save(out.parent / "photo.jpg")
    for block in blocks:
        exec(block.replace("FOLDER", str(out)), {})


def test_the_card_tells_of_a_mean_and_of_a_choice(trained: Path, deployed: tuple[Path, DeployResult]) -> None:
    out, result = deployed
    runs = [
        AveragedRun(run=name, checkpoint="checkpoints/x", weights_sha256="0", config=RunFolder(trained).read().config)
        for name in ("a", "b", "c")
    ]
    assert (out / "README.md").read_text() == model_card(result.deployment, result.table, ())
    plain, mean = (model_card(result.deployment, result.table, averaged) for averaged in ((), runs))
    assert mean.replace(" Its weights are the mean of those of 3 runs that began alike.", "") == plain != mean
    chosen = result.table.model_copy(update={"chosen_on": "<b>[a|b](c)"})
    assert r", chosen on &lt;b&gt;\[a\|b](c)." in model_card(result.deployment, chosen, ())
    gate = result.table.gates[0].model_copy(update={"name": "<b>|x"})
    named = result.deployment.model_copy(update={"name": "a](b)\n<b>"})
    card = model_card(named, result.table.model_copy(update={"gates": (gate,)}), ())
    assert "# a](b) &lt;b&gt;\n" in card
    assert r"| &lt;b&gt;\|x |" in card
    assert "a](b)" not in card.replace("# a](b)", "")


def test_a_damaged_tower_ships_nothing_and_says_by_how_much(
    trained: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx
    from onnx import numpy_helper

    export = deploy_files.export_towers

    def wrong(student: Any, folder: Path) -> Any:
        towers = export(student, folder)
        model = onnx.load(towers.image)
        weight = max(model.graph.initializer, key=lambda each: len(each.raw_data))
        values = numpy_helper.to_array(weight).copy()
        values *= np.random.default_rng(0).uniform(0.8, 1.2, values.shape).astype(np.float32)
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
        onnx.save(model, towers.image)
        return towers

    monkeypatch.setattr(deploy_files, "export_towers", wrong)
    with pytest.raises(DeploymentError, match=r"image\.onnx: .*least cosine.*below the required"):
        deploy(settings(trained, tiny_teacher, tmp_path / "out", int8=False))
    assert not list(tmp_path.iterdir())


def test_a_student_of_images_alone_is_measured_on_another_cache_and_fitted_to_its_own_images(
    trained: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train_on_images(trained.parent, tiny_teacher)
    with pytest.raises(UsageError, match=r"40 of 40 images have no caption\. .*name a --cache[^?]*$"):
        deploy(settings(run, tiny_teacher, tmp_path / "out"))
    fitted: list[np.ndarray] = []

    def prepared(images: CachedImages, rows: np.ndarray, preprocess: dict[str, Any]) -> Any:
        fitted.append(rows)
        return calibration_batches(images, rows, preprocess)

    monkeypatch.setattr(deploy_files, "calibration_batches", prepared)
    cache = str(trained.parent / "photos.cache")
    made = deploy(settings(run, tiny_teacher, tmp_path / "out", cache=cache, split="test"))
    assert (made.table.images, made.table.learned_images) == (8, 8)
    assert fitted[0].tolist() == np.linspace(0, 39, 8).round().astype(int).tolist()
    assert made.deployment.cache_manifest_digest == RunFolder(run).read().cache_manifest_digest


def test_int8_is_fitted_to_the_pixels_of_its_rows(trained: Path) -> None:
    split = open_split(EvaluateConfig(run=str(trained), split="test"))
    rows = split.reader.image_rows("train")[:8]
    preprocess = load_student(RunFolder(trained).checkpoint_path("last"))[0].preprocess.to_config()
    stored = CachedImages(split.reader, ImageSource(split.image_root), rows.tolist())
    (batch,) = calibration_batches(stored, rows, preprocess)()
    seen = ModelInput.from_config(preprocess)
    np.testing.assert_array_equal(batch, np.stack([seen.pixels(decode_image(stored.read(int(row)))) for row in rows]))


@pytest.mark.parametrize(("weight", "least", "most"), [("visual.proj", 0.8, 1.2), ("text_projection", np.nan, np.nan)])
def test_weights_that_are_not_the_student_ship_nothing(
    weight: str,
    least: float,
    most: float,
    trained: Path,
    tiny_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def another(source: Path, target: Path) -> None:
        state = load_file(source)
        state[weight] = state[weight] * torch.linspace(least, most, len(state[weight]))[:, None]
        save_file(state, target)

    monkeypatch.setattr(deploy_files.shutil, "copyfile", another)
    with pytest.raises(DeploymentError, match=r"open_clip_model\.safetensors in open_clip"):
        deploy(settings(trained, tiny_teacher, tmp_path / "out", int8=False))
    assert not list(tmp_path.iterdir())


def test_weights_that_are_no_numbers_are_named_and_ship_nothing(
    trained: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "run"
    shutil.copytree(trained, broken)
    weights = RunFolder(str(broken)).checkpoint_path("last") / CHECKPOINT_WEIGHTS
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, weights)
    with pytest.raises(DeploymentError, match=f"NaN or infinite weights, .*{re.escape(name.split('.')[-1])}"):
        deploy(settings(broken, tiny_teacher, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_int8_that_loses_too_much_is_refused_by_how_much(
    trained: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = deploy_files.quantize_tower

    def crippled(fp32: Path, out: Path, *rest: Any) -> Any:
        import onnx
        from onnx import numpy_helper

        report = quantize(fp32, out, *rest)
        model = onnx.load(out)
        for weight in model.graph.initializer:
            if weight.data_type == onnx.TensorProto.INT8 and len(weight.dims) == 2:
                values = numpy_helper.to_array(weight)
                weight.CopyFrom(numpy_helper.from_array(np.roll(values, 3, axis=-1), weight.name))
        onnx.save(model, out)
        return report

    monkeypatch.setattr(deploy_files, "quantize_tower", crippled)
    with pytest.raises(DeploymentError, match=r"lost, \d+\.\d\d points; at most 0 points may be\. "):
        deploy(settings(trained, tiny_teacher, tmp_path / "out", max_recall_loss=0.0))
    assert not list(tmp_path.iterdir())


def hit(queries: int, hits: int) -> np.ndarray:
    """Ranks: the first ``hits`` queries find theirs first, the others find nothing."""
    return np.where(np.arange(queries) < hits, 1, 0).astype(np.int32)


@pytest.mark.parametrize(
    ("queries", "lost", "most", "wanted"),
    [
        (20, 0, 1.0, "<= 1 or one of 20 captions"),
        (20, 1, 1.0, "<= 1 or one of 20 captions"),  # 5 points are one query
        (1000, 10, 1.0, "<= 1 or one of 1,000 captions"),
        (20, 2, 10.0, "<= 10 or one of 20 captions"),
        (20, 0, 0.0, "<= 0"),
    ],
)
def test_int8_may_lose_a_point_or_a_query(queries: int, lost: int, most: float, wanted: str) -> None:
    fp32 = RetrievalRanks(hit(queries, queries), hit(queries, queries), 10)
    gate = require_recall("int8", RetrievalRanks(fp32.i2t, hit(queries, queries - lost), 10), fp32, most)
    assert gate.found == pytest.approx(100 * lost / queries)
    assert gate.wanted == (wanted if lost else wanted.replace("captions", "images"))


@pytest.mark.parametrize(
    ("queries", "lost", "most", "message"),
    [
        (20, 2, 1.0, "2 of 20 captions lost, 10.00 points; at most 1 point or one of 20 captions may be. Nothing"),
        (1000, 11, 1.0, "11 of 1,000 captions lost, 1.10 points; at most 1 point or one of 1,000 captions may be. No"),
        (20, 1, 0.0, "1 of 20 captions lost, 5.00 points; at most 0 points may be. Nothing was deployed. "),
    ],
)
def test_int8_that_loses_more_is_refused_in_queries(queries: int, lost: int, most: float, message: str) -> None:
    fp32 = RetrievalRanks(hit(queries, queries), hit(queries, queries), 10)
    with pytest.raises(DeploymentError) as refused:
        require_recall("int8", RetrievalRanks(fp32.i2t, hit(queries, queries - lost), 10), fp32, most)
    share = 100 * (queries - lost) / queries
    assert str(refused.value).startswith(f"int8: t2i R@1 is {share:.2f}, and 100.00 in fp32: {message}")


def test_what_cannot_be_int8_is_said_and_not_shipped(
    trained: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = deploy_files.quantize_tower

    def images_only(fp32: Path, out: Path, *rest: Any) -> Any:
        if fp32.name == "text.onnx":
            out.write_bytes(b"half done")
            raise deploy_files.NotQuantisable("text.onnx: too little of it is int8")
        return quantize(fp32, out, *rest)

    monkeypatch.setattr(deploy_files, "quantize_tower", images_only)
    result = deploy(settings(trained, tiny_teacher, tmp_path / "out"))
    assert not (tmp_path / "out" / "text.int8.onnx").exists()
    assert result.deployment.not_quantised == {"text": "text.onnx: too little of it is int8"}
    assert result.table.rows[-1].name == "ONNX int8 image, fp32 text"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "too little of it is int8" in card
    assert 'variant="fp32"' in card  # the one that has both towers
    with pytest.raises(UsageError, match="too little of it is int8"):
        StudentRuntime(tmp_path / "out", "int8").embed_texts(["a"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": "there"}, "is there already"),
        ({"teacher": "local-dir:other"}, "weights_sha256"),
        ({"teacher": None}, "--teacher local-dir:PATH"),
        ({"split": "nowhere"}, "nowhere"),
        ({"run": "nothing"}, "no run here"),
        ({"run": "begun"}, "1 of 2 epochs are trained. Finish it by teacher-cache train --resume"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    changes: dict[str, Any],
    message: str,
    trained: Path,
    tiny_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("teacher_cache.pipeline.deploy.run.write_files", None)  # would be called in vain
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    make_model_folder(tmp_path / "other", seed=5)
    record = json.loads((shutil.copytree(trained, tmp_path / "begun") / "run.json").read_text())
    del record["epochs"][1:]
    (tmp_path / "begun" / "run.json").write_text(json.dumps(record))
    config = settings(trained, tiny_teacher, tmp_path / "out").model_copy(update=changes)
    with pytest.raises(Exception, match=message):
        deploy(config)


def test_the_command_says_all_of_it(trained: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    done = run(
        *("deploy", "--run", str(trained), "--out", "out", "--teacher", f"local-dir:{tiny_teacher}"),
        *("--rounds", "1", "--no-int8", "--json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["table"] == json.loads((tmp_path / "out" / "table.json").read_bytes())
    again = run("deploy", "--run", str(trained), "--out", "out", cwd=tmp_path)
    assert again.returncode == 2
    assert "is there already" in again.stderr


@pytest.mark.parametrize(
    ("missing", "flags", "install"),
    [("onnxscript", (), r"\[deploy\]"), ("openvino", ("--openvino",), "install openvino$")],
)
def test_a_missing_package_is_named_before_torch_is_loaded(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
    flags: tuple[str, ...],
    install: str,
) -> None:
    monkeypatch.setattr(
        "teacher_cache.pipeline.deploy.record.find_spec", lambda name: None if name == missing else object()
    )
    with pytest.raises(UsageError, match=f"deploy needs {missing}, .*{install}"):
        cli_deploy.deploy.main(["--run", str(trained), "--out", str(tmp_path / "out"), *flags], standalone_mode=False)
