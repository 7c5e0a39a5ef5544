"""Odd captions in every form that carries text: kept as they are, mended and counted, or left out and counted."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from teacher_cache.pipeline.data.datasets.records import MAX_CAPTION_CHARACTERS
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.pipeline.data.dataset_files import load, save_image, told, write_tar
from tests.pipeline.precompute.conftest import make_config

# written as bytes; what becomes of it (None: nothing); the kind of the problem, if any
BROKEN = "bad-record"
ANYWHERE: dict[str, tuple[bytes, str | None, str | None]] = {
    "plain": (b"A dog runs.", "A dog runs.", None),
    "broken": (b"A caf\xe9.", "A caf\ufffd.", BROKEN),
    "cut": ("A café".encode()[:-1], "A caf\ufffd", BROKEN),
    "half-pair": (b"\xed\xa0\xbd dog", "\ufffd\ufffd\ufffd dog", BROKEN),
    "nul": (b"a\0dog", "a\0dog", None),
    "emoji": ("😀🐕‍🦺".encode(), "😀🐕‍🦺", None),
    "empty": (b"", None, "empty-caption"),
    "white": (" \t\u00a0\u3000 ".encode(), None, "empty-caption"),
    "right-to-left": ("כלב \u202e رכض e\u0301\u0323".encode(), "כלב \u202e رכض e\u0301\u0323", None),
    "markup": (b"<end_of_text> &lt;b&gt; &amp; <start_of_text>", "<end_of_text> &lt;b&gt; &amp; <start_of_text>", None),
    "separator": ("one\u2028two\u2029three\x85four".encode(), "one\u2028two\u2029three\x85four", None),
    "escape": (b"\x1b[31mred\x1b[0m", "\x1b[31mred\x1b[0m", None),
    "10,000": (b"ab " * 3333 + b"c", "ab " * 3333 + "c", None),
    "one-word": (b"x" * MAX_CAPTION_CHARACTERS, "x" * MAX_CAPTION_CHARACTERS, None),
    "too-long": (b"x" * (MAX_CAPTION_CHARACTERS + 1), None, BROKEN),
    "1-MB": (b"dog " * 250_000, None, BROKEN),
}


def flickr_csv(root: Path, name: str, text: bytes) -> str:
    (root / "captions.txt").write_bytes(
        b'image,caption\n%s.png,"%s"\n%s.png,ok\n' % (name.encode(), text, name.encode())
    )
    save_image(root / "images" / f"{name}.png")
    return f"flickr:{root}"


def flickr_token(root: Path, name: str, text: bytes) -> str:
    (root / "Flickr8k.token.txt").write_bytes(b"%s.png#0\t%s\n%s.png#1\tok\n" % (name.encode(), text, name.encode()))
    save_image(root / "images" / f"{name}.png")
    return f"flickr:{root}"


def flickr_pipes(root: Path, name: str, text: bytes) -> str:
    head = b"image_name| comment_number| comment\n"
    (root / "results.csv").write_bytes(head + b"%s.png| 0| %s\n%s.png| 1| ok\n" % (name.encode(), text, name.encode()))
    save_image(root / "images" / f"{name}.png")
    return f"flickr:{root}"


def quoted(text: bytes) -> bytes:
    """A JSON string that holds these bytes as they are, escaped only where JSON has to."""
    escaped = text.decode("latin-1").translate({number: f"\\u{number:04x}" for number in (*range(32), 34, 92)})
    return b'"' + escaped.encode("latin-1") + b'"'


def coco(root: Path, name: str, text: bytes) -> str:
    (root / "annotations").mkdir()
    (root / "annotations" / "captions_val.json").write_bytes(
        b'{"images":[{"id":1,"file_name":"%s.png"}],"annotations":[{"image_id":1,"caption":%s},'
        b'{"image_id":1,"caption":"ok"}]}' % (name.encode(), quoted(text))
    )
    save_image(root / "val" / f"{name}.png")
    return f"coco:{root}"


def karpathy(root: Path, name: str, text: bytes) -> str:
    (root / "dataset.json").write_bytes(
        b'{"images":[{"filename":"%s.png","split":"","sentences":[{"raw":%s},{"raw":"ok"}]}]}'
        % (name.encode(), quoted(text))
    )
    save_image(root / "images" / f"{name}.png")
    return f"karpathy:{root}"


def webdataset(root: Path, name: str, members: dict[str, bytes]) -> str:
    files = {"png": save_image(root / "scratch" / "a.png"), **members}
    write_tar(root / "x.tar", [(f"{name}.{ending}", data) for ending, data in files.items()])
    return f"webdataset:{root}/x.tar?encoding=utf-8"


def webdataset_json(root: Path, name: str, text: bytes) -> str:
    return webdataset(root, name, {"json": b'{"captions": [%s, "ok"]}' % quoted(text)})


def webdataset_lines(root: Path, name: str, text: bytes) -> str:
    return webdataset(root, name, {"txt": text + b"\nok\n"}) + "&txt=lines"


def table_csv(root: Path, name: str, text: bytes) -> str:
    (root / "t.csv").write_bytes(b'path,caption\n%s.png,"%s"\n%s.png,ok\n' % (name.encode(), text, name.encode()))
    save_image(root / f"{name}.png")
    return f"table:{root}/t.csv?encoding=utf-8"


def _parquet(root: Path, name: str, captions: pa.Array) -> str:
    pq.write_table(pa.table({"path": [f"{name}.png"] * len(captions), "caption": captions}), root / "t.parquet")
    save_image(root / f"{name}.png")
    return f"table:{root}/t.parquet"


def parquet(root: Path, name: str, text: bytes) -> str:
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, len(text), len(text) + 2)))
    return _parquet(root, name, pa.StringArray.from_buffers(2, offsets, pa.py_buffer(text + b"ok")))


def parquet_list(root: Path, name: str, text: bytes) -> str:
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, len(text), len(text) + 2)))
    strings = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(text + b"ok"))
    return _parquet(root, name, pa.ListArray.from_arrays(pa.array([0, 2], pa.int32()), strings))


def parquet_binary(root: Path, name: str, text: bytes) -> str:
    return _parquet(root, name, pa.array([text, b"ok"], pa.binary()))


FORMS = [
    flickr_csv, flickr_token, flickr_pipes, coco, karpathy, webdataset_json, webdataset_lines, table_csv,
    parquet, parquet_list, parquet_binary,
]  # fmt: skip
# csv has a limit of its own for a field, and so loses the line; str.splitlines splits at each of these
OTHERWISE: dict[tuple[Callable[[Path, str, bytes], str], str], tuple[list[str], list[str]]] = {
    (webdataset_lines, "separator"): (["one", "two", "three", "four", "ok"], []),
}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("case", ANYWHERE)
def test_each_caption_in_each_form(form: Callable[[Path, str, bytes], str], case: str, tmp_path: Path) -> None:
    text, kept, problem = ANYWHERE[case]
    found = load(form(tmp_path, "a", text))
    wanted, problems = OTHERWISE.get(
        (form, case), ([kept, "ok"] if kept is not None else ["ok"], [problem] if problem else [])
    )
    assert [list(sample.captions) for sample in found.samples] == [wanted]
    assert [(one.kind, one.lost_image) for one in found.problems] == [(kind, False) for kind in problems]


@pytest.mark.parametrize("form", [coco, karpathy, webdataset_json], ids=lambda form: form.__name__)
def test_half_a_surrogate_pair_that_json_escapes(form: Callable[[Path, str, bytes], str], tmp_path: Path) -> None:
    if form is webdataset_json:
        spec = webdataset(tmp_path, "a", {"json": rb'{"captions": ["\ud83d", "ok"]}'})
    else:
        spec = form(tmp_path, "a", b"MARK")
        for path in tmp_path.rglob("*.json"):
            path.write_bytes(path.read_bytes().replace(b'"MARK"', rb'"\ud83d"'))
    found = load(spec)
    assert [sample.captions for sample in found.samples] == [("\ufffd", "ok")]
    assert [(one.kind, one.lost_image) for one in found.problems] == [("bad-record", False)]


def test_line_ends_marks_and_quotes_of_a_csv(tmp_path: Path) -> None:
    for name in "abc":
        save_image(tmp_path / f"{name}.png")
    (tmp_path / "t.csv").write_bytes(
        b'\xef\xbb\xbfpath,caption\r\na.png,"one\r\ntwo, ""three"""\r\nb.png,\r\nc.png,"never closed\r\n'
    )
    found = load(f"table:{tmp_path}/t.csv")
    assert [(sample.uri, sample.captions) for sample in found.samples] == [("a.png", ('one\r\ntwo, "three"',))]
    assert told(found.problems) == [
        ("bad-record", "t.csv line 5", False),
        ("empty-caption", "b.png", False),
        ("no-caption", "b.png", True),
    ]


def test_a_field_beyond_csvs_own_limit_costs_its_row(tmp_path: Path) -> None:
    for name in "ab":
        save_image(tmp_path / f"{name}.png")
    (tmp_path / "t.csv").write_text(f"path,caption\na.png,{'x' * csv.field_size_limit()}y\nb.png,B.\n")
    found = load(f"table:{tmp_path}/t.csv")
    assert [sample.uri for sample in found.samples] == ["b.png"]
    assert next((one.kind, one.where) for one in found.problems) == ("bad-record", "t.csv line 2")


def test_class_names_that_are_no_text(tmp_path: Path) -> None:
    save_image(tmp_path / "wolf" / "a.png")
    bad = Path(bytes(tmp_path).decode()) / "caf\udce9"
    save_image(bad / "b.png")
    save_image(tmp_path / "a\nb" / "c.png")
    save_image(tmp_path / "ليل" / "d.png")
    found = load(f"imagefolder:{tmp_path}")
    assert [sample.uri for sample in found.samples] == ["wolf/a.png", "ليل/d.png"]
    assert told(found.problems) == [("bad-record", "a\\nb/c.png", True), ("bad-record", "caf\ufffd/b.png", True)]
    (tmp_path / "names.json").write_bytes(
        b'\xef\xbb\xbf{"wolf": "w\xffolf", "a\\nb": "x", "\xd9\x84\xd9\x8a\xd9\x84": "\\udcff"}'
    )
    for path in bad.iterdir():
        path.unlink()
    bad.rmdir()
    found = load(f"imagefolder:{tmp_path}?classes={tmp_path}/names.json")
    assert [sample.captions[0] for sample in found.samples] == ["a photo of a w\ufffdolf.", "a photo of a \ufffd."]


@pytest.mark.timeout(300)
def test_all_that_is_kept_is_encoded(tiny_teacher: Path, tmp_path: Path) -> None:
    lines = []
    for case, (text, _, _) in ANYWHERE.items():
        name = f"{case.replace(',', '')}.png"
        save_image(tmp_path / "data" / "images" / name)
        shown = text.decode(errors="surrogateescape")
        sink = io.StringIO()
        csv.writer(sink).writerow([name, shown])
        lines.append(sink.getvalue())
    (tmp_path / "data" / "captions.txt").write_text("image,caption\n" + "".join(lines), errors="surrogateescape")
    result = precompute(make_config(tmp_path / "data", tiny_teacher, tmp_path / "c"))
    kept = [text for _, text, _ in ANYWHERE.values() if text is not None]
    reader = EmbeddingReader(str(tmp_path / "c"))
    assert reader.captions["text"].to_pylist() == kept
    assert json.dumps(result.model_dump(mode="json"))
    assert (result.images, result.lost_images) == (len(kept), len(ANYWHERE) - len(kept))
