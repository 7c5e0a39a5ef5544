"""Captions of several kinds: from a dataset to a cache, to the draws of a run and to an evaluation."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from scipy.stats import chisquare

from teacher_cache.pipeline.cli.app import app
from teacher_cache.pipeline.data.batches.pairs import CaptionDraw, PairOrder
from teacher_cache.pipeline.data.torch_datasets.streamed_targets import StreamedTargets
from teacher_cache.pipeline.data.torch_datasets.target_dataset import TargetDataset
from teacher_cache.pipeline.evaluate.retrieval import evaluate
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.run_file import load_config
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheMismatchError, UsageError
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.several.joined_caches import join_caches
from tests.conftest import cache_digest, write_photos
from tests.pipeline.train.train_work import make_student, measure, trace, train_config

IMAGES, BARE = 40, 5  # every fifth image has no synthetic caption
MIXED = {"real": 0.7, "synthetic": 0.3}


@pytest.fixture(scope="module")
def made(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ``plain.cache``, without kinds, and of ``kinds.cache`` and two parts, which copy its rows."""
    folder = tmp_path_factory.mktemp("kinds")
    write_photos(folder / "photos", IMAGES)
    with (folder / "pairs.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("path", "caption", "source", "split"))
        for number in range(IMAGES):
            place, split = f"photos/images/{number:04d}.jpg", "train" if number < 32 else "test"
            table.writerow((place, f"picture {number}", "real", split))
            for way in range(2 if number % BARE else 0):
                table.writerow((place, f"a rendering {way} of {number}", "synthetic", split))
    make(folder, tiny_teacher, "plain")
    make(folder, tiny_teacher, "kinds", "?kind=source", reuse=f"{folder}/plain.cache")
    for part in (1, 2):
        make(folder, tiny_teacher, f"part-{part}", f"?kind=source&part={part}/2", reuse=f"{folder}/plain.cache")
    return folder


def make(folder: Path, teacher: Path, name: str, settings: str = "", **changes: Any) -> Any:
    config = {"batch_size": 8, "chunk_rows": 8, "device": "cpu", **changes}
    config = {"dataset": f"table:{folder}/pairs.csv{settings}", "cache": f"{folder}/{name}.cache", **config}
    return precompute(PrecomputeConfig(teacher=f"local-dir:{teacher}", **config))


@pytest.fixture
def reader(made: Path) -> EmbeddingReader:
    return EmbeddingReader(f"{made}/kinds.cache")


def kinds_of(reader: EmbeddingReader, rows: Any) -> list[str]:
    kinds: list[str] = reader.captions["kind"].take(np.ravel(rows)).to_pylist()
    return kinds


def said(*words: object) -> str:
    done = CliRunner().invoke(app, [*map(str, words)], prog_name="teacher-cache")
    assert done.exit_code == 0, done.output
    return done.stdout


def test_kinds_are_part_of_the_identity_and_cost_no_row(made: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    plain, kinds = (EmbeddingReader(f"{made}/{name}.cache") for name in ("plain", "kinds"))
    assert plain.captions.column_names == ["row", "image_row", "text"]
    assert "caption_kinds" not in (made / "plain.cache" / "manifest.json").read_text()
    assert kinds.captions.drop_columns("kind").equals(plain.captions)
    assert kinds.identity.dataset.caption_kinds == {"real": 40, "synthetic": 64}
    assert [difference.field for difference in plain.identity.differences(kinds.identity)] == [
        "dataset.caption_kinds",
        "dataset.captions_sha256",
    ]
    targets = [cache_digest(made / f"{name}.cache" / "targets.zarr") for name in ("plain", "kinds")]
    assert targets[0] == targets[1]
    assert verify_cache(f"{made}/kinds.cache").ok
    with pytest.raises(CacheMismatchError, match=r"order or of other kinds"):
        make(made, tiny_teacher, "kinds")
    int8 = {"dtype": "int8", "cache": f"{tmp_path}/old.cache"}
    settings = {"teacher": f"local-dir:{tiny_teacher}", "batch_size": 8, "chunk_rows": 8, "device": "cpu", **int8}
    dataset = f"table:{made}/pairs.csv"
    precompute(PrecomputeConfig(dataset=dataset, **settings))
    settings |= {"reuse": settings["cache"], "cache": f"{tmp_path}/new.cache"}
    assert precompute(PrecomputeConfig(dataset=f"{dataset}?kind=source", **settings)).rows_reused == {
        "image": 40,
        "text": 104,
    }


def test_without_weights_the_stream_is_that_of_a_cache_without_kinds(made: Path) -> None:
    def stream(cache: str) -> list[list[Any]]:
        reader = EmbeddingReader(f"{made}/{cache}")
        order = PairOrder(reader, reader.row_set("train"), 8, 2, seed=4, captions_per_image=2)
        return [[batch.image_rows.tolist(), batch.caption_rows.tolist()] for batch in order.epoch(3)]

    assert stream("plain.cache") == stream("kinds.cache") == stream("part-*.cache")


def test_draws_have_the_weights_and_are_even_within_a_kind(reader: EmbeddingReader) -> None:
    """Chi-square on 20,000 draws of one image with all kinds; the same without a kind that an image lacks."""
    draws = np.random.default_rng(0).random(20_000)
    rows = CaptionDraw(reader, 1, {"synthetic": 3, "real": 7}).rows(np.full(20_000, 7), draws)
    counts = np.unique(rows, return_counts=True)[1]
    assert chisquare(counts, [14_000, 3_000, 3_000]).pvalue > 0.01
    assert set(kinds_of(reader, CaptionDraw(reader, 1, MIXED).rows(np.full(500, BARE), draws[:500]))) == {"real"}


@pytest.mark.parametrize("draw", [0.0, np.nextafter(0.7, 0), 0.7, np.nextafter(1, 0)])
@pytest.mark.parametrize("scale", [1.0, 1e-300, 3.3])
def test_the_ends_of_a_share_stay_in_it(reader: EmbeddingReader, draw: float, scale: float) -> None:
    weights = {kind: scale * weight for kind, weight in MIXED.items()}
    images = np.arange(IMAGES)
    rows = CaptionDraw(reader, 1, weights).rows(images, np.full(IMAGES, draw))[:, 0]
    np.testing.assert_array_equal(reader.captions["image_row"].take(rows), images)


def test_every_path_draws_by_kind(made: Path, reader: EmbeddingReader) -> None:
    """A run's order, from any step and from parts; a stream; and items at random."""
    rows, weights = reader.row_set("train"), {"synthetic": 0.5, "real": 0.5}
    order = PairOrder(reader, rows, 8, 2, seed=1, captions_per_image=3, caption_kinds=weights)
    drawn = [batch.caption_rows for batch in order.epoch(1)]
    assert [batch.caption_rows.tolist() for batch in order.epoch(1, 2)] == [batch.tolist() for batch in drawn[2:]]
    for captions in np.concatenate(drawn):
        assert len(set(kinds_of(reader, captions))) == 1  # further captions are of the first one's kind
    parts = EmbeddingReader(f"{made}/part-*.cache")
    assert parts.captions.equals(reader.captions)
    again = PairOrder(parts, parts.row_set("train"), 8, 2, seed=1, captions_per_image=3, caption_kinds=weights)
    assert [batch.caption_rows.tolist() for batch in again.epoch(1)] == [batch.tolist() for batch in drawn]

    synthetic = [row for row in rows.numbers() if row % BARE]
    targets = TargetDataset(reader, rows=synthetic, caption_kinds={"synthetic": 1}, captions=2, resident=False)
    stream = StreamedTargets(targets, 8)
    assert set(kinds_of(reader, np.concatenate([batch["caption"] for batch in stream]))) == {"synthetic"}
    assert set(
        kinds_of(reader, targets.at(reader.lookup(image_sha256=[])._replace(image_rows=np.array([1, 2])))["caption"])
    ) == {"synthetic"}
    resident = TargetDataset(reader, rows=synthetic, caption_kinds={"real": 1})
    assert set(kinds_of(reader, [item["caption"].item() for item in resident.__getitems__(range(20))])) == {"real"}
    other = StreamedTargets(TargetDataset(reader, rows=synthetic, resident=False), 8)
    with pytest.raises(CacheMismatchError, match="caption_kinds"):
        other.load_state_dict(stream.state_dict())
    with pytest.raises(UsageError, match=r"1 of 1 images have no caption of kind synthetic"):
        targets.at(reader.lookup(image_sha256=[])._replace(image_rows=np.array([BARE])))


def test_a_student_learns_from_kinds_and_is_measured_on_one(made: Path, tmp_path: Path) -> None:
    student, out = make_student(tmp_path / "student.json"), tmp_path / "run"
    assignments = ["caption_kinds.real=0.7", "caption_kinds.synthetic=0.3"]
    flags = train_config(made / "kinds.cache", student, out, epochs=1).model_dump(exclude_unset=True)
    config = load_config(TrainConfig, "train", None, flags, assignments)
    assert config.caption_kinds == MIXED
    train(config)
    assert json.loads((out / "run.json").read_text())["config"]["caption_kinds"] == MIXED
    train(train_config(made / "plain.cache", student, tmp_path / "plain", epochs=1))
    assert [line["loss"] for line in trace(out)] != [line["loss"] for line in trace(tmp_path / "plain")]
    assert (measure(out).captions, measure(out, caption_kind="real").captions) == (22, 8)
    names = sorted(path.name for path in (out / "evaluations").iterdir())
    assert names == ["test-epoch-0001.json", "test-real-epoch-0001.json"]


def test_a_kind_is_measured_and_shown(made: Path) -> None:
    cache = made / "kinds.cache"
    for kind, captions in ((None, 22), ("real", 8)):
        config = EvaluateConfig(cache=str(cache), split="test", caption_kind=kind, device="cpu")
        assert evaluate(config).captions == captions
    assert "8 captions of kind real" in " ".join(said("evaluate", "--cache", cache, "--caption-kind", "real").split())
    assert "real 40, synthetic 64" in said("info", cache)
    assert json.loads(said("stats", made / "plain.cache", "--json"))["true_pairs_of"] == {}
    shown = said("stats", cache)
    assert "of synthetic captions" in shown
    said("export", cache, "--captions", "all", "--out", made / "rows")
    assert pq.read_table(made / "rows" / "metadata")["kind"].to_pylist() == kinds_of(
        EmbeddingReader(str(cache)), range(104)
    )
    assert "real 40, synthetic 64" in shown
    assert re.search(r"row 1  real: picture 1\n .* row 2  synthetic: a rendering 0 of 1\n", said("look", cache, "1"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"caption_kinds": {"reel": 1}}, r"no caption is of kind 'reel'; there are real, synthetic"),
        ({"caption_kinds": {"real": 0}}, r"greater than 0"),
        ({"caption_kinds": {"synthetic": 1}}, r"7 of 32 images have no caption of kind synthetic; .* another kind"),
        ({"caption_kinds": MIXED, "captions_per_image": 0}, "captions_per_image is 0"),
        ({"caption_kinds": MIXED, "cache": "plain.cache"}, r"kind 'real'; its dataset names no kinds. .* --reuse"),
    ],
)
def test_what_cannot_be_drawn_is_refused(made: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    cache = made / settings.pop("cache", "kinds.cache")
    with pytest.raises(ValueError, match=message):  # UsageError and pydantic's errors are
        train(train_config(cache, make_student(tmp_path / "student.json"), tmp_path / "run", **settings))


def test_only_the_kinds_that_are_drawn_must_be_in_another_teachers_cache(
    made: Path, reader: EmbeddingReader, tiny_teacher: Path
) -> None:
    lines = (made / "pairs.csv").read_text().splitlines(keepends=True)
    (made / "real.csv").write_text("".join(line for line in lines if "synthetic" not in line))
    make(made, tiny_teacher, "real", reuse=f"{made}/plain.cache", dataset=f"table:{made}/real.csv")
    other, rows = EmbeddingReader(f"{made}/real.cache"), reader.row_set("train")
    (joined,) = join_caches(reader, [other], rows, ["real"])
    pairs = next(PairOrder(reader, rows, 8, 1, seed=0, caption_kinds={"real": 1}).epoch(0))
    rows_there = joined.captions[pairs.caption_rows[:, 0]]
    assert reader.captions["text"].take(pairs.caption_rows[:, 0]).equals(other.captions["text"].take(rows_there))
    for kinds in (["synthetic"], ["real", "synthetic"], [None]):
        with pytest.raises(UsageError, match=r"of 25 others a caption is missing; .* caption 'a rendering 0 of 1'"):
            join_caches(reader, [other], rows, kinds)


def test_what_cannot_be_measured_or_joined_is_refused(made: Path, tmp_path: Path) -> None:
    for kind, message in (("reel", "there are real, synthetic"), ("synthetic", "1 of 8 images have no caption of")):
        with pytest.raises(UsageError, match=message):
            evaluate(EvaluateConfig(cache=f"{made}/kinds.cache", split="test", caption_kind=kind, device="cpu"))
    for name in ("plain", "part-1"):
        (tmp_path / f"{name}.cache").symlink_to(made / f"{name}.cache")
    with pytest.raises(UsageError, match="caption_kinds draws captions, and captions is 0"):
        TargetDataset(f"{made}/kinds.cache", captions=0, caption_kinds=MIXED)
    with pytest.raises(CacheMismatchError, match=r"only the captions of .*part-1.cache have kinds"):
        EmbeddingReader(f"{tmp_path}/*.cache")
