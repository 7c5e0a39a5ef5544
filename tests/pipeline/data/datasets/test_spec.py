"""The name of a dataset: the home folder, a kind that is left out, and what is wrong, all before torch is imported."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from teacher_cache.pipeline.data.datasets.samples import load_samples
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec, _guessed_kind, check_dataset
from teacher_cache.storage.errors import UsageError
from tests.pipeline.data.dataset_files import save_image


@pytest.mark.parametrize(
    ("typed", "root", "options"),
    [
        ("table:~/d/pairs.csv", "d/pairs.csv", ()),
        ("imagefolder:~?classes=~/names.json", "", (("classes", "names.json"),)),
        ("~/pairs.csv", "pairs.csv", ()),
    ],
)
def test_the_home_folder_is_expanded(
    typed: str, root: str, options: tuple[tuple[str, str], ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    spec = DatasetSpec.parse(typed)
    assert spec.root == str(tmp_path / root)
    assert spec.options == tuple((name, str(tmp_path / value)) for name, value in options)
    assert DatasetSpec.parse(str(spec)) == spec
    assert DatasetSpec.parse("table:a~/b.csv?caption=x~").root == "a~/b.csv"


@pytest.mark.parametrize(
    ("files", "path", "kind"),
    [
        (["pairs.csv"], "pairs.csv", "table"),
        (["PAIRS.TSV"], "PAIRS.TSV", "table"),
        (["pairs.parquet"], "pairs.parquet", "table"),
        (["x.tar"], "x.tar", "webdataset"),
        ([], "shards/{000..003}.tar", "webdataset"),
        (["shards/000.tar"], "shards", "webdataset"),
        (["shards/train/000.tar"], "shards", "webdataset"),
        (["d/annotations/captions_val2017.json", "d/val2017/a.png"], "d", "coco"),
        (["d/dataset_flickr8k.json", "d/images/a.png"], "d", "karpathy"),
        (["dataset_flickr8k.json"], "dataset_flickr8k.json", "karpathy"),
        (["d/captions.txt", "d/images/a.png"], "d", "flickr"),
        (["d/Flickr8k_text/Flickr8k.token.txt", "d/Flicker8k_Dataset/a.png"], "d", "flickr"),
        (["d/results.csv", "d/flickr30k_images/a.png"], "d", "flickr"),
        (["d/cat/a.png", "d/dog/b.png"], "d", "imagefolder"),
        (["d/train/cat/a.png", "d/train/dog/b.png", "d/readme.md"], "d", "imagefolder"),
        (["d/cat/a.png", "d/dog/b.png", "d/c.png"], "d", "images"),  # as class folders, c.png would be lost
        ([*(f"d/{name}/{n}.png" for name in ("cat", "dog") for n in range(10)), "d/cover.jpg"], "d", "imagefolder"),
        (["d/cat/a.png", "d/dog/b.png", "d/dog/b.txt"], "d", "images"),  # captions beside the pictures
        (["d/a.PNG"], "d", "images"),
        (["d/images/a.png"], "d", "images"),
        (["d/train/a.png", "d/test/b.png"], "d", "images"),
    ],
)
def test_a_kind_that_is_left_out_follows_from_the_path(
    files: list[str], path: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    spec = DatasetSpec.parse(f"{tmp_path}/{path}?holdout=10%")
    assert spec == DatasetSpec.parse(f"{kind}:{tmp_path}/{path}?holdout=10%")
    DatasetSpec.parse(f"{tmp_path}/{path}")
    said = capsys.readouterr().err.splitlines()
    beside = "d/c.png" in files
    assert len(said) == 1 + beside  # once, however often it is parsed
    if beside:
        assert said[0].endswith(f"without classes. For the classes write imagefolder:{tmp_path}/d")
    assert said[-1].startswith(f"{tmp_path}/{path}: no kind given, read as {kind}:{tmp_path}/{path}")


def test_a_url_needs_no_kind_where_its_ending_shows_it() -> None:
    assert DatasetSpec.parse("s3://bucket/pairs.parquet?caption=title").kind == "table"
    assert DatasetSpec.parse("https://host/{00..03}.tar").kind == "webdataset"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            "csv:HERE/pairs.csv",
            r"dataset kind 'csv' is not known\. Did you mean table\? Write KIND:PATH with one of coco",
        ),
        (
            "tabel:HERE/pairs.csv",
            r"dataset kind 'tabel' is not known\. Did you mean table or labelled\? Write .*table, scenes, labe",
        ),
        ("table:HERE/pair.csv", r"HERE/pair\.csv: not there; HERE/pairs\.csv is$"),
        ("HERE/pair.csv", r"HERE/pair\.csv: not there; HERE/pairs\.csv is$"),
        ("images:HERE/pcs/more", r"HERE/pcs/more: HERE/pcs is not there; HERE/pics is$"),
        (
            "coco:HERE/zzz",
            r"HERE/zzz: not there; HERE holds a\.jsonl, a\.tar\.gz, empty/, nohead\.csv, .*, pairs\.csv, pics/$",
        ),
        ("HERE", r"has no kind, and holds .*for a table in it write table:HERE/nohead\.csv; write KIND:PATH with"),
        ("HERE/empty", r"'HERE/empty' has no kind, and holds nothing; write KIND:PATH with one of coco, .*labelled$"),
        ("HERE/notes.doc", r"'HERE/notes\.doc' has no kind, and its ending shows none; write KIND:PATH with"),
        ("table:HERE/pairs.csv?captions=x", r"'table' has no option 'captions'; it has path, caption, split, id, enc"),
        ("table:HERE/pairs.csv?caption=words", r"pairs\.csv: no column 'words' for caption=\. .* are path, caption$"),
        (
            "table:HERE/pairs.csv?caption=captoin",
            r"for caption=\. Did you mean caption\? Its columns are path, caption$",
        ),
        ("table:HERE/nohead.csv", r"first line names a picture \(pics/0\.png\): is it a header\? Add a line path,capt"),
        ("table:HERE/PAIRS.CSV", r"HERE/PAIRS\.CSV: not there; HERE/pairs\.csv is$"),
        (
            "HERE/notes.txt",
            r"its ending shows none; if it is a table of path and caption, write table:HERE/notes\.txt$",
        ),
        ("HERE/a.jsonl", r"lines of JSON are not read: save it as CSV or Parquet with the columns path and caption$"),
        ("table:HERE/a.jsonl", r"a\.jsonl: JSON is no table here: save it as CSV or Parquet with the columns path"),
        ("HERE/a.tar.gz", r"its ending shows none; tars are read in place: unpack the compression first$"),
        (
            "table:HERE/pairs.csv?sep=;",
            r"no option 'sep': tabs, commas, semicolons and bars are told apart from the he",
        ),
        ("images:HERE/pairs.csv", r"HERE/pairs\.csv is a table: write table:HERE/pairs\.csv$"),
        ("coco:HERE/pairs.csv", r"HERE/pairs\.csv is a table: write table:HERE/pairs\.csv$"),
        ("table:HERE/pairs.csv&id=a", r"settings follow a question mark: 'table:HERE/pairs\.csv\?id=a'$"),
        (
            "table:HERE/pairs.csv?id=a?path=b",
            r"two question marks; join settings by &: 'table:HERE/pairs\.csv\?id=a&NAME",
        ),
        ("HERE/pairs.csv?holdout", r"the setting holdout has no value: 'HERE/pairs\.csv\?holdout=VALUE'$"),
        ("table:HERE/pairs.csv?encoding=latin-8x", r"encoding='latin-8x' is not known; write for example encoding="),
        ("imagefolder:HERE/pics", r"no <class>/\*\.jpg .*found 0\.png; for pictures without classes write images:HERE"),
        ("webdataset:HERE/empty/*.tar", r"HERE/empty/\*\.tar: no tar has such a name; HERE/empty holds nothing$"),
        (
            "webdataset:HERE/empty/{0..3}.tar",
            r"/\{0\.\.3\}\.tar: none of 0\.tar to 3\.tar is there; HERE/empty holds nothing$",
        ),
        ("webdataset:HERE/no/*.tar", r"HERE/no: not there; HERE holds "),
        (
            "webdataset:s3://b/w/*.tar",
            r"a folder behind a URL is not listed; write its tars as s3://b/w/\{000\.\.003\}",
        ),
        (
            "webdataset:a/0.tar,a/1.tar",
            r"commas and :: join no tars; write webdataset:FOLDER or :FOLDER/\{000,001\}\.tar",
        ),
        ("webdataset:a::b", r"commas and :: join no tars; write webdataset:FOLDER or"),
        ("labelled:HERE/no.tar", r"HERE/no\.tar: not there; HERE holds"),
        ("labelled:HERE/no/{0..3}.tar", r"/no/0\.tar: HERE/no is not there; HERE holds"),
        ("images:HERE/empty", r"HERE/empty: no picture in or below it; found nothing$"),
        ("images:HERE/pics?txt=line", r"images option txt='line' is not known; it is one of whole, lines"),
        ("images:HERE/pics?uncaptioned=yes", r"uncaptioned='yes' is not known; it is one of keep, drop"),
        ("images:HERE/pics?holdout=0", r"holdout='0' is no share of the images; write for example holdout=10%"),
        ("images:HERE/pics?holdout=ten", r"holdout='ten' is no share of the images"),
        ("images:HERE/pics?holdout=100%", r"holdout='100%' is no share of the images"),
    ],
)
def test_what_is_wrong_with_a_dataset_is_named_at_once(typed: str, said: str, tmp_path: Path) -> None:
    _guessed_kind.cache_clear()
    save_image(tmp_path / "pics" / "0.png")
    (tmp_path / "empty").mkdir()
    for name in ("a.jsonl", "a.tar.gz", "notes.doc", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "pairs.csv").write_text("path,caption\npics/0.png,A.\n")
    (tmp_path / "nohead.csv").write_text("pics/0.png,A.\n")
    with pytest.raises(UsageError, match=said.replace("HERE", str(tmp_path))):
        check_dataset(typed.replace("HERE", str(tmp_path)))


@pytest.mark.parametrize("listed", ["data/pictures/a.jpg", "a.jpg", "pictures/a", "pictures\\a.jpg"])
def test_a_picture_that_is_elsewhere_is_named(listed: str, tmp_path: Path) -> None:
    save_image(tmp_path / "pictures/a.jpg")
    (tmp_path / "pairs.csv").write_text(f"path,caption\n{listed},A.\n")
    slashes = "; write / for each backslash in the paths" * ("\\" in listed)
    with pytest.raises(UsageError, match=rf"does not exist; there is pictures/a\.jpg{slashes}$"):
        load_samples(DatasetSpec.parse(f"table:{tmp_path}/pairs.csv"))


@pytest.mark.parametrize("typed", ["shards", "webdataset:shards", "webdataset:shards/more/0.tar"])
def test_a_relative_path_to_nothing_is_told_by_the_folder_it_starts_from(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of Prefect's may run in another folder than the one that its user has in mind."""
    (tmp_path / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    said = f"{tmp_path}/shards is not there; {tmp_path} holds notes.txt; write the whole path if it lies elsewhere"
    with pytest.raises(UsageError, match=f": {re.escape(said)}$"):
        check_dataset(typed)


def test_the_check_takes_no_torch(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("path,caption\na.png,A.\n")
    code = (
        "import sys; from teacher_cache.pipeline.data.datasets.spec import check_dataset; check_dataset(sys.argv[1]); "
        "sys.exit(' '.join({'torch', 'open_clip', 'pandas', 'prefect'} & set(sys.modules)) or None)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "pairs.csv")], capture_output=True, text=True)
    assert run.stderr == f"{tmp_path}/pairs.csv: no kind given, read as table:{tmp_path}/pairs.csv\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,caption\n", r"pairs\.csv: lists no image\. Check the path, and the kind before it$"),
        (
            "path,caption\na.png,\nb.png,\n",
            r"no usable image among 2 listed; the first problem: a\.png: its caption is empty\. To cache images "
            r"without captions, add \?uncaptioned=keep$",
        ),
        (
            "path,caption\na.png,\nb.png,B.\n",
            r"among 2 listed; the first problem: a\.png: its caption is empty$",
        ),
    ],
)
def test_a_dataset_without_a_usable_image_says_why(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(UsageError, match=said):
        load_samples(DatasetSpec.parse(f"table:{tmp_path}/pairs.csv"))
