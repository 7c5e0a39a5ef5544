"""A split as the thing to measure on, and what evaluate writes of each query: ranks by an independent computation."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from teacher_cache.pipeline.evaluate.intervals import bootstrap_recalls, bootstrap_share
from teacher_cache.pipeline.evaluate.recall import recall_of_ranks
from teacher_cache.pipeline.evaluate.retrieval import RANK_DEPTH, EvaluateResult, evaluate, measure, student_ranks
from teacher_cache.pipeline.evaluate.split import BytesEncoder, CachedTeacher, default_split, embed, open_split
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.errors import CacheMismatchError, UsageError
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import make_model_folder, write_photos
from tests.pipeline.cli.test_cli import run
from tests.pipeline.train.train_work import make_student, train_config

TEST_IMAGES = 64
BROKEN = 300  # one of the test images cannot be decoded


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 320 photographs, the last 64 for testing and one of these broken, and a student's run."""
    home = tmp_path_factory.mktemp("ranks")
    write_photos(home / "photos", 320)
    image = home / "photos" / "images" / f"{BROKEN:04d}.jpg"
    image.write_bytes(image.read_bytes()[:200])
    precompute(
        PrecomputeConfig(
            dataset=f"flickr:{home / 'photos'}",
            teacher=f"local-dir:{make_model_folder(home / 'teacher')}",
            cache=str(home / "c"),
            batch_size=32,
            device="cpu",
        )
    )
    student = make_student(home / "student.json")
    train(train_config(home / "c", student, home / "run", epochs=3, batch_size=64))
    return home


def settings(home: Path, **more: Any) -> EvaluateConfig:
    return EvaluateConfig(run=str(home / "run"), split="test", workers=0, device="cpu", **more)


@pytest.fixture(scope="module")
def measured(home: Path) -> EvaluateResult:
    return evaluate(settings(home, ranks=str(home / "out" / "ranks.parquet")))


def student_rows(home: Path, names: list[str], texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """By open_clip alone, from the checkpoint's folder."""
    folder = f"local-dir:{RunFolder(str(home / 'run')).checkpoint_path()}"
    model, _, transform = open_clip.create_model_and_transforms(folder)
    model.eval()
    pixels = torch.stack([transform(Image.open(home / "photos" / "images" / name)) for name in names])
    with torch.no_grad():
        image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(folder, context_length=16)(texts), normalize=True)
    return image.numpy(), text.numpy()


def naive_ranks(queries: np.ndarray, gallery: np.ndarray, positive: np.ndarray) -> list[int | None]:
    """1 + how many rows come before the best positive; None beyond the depth."""
    found: list[int | None] = []
    for query, wanted in zip(queries.astype(np.float64), positive, strict=True):
        scores = [float((query * row).sum()) for row in gallery.astype(np.float64)]
        best = min(np.flatnonzero(wanted), key=lambda row: (-scores[row], row))
        rank = 1 + sum((-score, row) < (-scores[best], best) for row, score in enumerate(scores))
        found.append(rank if rank <= RANK_DEPTH else None)
    return found


def test_every_query_with_its_ranks(home: Path, measured: EvaluateResult) -> None:
    table = pq.read_table(home / "out" / "ranks.parquet")
    assert table.column_names == ["direction", "query", "sample_id", "caption", "teacher_rank", "student_rank"]
    images = TEST_IMAGES - 1
    numbers = [number for number in range(256, 320) if number != BROKEN]
    rows = table.to_pylist()
    assert [row["direction"] for row in rows] == ["i2t"] * images + ["t2i"] * 2 * images
    assert [row["query"] for row in rows] == [*range(images), *range(2 * images)]
    names = [f"{number:04d}.jpg" for number in numbers]
    assert [row["sample_id"] for row in rows] == names + [name for name in names for _ in range(2)]
    texts = [text for number in numbers for text in (f"picture {number}, of colours", f"number {number} again")]
    assert [row["caption"] for row in rows] == [None] * images + texts

    owner = np.repeat(np.arange(images), 2)
    positive = owner == np.arange(images)[:, None]
    reader = EmbeddingReader(str(home / "c"))
    kept = np.array([row for row, name in enumerate(reader.samples["sample_id"].to_pylist()) if name in set(names)])
    captions = np.flatnonzero(np.isin(reader.captions["image_row"].to_numpy(), kept))
    cached = [reader.take("image", kept), reader.take("text", captions)]
    teacher = [
        rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (part.astype(np.float32) for part in cached)
    ]
    for column, (image, text) in (("teacher_rank", teacher), ("student_rank", student_rows(home, names, texts))):
        wanted = naive_ranks(image, text, positive) + naive_ranks(text, image, positive.T)
        assert table[column].to_pylist() == wanted
        ranks = np.array([rank or 10**6 for rank in wanted])
        recalls = getattr(measured, column.removesuffix("_rank"))
        for direction, part in (("i2t", ranks[:images]), ("t2i", ranks[images:])):
            for k in (1, 5, 10):
                assert recalls[direction][f"R@{k}"] == pytest.approx(100 * (part <= k).mean())
    # an untrained teacher: some queries are found late, and with 126 captions some not within the depth
    assert None in table["teacher_rank"].to_pylist()[:images]


def test_the_file_says_of_what_it_is(home: Path, measured: EvaluateResult) -> None:
    about = pq.read_schema(home / "out" / "ranks.parquet").metadata
    assert about == {
        b"depth": b"100",
        b"split": b"test",
        b"cache": str(home / "c").encode(),
        b"cache_manifest_digest": measured.cache_manifest_digest.encode(),
        b"run": str(home / "run").encode(),
        b"checkpoint": b"checkpoints/epoch-0003",
    }
    assert measured.ranks == str(home / "out" / "ranks.parquet")


def test_without_a_student_there_is_no_column_of_its(home: Path, tmp_path: Path) -> None:
    """A column of nulls would say that it found nothing."""
    path = tmp_path / "teacher.parquet"
    result = evaluate(EvaluateConfig(cache=str(home / "c"), split="test", ranks=str(path)))
    table = pq.read_table(path)
    assert table.column_names == ["direction", "query", "sample_id", "caption", "teacher_rank"]
    assert b"run" not in table.schema.metadata
    assert (result.student_intervals, result.retention_intervals) == (None, None)


def test_on_a_cpu_a_student_keeps_the_memory_that_its_layers_free(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a convolutional student's time else; the numbers are the same, so that nothing but this would show it."""
    kept: list[str] = []
    monkeypatch.setattr(
        "teacher_cache.pipeline.models.device.keep_freed_memory", lambda device: kept.append(device.type)
    )
    evaluate(EvaluateConfig(run=str(home / "run"), split="test", workers=0, device="cpu"))
    assert kept == ["cpu"]


def test_each_tower_beside_the_teachers_other_one(home: Path, measured: EvaluateResult) -> None:
    result = evaluate(settings(home, towers=True))
    # ranked down to 10 places, not to 100: the recalls and their intervals are the same
    changed = {"seconds", "date", "ranks", "towers"}
    assert result.model_dump(exclude=changed) == measured.model_dump(exclude=changed)
    assert measured.towers is None
    split = open_split(settings(home))
    own = student_rows(home, split.sample_ids, split.captions)
    weights = load_file(RunFolder(str(home / "run")).checkpoint_path() / "projection.safetensors")
    projected = [rows @ weights[f"{name}.weight"].numpy().T for name, rows in zip(("image", "text"), own, strict=True)]
    image, text = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in projected)
    positive = split.text_image == np.arange(len(split.image_rows))[:, None]
    teacher_image, teacher_text = embed(split, CachedTeacher())
    pairs = {"image": (image, teacher_text), "text": (teacher_image, text)}
    for name, (images, captions) in pairs.items():
        tower = (result.towers or {})[name]  # type: ignore[index]
        for direction, ranks in (
            ("i2t", naive_ranks(images, captions, positive)),
            ("t2i", naive_ranks(captions, images, positive.T)),
        ):
            for k in (1, 5, 10):
                wanted = 100 * np.mean([rank is not None and rank <= k for rank in ranks])
                assert tower.recall[direction][f"R@{k}"] == pytest.approx(wanted)
                share = tower.retention[direction][f"R@{k}"]
                assert share == pytest.approx(100 * wanted / result.teacher[direction][f"R@{k}"])


def test_towers_need_a_student_whose_rows_may_stand_beside_the_teachers(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="towers of a student: give --run"):
        evaluate(EvaluateConfig(cache=str(home / "c"), split="test", towers=True))
    record = RunFolder(str(home / "run")).read().model_dump(mode="json")
    record["config"]["losses"] = {"relational": 1.0, "contrastive": 1.0, "cosine": 0.0}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    (tmp_path / "run" / "checkpoints").symlink_to(home / "run" / "checkpoints")
    with pytest.raises(UsageError, match=r"this one learned from relational, contrastive\. Train with one of"):
        evaluate(EvaluateConfig(run=str(tmp_path / "run"), split="test", towers=True))
    record["config"]["losses"] = {"cosine": 1.0}
    record["identity"]["teacher"]["weights_sha256"] = "0" * 64
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    accepted = {"accept_mismatch": ("teacher.weights_sha256",), "workers": 0, "device": "cpu"}
    with pytest.raises(UsageError, match=r"student's own teacher, and this cache differs in teacher\.weights_sha256\."):
        evaluate(EvaluateConfig(run=str(tmp_path / "run"), split="test", towers=True, **accepted))


def test_a_write_that_fails_leaves_the_old_file(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ranks.parquet"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate(EvaluateConfig(cache=str(home / "c"), split="test", ranks=str(path)))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "this is a folder; name a file in it"),
        ("taken.txt/ranks.parquet", "taken.txt is no folder"),
        ("ranks.csv", "let its name end in .parquet"),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_anything_is_measured(
    home: Path, tmp_path: Path, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken.txt").write_text("a file")
    monkeypatch.setattr(
        "teacher_cache.pipeline.evaluate.retrieval.open_split", lambda config: pytest.fail("measured already")
    )
    with pytest.raises(UsageError, match=message):
        evaluate(EvaluateConfig(cache=str(home / "c"), split="test", ranks=str(tmp_path / name)))


def test_intervals_are_those_of_the_ranks(home: Path, measured: EvaluateResult) -> None:
    split = open_split(settings(home))
    teacher = split.ranks(*embed(split, CachedTeacher()))
    image, text = student_rows(home, split.sample_ids, split.captions)
    student = split.ranks(image, text)
    assert measured.teacher_intervals == bootstrap_recalls(teacher, split.text_image)
    assert measured.student_intervals == bootstrap_recalls(student, split.text_image)
    assert measured.retention_intervals == bootstrap_share(student, teacher, split.text_image)
    assert (measured.interval_level, measured.interval_resamples) == (0.95, 2000)
    span = measured.teacher_intervals.t2i["R@10"]
    assert span is not None
    assert span.low < measured.teacher["t2i"]["R@10"] < span.high
    assert measured.retention_intervals is not None
    assert measured.retention is not None
    kept = measured.retention_intervals.mean
    assert kept is not None
    assert kept.low < measured.retention["mean"] < kept.high


def test_a_split_measures_any_encoder_as_evaluate_does(home: Path, measured: EvaluateResult) -> None:
    """Two functions of bytes and captions, in batches, get the very recalls that evaluate gives the checkpoint."""
    split = open_split(settings(home))
    assert (len(split.image_rows), len(split.caption_rows), split.quarantined) == (TEST_IMAGES - 1, 126, 1)
    folder = f"local-dir:{RunFolder(str(home / 'run')).checkpoint_path()}"
    model, _, transform = open_clip.create_model_and_transforms(folder)
    model.eval()
    tokenizer = open_clip.get_tokenizer(folder, context_length=16)
    sizes: list[int] = []

    def encode_images(images: list[bytes]) -> np.ndarray:
        sizes.append(len(images))
        with torch.no_grad():
            pixels = torch.stack([transform(Image.open(io.BytesIO(data))) for data in images])
            return model.encode_image(pixels, normalize=True).numpy()

    def encode_texts(texts: list[str]) -> np.ndarray:
        sizes.append(len(texts))
        with torch.no_grad():
            return model.encode_text(tokenizer(texts), normalize=True).numpy()

    steps: list[tuple[str, int, int]] = []
    image, text = embed(split, BytesEncoder(encode_images, encode_texts, 50), lambda *at: steps.append(at))
    assert sizes == [50, 13, 50, 50, 26]
    assert steps[-1] == ("captions", 126, 126)
    assert (image.shape, text.shape, image.dtype) == ((63, 12), (126, 12), np.float32)
    assert recall_of_ranks(split.ranks(image, text)) == measured.student
    assert recall_of_ranks(split.ranks(*embed(split, CachedTeacher()))) == measured.teacher
    with pytest.raises(ValueError, match=r"62 rows of images and 126 of captions: .* has 63 and 126 in split 'test'"):
        split.ranks(image[1:], text)


def test_evaluate_embeds_a_split_by_one_function(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher and student alike, and each once: towers and ranks take the rows that are there."""
    encoders: list[str] = []

    def counted(split: Any, encoder: Any, progress: Any = None) -> Any:
        encoders.append(type(encoder).__name__)
        return embed(split, encoder, progress)

    monkeypatch.setattr("teacher_cache.pipeline.evaluate.retrieval.embed", counted)
    config = settings(home, towers=True)
    measured = measure(config)
    assert encoders == ["CachedTeacher", "StudentRows"]
    checkpoint = RunFolder(str(home / "run")).checkpoint_path()
    again = student_ranks(config, measured.split, checkpoint, 10)  # as promote measures the champion
    assert measured.student_ranks is not None
    assert again.t2i.tolist() == measured.student_ranks.t2i.tolist()
    assert encoders[2:] == ["StudentRows"]
    evaluate(EvaluateConfig(cache=str(home / "c"), split="test"))
    assert encoders[3:] == ["CachedTeacher"]


@pytest.mark.parametrize(
    ("splits", "learned", "chosen"),
    [
        (("train", "dev", "test"), "train", "test"),
        (("train", "val"), "train", "val"),
        (("train",), "train", "train"),
        (("",), "", ""),
        (("",), "train", ""),
        (("train", "test"), "test", "train"),
    ],
)
def test_the_split_to_measure_on_is_held_out_if_there_is_one(
    splits: tuple[str, ...], learned: str, chosen: str
) -> None:
    assert default_split("a.cache", dict.fromkeys(splits, 10), learned) == chosen


def test_of_several_splits_that_are_held_out_one_is_to_be_named() -> None:
    with pytest.raises(UsageError) as refused:
        default_split("a.cache", {"train": 40, "dev": 10, "val": 9})
    held_out = "'dev' (10 images), 'val' (9 images)"
    assert str(refused.value) == f"a.cache: no split 'test', and several others: {held_out}. Name one by --split"


def test_an_encoder_that_gives_other_rows_is_refused(home: Path) -> None:
    split = open_split(settings(home))
    short = BytesEncoder(lambda images: np.zeros((1, 4)), lambda texts: np.zeros((len(texts), 4)), 256)
    with pytest.raises(ValueError, match="the encoder gave 1 rows for 63 images"):
        embed(split, short)


def test_the_result_names_the_engine_and_the_device_is_never_another(home: Path, measured: EvaluateResult) -> None:
    assert measured.engine == f"faiss-cpu {faiss.__version__}"
    with pytest.raises(UsageError, match="device 'cuda' asked for, but FAISS"):
        evaluate(EvaluateConfig(cache=str(home / "c"), split="test", device="cuda"))


def test_the_bytes_of_an_image_are_proven(home: Path, tmp_path: Path) -> None:
    (tmp_path / "images").symlink_to(home / "photos" / "images")
    split = open_split(settings(home, image_root=str(tmp_path)))
    assert split.image_bytes(5) == (home / "photos" / "images" / "0261.jpg").read_bytes()
    (tmp_path / "images").unlink()
    with pytest.raises(
        OSError, match=r"row 261 \(0261.jpg\): .* cannot be read: .* Name their folder with --image-root"
    ):
        split.image_bytes(5)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0261.jpg").write_bytes((home / "photos" / "images" / "0262.jpg").read_bytes())
    with pytest.raises(CacheMismatchError, match=r"row 261 \(0261.jpg\): .*not the image that the cache was made of"):
        split.image_bytes(5)


def test_the_command_shows_intervals_and_towers(home: Path, measured: EvaluateResult, tmp_path: Path) -> None:
    # the workers' default is processes, which import torch once more
    (tmp_path / "run.toml").write_text("[evaluate]\nworkers = 0\n")
    flags = ("--ranks", "ranks.parquet", "--device", "cpu", "--towers")
    done = run("evaluate", "--run", str(home / "run"), "--split", "test", "run.toml", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    labels = [line.strip().split("  ")[0] for line in done.stdout.splitlines()]
    assert labels[labels.index("to") + 1 :][:4:2] == ["image tower", "text tower"]
    lines = {line[:13].rstrip(): line[13:].split() for line in done.stdout.splitlines()}
    assert measured.retention_intervals is not None
    assert measured.retention is not None
    assert lines["retention %"][-1] == f"{measured.retention['mean']:.1f}"
    spans = measured.retention_intervals.model_dump()
    for label, end in (("95 % from", "low"), ("to", "high")):
        found = [*spans["i2t"].values(), *spans["t2i"].values(), spans["mean"]]
        assert lines[label] == ["-" if span is None else f"{span[end]:.1f}" for span in found]
    assert measured.chance is not None
    assert lines["chance"][:-1] == [f"{value:.1f}" for side in measured.chance.values() for value in side.values()]
    assert "ranks.parquet: the rank of each of 189 queries" in done.stderr
    assert done.stderr.endswith(f"next: teacher-cache deploy --run {home}/run --out deployed/run\n")
    assert pq.read_table(tmp_path / "ranks.parquet").num_rows == 189
