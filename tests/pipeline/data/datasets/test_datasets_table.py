"""Tables of paths and captions: CSV, TSV, Parquet; files and URLs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from teacher_cache.pipeline.data.datasets.records import Sample
from teacher_cache.pipeline.data.datasets.samples import ImageSource, load_samples
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec, check_dataset
from teacher_cache.storage.errors import UsageError
from tests.pipeline.data.dataset_files import load, read, save_image, served, told


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves a folder without a word; /broken answers 500."""

    def do_GET(self) -> None:
        if self.path.startswith("/broken"):
            self.send_error(500)
        else:
            super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Address of a loopback server of tmp_path/served."""
    (tmp_path / "served").mkdir()
    with served(partial(QuietHandler, directory=str(tmp_path / "served"))) as address:
        yield address


def test_rows_of_one_path_are_one_image(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text('path,caption,split\nb.jpg,First.,train\na.png,"One, two.",test\nb.jpg,"Second\nline.",train\n')
    assert read("table", table) == (
        [
            Sample("b.jpg", "b.jpg", "train", ("First.", "Second\nline.")),
            Sample("a.png", "a.png", "test", ("One, two.",)),
        ],
        [],
    )


def test_paths_are_relative_to_the_table(tmp_path: Path) -> None:
    save_image(tmp_path / "data" / "images" / "a.jpg")
    outside = tmp_path / "elsewhere.webp"
    save_image(outside, 1)
    table = tmp_path / "data" / "pairs.tsv"
    table.write_text(f"FilePath\tText\nimages/a.jpg\tA.\n{outside}\tAn absolute path.\nimages/b.jpg\tGone.\n")
    found, digests = load_samples(DatasetSpec.parse(f"table:{table}"))
    assert [sample.uri for sample in found.samples] == ["images/a.jpg", str(outside)]
    assert (found.root, len(set(digests))) == (str(tmp_path / "data"), 2)
    assert told(found.problems) == [("missing-file", "images/b.jpg", True)]


@pytest.mark.parametrize("header", ["path,caption", "image_path,text", "url,TITLE", " filepath , Caption "])
def test_columns_are_found_by_their_usual_names(tmp_path: Path, header: str) -> None:
    (tmp_path / "t.csv").write_text(f"{header}\na.jpg,A.\n")
    assert read("table", tmp_path / "t.csv")[0] == [Sample("a.jpg", "a.jpg", "", ("A.",))]


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("path;caption\nb.jpg;One, two.\n", {}),
        ('"path";"caption, english"\nb.jpg;One, two.\n', {"caption": "caption, english"}),
        ("\ufeffcaption;path\r\nOne, two.;b.jpg\r\n", {}),
        ("path\tcaption\nb.jpg\tOne, two.\n", {}),
        ("nr;file;what, in words\n1;b.jpg;One, two.\n", {"path": "file", "caption": "what, in words"}),
        ('path,caption;x\nb.jpg,"One, two."\n', {"caption": "caption;x"}),
    ],
)
def test_the_delimiter_sets_the_column_of_paths_apart(tmp_path: Path, text: str, options: dict[str, str]) -> None:
    (tmp_path / "t.csv").write_text(text)
    assert read("table", tmp_path / "t.csv", **options) == ([Sample("b.jpg", "b.jpg", "", ("One, two.",))], [])


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16", "UTF-8", "mac_roman"])
def test_a_table_in_another_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "t.csv").write_bytes("path;caption\nä.jpg;Ein Café.\n".encode(encoding))
    assert read("table", tmp_path / "t.csv", encoding=encoding)[0] == [Sample("ä.jpg", "ä.jpg", "", ("Ein Café.",))]


def test_broken_characters_stop_and_the_way_out_is_named(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes(b"path,caption\na.jpg,A.\nb.jpg,A caf\xe9.\n")
    with pytest.raises(UsageError, match=r"t\.csv line 3: not UTF-8 at '.*caf.*'\. Save it as .* \?encoding=cp1252"):
        read("table", table)
    samples, problems = read("table", table, encoding="utf-8")
    assert [sample.captions for sample in samples] == [("A.",), ("A caf\ufffd.",)]
    assert told(problems) == [("bad-record", "b.jpg", False)]
    table.write_text("path,caption\na.jpg,A.\n")
    with pytest.raises(UsageError, match=r"t\.csv: not utf-16 \(.*\); is \?encoding= right\?"):
        read("table", table, encoding="utf-16")


def test_captions_left_out(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,caption\na.jpg,A.\na.jpg,B.\nb.jpg,\n")
    (tmp_path / "u.csv").write_text("path,number\na.jpg,1\nb.jpg,2\n")
    alone = [Sample("a.jpg", "a.jpg", "", ()), Sample("b.jpg", "b.jpg", "", ())]
    assert read("table", tmp_path / "t.csv", caption="") == (alone, [])
    assert read("table", tmp_path / "u.csv", caption="") == (alone, [])
    with pytest.raises(UsageError, match=r"no column for the caption; .*, or take the images alone with \?caption=$"):
        read("table", tmp_path / "u.csv")


def test_options_name_the_columns(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("path,caption,file,words,fold,number\nx,x,a.jpg,A.,3,0017\n")
    samples, _ = read("table", table, path="file", caption="words", split="fold", id="number")
    assert samples == [Sample("0017", "a.jpg", "3", ("A.",))]


def test_an_empty_option_leaves_the_column_out(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("id,path,caption\n1,a.jpg,One.\n2,a.jpg,Two.\n")
    samples, problems = read("table", table)
    assert samples == [Sample("1", "a.jpg", "", ("One.",))]
    assert told(problems) == [("bad-record", "t.csv line 3", False)]
    assert "the id '2' here and '1' in an earlier row (?id= leaves the ids out)" in problems[0].detail
    found = DatasetSpec.parse(f"table:{table}?id=")
    assert read("table", table, **dict(found.options)) == ([Sample("a.jpg", "a.jpg", "", ("One.", "Two."))], [])


def test_parquet_in_batches_with_lists_and_nulls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_cache.pipeline.data.datasets.columnar._BATCH_ROWS", 2)
    columns = {
        "url": ["a.jpg", "b.jpg", None, "a.jpg", "c.jpg"],
        "caption": [["A.", "Also a."], ["B."], ["Nobody's."], ["More."], None],
        "sample_id": [1, 2, 3, 1, 4],
        "split": pa.array(["train", None, None, "train", None]).dictionary_encode(),
        "unused": [b"\xff"] * 5,
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    samples, problems = read("table", tmp_path / "t.parquet")
    assert samples == [Sample("1", "a.jpg", "train", ("A.", "Also a.", "More.")), Sample("2", "b.jpg", "", ("B.",))]
    assert told(problems) == [
        ("bad-record", "t.parquet row 2", False),
        ("empty-caption", "4", False),
        ("no-caption", "4", True),
    ]


def test_columns_that_are_not_read_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text("filename,title,subset\na.jpg,A.,train\n")
    for _ in range(2):
        assert read("table", tmp_path / "t.csv")[0][0].split == ""
    said = capsys.readouterr().err
    assert said.count("t.csv: read path=filename, caption=title; not read: subset. A column of splits is named by") == 1
    assert read("table", tmp_path / "t.csv", split="subset")[0][0].split == "train"
    assert not capsys.readouterr().err


def test_a_column_of_bytes_holds_pictures_or_paths(tmp_path: Path) -> None:
    picture = save_image(tmp_path / "a.jpg")
    column = pa.array([None, picture], pa.binary())
    pq.write_table(pa.table({"image": column, "text": ["A.", "B."]}), tmp_path / "a.parquet")
    samples, _ = read("table", tmp_path / "a.parquet")
    assert [sample.uri for sample in samples] == ["a.parquet#image/0", "a.parquet#image/1"]
    pq.write_table(pa.table({"path": pa.array([b"a.jpg"]), "text": ["A."]}), tmp_path / "b.parquet")
    assert read("table", tmp_path / "b.parquet") == ([Sample("a.jpg", "a.jpg", "", ("A.",))], [])


def test_each_thing_wrong_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes(
        b"path,caption,split\n"
        b"a.jpg,A.,train\n"
        b"a.jpg,In two splits.,test\n"  # line 3
        b"a.jpg,too,many,fields\n"
        b"only.jpg\n"
        b"only.jpg,\n"
        b',"No path\nat all.",\n'
        b"../out.jpg,Outside.,train\n"
        b'a.jpg,"quoted" and not,train\n'
        b"a.jpg,A caf\xe9.,train\n"
        b"n\xe4me.jpg,Not a name.,train\n"
        b"\n"
        b"e.jpg, ,train\n"
    )
    samples, problems = read("table", table, encoding="utf-8")
    assert samples == [Sample("a.jpg", "a.jpg", "train", ("A.", "A caf\ufffd."))]
    assert told(problems) == [
        ("bad-record", "t.csv line 3", False),
        ("bad-record", "t.csv line 4", False),
        ("bad-record", "t.csv line 5", True),
        ("bad-record", "t.csv line 6", False),  # only.jpg is lost once
        ("bad-record", "t.csv lines 7-8", False),
        ("bad-record", "t.csv line 9", True),
        ("bad-record", "t.csv line 10", False),
        ("bad-record", "a.jpg", False),
        ("bad-record", "n\ufffdme.jpg", True),
        ("empty-caption", "e.jpg", False),
        ("no-caption", "e.jpg", True),
    ]
    details = [problem.detail for problem in problems]
    assert (
        details[0] == "a.jpg has split 'test' here and 'train' in an earlier row; the caption of this row is left out"
    )
    assert details[1] == "4 fields where the header has 3; a caption with a comma stands in quotes"
    assert details[5] == "'../out.jpg' leaves the folder of the table; write an absolute path"


def test_a_space_before_a_quote_and_bars_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('path, caption\na.jpg, "One, two."\nb.jpg, Three.\n')
    assert [(one.uri, one.captions) for one in read("table", tmp_path / "t.csv")[0]] == [
        ("a.jpg", ("One, two.",)),
        ("b.jpg", ("Three.",)),
    ]
    (tmp_path / "t.csv").write_text("path|caption\na.jpg|One, two.\n")
    assert read("table", tmp_path / "t.csv")[0][0].captions == ("One, two.",)


def test_an_empty_cell_takes_the_split_of_another_row(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,caption,split\na.jpg,A.,\na.jpg,B.,test\na.jpg,C.,\nb.jpg,D.,\n")
    samples, problems = read("table", tmp_path / "t.csv")
    assert [(one.split, one.captions) for one in samples] == [("test", ("A.", "B.", "C.")), ("", ("D.",))]
    assert problems == []


def test_a_table_without_the_columns_says_which_it_has(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("photo,caption\na,b\n")
    with pytest.raises(
        ValueError, match=r"no column for the path; looked for path, .*; its columns are photo, caption"
    ):
        read("table", table)
    with pytest.raises(ValueError, match=r"no column 'words' for caption=\. Its columns are photo, caption"):
        read("table", table, path="photo", caption="words")
    table.write_text("")
    with pytest.raises(ValueError, match=r"t\.csv: is empty; write a header, path,caption"):
        read("table", table)
    table.write_text("path,caption\n")
    with pytest.raises(ValueError, match=r"t\.csv: has a header and no row below it"):
        check_dataset(f"table:{table}")
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):  # the first has a byte-order mark
        table.write_text("path,caption\na.jpg,b\n", encoding=encoding)
        with pytest.raises(ValueError, match=rf"t\.csv: not UTF-8; .* add \?encoding={encoding}$"):
            read("table", table)
        assert [sample.uri for sample in read("table", table, encoding=encoding)[0]] == ["a.jpg"]
    table.write_text("")
    with pytest.raises(ValueError, match=r"nowhere\.csv: not there; .* holds t\.csv"):
        read("table", tmp_path / "nowhere.csv")
    with pytest.raises(ValueError, match=r"is a folder without Parquet or Arrow files; name the table in it"):
        read("table", tmp_path)
    (tmp_path / "t.parquet").write_text("path,caption\n")
    with pytest.raises(ValueError, match=r"t\.parquet: not Parquet"):
        read("table", tmp_path / "t.parquet")


def test_images_and_tables_behind_urls(tmp_path: Path, server: str) -> None:
    content = save_image(tmp_path / "served" / "images" / "a.jpg", 7)
    save_image(tmp_path / "served" / "images" / "b.jpg", 8)
    (tmp_path / "served" / "pairs.csv").write_text(
        f"url,caption\n{server}/images/a.jpg,A.\nimages/b.jpg,Relative to the table.\n{server}/images/gone.jpg,G.\n"
        f"{server}/broken.jpg,B.\nnosuch://host/c.jpg,C.\n"
    )
    (tmp_path / "local.csv").write_bytes((tmp_path / "served" / "pairs.csv").read_bytes())

    found = load(f"table:{server}/pairs.csv")
    assert [sample.uri for sample in found.samples] == [f"{server}/images/a.jpg", "images/b.jpg"]
    assert found.root == server
    assert told(found.problems) == [
        ("missing-file", f"{server}/images/gone.jpg", True),
        ("unreadable-file", f"{server}/broken.jpg", True),
        ("unreadable-file", "nosuch://host/c.jpg", True),
    ]
    assert "500" in found.problems[1].detail
    assert ImageSource(found.root).read(found.samples[0].uri) == content

    # the same rows in a local table: what is relative is looked for beside it
    found = load(f"table:{tmp_path}/local.csv")
    assert [sample.uri for sample in found.samples] == [f"{server}/images/a.jpg"]


def test_a_table_url_that_fails_is_a_usage_error(server: str) -> None:
    with pytest.raises(ValueError, match=r"gone\.csv: no table there that can be read"):
        read("table", f"{server}/gone.csv")
    with pytest.raises(ValueError, match=r"broken\.csv: no table there that can be read"):
        read("table", f"{server}/broken.csv")
    with pytest.raises(ValueError, match=r"nosuch://x/t\.csv: no table .* \(ValueError: Protocol not known"):
        read("table", "nosuch://x/t.csv")


@pytest.mark.parametrize("columnar", [False, True], ids=["csv", "parquet"])
def test_captions_of_kinds_in_columns(tmp_path: Path, columnar: bool) -> None:
    """Sorted by kind, whatever the order of the columns; an empty cell is no caption, and no problem."""
    rows = [("a.jpg", "Blip.", "Alt."), ("b.jpg", "", "Only alt."), ("a.jpg", "Blip again.", ""), ("c.jpg", "", "")]
    table = tmp_path / ("pairs.parquet" if columnar else "pairs.csv")
    if columnar:
        columns = [[value or None for value in column] for column in zip(*rows, strict=True)]
        columns[1] = [value and [value] for value in columns[1]]  # lists of captions
        pq.write_table(pa.table(dict(zip(("path", "blip", "alt:text"), columns, strict=True))), table)
    else:
        table.write_text("\n".join(map(",".join, [("path", "blip", "alt:text"), *rows])) + "\n")
    samples, problems = read("table", table, caption="synthetic:blip,real:alt:text")
    assert samples == [
        Sample("a.jpg", "a.jpg", "", ("Alt.", "Blip.", "Blip again."), kinds=("real", "synthetic", "synthetic")),
        Sample("b.jpg", "b.jpg", "", ("Only alt.",), kinds=("real",)),
    ]
    assert [problem.kind for problem in problems] == ["no-caption"]
    assert [(one.captions, one.kinds) for one in read("table", table, caption="alt:text")[0]] == [
        (("Alt.",), ()),
        (("Only alt.",), ()),
    ]


def test_kinds_in_a_column_of_their_own(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text("path,caption,by\na.jpg,Made.,synthetic\na.jpg,Said., real \nb.jpg,Whose?,\nb.jpg,So.,real\n")
    samples, problems = read("table", table, kind="by")
    assert samples == [
        Sample("a.jpg", "a.jpg", "", ("Said.", "Made."), kinds=("real", "synthetic")),
        Sample("b.jpg", "b.jpg", "", ("So.",), kinds=("real",)),
    ]
    assert [(problem.where, problem.lost_image) for problem in problems] == [("pairs.csv line 4", False)]
    assert "'' is no kind of captions" in problems[0].detail
    assert read("table", table)[0][0].kinds == ()  # a column is no kind unless it is named
    table.write_text("path,caption,by\n" + "".join(f"a.jpg,Caption {n}.,k{n}\n" for n in range(17)))
    with pytest.raises(UsageError, match=r"pairs.csv, column 'by': 17 kinds of captions, .* at most 16"):
        read("table", table, kind="by")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption": "real:caption,blip"}, "write each kind once"),
        ({"caption": "real:caption,real:by"}, "write each kind once"),
        ({"caption": "r al:caption"}, "'r al' is no kind of captions"),
        ({"caption": "real:blip"}, "no column 'blip' for caption:real=. Its columns are path, caption, by"),
        ({"caption": "real:caption", "kind": "by"}, "kind= and caption= both name kinds"),
        ({"kind": "bye"}, "no column 'bye' for kind=. Did you mean by?"),
    ],
)
def test_kinds_that_cannot_be_read_are_refused_early(tmp_path: Path, options: dict[str, str], message: str) -> None:
    (tmp_path / "pairs.csv").write_text("path,caption,by\na.jpg,A.,real\n")
    query = "&".join(f"{name}={value}" for name, value in options.items())
    with pytest.raises(UsageError) as error:
        check_dataset(f"table:{tmp_path}/pairs.csv?{query}")
    assert message in str(error.value)
