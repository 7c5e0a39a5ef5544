"""The teacher runs once: right rows, right bytes, every loss named, and any interruption without a trace."""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images.preprocess import Preprocess
from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.pipeline.precompute.encode import encode_chunks
from teacher_cache.pipeline.precompute.plan import PlanSettings, plan_precompute
from teacher_cache.pipeline.precompute.run import precompute, seal_and_summarize
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheError, CacheMismatchError, UsageError
from teacher_cache.storage.format.commits import ChunkCommit, ChunkRef
from teacher_cache.storage.format.manifest import CacheManifest
from teacher_cache.storage.look.info import describe_cache
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.commands import run_command
from tests.conftest import cache_digest, make_identity, make_model_folder
from tests.pipeline.data.dataset_files import save_image, write_tar
from tests.pipeline.precompute.conftest import make_config

MakePhotos = Callable[..., Path]


def test_rows_are_the_teachers(make_photos: MakePhotos, tiny_teacher: Path, tmp_path: Path) -> None:
    photos = make_photos(21)
    result = precompute(make_config(photos, tiny_teacher, tmp_path / "c"))
    assert (result.images, result.captions, result.chunks, result.chunks_encoded) == (21, 42, 3 + 6, 9)
    assert (result.splits, result.problems) == ({"train": 17, "test": 4}, {})
    assert min(result.images_per_second or 0, result.captions_per_second or 0) > 0
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tiny_teacher}")
    reader = EmbeddingReader(str(tmp_path / "c"))
    with torch.no_grad():
        for row in (0, 7, 8, 20):
            sample = reader.samples.slice(row, 1).to_pylist()[0]
            assert sample["sample_id"] == f"{row:04d}.jpg"
            image = Image.open(photos / "images" / sample["sample_id"])
            expected = model.eval().encode_image(transform(image)[None])[0]
            stored = reader.take("image", np.array([row]))[0] * reader.take("image", np.array([row]), array="norm")[0]
            np.testing.assert_allclose(stored, expected, atol=2e-3)
            top, left, height, width, flip = reader.take("image", np.array([row]), array="view")[0]
            assert (top, left, height, width, flip) == pytest.approx(
                Preprocess.from_config(model.visual.preprocess_cfg).evaluation_crop(*image.size)
            )
    assert reader.captions["text"][15].as_py() == "number 7 again"
    assert verify_cache(str(tmp_path / "c")).ok


def test_again_encodes_nothing(make_photos: MakePhotos, tiny_teacher: Path, tmp_path: Path) -> None:
    settings = make_config(make_photos(), tiny_teacher, tmp_path / "c")
    precompute(settings)
    before = cache_digest(tmp_path / "c")
    assert precompute(settings).chunks_encoded == 0
    # chunk rows left out: those of the cache
    assert precompute(settings.model_copy(update={"chunk_rows": None})).chunks_encoded == 0
    assert cache_digest(tmp_path / "c") == before


def test_a_dataset_of_too_many_chunks_is_refused_with_the_rows_that_do() -> None:
    settings = PlanSettings(make_config(Path("photos"), Path("teacher"), Path("c"), chunk_rows=1), None, None)
    with pytest.raises(UsageError, match=r"^c: 8,388,608 chunks, at most 4,194,304 .* Set chunk_rows to 4 or more$"):
        settings.layout(make_identity(4_194_304, 4_194_304), "cpu")


def test_any_order_of_chunks_gives_the_same_bytes(make_photos: MakePhotos, tiny_teacher: Path, tmp_path: Path) -> None:
    photos = make_photos(21)
    precompute(make_config(photos, tiny_teacher, tmp_path / "whole"))
    parts = make_config(photos, tiny_teacher, tmp_path / "parts", decode_threads=1)
    teacher = load_teacher(parts.teacher, device="cpu")
    for ref in reversed(plan_precompute(parts, teacher)[:-1]):
        encode_chunks(parts, teacher, [ref])
    assert precompute(parts).chunks_encoded == 1
    assert cache_digest(tmp_path / "parts") == cache_digest(tmp_path / "whole")


def test_every_lost_image_is_named_and_counted(make_photos: MakePhotos, tiny_teacher: Path, tmp_path: Path) -> None:
    photos = make_photos(20)
    whole = precompute(make_config(photos, tiny_teacher, tmp_path / "whole"))
    data = (photos / "images" / "0003.jpg").read_bytes()
    (photos / "images" / "0003.jpg").write_bytes(data[: len(data) // 2])
    (photos / "images" / "0005.jpg").write_bytes(b"not an image")
    (photos / "images" / "0011.jpg").unlink()
    with (photos / "captions.txt").open("a") as file:
        file.write("0001.jpg,   \n")
    result = precompute(make_config(photos, tiny_teacher, tmp_path / "c"))
    assert result.problems == {"empty-caption": 1, "missing-file": 1, "undecodable-image": 2}
    assert (result.images, result.lost_images, result.quarantined) == (19, 1, 2)
    assert whole.images == result.images + result.lost_images
    details = "\n".join(result.problem_details)
    for name in ("0001.jpg", "0003.jpg", "0005.jpg", "0011.jpg"):
        assert name in details
    reader = EmbeddingReader(str(tmp_path / "c"))
    assert [row.sample_id for row in reader.quarantined] == ["0003.jpg", "0005.jpg"]
    assert len(reader.image_rows("train")) == 16 - 3
    # the neighbours in the batch of an undecodable image are what they are without it
    np.testing.assert_array_equal(
        reader.take("image", np.array([0, 1, 2, 4])),
        EmbeddingReader(str(tmp_path / "whole")).take("image", np.array([0, 1, 2, 4])),
    )
    assert verify_cache(str(tmp_path / "c")).ok


def test_an_image_that_changes_or_goes_away_under_the_run_stops_it(
    make_photos: MakePhotos, tiny_teacher: Path, tmp_path: Path
) -> None:
    """Nothing is given up for good because a share was away for a minute; nothing foreign is encoded."""
    photos = make_photos(24)
    precompute(make_config(photos, tiny_teacher, tmp_path / "whole"))
    settings = make_config(photos, tiny_teacher, tmp_path / "c")
    teacher = load_teacher(settings.teacher, device="cpu")
    pending = plan_precompute(settings, teacher)
    second = photos / "images" / "0012.jpg"
    data = second.read_bytes()
    second.write_bytes((photos / "images" / "0003.jpg").read_bytes())
    with pytest.raises(CacheMismatchError, match=r"0012.jpg: not the image that the cache was made of"):
        encode_chunks(settings, teacher, pending)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"0012.jpg"):
        encode_chunks(settings, teacher, pending)
    with pytest.raises(FileNotFoundError, match=r"0012.jpg"):  # one that is encoded already is not missed
        precompute(settings)
    second.write_bytes(data)
    assert precompute(settings).quarantined == 0
    assert cache_digest(tmp_path / "c") == cache_digest(tmp_path / "whole")


def test_a_dataset_that_moved_is_read_where_it_is_now(
    make_photos: MakePhotos, tiny_teacher: Path, tmp_path: Path
) -> None:
    photos = make_photos(24)
    settings = make_config(photos, tiny_teacher, tmp_path / "c")
    teacher = load_teacher(settings.teacher, device="cpu")
    encode_chunks(settings, teacher, plan_precompute(settings, teacher)[:1])
    photos.rename(tmp_path / "moved")
    result = precompute(make_config(tmp_path / "moved", tiny_teacher, tmp_path / "c"))
    assert (result.chunks_encoded, result.quarantined) == (8, 0)
    assert verify_cache(settings.cache).ok


def test_the_same_images_listed_in_another_form_are_refused(
    make_photos: MakePhotos, tiny_teacher: Path, tmp_path: Path
) -> None:
    photos = make_photos(8)
    precompute(make_config(photos, tiny_teacher, tmp_path / "c"))
    (photos / "images").rename(photos / "Images")
    with pytest.raises(CacheMismatchError, match=r"has the same images under other paths within the dataset \(flickr:"):
        precompute(make_config(photos, tiny_teacher, tmp_path / "c"))


def test_chunks_are_encoded_by_the_teacher_that_planned_them(
    make_photos: MakePhotos, tiny_teacher: Path, tmp_path: Path
) -> None:
    settings = make_config(make_photos(8), tiny_teacher, tmp_path / "c")
    pending = plan_precompute(settings, load_teacher(settings.teacher, device="cpu"))
    other = load_teacher(f"local-dir:{make_model_folder(tmp_path / 'other', seed=5)}", device="cpu")
    with pytest.raises(CacheMismatchError, match=r"teacher.weights_sha256"):
        encode_chunks(settings, other, pending)
    assert describe_cache(settings.cache).chunks_committed == 0


def test_a_repair_that_changes_sealed_bytes_says_so(
    make_photos: MakePhotos, tiny_teacher: Path, tmp_path: Path
) -> None:
    settings = make_config(make_photos(8), tiny_teacher, tmp_path / "c")
    first = precompute(settings)
    chunk = tmp_path / "c" / "targets.zarr/text/embedding/c/1/0"
    chunk.write_bytes(b"damaged")
    again = precompute(settings.model_copy(update={"batch_size": None}))  # the cache's own
    assert (again.chunks_encoded, again.replaced_manifest_digest) == (1, None)
    assert again.manifest_digest == first.manifest_digest
    with pytest.raises(CacheMismatchError, match=r"in batches of 4 in the cache, 8, 8 and 3 asked for"):
        precompute(settings.model_copy(update={"batch_size": 3}))
    # what another device would do: equal rows but for the last bit
    path = tmp_path / "c" / ChunkRef("text", 0, 1).commit_key
    writer = EmbeddingWriter(settings.cache)
    reader = EmbeddingReader(settings.cache)
    rows = np.arange(8, 16)
    arrays = {name: reader.take("text", rows, array=name) for name in ("embedding", "norm")}
    arrays["norm"] = np.nextafter(arrays["norm"], np.float32(np.inf))
    before = path.read_bytes()
    writer.replaces.add(ChunkRef("text", 0, 1))
    writer.write(ChunkRef("text", 0, 1), arrays)
    assert path.read_bytes() != before
    assert precompute(settings).replaced_manifest_digest == first.manifest_digest


def test_rows_that_are_not_numbers_are_quarantined_by_name(
    make_photos: MakePhotos, tiny_teacher: Path, tmp_path: Path
) -> None:
    settings = make_config(make_photos(8), tiny_teacher, tmp_path / "c")
    teacher = load_teacher(settings.teacher, device="cpu")
    encode = teacher.model.encode_image

    def overflow(pixels: torch.Tensor) -> torch.Tensor:
        features = encode(pixels)
        if len(features) == 4:
            features = features.clone()
            features[1] = float("inf")
            features[2] = 0.0
        return features

    pending = plan_precompute(settings, teacher)
    teacher.model.encode_image = overflow
    encode_chunks(settings, teacher, pending)
    seal_and_summarize(settings.cache, len(pending), 1.0)
    lost = EmbeddingReader(settings.cache).quarantined
    assert [(row.sample_id, row.reason) for row in lost] == [(f"000{row}.jpg", "not-finite") for row in (1, 2, 5, 6)]
    teacher.model.encode_text = lambda tokens: torch.full((len(tokens), 16), float("nan"))
    teacher._shortens = False
    # the shortest captions go first
    with pytest.raises(FloatingPointError, match=r"text row 1: the teacher's features are not finite in fp32"):
        encode_chunks(settings, teacher, [ref for ref in pending if ref.tower == "text"])


@pytest.mark.parametrize(
    ("limit", "images", "allowed"),
    [(None, 60, 10), (None, 360, 36), ("0", 60, 0), ("7", 5, 7), ("5%", 360, 18), ("2.5%", 360, 9), ("100%", 3, 3)],
)
def test_how_many_images_may_be_missing(limit: str | None, images: int, allowed: int) -> None:
    config = PrecomputeConfig(dataset="coco:x", teacher="t", cache="c", max_problems=limit)
    assert config.allowed_problems(images) == allowed


@pytest.mark.parametrize("limit", ["-1", "5.5", "5 %", "many"])
def test_a_limit_that_is_no_number_is_refused(limit: str) -> None:
    with pytest.raises(ValueError, match=f"a share such as 5% is required, not {limit}"):
        PrecomputeConfig(dataset="coco:x", teacher="t", cache="c", max_problems=limit)


def test_too_many_missing_images_stop_the_run_before_it_writes(
    make_photos: MakePhotos, tiny_teacher: Path, tmp_path: Path
) -> None:
    photos = make_photos(24)
    for number in range(11):
        (photos / "images" / f"{number:04d}.jpg").unlink()
    wanted = (
        r"11 of 24 images cannot be used \(missing-file 11\), at most 10 are allowed\. The first: 0000\.jpg: .* does "
        r"not exist; 0001\.jpg: .* Nothing was written\. Mend the dataset, or leave them out: --max-problems 11$"
    )
    with pytest.raises(CacheError, match=wanted):
        precompute(make_config(photos, tiny_teacher, tmp_path / "c"))
    assert not (tmp_path / "c").exists()
    allowed = make_config(photos, tiny_teacher, tmp_path / "c", max_problems=11)
    assert precompute(allowed).lost_images == 11
    # the cache has them in its table, so that no limit is needed to go on
    assert precompute(make_config(photos, tiny_teacher, tmp_path / "c")).chunks_encoded == 0


@pytest.mark.parametrize(
    ("header", "line", "said"),
    [
        ("path,caption", '{0}.png,"A quote that is open."', ""),
        (
            "id,path,caption",
            "{1},{0}.png,A.",
            r"48 of 72 captions would be left out, at most 10 are allowed\. The first: t\.csv line 3: 0\.png has the "
            r"id '1' here and '0' in an earlier row \(\?id= leaves the ids out\); .* Nothing was written\. Mend the "
            r"dataset, or leave them out: --max-problems 48$",
        ),
        (
            "path,caption,split",
            "{0}.png,A.,s{1}",
            r"48 of 72 captions would be left out, .* t\.csv line 3: 0\.png has split 's1' here and 's0' in an earlier",
        ),
        ("path,caption", '{0}.png,A." B', ""),
        (
            "path,caption",
            '{0}.png,"A.{2}',
            r"36 of 72 captions would be left out, .* t\.csv lines 38-39: not CSV \(.*\); is a quote in line 38 not",
        ),
    ],
)
def test_too_many_lost_captions_stop_the_run_before_it_writes(
    header: str, line: str, said: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    lines = [header]
    for number in range(72):
        image = number // 3
        save_image(tmp_path / f"{image}.png", 10 * image)
        lines.append(line.format(image, number, "" if number >= 36 else '"'))
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    settings = {"dataset": f"table:{tmp_path}/t.csv", "teacher": f"local-dir:{tiny_teacher}", "device": "cpu"}
    config = PrecomputeConfig(**settings, cache=str(tmp_path / "c"))
    if not said:
        assert precompute(config).captions == 72
        return
    with pytest.raises(CacheError, match=said):
        precompute(config)
    assert not (tmp_path / "c").exists()
    assert precompute(config.model_copy(update={"max_problems": "48"})).captions in (24, 36)


def test_a_tar_that_is_broken_or_missing_stops_the_run(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        picture = save_image(tmp_path / "scratch.png", 80 * number)
        write_tar(tmp_path / f"{number}.tar", [(f"{number}.png", picture), (f"{number}.txt", "A.")])
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:700])
    tars = {"dataset": f"webdataset:{tmp_path}/{{0..3}}.tar", "teacher": f"local-dir:{tiny_teacher}", "device": "cpu"}
    config = PrecomputeConfig(**tars, cache=str(tmp_path / "c"))
    wanted = r"2 files of samples cannot be read to the end\. The first: 1\.tar: broken .*; 3\.tar: .* does not exist\."
    with pytest.raises(CacheError, match=wanted):
        precompute(config)
    assert not (tmp_path / "c").exists()
    result = precompute(config.model_copy(update={"max_problems": "50%"}))
    assert (result.problems["broken-file"], result.lost_images) == (2, 1)
    assert "nothing is held out to measure on: ?holdout=10%" in capsys.readouterr().err


@pytest.mark.parametrize("empty", [True, False])
def test_some_pictures_without_captions_are_counted_and_captions_that_none_reads_stop_the_run(
    empty: bool, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(24):
        save_image(tmp_path / f"p/{number}.jpg", 10 * number)
        if number < 18 or empty:
            (tmp_path / f"p/{number}.txt").write_text("A." * (number < 18))
    shared = {"teacher": f"local-dir:{tiny_teacher}", "device": "cpu", "dataset": f"images:{tmp_path}/p"}
    precompute(PrecomputeConfig(cache=str(tmp_path / "c"), **shared))
    assert (
        "6 of 24 images have no caption: ?uncaptioned=drop leaves them out; to learn from images alone train with "
        "--set captions_per_image=0\n"
    ) in capsys.readouterr().err
    for number in range(18):
        (tmp_path / f"p/{number}.txt").rename(tmp_path / f"p/{number}.caption")
    said = r"18 of 18 captions would be left out, .*: not read: the caption belongs in 0\.txt, .* --max-problem"
    with pytest.raises(CacheError, match=said):
        precompute(PrecomputeConfig(cache=str(tmp_path / "d"), **shared))


def test_images_without_captions_that_are_to_be_dropped_are_no_problem(tiny_teacher: Path, tmp_path: Path) -> None:
    lines = ["path,caption"]
    for number in range(24):
        save_image(tmp_path / f"{number}.png", 10 * number)
        lines.append(f"{number}.png,{'A.' * (number < 12)}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    shared = {"teacher": f"local-dir:{tiny_teacher}", "cache": str(tmp_path / "c"), "device": "cpu"}
    with pytest.raises(CacheError, match=r"--max-problems 12; \?uncaptioned=keep behind the dataset caches images"):
        precompute(PrecomputeConfig(dataset=f"table:{tmp_path}/t.csv", **shared))
    precompute(PrecomputeConfig(dataset=f"table:{tmp_path}/t.csv?uncaptioned=drop", **shared))
    with pytest.raises(CacheMismatchError, match=r"\(the cache is of .*=drop, asked for is .*=keep\)\. To add them:"):
        precompute(PrecomputeConfig(dataset=f"table:{tmp_path}/t.csv?uncaptioned=keep", **shared))


def test_each_problem_is_named_once_and_all_are_listed_later(
    make_photos: MakePhotos, tiny_teacher: Path, tmp_path: Path
) -> None:
    photos = make_photos(20)
    (photos / "images" / "0005.jpg").write_bytes(b"not an image")
    (photos / "images" / "0011.jpg").unlink()
    command = ("precompute", f"--dataset=flickr:{photos}", f"--teacher=local-dir:{tiny_teacher}", "--device=cpu")
    done = run_command(*command, f"--cache={tmp_path / 'c'}")
    named = [line for line in done.stderr.splitlines() if "0011.jpg" in line or "0005.jpg" in line]
    missing = f"missing-file: 0011.jpg: {photos}/images/0011.jpg does not exist"
    assert [named[0], named[1].partition(": ")[0], len(named)] == [missing, "undecodable-image", 2]
    assert "WARNING" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"next: teacher-cache train --cache {tmp_path / 'c'} --student vit-ti-32 --out runs/a"
    )
    again = run_command(*command, f"--cache={tmp_path / 'c'}")
    assert again.stdout.splitlines()[1] == "already complete: this run had nothing to encode"
    assert "images/s" not in again.stdout
    assert "0011.jpg" not in again.stderr
    listed = run_command("info", str(tmp_path / "c"), "--problems")
    assert listed.stdout.splitlines() == named
    problems = json.loads(run_command("info", str(tmp_path / "c"), "--problems", "--json").stdout)["problems"]
    assert [(each["kind"], each["where"], each["lost_image"]) for each in problems] == [
        ("missing-file", "0011.jpg", True),
        ("undecodable-image", "0005.jpg", False),
    ]


def test_another_teacher_or_dataset_is_refused(make_photos: MakePhotos, tiny_teacher: Path, tmp_path: Path) -> None:
    photos = make_photos(8)
    precompute(make_config(photos, tiny_teacher, tmp_path / "c"))
    other = make_model_folder(tmp_path / "other", seed=5)
    with pytest.raises(CacheMismatchError, match=r'teacher.weights_sha256: "\w{12}" in the cache, "\w{12}" asked for'):
        precompute(make_config(photos, other, tmp_path / "c"))
    text = (photos / "captions.txt").read_text()
    (photos / "captions.txt").write_text(text.replace("number 2 again", "number two again"))
    with pytest.raises(CacheMismatchError, match=r"holds 8: other captions or splits"):
        precompute(make_config(photos, tiny_teacher, tmp_path / "c"))
    (photos / "captions.txt").write_text(text)
    (photos / "images" / "0001.jpg").write_bytes((photos / "images" / "0002.jpg").read_bytes())
    with pytest.raises(CacheMismatchError, match=r"holds 8: 1 image with other bytes, the first: 0001.jpg"):
        precompute(make_config(photos, tiny_teacher, tmp_path / "c"))


def test_a_dataset_without_an_image_is_refused(make_photos: MakePhotos, tiny_teacher: Path, tmp_path: Path) -> None:
    photos = make_photos(2)
    for path in (photos / "images").iterdir():
        path.unlink()
    with pytest.raises(UsageError, match=r"no usable image among 2 listed; the first problem: 0000\.jpg"):
        precompute(make_config(photos, tiny_teacher, tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_a_teacher_that_overflows_is_not_taken_for_odd_images(
    make_photos: MakePhotos, tiny_teacher: Path, tmp_path: Path
) -> None:
    settings = make_config(make_photos(8), tiny_teacher, tmp_path / "c", batch_size=1)
    teacher = load_teacher(settings.teacher, device="cpu")
    pending = plan_precompute(settings, teacher)
    teacher.model.encode_image = lambda pixels: torch.full((len(pixels), 16), float("nan"))
    with pytest.raises(FloatingPointError, match=r"image row 0: the teacher's features are not finite in fp32"):
        encode_chunks(settings, teacher, [ref for ref in pending if ref.tower == "image"])
    assert describe_cache(settings.cache).chunks_committed == 0


def test_a_share_in_trouble_is_not_a_smaller_dataset(
    make_photos: MakePhotos, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ImageSource.read

    def stale(self: ImageSource, uri: str, offset: int = -1, length: int = -1) -> bytes:
        if uri.endswith("0005.jpg"):
            raise OSError(errno.ESTALE, "Stale file handle", uri)
        return real(self, uri, offset, length)

    monkeypatch.setattr(ImageSource, "read", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        precompute(make_config(make_photos(8), tiny_teacher, tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_a_new_cache_costs_two_parses_of_the_manifest_and_one_read_of_each_commit(
    make_photos: Callable[..., Path], tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: Counter[str] = Counter()
    for record in (CacheManifest, ChunkCommit):
        parse = record.from_bytes

        def counted(data: bytes, where: str, *more: str, parse: Any = parse) -> Any:
            parsed[where if where.endswith(".json") else "manifest"] += 1
            return parse(data, where, *more)

        monkeypatch.setattr(record, "from_bytes", counted)
    result = precompute(make_config(make_photos(images=20), tiny_teacher, tmp_path / "c", views=2))
    assert parsed.pop("manifest") <= 2
    assert len(parsed) == result.chunks == 11
    assert max(parsed.values()) == 1
