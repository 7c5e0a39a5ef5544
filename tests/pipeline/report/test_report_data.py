"""What a report collects of a cache, against computations of its own."""

from __future__ import annotations

import base64
import io
import math
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from teacher_cache.pipeline.data.batches.stored_images import CachedImages
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.evaluate.sampled import rank_rows
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.report.collect import collect_report
from teacher_cache.pipeline.report.data import ReportData, RetrievedPair
from teacher_cache.pipeline.report.page import render_report
from teacher_cache.pipeline.report.pairs import retrieved_pairs
from teacher_cache.pipeline.report.row_map import place_rows
from teacher_cache.pipeline.report.thumbnails import collect_pictures
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.errors import CacheNotFoundError, UsageError
from teacher_cache.storage.format.commits import QuarantinedRow
from teacher_cache.storage.look.info import describe_cache
from teacher_cache.storage.look.nearest import unit_rows
from teacher_cache.storage.look.stats import cache_stats, read_drawn
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import known_arrays, plan_known_cache, write_photos
from tests.storage.look.test_diff import BASE, Picture, make


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A cache of 20 photographs, one of them broken; the photographs lie beside it."""
    folder = tmp_path_factory.mktemp("report")
    images = write_photos(folder / "photos", 20) / "images"
    (images / "0003.jpg").write_bytes((images / "0003.jpg").read_bytes()[:200])
    precompute(precompute_config(folder, tiny_teacher, folder / "photos.cache"))
    return folder / "photos.cache"


def precompute_config(folder: Path, teacher: Path, cache: Path, **more: Any) -> PrecomputeConfig:
    dataset, settings = f"flickr:{folder / 'photos'}", {"batch_size": 8, "chunk_rows": 8, "device": "cpu", **more}
    return PrecomputeConfig(dataset=dataset, teacher=f"local-dir:{teacher}", cache=str(cache), **settings)


def opened(uri: str) -> Image.Image:
    kind, _, data = uri.partition(",")
    assert kind == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    image.load()
    return image


# --- the whole


def test_a_report_of_photographs_has_everything(photos: Path) -> None:
    stages: dict[str, tuple[int, int]] = {}
    found = collect_report(str(photos), progress=lambda stage, done, of: stages.update({stage: (done, of)}))
    assert found.info == describe_cache(str(photos))
    assert found.stats == cache_stats(str(photos))
    assert [(image.row, image.sample_id, image.uri) for image in found.lost] == [(3, "0003.jpg", "images/0003.jpg")]
    assert found.lost[0].reason.startswith("undecodable-image: ")
    assert found.row_map is not None
    towers = [point.tower for point in found.row_map.points]
    assert (towers.count("image"), towers.count("text"), found.row_map.images_of) == (19, 19, 19)
    assert found.pairs_of == 19 * 3
    assert len(found.hardest) == 24
    # a picture of each image but the broken one, which is no news
    assert sorted(found.pictures) == [row for row in range(20) if row != 3]
    assert found.notes == ()
    assert all(done == of for done, of in stages.values())
    assert {"read images", "recall", "map", "pictures"} <= set(stages)
    assert ReportData.model_validate_json(found.model_dump_json()) == found


def test_points_and_pairs_name_what_they_are_of(photos: Path) -> None:
    found = collect_report(str(photos))
    reader = EmbeddingReader(str(photos))
    samples, captions = reader.samples.to_pylist(), reader.captions.to_pylist()
    assert found.row_map is not None
    for point in found.row_map.points:
        image = samples[point.image_row]
        assert point.split == image["split"]
        if point.tower == "image":
            assert (point.row, point.label) == (point.image_row, image["sample_id"])
        else:
            first = next(caption for caption in captions if caption["image_row"] == point.image_row)
            assert (point.row, point.label) == (first["row"], first["text"])
    for pair in found.hardest + found.best:
        caption = captions[pair.caption_row]
        assert (caption["text"], caption["image_row"]) == (pair.caption, pair.image_row)


def test_collecting_needs_neither_torch_nor_onnx(known_cache: Path) -> None:
    code = """
import sys
class Absent:
    names = ("torch", "torchvision", "open_clip", "safetensors", "lightning_fabric", "tensorboard", "prefect",
             "s3fs", "onnx", "onnxruntime", "tokenizers", "timm", "matplotlib", "altair", "jinja2")
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from teacher_cache.pipeline.report.collect import collect_report
found = collect_report(sys.argv[1])
assert found.pairs_of == 35 and len(found.row_map.points) == 20
"""
    command = [sys.executable, "-c", code, str(known_cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_several_teachers_are_on_the_page_with_the_recall_of_each(tmp_path: Path) -> None:
    """As a report of each by itself has it, where both have all pictures."""
    caches = [make(tmp_path / "a", BASE), make(tmp_path / "b", BASE[::-1], tilt=0.6, dim=16)]
    both = collect_report(caches[0], others=caches[1:])
    alone = [collect_report(cache, whole=False) for cache in caches]
    assert [one.recall for one in both.teachers] == [report.recall for report in alone]
    ranks = [report.stats.image.effective_rank for report in alone if report.stats is not None]
    assert [one.image_rank for one in both.teachers] == pytest.approx(ranks)
    page = render_report(both)
    assert "Several teachers, on the same images and captions" in page
    assert caches[1] in page
    lacking = make(tmp_path / "c", BASE[:10], tilt=0.6)
    with pytest.raises(UsageError, match="2 have no embedding in it"):
        collect_report(caches[0], others=[lacking])
    dropped = collect_report(caches[0], others=[lacking], unmatched="drop", whole=False)
    assert any("without 2 images that a cache lacks" in note for note in dropped.notes)


def test_a_split_is_all_that_statistics_map_and_pairs_are_of(photos: Path) -> None:
    found = collect_report(str(photos), split="test")
    assert found.stats == cache_stats(str(photos), split="test")
    assert found.row_map is not None
    assert {point.split for point in found.row_map.points} == {"test"}
    assert {pair.image_row for pair in found.hardest + found.best} <= set(range(16, 20))
    with pytest.raises(UsageError, match="no split 'dev'"):
        collect_report(str(photos), split="dev")


def test_what_is_drawn_is_said_and_is_the_same_again(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_cache.pipeline.evaluate.sampled._IMAGES", 9)
    monkeypatch.setattr("teacher_cache.pipeline.report.collect._MAP_IMAGES", 5)
    found = collect_report(str(photos), most=12, seed=3)
    read = found.stats.image.rows_read if found.stats else 0
    usable = read - (found.stats.image.missing if found.stats else 0)
    assert read == 12
    assert found.pairs_of == 27
    assert found.notes == (
        "Statistics are of 12 of 20 images and their captions, drawn with seed 3; --most reads more.",
        f"Recall and pairs are among 9 of the {usable} images that were read, drawn at random.",
        f"On the map are 5 of {usable} images, drawn at random.",
    )
    again = collect_report(str(photos), most=12, seed=3)
    assert again.model_copy(update={"made": found.made}) == found
    other = collect_report(str(photos), most=12, seed=4)
    assert other.row_map != found.row_map


def test_without_map_and_pictures_no_image_is_read_and_all_else_is_the_same(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = collect_report(str(photos))

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("not asked for")

    monkeypatch.setattr("teacher_cache.pipeline.report.collect.collect_pictures", never)
    monkeypatch.setattr("teacher_cache.pipeline.report.collect.row_map", never)
    stages: list[str] = []
    found = collect_report(str(photos), whole=False, progress=lambda stage, done, total: stages.append(stage))
    assert found == whole.model_copy(update={"made": found.made, "row_map": None, "pictures": {}})
    assert not {"map", "pictures"} & set(stages)


# --- caches that are not whole, or not of pairs


def test_an_unfinished_cache_has_a_way_out(tmp_path: Path) -> None:
    path = tmp_path / "part.cache"
    plan_known_cache(path)
    writer = EmbeddingWriter(str(path))
    for ref in writer.pending()[:2]:
        arrays = known_arrays(writer, ref)
        lost = []
        if ref.chunk == 1:
            for values in arrays.values():
                values[2] = np.nan
            lost = [QuarantinedRow(row=6, sample_id="img-6", reason="undecodable", detail="cut short")]
        writer.write(ref, arrays, lost)
    found = collect_report(str(path))
    assert (found.stats, found.row_map, found.hardest, found.best, found.pairs_of) == (None, None, (), (), 0)
    assert [(image.row, image.uri, image.reason) for image in found.lost] == [
        (6, "img-6.jpg", "undecodable: cut short")
    ]
    assert len(found.notes) == 1
    assert found.notes[0].startswith("No statistics, map and pairs yet: ")
    assert "2 of 10 chunks are there. Run the same precompute command again" in found.notes[0]
    with pytest.raises(CacheNotFoundError):
        collect_report(str(tmp_path / "nothing.cache"))


def test_quarantined_images_beyond_some_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make(tmp_path / "lossy", BASE, lost=(1, 4, 5, 9))
    monkeypatch.setattr("teacher_cache.pipeline.report.collect._LOST_NAMED", 2)
    for commits in (1000, 1):  # where info does not read all commits, the reader does
        monkeypatch.setattr("teacher_cache.storage.look.info.COMMITS_READ", commits)
        found = collect_report(cache)
        assert [(image.row, image.sample_id, image.reason) for image in found.lost] == [
            (1, "p1", "r: d"),
            (4, "p4", "r: d"),
        ]
        assert "The first 2 of 4 quarantined images are named; commits/image has all." in found.notes


@pytest.mark.parametrize("prompts", [("a photo of a cat.", "a photo of a dog."), ()])
def test_images_without_captions_make_no_pairs(tmp_path: Path, prompts: tuple[str, ...]) -> None:
    """Labelled images, whose captions are the prompts of their classes; and images that nobody described."""
    pictures = [picture._replace(captions=prompts if number == 0 else ()) for number, picture in enumerate(BASE)]
    found = collect_report(make(tmp_path / "labelled", pictures))
    assert (found.hardest, found.best, found.pairs_of) == ((), (), 0)
    assert found.row_map is not None
    assert [point.tower for point in found.row_map.points] == ["image"] * 12
    assert found.row_map.method.startswith("Images: centred on their mean, ")
    bare = 11 if prompts else 12
    assert found.notes[0].startswith(f"No pairs and no recall: {bare} of 12 images have no caption.")


def test_a_cache_of_broken_images_alone_is_reported(tmp_path: Path) -> None:
    found = collect_report(make(tmp_path / "broken", BASE, lost=tuple(range(12))))
    assert found.row_map is None
    assert found.stats is not None
    assert (len(found.lost), found.stats.image.missing, found.pairs_of) == (12, 12, 0)
    assert "no image that was read has an embedding and a caption with one" in found.notes[0]


# --- pairs


def naive_pairs(reader: EmbeddingReader, count: int) -> tuple[list[RetrievedPair], list[RetrievedPair], int]:
    """From the whole matrix of scores, ranks counted one by one."""
    image_rows = reader.image_rows()
    caption_rows, owner = reader.caption_rows(image_rows)
    image = unit_rows(reader.take("image", image_rows)).astype(float)
    text = unit_rows(reader.take("text", caption_rows)).astype(float)
    words = reader.captions["text"].to_pylist()
    # pair by pair: equal vectors have equal scores, which a matrix product does not promise
    matrix = np.array([[math.fsum(i * t) for t in text] for i in image])
    hardest: list[RetrievedPair] = []
    best: list[RetrievedPair] = []
    queries = 0
    for direction in ("i2t", "t2i"):
        rows = matrix if direction == "i2t" else matrix.T
        found = []
        for query, row in enumerate(rows):
            order = sorted(range(len(row)), key=lambda place: (-row[place], place))
            mine = [
                place for place in order if (owner[place] == query if direction == "i2t" else owner[query] == place)
            ]
            if not mine:
                continue
            rank, first = order.index(mine[0]), order[0]
            at_image, at_text = (query, mine[0]) if direction == "i2t" else (mine[0], query)
            pair = RetrievedPair(
                direction=direction,  # type: ignore[arg-type]
                image_row=int(image_rows[at_image]),
                caption_row=int(caption_rows[at_text]),
                caption=words[caption_rows[at_text]],
                rank=rank + 1,
                cosine=matrix[at_image, at_text],
                first_image_row=int(image_rows[first]) if direction == "t2i" and rank else None,
                first_caption=words[caption_rows[first]] if direction == "i2t" and rank else None,
                first_cosine=row[first],
            )
            found.append((query, pair))
        queries += len(found)
        hardest += [pair for _, pair in sorted(found, key=lambda each: (-each[1].rank, each[1].cosine, each[0]))][
            :count
        ]
        chosen: dict[int, RetrievedPair] = {}
        for _, pair in sorted(found, key=lambda each: (-each[1].cosine, each[0])):
            if pair.rank == 1:
                chosen.setdefault(pair.image_row, pair)
        best += list(chosen.values())[:count]
    return hardest, best, queries


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kinds=st.sampled_from([2, 5, 100]), count=st.sampled_from([3, 12]))
def test_pairs_are_those_of_the_whole_matrix(
    seed: int, kinds: int, count: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Few kinds of contents and captions: many embeddings, and scores, are equal."""
    rng = np.random.default_rng(seed)
    pictures = [
        Picture(f"p{n}", f"c{rng.integers(kinds)}", tuple(f"t{rng.integers(kinds)}" for _ in range(rng.integers(1, 4))))
        for n in range(15)
    ]
    cache = make(tmp_path_factory.mktemp("pairs") / "c", pictures, lost=(4,))
    reader = EmbeddingReader(cache)
    ranked = rank_rows(read_drawn(cache))
    assert ranked is not None
    found = retrieved_pairs(reader, ranked, count)
    wanted = naive_pairs(reader, count)
    assert found[2] == wanted[2]
    for here, there in zip(found[:2], wanted[:2], strict=True):
        assert len(here) == len(there)
        for one, other in zip(here, there, strict=True):
            numbers = {"cosine": pytest.approx(other.cosine), "first_cosine": pytest.approx(other.first_cosine)}
            assert one.model_dump() == {**other.model_dump(), **numbers}
    assert all(pair.rank == 1 for pair in found[1])


# --- the map


def test_the_map_closes_the_gap_between_the_towers() -> None:
    """Captions lie far from all images, and in the same order: on the map each is beside its own group of images."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(4), 15)
    centres = rng.standard_normal((4, 32))
    images = unit_rows(centres[groups] + 0.2 * rng.standard_normal((60, 32)))
    texts = unit_rows(centres[groups] + 0.2 * rng.standard_normal((60, 32)) + 20 * np.eye(32)[0])
    assert (images @ texts.T).max() < 0.4 < (texts @ texts.T).min()
    places, how = place_rows([images, texts])
    assert "then t-SNE, perplexity 30." in how
    means = np.stack([places[:60][groups == group].mean(axis=0) for group in range(4)])
    nearest = ((places[60:, None] - means[None]) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == groups).mean() > 0.95
    assert (places == place_rows([images, texts])[0]).all()


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_few_rows_are_placed_by_their_principal_components(rows: int) -> None:
    towers = [unit_rows(np.random.default_rng(n).standard_normal((rows, 8))) for n in range(2)]
    places, how = place_rows(towers)
    assert how.endswith("then the first two principal components.")
    assert places.shape == (2 * rows, 2)
    assert np.isfinite(places).all()


def test_equal_rows_have_one_place() -> None:
    """Of a collapsed teacher: no direction is left, and nothing to divide by."""
    places, _ = place_rows([np.ones((20, 4), np.float32) / 2, np.ones((20, 4), np.float32) / 2])
    assert np.abs(places).max() < 1e-6


# --- pictures


def test_pictures_are_as_large_as_they_are_looked_at(photos: Path) -> None:
    found = collect_report(str(photos))
    sides = {row: max(opened(uri).size) for row, uri in found.pictures.items()}
    originals = {}
    for row in sides:
        with Image.open(photos.parent / "photos" / "images" / f"{row:04d}.jpg") as image:
            originals[row] = max(image.size)
    in_pairs = {row for pair in found.hardest + found.best for row in (pair.image_row, pair.first_image_row)}
    assert found.stats is not None
    in_pairs |= {row for alike in found.stats.nearest_pairs for row in alike.rows}
    assert all(sides[row] == (originals[row] if row in in_pairs else min(80, originals[row])) for row in sides)


def test_images_that_are_gone_or_changed_are_named_once(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there = photos.parent / "photos"
    moved = tmp_path / "moved"
    shutil.copytree(there, moved)
    (moved / "images" / "0007.jpg").unlink()
    (moved / "images" / "0012.jpg").write_bytes((moved / "images" / "0011.jpg").read_bytes())
    found = collect_report(str(photos), image_root=str(moved))
    assert sorted(found.pictures) == [row for row in range(20) if row not in (3, 7, 12)]
    (note,) = found.notes
    gone = "row 7 (0007.jpg, images/0007.jpg) cannot be read: No such file or directory"
    changed = "row 12 (0012.jpg, images/0012.jpg) is not the image that the cache was made of"
    way_out = "Were the images moved? Name the folder that has them with --image-root."
    first = "2 of 20 pictures are missing. The first one: "
    assert note in (f"{first}{gone}. {way_out}", f"{first}{changed}. {way_out}")
    none = collect_report(str(photos), image_root="/nowhere/at/all")
    assert none.pictures == {}
    assert none.notes[0].startswith("20 of 20 pictures are missing. The first one: row ")
    # a page is mailed; where it was looked for is for who made it
    assert "/nowhere" not in none.notes[0]
    assert "/nowhere/at/all/images/" in caplog.records[-1].getMessage()


def test_a_store_that_does_not_answer_is_not_asked_for_every_image(
    known_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def read(self: ImageSource, uri: str, offset: int = -1, length: int = -1) -> bytes:
        asked.append(uri)
        raise ConnectionError("no answer")

    monkeypatch.setattr(ImageSource, "read", read)
    monkeypatch.setattr("teacher_cache.pipeline.report.thumbnails._AT_ONCE", 2)
    monkeypatch.setattr("teacher_cache.pipeline.report.thumbnails._TRIES", 4)
    images = CachedImages(EmbeddingReader(str(known_cache)), ImageSource("/nowhere"), range(10))
    steps: list[tuple[int, int]] = []
    found, note = collect_pictures(images, dict.fromkeys(range(10), 80), progress=lambda *step: steps.append(step))
    assert (found, len(asked)) == ({}, 4)
    assert note is not None
    assert note.startswith("10 of 10 pictures are missing. The first one: row 0 (img-0, img-0.jpg) cannot be read: Con")
    assert steps[-1] == (10, 10)
    assert all(before < after for (before, _), (after, _) in pairwise(steps))
