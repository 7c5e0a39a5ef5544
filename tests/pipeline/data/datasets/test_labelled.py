"""Labelled images in all their forms: which image is of which class, and what is said where that is not sure."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from teacher_cache.pipeline.data.datasets.spec import check_dataset
from teacher_cache.pipeline.data.datasets.torchvision import _BY_FLAG, TORCHVISION
from teacher_cache.pipeline.evaluate.zero_shot.labelled_images import LabelledDataset, labelled_spec, open_labelled
from teacher_cache.pipeline.settings.evaluate import ZeroShotConfig
from teacher_cache.storage.errors import UsageError
from tests.pipeline.data.dataset_files import (
    birdsnap,
    hateful_memes,
    kinetics700,
    read,
    save_image,
    ucf101,
    write_tar,
)


def opened(dataset: str, **settings: Any) -> LabelledDataset:
    return open_labelled(ZeroShotConfig(dataset=dataset, **settings))


def truth(found: LabelledDataset) -> dict[str, str]:
    """The class of each image, by name."""
    return {found.sample_id(row): found.found.classes.names[label] for row, label in enumerate(found.labels)}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for number, name in enumerate(("British_Shorthair", "beagle", "pug")):
        for index in range(2):
            save_image(root / name / f"{index}.png", 60 * number + index)
    return root


def test_folders_are_classes_by_their_names(folders: Path) -> None:
    found = opened(f"imagefolder:{folders}")
    assert found.found.classes.names == ("British Shorthair", "beagle", "pug")
    assert truth(found)["beagle/1.png"] == "beagle"
    assert found.prompts[2] == ("a photo of a pug.", "a photo of the pug.", "a good photo of a pug.")
    assert found.image(0).size == found.image(5).size


def test_the_held_out_images_are_those_of_a_cache(folders: Path) -> None:
    held, _ = read("imagefolder", folders, holdout="50%")
    found = opened(f"imagefolder:{folders}?holdout=50%")
    names = {sample.sample_id for sample in held if sample.split == "test"}
    assert {found.sample_id(row) for row in range(len(found.labels))} == names
    assert 0 < len(names) < 6
    assert found.split == "test"
    assert len(found.prompts) == 3  # every class competes, also one without an image here
    others = opened(f"imagefolder:{folders}?holdout=50%", split="train")
    assert {others.sample_id(row) for row in range(len(others.labels))} == {s.sample_id for s in held} - names
    assert len(opened(f"imagefolder:{folders}?holdout=50%", split="all").labels) == 6


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("holdout=150%", "holdout='150%' is no share of the images"),
        ("holdouts=10%", "no option 'holdouts' here; there are templates, classes, split, holdout"),
        ("templates=nothere", "nothere"),
    ],
)
def test_settings_are_refused_before_an_image_is_listed(setting: str, said: str, folders: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        labelled_spec(ZeroShotConfig(dataset=f"imagefolder:{folders}?{setting}"))


def test_folders_are_matched_with_the_names_of_a_set(folders: Path) -> None:
    found = opened(f"imagefolder:{folders}", prompts="pets")
    assert len(found.prompts) == 37  # all classes of the set compete, whatever images there are
    assert truth(found) == {
        **{f"British_Shorthair/{n}.png": "British Shorthair" for n in range(2)},
        **{f"beagle/{n}.png": "Beagle" for n in range(2)},
        **{f"pug/{n}.png": "Pug" for n in range(2)},
    }
    assert found.prompts[found.labels[-1]] == ("a photo of a Pug, a type of pet.",)
    assert found.found.classes.matched_by == "name"


def test_a_folder_that_matches_none_is_refused_or_named_by_a_file(folders: Path, tmp_path: Path) -> None:
    (folders / "pug").rename(folders / "mops")
    with pytest.raises(
        UsageError,
        match=r"of 'mops' \(1 of 3 classes\); the pets names that no class has are 'Abys.*"
        r"Say it by --class-names FILE\.json, \{\"British_Shorthair\"",
    ):
        opened(f"imagefolder:{folders}", prompts="pets")
    file = tmp_path / "names.json"
    file.write_text(json.dumps({"mops": "Pug", "beagle": "Beagle", "British_Shorthair": "British Shorthair"}))
    found = opened(f"imagefolder:{folders}", prompts="pets", class_names=str(file))
    assert found.found.classes.names == ("Pug", "Beagle", "British Shorthair")  # those of the file alone compete
    assert truth(found)["mops/0.png"] == "Pug"
    assert found.prompts[0] == ("a photo of a Pug, a type of pet.",)
    # the set's templates with the folders' own names
    assert opened(f"imagefolder:{folders}", templates="pets").prompts[2] == ("a photo of a mops, a type of pet.",)


def test_folders_of_numbers_want_names(tmp_path: Path) -> None:
    for number in range(10):
        save_image(tmp_path / "digits" / f"{number}" / "a.png", 20 * number)
    for prompts in ("", "cifar10"):  # "a photo of a 3." would be measured without a word
        with pytest.raises(UsageError, match=r"the classes are called by numbers \(0 \.\.\.\), which make no prompts"):
            opened(f"imagefolder:{tmp_path / 'digits'}", prompts=prompts)
    assert truth(opened(f"imagefolder:{tmp_path / 'digits'}", prompts="mnist"))["7/a.png"] == "7"
    found = opened(f"imagefolder:{tmp_path / 'digits'}", prompts="svhn")
    assert truth(found)["7/a.png"] == "seven"
    assert found.found.classes.matched_by == "number"


def test_some_folders_of_imagenet_among_its_thousand_classes(tmp_path: Path) -> None:
    for number, folder in enumerate(("n02102040", "n01440764", "n03888257")):
        save_image(tmp_path / "some" / folder / "a.png", 50 * number)
    dataset = f"imagefolder:{tmp_path / 'some'}"
    names = {
        "n01440764/a.png": "tench",
        "n02102040/a.png": "English Springer Spaniel",
        "n03888257/a.png": "parachute",
    }
    found = opened(dataset, prompts="imagenet1k")
    assert (truth(found), len(found.prompts), len(found.prompts[0])) == (names, 1000, 80)
    found = opened(f"{dataset}?classes=imagenet")  # as imagefolder calls it
    assert (truth(found), len(found.prompts), len(found.prompts[0])) == (names, 1000, 3)
    file = tmp_path / "names.json"
    file.write_text(json.dumps({path.split("/")[0]: name for path, name in names.items()}))
    found = opened(dataset, prompts="imagenet1k", class_names=str(file))  # these three alone
    assert (truth(found), len(found.prompts), len(found.prompts[0])) == (names, 3, 80)
    with pytest.raises(UsageError, match="give --prompts imagenet1k"):
        opened(dataset, prompts="cifar10")


def test_settings_of_the_dataset_and_flags(folders: Path) -> None:
    # as it was written before there were flags
    assert len(opened(f"imagefolder:{folders}?templates=simple").prompts[0]) == 7
    assert len(opened(f"imagefolder:{folders}?templates=simple", templates="openai").prompts[0]) == 80
    with pytest.raises(UsageError, match="no option 'colour' here; there are templates, classes, split"):
        opened(f"imagefolder:{folders}?colour=red")
    (folders.parent / "t.txt").write_text("a photo\n")
    with pytest.raises(UsageError, match=r"no \{\} for the class"):
        opened(f"imagefolder:{folders}", templates=str(folders.parent / "t.txt"))


def test_a_dataset_named_as_precompute_names_it_is_what_its_cache_holds(folders: Path) -> None:
    settings = f"{folders}?form=imagefolder&holdout=50%&prompts=pets&class_names={folders.parent}/own.json"
    (folders.parent / "own.json").write_text('{"British_Shorthair": "cat", "beagle": "dog", "pug": "hound"}')
    found = opened(f"labelled:{settings}")
    assert {sample.split for sample in found.samples.samples} == {"train", "test"}
    assert found.prompts[0][0] == "a photo of a cat, a type of pet."
    assert read("labelled", folders, **dict(found.spec.options))[0][0].captions[0] == found.prompts[0][0]


def test_splits_are_not_mixed_unasked(folders: Path) -> None:
    with pytest.raises(UsageError, match=r"has no splits: leave --split out, or set a part aside by \?holdout=10%$"):
        opened(f"imagefolder:{folders}", split="tset")
    (folders / "val").mkdir()
    save_image(folders / "val" / "pug" / "9.png", 200)
    with pytest.raises(UsageError, match=r"'none' \(6 images\), 'val' \(1 images\); name one behind the dataset"):
        opened(f"imagefolder:{folders}")
    assert truth(opened(f"imagefolder:{folders}", split="val")) == {"val/pug/9.png": "pug"}
    assert len(opened(f"imagefolder:{folders}", split="all").labels) == 7
    with pytest.raises(UsageError, match="no image of split 'test'; there are 'none'"):
        opened(f"imagefolder:{folders}", split="test")


def test_one_class_is_no_choice(folders: Path) -> None:
    save_image(folders / "alone" / "cat" / "0.png", 3)
    with pytest.raises(UsageError, match="there is one class, 'cat'"):
        opened(f"imagefolder:{folders / 'alone'}")


@pytest.fixture
def tars(tmp_path: Path, folders: Path) -> Path:
    """Two tars in clip-benchmark's layout, classes 2, 0 and 0."""
    root = tmp_path / "wds"
    pictures = [path.read_bytes() for path in sorted(folders.glob("*/*.png"))]
    write_tar(
        root / "test" / "0.tar",
        [("s0000000.cls", "2"), ("s0000000.png", pictures[0]), ("s0000001.png", pictures[1]), ("s0000001.cls", "0")],
    )
    write_tar(root / "test" / "1.tar", [("s0000000.cls", "0"), ("s0000000.webp", pictures[2])])
    (root / "test" / "nshards.txt").write_text("2")
    return root


def test_tars_of_clip_benchmark(tars: Path) -> None:
    (tars / "classnames.txt").write_text("cat\nguinea pig\ndog\n")
    (tars / "zeroshot_classification_templates.txt").write_text("a {c}.\nthe {c}.\n")
    found = opened(f"webdataset:{tars}")
    assert truth(found) == {
        "test/0.tar/s0000000": "dog",
        "test/0.tar/s0000001": "cat",
        "test/1.tar/s0000000": "cat",
    }
    assert found.prompts == (("a cat.", "the cat."), ("a guinea pig.", "the guinea pig."), ("a dog.", "the dog."))
    assert opened(f"webdataset:{tars / 'test'}").prompts == found.prompts  # the folder of a split
    assert opened(f"webdataset:{tars}", prompts="cifar10").prompts[0][1] == "a blurry photo of a cat."


_EXPORT = """
import io, sys
from PIL import Image
from clip_benchmark.webdataset_builder import convert_dataset

class Dataset(list):
    classes = ["cat", "dog", "guinea pig"]
    templates = ["a photo of a {c}.", "the {c}."]

def picture(red):
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 0, 0)).save(data, "WEBP", lossless=True)
    return data.getvalue()

if __name__ == "__main__":
    images = Dataset((picture(20 * number), number % 3) for number in range(7))
    convert_dataset(images, "test", sys.argv[1], max_count=3, verbose=False)
"""


def test_what_clip_benchmark_itself_exports(tmp_path: Path) -> None:
    root = tmp_path / "exported"
    done = subprocess.run([sys.executable, "-c", _EXPORT, str(root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = opened(f"webdataset:{root}")
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert [found.image(row).getpixel((0, 0)) for row in range(7)] == [(20 * n, 0, 0) for n in range(7)]
    assert found.prompts[2] == ("a photo of a guinea pig.", "the guinea pig.")
    assert found.samples is not None
    assert found.samples.problems == []


def test_tars_without_names_count_in_the_order_of_a_list(tars: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing names its 2 classes \(no classnames\.txt\); give --prompts"):
        opened(f"webdataset:{tars}")
    with pytest.raises(UsageError, match="nothing names its 2 classes"):
        opened(f"webdataset:{tars}", prompts="cifar10")  # a set without class names
    # the settings of a dataset to cache, whose form is known by its tars
    for root in (tars, tars / "test", tars / "test/0.tar"):
        check_dataset(f"labelled:{root}")
        with pytest.raises(UsageError, match=r"give \?prompts=NAME of a set .*, or \?class_names=FILE\.json, a list"):
            read("labelled", root)
        assert len(read("labelled", root, prompts="mnist")[0]) == 3 - (root.suffix == ".tar")
    found = opened(f"webdataset:{tars}", prompts="mnist")
    assert found.found.classes.matched_by == "number"
    assert list(truth(found).values()) == ["2", "0", "0"]
    file = tmp_path / "names.json"
    file.write_text('["cat", "dog"]')
    with pytest.raises(UsageError, match="label 2, and 2 class names, of 0 to 1"):
        opened(f"webdataset:{tars}", class_names=str(file))
    file.write_text('{"2": "dog", "0": "cat"}')
    assert list(truth(opened(f"webdataset:{tars}", class_names=str(file))).values()) == ["dog", "cat", "cat"]


def test_names_of_tars_are_matched_with_those_of_a_set_by_name(tars: Path) -> None:
    # clip-benchmark has two lists of Caltech101 in different orders: a number alone would be wrong
    (tars / "classnames.txt").write_text("pug\nbeagle\nbritish shorthair\n")
    assert list(truth(opened(f"webdataset:{tars}", prompts="pets")).values()) == ["British Shorthair", "Pug", "Pug"]
    (tars / "classnames.txt").write_text("pug\nbeagle\n")
    with pytest.raises(UsageError, match=r"label 2, and .*classnames\.txt has 2 names, of 0 to 1"):
        opened(f"webdataset:{tars}")
    (tars / "classnames.txt").write_text("pug\n\nbeagle\n")
    with pytest.raises(UsageError, match=r"classnames\.txt: an empty line"):
        opened(f"webdataset:{tars}")


def test_numbers_of_tars_with_names_of_their_own_are_not_taken_for_places(tars: Path) -> None:
    # torchvision's order of FER2013, which is not that of the names in the set
    (tars / "classnames.txt").write_text("anger\ndisgust\nfear\nhappiness\nsadness\nsurprise\nneutrality\n")
    with pytest.raises(UsageError, match=r"no class name is surely that of"):
        opened(f"webdataset:{tars}", prompts="fer2013")


def test_an_image_without_a_label_is_counted(tars: Path, folders: Path) -> None:
    picture = (folders / "pug" / "0.png").read_bytes()
    write_tar(
        tars / "test" / "2.tar",
        [("a.png", picture), ("b.png", picture), ("b.cls", "-1"), ("c.png", picture), ("c.cls", "1"), ("d.cls", "1")],
    )
    found = opened(f"webdataset:{tars}", prompts="mnist")
    assert found.samples is not None
    assert [problem.kind for problem in found.samples.problems] == ["bad-record", "bad-record"]
    assert found.lost_images == (
        "test/2.tar/a: no label in KEY.cls beside the image; the number of its class is wanted",
        "test/2.tar/b: the label '-1' in KEY.cls beside the image; the number of its class is wanted",
    )
    assert truth(found)["test/2.tar/c"] == "1"


def test_what_is_wrong_in_another_split_is_not_counted(tars: Path, folders: Path) -> None:
    picture = (folders / "pug" / "0.png").read_bytes()
    write_tar(tars / "train" / "0.tar", [("a.png", picture), ("b.png", picture), ("b.cls", "1"), ("b.cls", "2")])
    write_tar(tars / "test" / "2.tar", [("a.png", picture)])
    (tars / "train" / "1.tar").write_bytes(b"no tar")  # which images it had, nobody knows
    found = opened(f"webdataset:{tars}", prompts="mnist", split="test")
    assert found.lost_images == (
        "test/2.tar/a: no label in KEY.cls beside the image; the number of its class is wanted",
    )
    assert found.samples is not None
    assert [problem.where for problem in found.samples.problems] == ["test/2.tar/a", "train/1.tar"]
    every = opened(f"webdataset:{tars}", prompts="mnist", split="all")
    assert len(every.lost_images) == 2
    assert every.samples is not None
    assert len(every.samples.problems) == 4


def test_what_lies_beside_the_classes_of_another_split_is_not_counted(folders: Path) -> None:
    for split in ("train", "val"):
        save_image(folders / split / "pug" / "9.png", 200)
        save_image(folders / split / "stray.png", 90)
        (folders / split / "pug" / "notes.txt").write_text("no image")
    found = opened(f"imagefolder:{folders}", split="val")
    assert found.lost_images == ("val/stray.png: an image outside the class folders",)
    assert found.samples is not None
    assert [problem.where for problem in found.samples.problems] == ["val/stray.png", "val/pug/notes.txt"]


def test_torchvision_folders(tmp_path: Path) -> None:
    """EuroSAT's class folders, whose numbers clip-benchmark's names are known to follow."""
    base = tmp_path / "eurosat" / "2750"
    published = (
        "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake"
    )
    for number, name in enumerate(published.split()):
        save_image(base / name / "0.png", 20 * number)
    found = opened(f"torchvision:EuroSAT:{tmp_path}", prompts="eurosat")
    names = list(truth(found).values())
    assert (names[0], names[2], names[9]) == ("annual crop land", "brushland or shrubland", "lake or sea")
    assert found.found.classes.matched_by == "place"
    # its files are read as any other's
    image = found.image(3)
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(base / "Highway" / "0.png").convert("RGB")))
    assert found.sample_id(3) == "eurosat/2750/Highway/0.png"
    own = opened(f"torchvision:EuroSAT:{tmp_path}", templates="simple")
    assert truth(own)["eurosat/2750/SeaLake/0.png"] == "SeaLake"
    with pytest.raises(UsageError, match="torchvision has no splits of it"):
        opened(f"torchvision:EuroSAT:{tmp_path}", split="test")


def test_categories_of_caltech256_are_read_as_words(tmp_path: Path) -> None:
    base = tmp_path / "caltech256" / "256_ObjectCategories"
    for number, folder in enumerate(("001.ak47", "002.american-flag", "003.bonsai-101"), 1):
        save_image(base / folder / f"{number:03d}_0001.jpg", 60 * number)
    found = opened(f"torchvision:Caltech256:{tmp_path}")
    assert list(truth(found).values()) == ["ak47", "american flag", "bonsai"]
    assert found.prompts[1][0] == "a photo of a american flag."


def test_torchvision_without_names_or_a_known_order_wants_a_file(tmp_path: Path) -> None:
    """GTSRB has numbers only. In the order of its own names they are known, in that of others nothing is."""
    images = tmp_path / "gtsrb" / "GTSRB" / "Final_Test" / "Images"
    lines = ["Filename;Width;ClassId"]
    for number, label in enumerate((14, 0, 2)):
        save_image(images / f"{number}.ppm", 30 * number)
        lines.append(f"{number}.ppm;9;{label}")
    (tmp_path / "gtsrb" / "GT-final_test.csv").write_text("\n".join(lines) + "\n")
    dataset = f"torchvision:GTSRB:{tmp_path}"
    found = opened(dataset, prompts="gtsrb")
    assert len(found.prompts) == 43
    assert list(truth(found).values()) == [
        "stop",
        "red and white circle 20 kph speed limit",
        "red and white circle 50 kph speed limit",
    ]
    with pytest.raises(UsageError, match=r"the classes are called by numbers \(0 \.\.\.\), which make no prompts"):
        opened(dataset)
    with pytest.raises(UsageError, match="numbers, which are not known to be in the order of the class names of mnist"):
        opened(dataset, prompts="mnist")
    file = tmp_path / "names.json"
    file.write_text(json.dumps({str(number): f"sign {number}" for number in range(15)}))
    assert list(truth(opened(dataset, class_names=str(file))).values()) == ["sign 14", "sign 0", "sign 2"]


def write_mnist(root: Path, images: NDArray[np.uint8], labels: Sequence[int]) -> Path:
    """As published: idx files, of which torchvision wants all four to be there."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("t10k", "train"):
        header = struct.pack(">4i", 0x803, *images.shape)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, len(labels)) + bytes(labels))
    return root


def test_torchvision_arrays(tmp_path: Path) -> None:
    """Images that lie in no files of their own come out to the last bit, each with its label."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28)).astype(np.uint8)
    found = opened(f"torchvision:MNIST:{write_mnist(tmp_path, pixels, [7, 0, 9, 3, 1])}", prompts="mnist")
    assert list(truth(found).values()) == ["7", "0", "9", "3", "1"]
    assert len(found.prompts) == 10
    for number in range(5):
        image = found.image(number)
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), pixels[number])
    # the names that torchvision has for its own numbers
    own = opened(f"torchvision:MNIST:{tmp_path}", templates="mnist", split="train")
    assert truth(own)["000000"] == "7 - seven"
    with pytest.raises(UsageError, match="no split 'val'; there are 'train' and 'test'"):
        opened(f"torchvision:MNIST:{tmp_path}", split="val")


def test_torchvision_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"write torchvision:NAME:PATH with one of CIFAR10, CIFAR100, Caltech101"):
        opened(f"torchvision:CIFAR11:{tmp_path}")
    with pytest.raises(UsageError, match="gone: not there"):
        opened(f"torchvision:CIFAR10:{tmp_path / 'gone'}")
    with pytest.raises(UsageError, match=r"torchvision cannot open it \(Dataset not found.*Nothing is downloaded"):
        opened(f"torchvision:CIFAR10:{tmp_path}")


def test_torchvisions_signatures_are_as_the_table_says() -> None:
    from inspect import signature

    import torchvision

    for name, split in TORCHVISION.items():
        parameters = signature(getattr(torchvision.datasets, name).__init__).parameters
        assert ("train" in parameters) == (name in _BY_FLAG), name
        assert ("split" in parameters) == (bool(split) and name not in _BY_FLAG), name
        # never downloaded unasked
        assert name in ("FER2013", "ImageNet") or parameters["download"].default is False, name


def test_images_without_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"images without labels\. Labelled images are imagefolder:PATH"):
        opened(f"table:{tmp_path}")


@pytest.mark.parametrize(
    ("write", "classes", "named"),
    [
        (
            birdsnap,
            500,
            {"Acadian_Flycatcher/1.jpg": "Acadian Flycatcher", "Allens_Hummingbird/2.jpg": "Allens Hummingbird"},
        ),
        (ucf101, 101, {"v_HandStandPushups_g01_c01.jpg": "Hand Stand Pushups", "v_YoYo_g01_c01.jpg": "Yo Yo"}),
        (hateful_memes, 2, {"8291.png": "hatespeech meme", "46971.png": "meme"}),
        (
            kinetics700,
            700,
            {"a_000001_000011.jpg": "punching person (boxing)", "b_000001_000011.jpg": "massaging person's head"},
        ),
    ],
)
def test_published_forms_that_clip_benchmark_lacks(
    write: Callable[[Path], None], classes: int, named: dict[str, str], tmp_path: Path
) -> None:
    write(tmp_path)
    found = opened(f"labelled:{tmp_path}", prompts=write.__name__)
    assert len(found.prompts) == classes
    assert len(found.labels) == len(named)
    for sample_id, name in truth(found).items():
        assert any(sample_id.endswith(end) and name == named[end] for end in named), sample_id
    assert all(found.image(row).size == (12, 8) for row in range(len(found.labels)))
    assert len(found.lost_images) == (write is birdsnap)
    # as it is cached
    assert read("labelled", tmp_path, **dict(found.spec.options))[0][0].captions[0] == found.prompts[0][0]


def test_lists_of_published_datasets(tmp_path: Path) -> None:
    for write in (ucf101, hateful_memes):
        (tmp_path / write.__name__).mkdir()
        write(tmp_path / write.__name__)
    clips, memes = (f"labelled:{tmp_path / name}" for name in ("ucf101", "hateful_memes"))
    assert list(truth(opened(clips, prompts="ucf101", split="trainlist01")).values()) == ["Yo Yo"]
    with pytest.raises(UsageError, match=r"no list testlist02\.txt of a split; .*testlist01\.txt"):
        opened(clips, prompts="ucf101", split="testlist02")
    with pytest.raises(UsageError, match=r'no image of any class.*line 1 is no {"img": "img/NAME\.png", "label": 0'):
        opened(memes, prompts="hateful_memes", split="test")
    with pytest.raises(UsageError, match="called by numbers"):
        opened(memes)
    with pytest.raises(UsageError, match="holdout is for datasets without splits"):
        opened(f"{memes}?holdout=10%", prompts="hateful_memes")
