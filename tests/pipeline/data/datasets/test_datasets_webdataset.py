"""WebDataset tars, read in place."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from teacher_cache.pipeline.data.datasets.records import Sample
from teacher_cache.pipeline.data.datasets.samples import ImageSource, load_samples
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec
from teacher_cache.pipeline.precompute.plan import dataset_tables
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.format.tables import CAPTIONS
from tests.pipeline.data.dataset_files import load, read, save_image, told, write_tar


@pytest.fixture
def pictures(tmp_path: Path) -> list[bytes]:
    """Bytes of six different images."""
    endings = ("jpg", "png", "webp", "jpeg", "jpg", "jpg")
    return [save_image(tmp_path / "pictures" / f"{n}.{ending}", 40 * n) for n, ending in enumerate(endings)]


def test_members_with_one_key_are_one_sample(tmp_path: Path, pictures: list[bytes]) -> None:
    root = tmp_path / "shards"
    write_tar(
        root / "train" / "000.tar",
        [
            ("0001.txt", "A dog.\nOn the same day.\n"),
            ("0001.jpg", pictures[0]),
            ("0001.json", json.dumps({"caption": "Not used, there is a .txt", "key": "0001"})),
            ("deep/0002.seg.png", pictures[5]),
            ("deep/0002.PNG", pictures[1]),
            ("deep/0002.json", json.dumps({"captions": ["One.", "Two."]})),
            ("0003.cls", "7"),
        ],
    )
    write_tar(root / "val" / "000.tar", [("./0004.webp", pictures[2]), ("./0004.json", '{"caption": "A cat."}')])
    found, digests = load_samples(DatasetSpec.parse(f"webdataset:{root}"))
    assert found.problems == []
    assert [(s.sample_id, s.uri, s.split, s.captions) for s in found.samples] == [
        ("0001", "train/000.tar", "train", ("A dog.\nOn the same day.",)),
        ("deep/0002", "train/000.tar", "train", ("One.", "Two.")),
        ("0004", "val/000.tar", "val", ("A cat.",)),
    ]
    source = ImageSource(found.root)
    assert [source.read(s.uri, s.offset, s.length) for s in found.samples] == pictures[:3]
    assert len(set(digests)) == 3
    assert sorted(path.name for path in root.rglob("*")) == ["000.tar", "000.tar", "train", "val"]  # nothing unpacked


def test_an_image_with_a_dot_in_its_name_is_missed(tmp_path: Path, pictures: list[bytes]) -> None:
    """The published key ends at the first dot; what that leaves without an image is said, a mask is not."""
    write_tar(
        tmp_path / "a.tar",
        [
            ("IMG_2021.05.01.jpg", pictures[0]),
            ("IMG_2021.05.01.txt", "Lost."),
            ("0001.image.jpg", pictures[1]),
            ("0002.jpg", pictures[2]),
            ("0002.seg.png", pictures[3]),
            ("0002.txt", "There."),
        ],
    )
    samples, problems = read("webdataset", tmp_path / "a.tar")
    assert [sample.sample_id for sample in samples] == ["0002"]
    assert told(problems) == [
        ("bad-record", "a.tar/IMG_2021.05.01.jpg", True),
        ("bad-record", "a.tar/0001.image.jpg", True),
    ]
    assert "a key ends at the first dot, so that its ending is '05.01.jpg'" in problems[0].detail


def test_an_empty_txt_does_not_hide_the_caption_of_the_json(tmp_path: Path, pictures: list[bytes]) -> None:
    caption = json.dumps({"caption": "A dog."})
    write_tar(tmp_path / "a.tar", [("1.jpg", pictures[0]), ("1.txt", " \n"), ("1.json", caption)])
    samples, problems = read("webdataset", tmp_path / "a.tar")
    assert ([sample.captions for sample in samples], problems) == ([("A dog.",)], [])


@pytest.mark.parametrize(
    ("members", "settings", "captions", "said"),
    [
        ([("a.json", '{"caption": ["One.", "Two."]}')], {}, ("One.", "Two."), ""),
        ([("a.json", '{"text": "One."}'), ("a.txt", "Not this.")], {"caption": "text"}, ("One.",), ""),
        ([("a.json", '{"text": "One."}')], {}, (), "captions are wanted as caption or captions, or by ?caption=KEY"),
        ([("a.json", '{"caption": "One."}')], {"caption": "text"}, (), "its captions are wanted as text, or by ?cap"),
        ([("a.txt", " ")], {}, (), "0.tar: its caption is empty"),
        ([("a.cls", "3")], {}, (), "names this image; beside it lies .cls, the number of a class: write labelled: for"),
        ([("a.caption", "One.")], {}, (), "beside it lies .caption, and captions are read from .txt and .json"),
    ],
)  # fmt: skip
def test_captions_are_read_from_where_they_lie_or_that_is_said(
    members: list[tuple[str, str]],
    settings: dict[str, str],
    captions: tuple[str, ...],
    said: str,
    tmp_path: Path,
    pictures: list[bytes],
) -> None:
    tar = write_tar(tmp_path / "0.tar", [("a.jpg", pictures[0]), *members])
    samples, problems = read("webdataset", tar, **settings)
    assert [sample.captions for sample in samples] == [captions] * bool(captions)
    assert said in str([str(problem) for problem in problems])
    if said:
        with pytest.raises(UsageError) as refused:
            load_samples(DatasetSpec("webdataset", str(tar), tuple(settings.items())))
        assert said in str(refused.value)
        assert str(refused.value).endswith("?uncaptioned=keep") == ("KEY" not in said and "?" not in said)


def test_txt_lines_is_a_caption_per_line(tmp_path: Path, pictures: list[bytes]) -> None:
    tar = write_tar(tmp_path / "0.tar", [("a.jpg", pictures[0]), ("a.txt", "A dog.\r\nA black dog.\n")])
    assert read("webdataset", tar, txt="lines")[0][0].captions == ("A dog.", "A black dog.")
    with pytest.raises(ValueError, match=r"txt='line' is not known; it is one of whole, lines"):
        read("webdataset", tar, txt="line")


@pytest.mark.parametrize(
    ("tar", "split"),
    [
        ("cc3m-train-0003.tar", "train"),
        ("dev/0003.tar", "dev"),
        ("test/part1/0003.tar", "test"),
        ("test/val_0003.tar", "val"),
        ("latest/training-0003.tar", ""),
    ],
)
def test_split_comes_from_the_nearest_name(tmp_path: Path, pictures: list[bytes], tar: str, split: str) -> None:
    write_tar(tmp_path / tar, [("a.jpg", pictures[0]), ("a.txt", "A.")])
    assert [sample.split for sample in read("webdataset", tmp_path)[0]] == [split]
    assert [sample.split for sample in read("webdataset", tmp_path, split="mine")[0]] == ["mine"]


def test_the_root_folder_may_name_the_split(tmp_path: Path, pictures: list[bytes]) -> None:
    tar = write_tar(tmp_path / "val" / "0.tar", [("a.jpg", pictures[0]), ("a.txt", "A.")])
    for root in (tar, tar.parent):
        assert [(s.uri, s.split) for s in read("webdataset", root)[0]] == [("0.tar", "val")]


def test_patterns_name_their_tars(tmp_path: Path, pictures: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("train/008", "train/009", "train/010", "val/009", "val/010")):
        write_tar(tmp_path / "shards" / f"{name}.tar", [(f"k{number}.jpg", pictures[number]), (f"k{number}.txt", "A.")])
    spec = DatasetSpec.parse(f"webdataset:{tmp_path}/shards/{{val,train}}/{{009..011}}.tar")
    assert str(spec) == f"webdataset:{tmp_path}/shards/{{val,train}}/{{009..011}}.tar"
    found, digests = load_samples(spec)
    assert [sample.uri for sample in found.samples] == ["val/009.tar", "val/010.tar", "train/009.tar", "train/010.tar"]
    assert (found.root, len(digests)) == (str(tmp_path / "shards"), 4)
    assert told(found.problems) == [("broken-file", "val/011.tar", False), ("broken-file", "train/011.tar", False)]
    monkeypatch.chdir(tmp_path / "shards")
    relative = load("webdataset:val/{009..010}.tar")
    assert [(sample.uri, sample.split) for sample in relative.samples] == [("009.tar", "val"), ("010.tar", "val")]
    for starred in ("{val,train}/*9.tar", "*/*9.tar", "**/009.*"):
        found = load(f"webdataset:{tmp_path}/shards/{starred}")
        assert {(sample.uri, sample.split) for sample in found.samples} == {
            ("val/009.tar", "val"),
            ("train/009.tar", "train"),
        }
        assert found.root == str(tmp_path / "shards")


def test_keys_that_tars_repeat(tmp_path: Path, pictures: list[bytes]) -> None:
    for number, name in enumerate(("train/0.tar", "val/0.tar", "val/1.tar")):
        write_tar(tmp_path / "w" / name, [("s0.jpg", pictures[number]), ("s0.txt", "A.")])
    found = load(f"webdataset:{tmp_path}/w")
    assert told(found.problems) == [("duplicate-id", "s0", True)] * 2
    assert [problem.detail.endswith("add ?ids=tar") for problem in found.problems] == [True, False]
    found = load(f"webdataset:{tmp_path}/w?ids=tar")
    assert [sample.sample_id for sample in found.samples] == ["train/0.tar/s0", "val/0.tar/s0", "val/1.tar/s0"]


def test_each_thing_wrong_is_named_and_the_rest_is_read(tmp_path: Path, pictures: list[bytes]) -> None:
    tar = write_tar(
        tmp_path / "0.tar",
        [
            ("a.jpg", pictures[0]),
            ("a.png", pictures[1]),
            ("a.txt", b"A caf\xe9."),
            ("a.txt", "Again."),
            ("b.jpg", pictures[3]),
            ("b.json", "{broken"),
            ("c.json", '{"caption": "No image."}'),
            ("d.jpg", pictures[4]),
            ("d.txt", " \n"),
            ("e.jpg", pictures[5]),
            ("e.json", '{"caption": "Half a pair \\ud83d"}'),
        ],
    )
    with tarfile.open(tar, "a") as archive:
        link = tarfile.TarInfo("f.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(UsageError, match=r"0\.tar/a\.txt: not UTF-8 at .*; with \?encoding=utf-8 broken characters"):
        read("webdataset", tar)
    samples, problems = read("webdataset", tar, encoding="utf-8")
    assert [(s.sample_id, s.captions) for s in samples] == [
        ("a", ("A caf\ufffd.",)),
        ("e", ("Half a pair \ufffd",)),
    ]
    assert told(problems) == [
        ("duplicate-id", "0.tar/a.png", True),
        ("duplicate-id", "0.tar/a.txt", False),
        ("bad-record", "0.tar/b.json", False),
        ("bad-record", "0.tar/f.jpg", True),
        ("bad-record", "a", False),
        ("no-caption", "b", True),
        ("no-image", "c", False),
        ("empty-caption", "d", False),
        ("no-caption", "d", True),
        ("bad-record", "e", False),
    ]
    assert problems[6].detail == "0.tar: there is no image beside json"


def whole_tar(path: Path, pictures: list[bytes]) -> tuple[Path, list[Sample]]:
    members: list[tuple[str, bytes | str]] = []
    for key, picture in zip("abc", pictures, strict=False):
        members += [(f"{key}.txt", f"Caption {key}."), (f"{key}.jpg", picture)]
    tar = write_tar(path, members)
    samples, problems = read("webdataset", tar)
    assert (len(samples), problems) == (3, [])
    return tar, samples


@pytest.mark.parametrize("cut", ["in an image", "after an image", "in a header", "in a caption"])
def test_a_truncated_tar_keeps_what_was_read(tmp_path: Path, pictures: list[bytes], cut: str) -> None:
    tar, samples = whole_tar(tmp_path / "0.tar", pictures)
    second = samples[1]
    end = second.offset + -(-second.length // 512) * 512
    size = {"in an image": second.offset + 10, "after an image": end, "in a header": end + 100}.get(cut, end + 515)
    tar.write_bytes(tar.read_bytes()[:size])
    found = load(f"webdataset:{tar}")
    whole = 1 if cut == "in an image" else 2
    assert found.samples == samples[:whole]
    assert told(found.problems)[0] == ("broken-file", "0.tar", False)
    assert found.problems[0].detail.startswith("broken or cut short after 2 images, the rest is not read: ")
    if cut == "in an image":
        assert told(found.problems)[1:] == [("unreadable-file", "b", True)]
        assert f"10 bytes at offset {second.offset}, {second.length} wanted" in found.problems[1].detail


def test_a_broken_header_keeps_what_was_read_and_other_tars(tmp_path: Path, pictures: list[bytes]) -> None:
    tar, samples = whole_tar(tmp_path / "w" / "0.tar", pictures)
    content = bytearray(tar.read_bytes())
    end = samples[0].offset + -(-samples[0].length // 512) * 512
    content[end : end + 512] = b"\x07" * 512
    tar.write_bytes(content)
    (tmp_path / "w" / "1.tar").write_text("this was never a tar")
    write_tar(tmp_path / "w" / "2.tar", [("y.txt", "A."), ("y.jpg", pictures[4])])
    found = load(f"webdataset:{tmp_path}/w")
    assert [sample.sample_id for sample in found.samples] == ["a", "y"]
    assert told(found.problems) == [("broken-file", f"{number}.tar", False) for number in range(2)]
    assert f"after 1 image, the rest is not read: no end mark at byte {end}" in found.problems[0].detail
    assert found.problems[1].detail == "no tar, but a file that begins with b'this was never a tar'"


def test_a_file_that_is_no_tar_is_said_to_be_none(tmp_path: Path) -> None:
    for content, said in ((b"", "of 0 bytes"), (b"<html>404", "that begins with b'<html>404'")):
        (tmp_path / "0.tar").write_bytes(content)
        with pytest.raises(
            UsageError, match=rf"no usable image; the first problem: 0\.tar: no tar, but a file {said}$"
        ):
            load(f"webdataset:{tmp_path}/0.tar")


def test_tars_behind_urls(tmp_path: Path, pictures: list[bytes]) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for number in range(2):
        tar = write_tar(tmp_path / "x.tar", [(f"k{number}.jpg", pictures[number]), (f"k{number}.txt", "A.")])
        memory.pipe(f"/wds-test/train/{number}.tar", tar.read_bytes())
    found = load("webdataset:memory://wds-test/train/{0..2}.tar")
    assert [(s.sample_id, s.uri, s.split) for s in found.samples] == [
        ("k0", "0.tar", "train"),
        ("k1", "1.tar", "train"),
    ]
    assert told(found.problems) == [("broken-file", "2.tar", False)]
    source = ImageSource(found.root)
    assert [source.read(s.uri, s.offset, s.length) for s in found.samples] == pictures[:2]
    with pytest.raises(
        ValueError, match=r"a folder behind a URL is not listed; write its tars as memory://wds-test/\{"
    ):
        read("webdataset", "memory://wds-test")


def test_captions_of_kinds(tmp_path: Path, pictures: list[bytes]) -> None:
    """Of the .txt, of keys of the .json and of DataCompDR's .syn.json, sorted by kind."""
    own, made = {"caption": "Own.", "blip": ["Made.", "Made again."]}, {"syn_text": ["Painted."]}
    members: list[tuple[str, bytes | str]] = [("1.json", json.dumps(own)), ("1.txt", "Beside."), ("1.jpg", pictures[0])]
    members += [("1.syn.json", json.dumps(made)), ("2.json", json.dumps({"caption": "Alone.", "blip": None}))]
    members += [("2.jpg", pictures[1]), ("3.json", '{"width": 3}'), ("3.jpg", pictures[2])]
    tar = write_tar(tmp_path / "a.tar", members)

    def kinds(**options: str) -> list[dict[str, str]]:
        return [dict(zip(one.captions, one.kinds, strict=True)) for one in read("webdataset", tar, **options)[0]]

    in_json = {"Own.": "real", "Made.": "synthetic", "Made again.": "synthetic"}
    assert kinds(caption="synthetic:blip,real:caption") == [in_json, {"Alone.": "real"}]
    of_files = {"caption": "real:.txt,alt:caption", "syn": "synthetic:syn_text"}
    expected = {"Own.": "alt", "Beside.": "real", "Painted.": "synthetic"}
    assert kinds(**of_files) == [expected, {"Alone.": "alt"}]
    named, digests = load_samples(
        DatasetSpec.parse(f"webdataset:{tar}?caption=real:.txt,alt:caption&syn=made:syn_text")
    )
    table = dataset_tables(named, digests)[CAPTIONS].select(["image_row", "text", "kind"])
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        (0, "Own.", "alt"),
        (0, "Painted.", "made"),
        (0, "Beside.", "real"),
        (1, "Alone.", "alt"),
    ]
    _, problems = read("webdataset", tar, caption="real:caption,synthetic:blip")
    assert "a JSON object with the keys width; its captions are wanted as caption or blip" in problems[0].detail
    for wrong in ({"syn": "synthetic:syn_text"}, {**of_files, "syn": "syn_text"}, {**of_files, "syn": "alt:syn_text"}):
        with pytest.raises(UsageError, match="name a kind for both, each once"):
            kinds(**wrong)
    with pytest.raises(UsageError, match=r"\.vtt is not read"):
        kinds(caption="real:.vtt")
    with pytest.raises(UsageError, match="17 kinds of captions, and a cache has at most 16"):
        kinds(caption=",".join(f"k{number}:key" for number in range(16)), syn="made:syn_text")
