"""Prompt sets by name, and classes matched with names: never a label by chance."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.pipeline.data.datasets import prompts
from teacher_cache.pipeline.data.datasets.prompts import (
    SAME_ORDER,
    filled,
    match_classes,
    prompt_set,
    prompt_sets,
    read_class_names,
    read_templates,
)
from teacher_cache.storage.errors import UsageError


def test_the_27_datasets_of_clip_have_prompts() -> None:
    """All of CLIP's table (Radford et al. 2021, appendix A)."""
    names = (
        "birdsnap hateful_memes kinetics700 ucf101 "
        "caltech101 cars cifar10 cifar100 clevr_count_all country211 dtd eurosat fer2013 fgvc_aircraft flowers food101 "
        "gtsrb imagenet1k kitti_closest_vehicle_distance mnist pcam pets renderedsst2 resisc45 stl10 sun397 voc2007"
    )
    covered = {name: prompt_set(name).class_names for name in names.split()}
    assert len(covered) == 27
    assert sum(found is not None for found in covered.values()) == 16
    sizes = {
        "birdsnap": 500,
        "hateful_memes": 2,
        "kinetics700": 700,
        "ucf101": 101,
        "imagenet1k": 1000,
        "country211": 211,
        "flowers": 102,
        "gtsrb": 43,
        "pets": 37,
        "mnist": 10,
    }
    assert {name: len(covered[name] or ()) for name in sizes} == sizes


def test_every_set_has_templates_for_a_class() -> None:
    assert len(prompt_sets()) == 36
    for name in prompt_sets():
        found = prompt_set(name)
        assert found.templates, name
        assert all("{}" in template and "{c}" not in template for template in found.templates), name
        prompts_of = [filled(found.templates, each) for each in found.class_names or ("cat", "dog")]
        assert all(prompt for each in prompts_of for prompt in each), name
        assert len(set(prompts_of)) >= len(prompts_of) - 2, name  # two names of ImageNet are of two classes each


def test_known_templates() -> None:
    assert len(prompt_set("cifar10").templates) == 18
    assert prompt_set("food101").templates == ("a photo of {}, a type of food.",)
    # open_clip's templates are functions, ours are texts
    names = [template("tench") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert list(filled(prompt_set("imagenet1k").templates, "tench")) == names
    assert read_templates("cifar10") == prompt_set("cifar10").templates


def test_only_data_files_are_read() -> None:
    """No code of clip-benchmark is imported, and no torch for the sets that it ships."""
    code = (
        "import sys; from teacher_cache.pipeline.data.datasets.prompts import prompt_set; prompt_set('cifar10');"
        "print([name for name in ('torch', 'open_clip', 'clip_benchmark') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_set_lists_the_known() -> None:
    with pytest.raises(
        UsageError,
        match=r"prompts 'cifar11' are not known\. Did you mean cifar1.* There are birdsnap, caltech101, .*cifar100",
    ):
        prompt_set("cifar11")
    with pytest.raises(UsageError, match=r"'cifar11' is neither photo, simple nor openai, nor a file .* cifar10, "):
        read_templates("cifar11")


def test_the_shipped_sets_are_clip_benchmarks() -> None:
    """Byte for byte those of the published package, with its licence beside them."""
    published = distribution("clip-benchmark")
    for file in prompts._SHIPPED.glob("*.json"):
        original = Path(str(published.locate_file(f"clip_benchmark/datasets/{file.name}")))
        assert file.read_bytes() == original.read_bytes()
    assert (prompts._SHIPPED / "LICENSE").read_text().startswith("MIT License")
    assert len(prompts.prompt_sets()) > 20


def test_names_match_whatever_their_marks_and_order() -> None:
    own = {"Guinea_Pig": "Guinea Pig", "CAT": "CAT", "t-rex": "t-rex"}
    found = match_classes("d", own, ["T rex", "cat", "guinea-pig", "dodo"])
    assert found.number == {"Guinea_Pig": 2, "CAT": 1, "t-rex": 0}
    assert (found.names, found.matched_by) == (("T rex", "cat", "guinea-pig", "dodo"), "name")


def test_a_name_that_two_classes_share_matches_neither() -> None:
    assert open_clip.IMAGENET_CLASSNAMES.count("sunglasses") == 2
    with pytest.raises(UsageError, match="no class name is surely that of 'sunglasses'"):
        match_classes("d", {"sunglasses": "sunglasses"}, open_clip.IMAGENET_CLASSNAMES)
    # nor are its two classes made one: accuracy is that over 1,000
    assert len(match_classes("d", {"tench": "tench"}, open_clip.IMAGENET_CLASSNAMES).names) == 1000


@settings(deadline=None)  # seconds of another process on a busy machine are no finding
@given(st.lists(st.text("abcdefgh", min_size=1, max_size=6), min_size=2, max_size=12, unique=True), st.randoms())
def test_no_order_of_folders_moves_a_label(names: list[str], rng: random.Random) -> None:
    folders = list(names)
    rng.shuffle(folders)
    found = match_classes("d", {name: name for name in folders}, names)
    assert {found.names[number] for number in found.number.values()} == set(names)
    assert all(found.names[number] == key for key, number in found.number.items())


def test_numbers_are_positions_only_when_all_are_there() -> None:
    names = ["zero", "one", "two"]
    found = match_classes("d", {"00": "00", "01": "01", "02": "02"}, names)
    assert (found.number, found.matched_by) == ({"00": 0, "01": 1, "02": 2}, "number")
    # from 1 on: every label would be one off
    for folders in ("1 2 3", "1 2", "0 1", "0 1 3"):
        with pytest.raises(UsageError, match=r"by number they must be 0 to 2, for as many class names"):
            match_classes("d", {folder: folder for folder in folders.split()}, names)
    # names that are numbers are names first
    assert match_classes("d", {"3": "3", "10": "10"}, ["10", "3"]).number == {"3": 1, "10": 0}


def test_a_number_is_no_match_where_the_class_has_another_name() -> None:
    # torchvision's order; of the names that clip-benchmark has, the fifth is neutral
    order = "anger disgust fear happiness sadness surprise neutrality"
    own = {str(number): name for number, name in enumerate(order.split())}
    names = list(prompt_set("fer2013").class_names or ())
    with pytest.raises(UsageError, match=r"no class name is surely that of '0', .*'6' .*--class-names FILE\.json"):
        match_classes("d", own, names, prompts="fer2013")
    # another number is a name too, and here it says that the count begins at 1
    with pytest.raises(UsageError, match="no class name is surely that of '0', '1'"):
        match_classes("d", {"0": "1", "1": "2"}, ["cat", "dog"])


def test_names_that_repeat_match_by_number_where_all_names_are_in_their_places() -> None:
    names = list(open_clip.IMAGENET_CLASSNAMES)
    own = {str(number): name.upper() for number, name in enumerate(names)}
    found = match_classes("d", own, names)
    assert (found.matched_by, found.number) == ("number", {str(number): number for number in range(1000)})
    with pytest.raises(UsageError, match="no class name is surely that of"):
        match_classes("d", {**own, "1": own["0"], "0": own["1"]}, names)


def test_the_same_order_wants_as_many() -> None:
    own = {"negative": "negative", "positive": "positive"}
    assert match_classes("d", own, ["a", "b"], same_order=True).number == {"negative": 0, "positive": 1}
    with pytest.raises(UsageError, match="d: 2 classes and 3 class names in order"):
        match_classes("d", own, ["a", "b", "c"], same_order=True)
    assert all(prompt_set(name).class_names for name in SAME_ORDER.values())
    # torchvision numbers anger, disgust, fear, happiness, sadness, surprise, neutrality; the names have neutral fifth
    assert "FER2013" not in SAME_ORDER
    assert (prompt_set("fer2013").class_names or ())[4] == "neutral"


def test_class_names_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "names.json"
    file.write_text(json.dumps({"a": "cat", "b": "dog", "c": "cat", "d": "cow"}))
    names = read_class_names(str(file))
    found = match_classes("d", {"c": "c", "a": "a", "b": "b"}, names)
    assert (found.names, found.number) == (("cat", "dog", "cow"), {"a": 0, "b": 1, "c": 0, "d": 2})
    with pytest.raises(UsageError, match="the class names have none for 'e', of 2 classes"):
        match_classes("d", {"a": "a", "e": "e"}, names)
    for content in ("{}", "[]", '{"a": 1}', '["cat", " "]', "7"):
        file.write_text(content)
        with pytest.raises(UsageError, match=r"names\.json: an object \{folder: name of the class\} or a list"):
            read_class_names(str(file))
    file.write_text("{")
    with pytest.raises(UsageError, match=r"names\.json: not JSON"):
        read_class_names(str(file))
    with pytest.raises(UsageError, match="no such file"):
        read_class_names(str(tmp_path / "gone.json"))
