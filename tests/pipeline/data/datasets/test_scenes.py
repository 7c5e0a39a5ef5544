"""The built-in scenes dataset and the teacher that ships for it."""

from __future__ import annotations

import json
import re
from collections import Counter
from inspect import signature
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import teacher_cache.pipeline
from teacher_cache.pipeline.data.datasets.adapters import scenes
from teacher_cache.pipeline.data.datasets.adapters.scenes import Scene, SceneObject, describe_scene, read, render_scene
from teacher_cache.pipeline.data.datasets.records import Sample
from teacher_cache.pipeline.data.datasets.samples import ImageSource, load_samples
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec

TEACHER = Path(teacher_cache.pipeline.__file__).parent / "models" / "scenes_teacher"
SMALL = {"seed": "5", "train": "7", "dev": "0", "test": "3"}

SIZE_OF_WORD = {word: size for size, words in scenes._SIZE_WORDS.items() for word in words}
NOUN = rf"an? (?:(\w+) )??(?:({'|'.join(scenes.COLOURS)}) )?({'|'.join(scenes.SHAPES)}|shape|thing|object)\b"
RELATION = re.compile(r"(left of|right of|above|over|below|under)")


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def named_objects(caption: str, scene: Scene) -> list[list[SceneObject]]:
    """For each noun of a caption, the objects of the scene that it fits."""
    fitting = []
    for size, colour, shape in re.findall(NOUN, caption.split(" on a ")[0]):
        fitting.append(
            [
                thing
                for thing in scene.objects
                if (not size or SIZE_OF_WORD[size] == thing.size)
                and (not colour or colour == thing.colour)
                and (shape in ("shape", "thing", "object") or shape == thing.shape)
            ]
        )
    return fitting


# ------------------------------------------------------------------------------------------ the dataset


def test_same_seed_same_bytes_and_another_seed_differs(tmp_path):
    """Two renders of the same settings agree in every byte; another seed shares no picture."""
    list(read(str(tmp_path / "a"), **SMALL))
    list(read(str(tmp_path / "b"), **SMALL))
    list(read(str(tmp_path / "c"), **{**SMALL, "seed": "6"}))
    first, other = folder_bytes(tmp_path / "a"), folder_bytes(tmp_path / "c")
    assert first == folder_bytes(tmp_path / "b")
    assert len(first) == 7 + 3 + 1
    assert first.keys() == other.keys()
    assert not set(first.values()) & set(other.values())


def test_a_scene_does_not_depend_on_its_neighbours_or_on_the_counts(tmp_path):
    """The fourth test scene is the same alone, in a small set and in a larger one."""
    list(read(str(tmp_path / "small"), seed="5", train="0", dev="0", test="4"))
    list(read(str(tmp_path / "large"), seed="5", train="3", dev="1", test="9"))
    picture, captions = render_scene(5, "test", 3)
    for folder in ("small", "large"):
        stored = Image.open(tmp_path / folder / "images" / "test-00003.png")
        assert stored.mode == "RGB"
        assert np.array_equal(np.asarray(stored), np.asarray(picture))
        index = json.loads((tmp_path / folder / "captions.json").read_text())
        (entry,) = [image for image in index["images"] if image["file"] == "images/test-00003.png"]
        assert entry["captions"] == list(captions)


def test_splits_counts_and_order(tmp_path):
    """Train, dev, test in this order, four captions each, and ids that name split and number."""
    records = list(read(str(tmp_path / "d"), seed="1", train="6", dev="2", test="3"))
    assert all(isinstance(record, Sample) for record in records)
    assert [record.split for record in records] == ["train"] * 6 + ["dev"] * 2 + ["test"] * 3
    assert [record.sample_id for record in records[:2]] == ["train-00000", "train-00001"]
    assert records[-1].uri == "images/test-00002.png"
    assert {len(record.captions) for record in records} == {4}


def test_defaults_are_1800_200_and_400_images():
    options = signature(read).parameters
    assert [options[split].default for split in ("train", "dev", "test")] == ["1800", "200", "400"]


def test_every_option_reaches_the_dataset_through_its_spec(tmp_path):
    """``scenes:PATH?...`` parses, renders and passes the check that every image can be read."""
    spec = DatasetSpec.parse(f"scenes:{tmp_path / 'd'}?seed=1&train=4&dev=0&test=2")
    found, digests = load_samples(spec)
    assert len(found.samples) == len(set(digests)) == 6
    assert found.problems == []
    source = ImageSource(found.root)
    assert source.read(found.samples[0].uri) == (tmp_path / "d" / "images" / "train-00000.png").read_bytes()


# ------------------------------------------------------------------------------------ scenes and captions


@pytest.mark.parametrize("split", ["train", "test"])
def test_captions_name_true_attributes(split):
    """Every noun fits an object, every relation holds, every background is the scene's."""
    views = Counter()
    for index in range(300):
        scene = describe_scene(9, split, index)
        _, captions = render_scene(9, split, index)
        assert len(set(captions)) == 4
        for caption in captions:
            fitting = named_objects(caption, scene)
            assert fitting, caption
            assert all(fitting), (caption, scene)
            third = re.search(r"with something (\w+),", caption)
            if third:
                views["third colour"] += 1
                assert third[1] in {thing.colour for thing in scene.objects}, caption
            place = any(f" {place} of a " in caption for place in scenes._PLACES.values())
            relation = None if place else RELATION.search(caption)
            if relation:
                views["relation"] += 1
                holds = [
                    {
                        "left of": first.column < second.column,
                        "right of": first.column > second.column,
                        "above": first.row < second.row,
                        "over": first.row < second.row,
                        "below": first.row > second.row,
                        "under": first.row > second.row,
                    }[relation[1]]
                    for first in fitting[0]
                    for second in fitting[1]
                    if first != second
                ]
                assert any(holds), (caption, scene)
            if "background" in caption or "backdrop" in caption:
                views["background"] += 1
                assert re.search(rf"a {scene.texture} {scene.background} (background|backdrop)\b", caption), caption
            for (row, column), place in scenes._PLACES.items():
                if f" {place} of " in caption:
                    views["place"] += 1
                    assert any((thing.row, thing.column) == (row, column) for thing in fitting[0]), caption
    assert min(views[view] for view in ("relation", "background", "place", "third colour")) > 100


def test_objects_of_a_scene_share_neither_shape_nor_colour_nor_cell():
    for index in range(300):
        things = describe_scene(2, "train", index).objects
        assert len(things) in (2, 3)
        for values in (
            {thing.shape for thing in things},
            {thing.colour for thing in things},
            {(thing.row, thing.column) for thing in things},
        ):
            assert len(values) == len(things)


def test_a_twin_holds_the_same_words_in_another_arrangement():
    """Scene 5k + 1 has the shapes, colours, sizes and cells of scene 5k, but not bound together alike."""
    for index in range(0, 200, 5):
        scene, twin = describe_scene(3, "dev", index), describe_scene(3, "dev", index + 1)
        assert set(scene.objects) != set(twin.objects)
        for attribute in ("shape", "colour", "size", "row", "column"):
            values, twin_values = (sorted(getattr(thing, attribute) for thing in one.objects) for one in (scene, twin))
            assert values == twin_values
        assert (scene.background, scene.texture) == (twin.background, twin.texture)


def test_shapes_are_drawn_where_and_as_they_are_described():
    """The mean colour at the middle of a filled shape's cell is nearest to the colour in the description."""
    names = list(scenes.COLOURS)
    palette = np.array([scenes.COLOURS[name] for name in names], dtype=float)
    right = total = 0
    for index in range(150):
        picture, _ = render_scene(4, "train", index)
        pixels = np.asarray(picture, dtype=float)
        for thing in describe_scene(4, "train", index).objects:
            if thing.shape in ("circle", "square", "cross"):
                row, column = (int(scenes._CELL_CENTRES[place]) for place in (thing.row, thing.column))
                seen = pixels[row - 1 : row + 2, column - 1 : column + 2].mean((0, 1))
                right += names[int(np.linalg.norm(palette - seen, axis=1).argmin())] == thing.colour
                total += 1
    assert total > 100
    assert right / total > 0.9


# ------------------------------------------------------------------------------------- safety of the folder


def test_a_leftover_of_a_killed_render_is_ignored(tmp_path):
    """Half a render beside PATH changes nothing; PATH is rendered whole and the stranger's folder stays."""
    leftover = tmp_path / ".d.rendering-0123456789ab"
    (leftover / "images").mkdir(parents=True)
    (leftover / "images" / "train-00000.png").write_bytes(b"half a picture")
    assert len(list(read(str(tmp_path / "d"), **SMALL))) == 10
    list(read(str(tmp_path / "e"), **SMALL))
    assert folder_bytes(tmp_path / "d") == folder_bytes(tmp_path / "e")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [leftover.name, "d", "e"]


def test_a_render_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    """Stopped at the fifth scene: no PATH, no hidden folder; the next call renders it whole."""

    def stops_at_four(seed, split, index):
        if index == 4:
            raise KeyboardInterrupt
        return render_scene(seed, split, index)

    with monkeypatch.context() as patch:
        patch.setattr(scenes, "render_scene", stops_at_four)
        with pytest.raises(KeyboardInterrupt):
            read(str(tmp_path / "d"), **SMALL)
    assert list(tmp_path.iterdir()) == []
    assert len(list(read(str(tmp_path / "d"), **SMALL))) == 10


def test_a_second_call_reads_what_the_first_rendered(tmp_path, monkeypatch):
    first = list(read(str(tmp_path / "d"), **SMALL))
    monkeypatch.setattr(scenes, "render_scene", None)  # rendering again would fail
    assert list(read(str(tmp_path / "d"), **SMALL)) == first


def test_another_process_that_finished_first_wins(tmp_path, monkeypatch):
    """While this process renders, another puts its folder in place: this one reads it and cleans up."""
    winner = tmp_path / "winner"
    list(read(str(winner), **SMALL))

    def overtaken(seed, split, index):
        if winner.exists():
            winner.rename(tmp_path / "d")
        return render_scene(seed, split, index)

    monkeypatch.setattr(scenes, "render_scene", overtaken)
    assert len(list(read(str(tmp_path / "d"), **SMALL))) == 10
    assert [entry.name for entry in tmp_path.iterdir()] == ["d"]


def test_other_settings_are_refused_with_both_values(tmp_path):
    path = str(tmp_path / "d")
    list(read(path, **SMALL))
    with pytest.raises(ValueError, match=r"rendered with seed 5 \(asked for 8\), test 3 \(asked for 4\)"):
        read(path, **{**SMALL, "seed": "8", "test": "4"})
    index = json.loads((tmp_path / "d" / "captions.json").read_text())
    index["scenes"]["version"] = 0
    (tmp_path / "d" / "captions.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"version 0 \(asked for {scenes.VERSION}\)"):
        read(path, **SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "-1"}, r"train='-1' is not a whole number"),
        ({"seed": "x"}, r"seed='x' is not a whole number"),
        ({"train": "0", "dev": "0", "test": "0"}, r"all 0"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        read(str(tmp_path / "d"), **options)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="neither empty nor a scenes dataset"):
        read(str(tmp_path), **SMALL)
    with pytest.raises(ValueError, match="local folder"):
        read("s3://bucket/scenes", **SMALL)
    (tmp_path / "captions.json").write_text('[{"image_id": 1}]')
    with pytest.raises(ValueError, match="not the list of a scenes dataset"):
        read(str(tmp_path), **SMALL)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["captions.json", "notes.txt"]


def test_an_empty_folder_is_used(tmp_path):
    assert len(list(read(str(tmp_path), **SMALL))) == 10


# ------------------------------------------------------------------------------------------ the teacher


def test_the_shipped_teacher_is_small():
    """Under 10 MB on disk, and its embedding is zero but for the words that captions use."""
    assert sum(file.stat().st_size for file in TEACHER.iterdir()) < 10_000_000
    rows = open_clip.create_model(f"local-dir:{TEACHER}").token_embedding.weight
    assert rows.shape == (49408, 64)
    assert int(rows.any(1).sum()) < 100


def test_no_caption_is_cut_or_holds_a_word_that_the_teacher_never_saw():
    tokenizer = open_clip.get_tokenizer(f"local-dir:{TEACHER}")
    known = open_clip.create_model(f"local-dir:{TEACHER}").token_embedding.weight.any(1)
    tokens = tokenizer([caption for index in range(400) for caption in render_scene(2024, "test", index)[1]])
    assert tokens.shape[1] == 32
    assert bool((tokens[:, -1] == 0).all())
    assert bool(known[tokens[tokens > 0]].all())


def test_the_shipped_teacher_finds_the_test_scenes(tmp_path):
    """R@1 over the 400 test images is above 60 % both ways, through the folder's own eval transform."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{TEACHER}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{TEACHER}")
    samples = list(read(str(tmp_path / "d"), train="0", dev="0"))
    images = torch.stack([transform(Image.open(tmp_path / "d" / sample.uri)) for sample in samples])
    texts = tokenizer([caption for sample in samples for caption in sample.captions])
    model.eval()
    with torch.inference_mode():
        image_features = model.encode_image(images, normalize=True)
        text_features = model.encode_text(texts, normalize=True)
    similarity = image_features @ text_features.T
    owner = torch.arange(400).repeat_interleave(4)
    image_to_text = (owner[similarity.argmax(1)] == torch.arange(400)).float().mean().item()
    text_to_image = (similarity.argmax(0) == owner).float().mean().item()
    assert image_to_text > 0.6
    assert text_to_image > 0.6
