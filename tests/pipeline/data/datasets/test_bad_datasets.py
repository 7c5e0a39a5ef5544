"""Datasets that are broken, odd or hostile: what is sound is read, the rest is counted, and nothing else happens."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from teacher_cache.pipeline.cli.app import app
from teacher_cache.pipeline.data.datasets.adapters import ADAPTERS
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.datasets.tar_names import tar_names
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.pipeline.data.dataset_files import load, save_image, served, told


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# tars


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    entry = tarfile.TarInfo(name)
    entry.size, entry.type = len(data), kind
    for field, value in fields.items():
        setattr(entry, field, value)
    return entry, data


def write_tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], format: int = tarfile.PAX_FORMAT) -> None:
    with path.open("wb") as file:
        for entry, data in members:
            file.write(entry.tobuf(format, "utf-8", "surrogateescape"))
            file.write(data + bytes(-len(data) % 512))
        file.write(bytes(1024))


def hostile_members(image: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Members that climb, link, are devices, archives or code, have long names or come twice; four are sound images."""
    links = {"linkname": "/etc/passwd"}
    return [
        member("../../climbs.png", image),
        member("../../climbs.txt", b"Up."),
        member("/absolute.png", image),
        member("/absolute.txt", b"Root."),
        member("symbolic.jpg", kind=tarfile.SYMTYPE, **links),
        member("hard.jpg", kind=tarfile.LNKTYPE, **links),
        member("device.jpg", kind=tarfile.CHRTYPE, devmajor=1, devminor=5),
        member("pipe.jpg", kind=tarfile.FIFOTYPE),
        member("text.txt", kind=tarfile.SYMTYPE, **links),
        member("inner.tar", bytes(2048)),
        member("evil.pkl", b"cos\nsystem\n(S'touch /tmp/x'\ntR."),
        member("evil.npy", b"\x93NUMPY"),
        member("x" * 3000 + ".png", image),
        member("x" * 3000 + ".json", b'{"caption": "Long."}'),
        member("good.png", image),
        member("good.txt", b"Good."),
        member("good.png", image),
    ]


def test_members_that_would_climb_link_or_be_a_device(tmp_path: Path) -> None:
    image = save_image(tmp_path / "scratch.png")
    home = tmp_path / "data"
    home.mkdir()
    write_tar(home / "x.tar", hostile_members(image))
    before = tree(tmp_path)
    found = load(f"webdataset:{home}")
    assert [(sample.sample_id[:20], sample.uri) for sample in found.samples] == [
        ("../../climbs", "x.tar"),
        ("absolute", "x.tar"),
        ("x" * 20, "x.tar"),
        ("good", "x.tar"),
    ]
    assert [ImageSource(found.root).read(one.uri, one.offset, one.length) for one in found.samples] == [image] * 4
    assert told(found.problems) == [
        ("bad-record", "x.tar/symbolic.jpg", True),
        ("bad-record", "x.tar/hard.jpg", True),
        ("bad-record", "x.tar/device.jpg", True),
        ("bad-record", "x.tar/pipe.jpg", True),
        ("bad-record", "x.tar/text.txt", False),
        ("duplicate-id", "x.tar/good.png", True),
    ]
    assert tree(tmp_path) == before


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (member("huge.png", size=10 * 1024**3), "huge"),
        (member("huge.txt", size=10 * 1024**3), "10,737,418,240 bytes of text"),
        (member("back.png", size=-1024), "says that -1024 bytes follow"),
        (member("PaxHeader", b"20 size=-512000000\n", kind=tarfile.XHDTYPE), "broken or cut short"),
        (member("PaxHeader", b"9" * 30_000, kind=tarfile.XHDTYPE), ""),
        (member("PaxHeader", b"9" * 2_000_000, kind=tarfile.XHDTYPE), "says that 2000000 bytes follow"),
        (member("././@LongLink", b"x" * 100_000, kind=tarfile.GNUTYPE_LONGNAME), "says that 100000 bytes follow"),
        (member("PaxHeader", b"21 size=notanumber99\n", kind=tarfile.XHDTYPE), ""),
        (member("PaxHeader", b"19 path=caf\xe9\xff\xfe.png\n", kind=tarfile.XHDTYPE), ""),
        (member("PaxHeader", b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n", kind=tarfile.XHDTYPE), ""),
    ],
    ids=["10GB-image", "10GB-text", "negative", "pax-negative", "pax-digits", "pax-huge", "long-name", "pax-text",
         "pax-broken-name", "pax-sparse"],
)  # fmt: skip
def test_headers_that_lie(bad: tuple[tarfile.TarInfo, bytes], said: str, tmp_path: Path) -> None:
    """What comes before a lie is read; none of them ends the run, reads for ever, or takes the memory it claims."""
    image = save_image(tmp_path / "scratch.png")
    first = [member("good.png", image), member("good.txt", b"Good.")]
    write_tar(
        tmp_path / "x.tar", [*first, bad, member("late.png", image), member("late.txt", b"Late.")], tarfile.GNU_FORMAT
    )
    found = load(f"webdataset:{tmp_path}/x.tar")
    assert found.samples[0].sample_id == "good"
    if said:
        assert any(said in problem.detail + problem.where for problem in found.problems)


def test_a_chain_of_headers_is_no_endless_recursion(tmp_path: Path) -> None:
    image = save_image(tmp_path / "scratch.png")
    chain = [member("././@LongLink", b"a.png", kind=tarfile.GNUTYPE_LONGNAME)] * 5000
    write_tar(tmp_path / "x.tar", [member("good.png", image), member("good.txt", b"G."), *chain], tarfile.GNU_FORMAT)
    found = load(f"webdataset:{tmp_path}/x.tar")
    assert [sample.sample_id for sample in found.samples] == ["good"]
    assert told(found.problems) == [("broken-file", "x.tar", False)]


def test_cut_compressed_and_odd_tars(tmp_path: Path) -> None:
    image = save_image(tmp_path / "scratch.png")
    write_tar(tmp_path / "good.tar", [member("a.png", image), member("a.txt", b"A."), member("b.png", image)])
    whole = (tmp_path / "good.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: 512 + 40])
    with tarfile.open(tmp_path / "gz.tar", "w:gz") as archive:
        archive.add(tmp_path / "scratch.png", "c.png")
    (tmp_path / "empty.tar").touch()
    (tmp_path / "folder.tar").mkdir()
    os.mkfifo(tmp_path / "pipe.tar")
    found = load(f"webdataset:{tmp_path}/{{cut,empty,folder,gz,pipe,good,none}}.tar?ids=tar")
    assert [sample.sample_id for sample in found.samples] == ["good.tar/a"]
    assert told(found.problems) == [
        ("broken-file", "cut.tar", False),
        ("no-caption", "cut.tar/a", True),
        ("broken-file", "empty.tar", False),
        ("broken-file", "folder.tar", False),
        ("broken-file", "gz.tar", False),
        ("broken-file", "pipe.tar", False),
        ("no-caption", "good.tar/b", True),
        ("broken-file", "none.tar", False),
    ]
    assert found.problems[4].detail == "compressed by gzip, and tars are read in place; unpack it"


@pytest.mark.parametrize("pattern", ["{0..99999999}", "{000..999}{000..9999}", "{0..9}" * 7])
def test_a_pattern_for_more_tars_than_anybody_has(pattern: str) -> None:
    with pytest.raises(UsageError, match=r"stands for [\d,]+ tars"):
        tar_names(f"https://host/{pattern}.tar")


# JSON


@pytest.mark.parametrize("kind", ["coco", "karpathy"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'{"images": ' * 200_000, "not JSON"),
        (b"9" * 5000, "not JSON"),
        (b"NaN", "holds a float"),
        (b'{"images": {}}', "no list 'images'"),
        (b'{"\\ud83d' + b"x" * 2000 + b'": 1}', "its keys are \ufffdxxx"),
        (b"\x80\x81", "not JSON"),
    ],
)
def test_json_that_is_no_dataset(kind: str, content: bytes, said: str, tmp_path: Path) -> None:
    name = "annotations/captions_val.json" if kind == "coco" else "dataset.json"
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=said) as caught:
        load(f"{kind}:{tmp_path}")
    assert len(str(caught.value)) < 1000


def test_records_of_coco_that_are_none(tmp_path: Path) -> None:
    save_image(tmp_path / "val" / "a.png")
    images: list[Any] = [
        {"id": 1, "file_name": "a.png"},
        {"id": 1, "file_name": "a.png"},
        {"id": 1, "file_name": "b.png"},
        {"id": True, "file_name": "a.png"},
        {"id": float("nan"), "file_name": "a.png"},
        {"id": 10**300, "file_name": "../a.png"},
        {"id": 2, "file_name": "/etc/passwd"},
        {"id": 3, "file_name": "file:///etc/passwd"},
        {"id": 4, "file_name": "a\0.png"},
        {"id": 5, "file_name": "a\n.png"},
        {"id": 6, "file_name": ["a.png"]},
        {"id": 7},
        None,
        [[]],
        {"id": 8, "file_name": "c.png"},
    ]
    annotations: list[Any] = [
        {"image_id": 1, "caption": "A."},
        *({"image_id": number, "caption": "B."} for number in (2, 3, 4, 5, 10**300)),
        {"image_id": True, "caption": "B."},
        {"image_id": 1, "caption": 7},
        {"image_id": 99, "caption": "C."},
        "text",
        {"image_id": [1], "caption": "?"},
        {"image_id": 1, "caption": "  "},
        {"image_id": 1, "caption": "Kept."},
    ]
    (tmp_path / "annotations").mkdir()
    text = json.dumps({"images": images, "annotations": annotations})
    (tmp_path / "annotations" / "captions_val.json").write_text(text)
    found = load(f"coco:{tmp_path}")
    assert [(one.sample_id, one.captions) for one in found.samples] == [("val/a.png", ("A.", "Kept."))]
    name = "captions_val.json"
    assert told(found.problems) == [
        ("duplicate-id", f"{name} images[1]", False),
        ("duplicate-id", f"{name} images[2]", True),
        *(("bad-record", f"{name} images[{number}]", True) for number in (3, 4, 5, 6, 7)),
        *(("bad-record", f"{name} images[{number}]", True) for number in (10, 11, 12, 13)),
        *(("bad-record", f"{name} annotations[{number}]", False) for number in (6, 7)),
        ("no-image", f"{name} annotations[8]", False),
        *(("bad-record", f"{name} annotations[{number}]", False) for number in (9, 10)),
        ("empty-caption", "val/a.png", False),
        ("bad-record", "val/a\\x00.png", True),
        ("bad-record", "val/a\\n.png", True),
        ("no-caption", "val/c.png", True),
    ]
    assert found.problems[4].detail == "file_name '../a.png' leaves the folder of images"
    # two of the entries list one image: images listed = rows + lost images
    assert len(found.samples) + sum(problem.lost_image for problem in found.problems) == len(images) - 1


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.timeout(60)
def test_a_pipe_in_place_of_a_file_is_never_waited_for(kind: str, tmp_path: Path) -> None:
    names = {
        "coco": "annotations/captions_val.json",
        "karpathy": "dataset.json",
        "flickr": "captions.txt",
        "imagefolder": "wolf/a.jpg",
        "images": "a.jpg",
        "labelled": "wolf/a.jpg",
        "scenes": "captions.json",
        "table": "t.csv",
        "webdataset": "x.tar",
    }
    pipe = tmp_path / names[kind]
    pipe.parent.mkdir(exist_ok=True)
    os.mkfifo(pipe)
    for root in (tmp_path, pipe):
        with pytest.raises(UsageError):
            load(f"{kind}:{root}")


# tables


def test_paths_in_a_table(tmp_path: Path) -> None:
    save_image(tmp_path / "data" / "a.png")
    outside = tmp_path / "b.png"
    save_image(outside, 9)
    os.mkfifo(tmp_path / "pipe.png")
    rows = [
        "a.png",
        str(outside),
        f"file://{outside}",
        "../b.png",
        "x/../../b.png",
        f"file://{tmp_path}/pipe.png",
        f"simplecache::file://{outside}",
        f"local://{tmp_path}/pipe.png",
        "nosuch://x/y.png",
        "x" * 5000,
    ]
    text = "".join(f'"{row}",caption {number}\n' for number, row in enumerate(rows))
    (tmp_path / "data" / "t.csv").write_text("path,caption\n" + text)
    before = tree(tmp_path)
    found = load(f"table:{tmp_path}/data/t.csv")
    assert [one.uri for one in found.samples] == rows[:3]
    assert [(problem.kind, problem.lost_image) for problem in found.problems] == [
        ("bad-record", True),
        ("bad-record", True),
        ("bad-record", True),
        ("unreadable-file", True),
        ("unreadable-file", True),
        ("unreadable-file", True),
        ("unreadable-file", True),
    ]
    assert found.problems[0].detail == "'../b.png' leaves the folder of the table; write an absolute path"
    assert tree(tmp_path) == before


def test_a_parquet_table_of_odd_types(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "7"):
        save_image(tmp_path / "scratch.png")
        (tmp_path / name).write_bytes((tmp_path / "scratch.png").read_bytes())
    table = pa.table(
        {
            "path": pa.array([b"a.png", b"b.png", None, b"c.png", b"caf\xe9.png"], pa.binary()),
            "caption": pa.array([["A.", None], None, ["B."], [], ["D."]], pa.list_(pa.string())),
            "split": pa.array([1.5, None, 2.0, None, None], pa.float64()),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    found = load(f"table:{tmp_path}/t.parquet")
    assert [(one.sample_id, one.split, one.captions) for one in found.samples] == [("a.png", "1.5", ("A.",))]
    assert told(found.problems) == [
        ("bad-record", "t.parquet row 2", False),
        ("empty-caption", "a.png", False),
        ("empty-caption", "b.png", False),
        ("no-caption", "b.png", True),
        ("no-caption", "c.png", True),
        ("bad-record", "caf\ufffd.png", True),
    ]
    nested = pa.table({"path": [7], "caption": pa.array([{"en": "A."}])})
    pq.write_table(nested, tmp_path / "n.parquet")
    assert load(f"table:{tmp_path}/n.parquet").samples[0].captions == ("{'en': 'A.'}",)


def test_parquet_that_is_none(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    sink = io.BytesIO()
    pq.write_table(pa.table({"path": ["a.png"] * 1000, "caption": [f"caption {n}" for n in range(1000)]}), sink)
    whole = sink.getvalue()
    for content, said in (
        (b"", "not Parquet"),
        (b"PAR1" + bytes(100) + b"PAR1", "not Parquet"),
        (whole[:-100], "not Parquet"),
        (whole.replace(b"PAR1", b"PARE"), "not Parquet"),
    ):
        (tmp_path / "t.parquet").write_bytes(content)
        with pytest.raises(UsageError, match=said):
            load(f"table:{tmp_path}/t.parquet")
    damaged = bytearray(whole)
    damaged[10:60] = bytes(50)
    (tmp_path / "t.parquet").write_bytes(damaged)
    with pytest.raises(UsageError, match=r"no usable image; the first problem: t\.parquet: row 0 cannot be read"):
        load(f"table:{tmp_path}/t.parquet")


# folders and roots

_COCO, _KARPATHY = "annotations/captions_val2017.json", "dataset_flickr8k.json"
_ONE_IMAGE = '{"images": [{"id": 1, "file_name": "a.jpg", "filename": "a.jpg", "sentences": []}], "annotations": []}'


@pytest.mark.parametrize(
    ("kind", "files", "said"),
    [
        ("coco", {"readme.md": ""}, r"no annotations/captions_\*\.json; found readme\.md"),
        ("coco", {"annotations/x": ""}, r"annotations: no captions_\*\.json; found x"),
        ("coco", {_COCO: _ONE_IMAGE}, r"looked for val2017/, images/val2017/, images/; found annotations/"),
        ("coco", {_COCO: '{"images": ['}, r"captions_val2017\.json: not JSON \(Expecting value.*download or copy"),
        ("coco", {_COCO: '{"images": []}'}, r"captions_val2017\.json: no list 'annotations'; its keys are images"),
        ("karpathy", {"images.zip": ""}, r"no dataset_\*\.json; found images\.zip"),
        ("karpathy", {_KARPATHY: _ONE_IMAGE}, r"looked for images/, Images/, .*give it with \?images=FOLDER"),
        ("karpathy", {_KARPATHY: "[]"}, r"flickr8k\.json: holds a list, an object with images is wanted"),
        ("flickr", {"Flickr8k.lemma.token.txt": ""}, r"none of captions\.txt, .*; found Flickr8k\.lemma\.token\.txt"),
        ("flickr", {"captions.txt": "file,label\n"}, r"begins with 'file,label'; a header such as 'image,caption'"),
        ("flickr", {"captions.txt": "image,caption\n"}, r"looked for images/, Images/, .*; found captions\.txt"),
        ("imagefolder", {"1.jpg": ""}, r"no <class>/\*\.jpg and no <split>/<class>/\*\.jpg; found 1\.jpg"),
        ("webdataset", {"0.tar.gz": ""}, r"no \*\.tar in or below it; found 0\.tar\.gz"),
    ],
)
def test_a_root_without_the_published_form_says_what_it_has(
    kind: str, files: dict[str, str], said: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=said):
        load(f"{kind}:{tmp_path}")
    with pytest.raises(UsageError, match=r"nowhere: not there; .* holds "):
        load(f"{kind}:{tmp_path / 'nowhere'}")


def test_a_folder_that_leads_back_to_itself_and_one_without_end(tmp_path: Path) -> None:
    save_image(tmp_path / "wolf" / "a.png")
    (tmp_path / "wolf" / "again").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    image = (tmp_path / "wolf" / "a.png").read_bytes()
    here, deep = os.getcwd(), 1100  # noqa: PTH109 - deeper than functions may call each other
    os.chdir(tmp_path / "wolf")
    try:
        for _ in range(deep):
            os.mkdir("d")  # noqa: PTH102
            os.chdir("d")
        Path("b.png").write_bytes(image)
        found = load(f"imagefolder:{tmp_path}")
        with pytest.raises(UsageError) as tars:
            load(f"webdataset:{tmp_path}")
    finally:
        # nor can pytest remove it
        Path("b.png").unlink()
        for _ in range(deep):
            os.chdir("..")
            os.rmdir("d")  # noqa: PTH106
        os.chdir(here)
    assert [one.uri for one in found.samples] == ["wolf/a.png", "wolf/" + "d/" * deep + "b.png"]
    assert str(tars.value).startswith(f"webdataset:{tmp_path}: nested too deeply") or "no *.tar" in str(tars.value)


@pytest.mark.parametrize("kind", ["coco", "karpathy", "flickr", "webdataset", "imagefolder", "table", "scenes"])
@pytest.mark.parametrize("root", ["nul\0", "caf\udce9", "x" * 5000, "/dev/null/x", "/dev/zero", "/dev/stdin"])
def test_roots_that_cannot_be(kind: str, root: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(f"{kind}:{root}")
    str(caught.value).encode()


# servers


@pytest.fixture
def server() -> Iterator[str]:
    """Sends every request on to a signed address that is refused, as a hub does whose links have expired."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            signed = "X-Amz-Signature=" in self.path
            self.send_response(403 if signed else 302)
            if not signed:
                self.send_header("Location", "/x?X-Amz-Credential=SECRET1&X-Amz-Signature=SECRET2")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with served(Handler) as address:
        yield address


def test_a_redirect_to_a_signed_address_does_not_show_the_signature(server: str, tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text(f"path,caption\na.png,A.\n{server}/b.png,B.\n")
    found = load(f"table:{tmp_path}/t.csv")
    [problem] = found.problems
    assert (problem.kind, problem.lost_image) == ("unreadable-file", True)
    assert "403" in problem.detail
    assert "SECRET" not in problem.detail + problem.where
    with pytest.raises(UsageError) as caught:
        load(f"table:{server}/t.csv")
    assert "SECRET" not in str(caught.value)


# the sums


def hostile_tar(home: Path, image: bytes) -> tuple[str, int]:
    """A tar of the members above, and captionless and undecodable images; the number of images."""
    more = [("mute.png", image), ("broken.jpg", b"not an image"), ("broken.txt", b"Broken."), ("empty.jpg", b"")]
    more_members = [member(name, data) for name, data in [*more, ("empty.txt", b"Empty.")]]
    write_tar(home / "x.tar", [*hostile_members(image), *more_members])
    return f"webdataset:{home}/x.tar", 4 + 4 + 1 + 3


def hostile_json(home: Path, image: bytes) -> tuple[str, int]:
    """COCO with records that miss fields, climb, or name one image twice."""
    (home / "val").mkdir()
    for name in ("a.png", "b.png"):
        (home / "val" / name).write_bytes(image)
    (home / "val" / "c.png").write_bytes(image[:40])
    images: list[Any] = [{"id": number, "file_name": f"{name}.png"} for number, name in enumerate("abc")]
    images += [{"id": 7}, {"file_name": "a.png"}, {"id": 8, "file_name": "../a.png"}, {"id": 9, "file_name": "no.png"}]
    numbers = [one["id"] for one in images if "id" in one]
    annotations: list[Any] = [{"image_id": number, "caption": "A caption."} for number in numbers if number != 1]
    (home / "annotations").mkdir()
    text = json.dumps({"images": images, "annotations": [*annotations, {"caption": "?"}, {"image_id": 0}]})
    (home / "annotations" / "captions_val.json").write_text(text)
    return f"coco:{home}", len(images)


@pytest.mark.parametrize("hostile", [hostile_tar, hostile_json], ids=["tar", "json"])
def test_all_that_went_in_is_accounted_for_by_info(
    hostile: Callable[[Path, bytes], tuple[str, int]], tiny_teacher: Path, tmp_path: Path
) -> None:
    image = save_image(tmp_path / "scratch" / "a.png")
    (tmp_path / "data").mkdir()
    spec, images = hostile(tmp_path / "data", image)
    before, cache = tree(tmp_path), str(tmp_path / "c")
    precompute(PrecomputeConfig(dataset=spec, teacher=f"local-dir:{tiny_teacher}", cache=cache, device="cpu"))
    assert [name for name in tree(tmp_path) if name.partition("/")[0] != "c"] == before
    told = CliRunner().invoke(app, ["info", cache, "--json"])
    found = json.loads(told.stdout)
    parts = [found["images_encoded"], found["images_quarantined"], found["lost_images"]]
    assert sum(parts) == images
    assert min(parts) > 0
    shown = CliRunner().invoke(app, ["info", cache], env={"COLUMNS": "200"}).stdout
    encoded, quarantined, lost = parts
    assert f"{images} = {encoded} encoded + {quarantined} quarantined + {lost} without a row" in shown
    reader = EmbeddingReader(cache)
    assert len(reader.image_rows()) == encoded
    assert [bool(row.reason and row.detail) for row in reader.quarantined] == [True] * quarantined
    assert sum(reader.problems["lost_image"].to_pylist()) == lost
    assert all(reader.problems["detail"].to_pylist())
