"""Parquet and Arrow files with pictures inside, as Hugging Face's ``datasets`` and others write them."""

from __future__ import annotations

import gc
import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfFileSystem, constants

from teacher_cache import Cache, PrecomputeConfig, precompute, train
from teacher_cache.pipeline.data.datasets import parquet_cells
from teacher_cache.pipeline.data.datasets.records import Sample
from teacher_cache.pipeline.data.datasets.samples import ImageSource, load_samples
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec
from teacher_cache.storage.errors import UsageError
from tests.hub_server import Hub, start_hub
from tests.pipeline.data.dataset_files import load, read, save_image
from tests.pipeline.train.train_work import make_student, trace, train_config

COUNT = 12


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Pictures at paths, with a table that names them."""
    folder = tmp_path / "files"
    lines = ["path,caption,split"]
    for number in range(COUNT):
        save_image(folder / f"{number:02d}.png", 20 * number)
        split = "test" if number < 3 else "train"
        lines += [f"{number:02d}.png,Picture {number}.,{split}", f"{number:02d}.png,No. {number}.,{split}"]
    (folder / "pairs.csv").write_text("\n".join(lines))
    return folder


def rows(pictures: Path, named: bool = True) -> list[dict[str, Any]]:
    return [
        {
            "image": {"bytes": path.read_bytes(), "path": path.name if named else None},
            "caption": [f"Picture {int(path.stem)}.", f"No. {int(path.stem)}."],
        }
        for path in sorted(pictures.glob("*.png"))
    ]


def write_arrow(path: Path, table: pa.Table, as_file: bool = False, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = pa.ipc.new_file if as_file else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=5)
    return path


def found(dataset: str) -> dict[str, tuple[str, tuple[str, ...], str]]:
    """Split, captions and digest of each picture, by its sample_id."""
    samples, digests = load_samples(DatasetSpec.parse(dataset))
    assert not samples.problems, samples.problems
    both = zip(samples.samples, digests, strict=True)
    return {sample.sample_id: (sample.split, sample.captions, digest) for sample, digest in both}


@pytest.mark.parametrize("form", ["to_parquet", "save_to_disk"])
def test_what_datasets_writes_is_what_the_files_are(form: str, pictures: Path, tmp_path: Path) -> None:
    values = rows(pictures)
    splits = {"test": values[:3], "train": values[3:]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})
    made = {name: datasets.Dataset.from_list(part, features=features) for name, part in splits.items()}
    if form == "save_to_disk":
        datasets.DatasetDict(made).save_to_disk(str(tmp_path / "hf"), num_shards={"train": 2, "test": 1})
        made["train"].map(lambda row: row, cache_file_name=str(tmp_path / "hf/train/cache-0.arrow"))
    else:
        for name, part in made.items():
            part.to_parquet(str(tmp_path / "hf/data" / f"{name}-00000-of-00001.parquet"))
    assert found(str(tmp_path / "hf")) == found(f"table:{pictures / 'pairs.csv'}")


@pytest.mark.parametrize(
    ("kind", "ending"), [(pa.binary(), ".parquet"), (pa.large_binary(), ".parquet"), (pa.large_binary(), ".arrow")]
)
def test_a_column_of_bytes_is_read(kind: pa.DataType, ending: str, pictures: Path, tmp_path: Path) -> None:
    values = rows(pictures)
    table = pa.table(
        {
            "image": pa.array([value["image"]["bytes"] for value in values], kind),
            "text": [value["caption"][0] for value in values],
        }
    )
    path = tmp_path / f"x{ending}"
    pq.write_table(table, path) if ending == ".parquet" else write_arrow(path, table, as_file=True)
    of_files = found(f"table:{pictures / 'pairs.csv'}")
    assert found(f"table:{path}") == {
        f"x{ending}/{number}": ("", captions[:1], digest)
        for number, (_, captions, digest) in enumerate(of_files.values())
    }
    assert found(f"{path}?text=" if False else f"table:{path}?caption=").keys() == found(f"table:{path}").keys()


def test_rows_with_one_id_are_one_picture(pictures: Path, tmp_path: Path) -> None:
    table = pa.Table.from_pylist(
        [
            {"image": row["image"], "caption": caption, "id": f"p{number}"}
            for number, row in enumerate(rows(pictures, named=False))
            for caption in row["caption"]
        ]
    )
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=5)
    of_files = found(f"table:{pictures / 'pairs.csv'}")
    assert found(f"table:{tmp_path / 'x.parquet'}") == {
        f"p{number}": ("", captions, digest) for number, (_, captions, digest) in enumerate(of_files.values())
    }
    # without the ids each row is a picture of its own
    assert len(found(f"table:{tmp_path / 'x.parquet'}?id=")) == 2 * COUNT


def test_a_name_that_several_pictures_have_is_the_firsts(pictures: Path, tmp_path: Path) -> None:
    values = rows(pictures)[:3]
    for value in values:
        value["image"]["path"] = "image.png"
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "x.parquet")
    assert list(found(f"table:{tmp_path / 'x.parquet'}")) == ["image.png", "x.parquet/1", "x.parquet/2"]


def test_a_row_group_is_read_once_in_order(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(rows(pictures)), path, row_group_size=5)
    read_group, groups = pq.ParquetFile.read_row_group, []

    def counted(self: pq.ParquetFile, group: int, **options: Any) -> Any:
        groups.append(group)
        return read_group(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    source = ImageSource(str(tmp_path))
    uris = [f"x.parquet#image.bytes/{row}" for row in range(COUNT)]
    wanted = [file.read_bytes() for file in sorted(pictures.glob("*.png"))]
    assert [source.read(uri) for uri in uris] == wanted
    assert groups == [0, 1, 2]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.read, uris)) == wanted
    assert [source.read(uri) for uri in reversed(uris)] == wanted[::-1]
    # a file that is written again is opened again
    pq.write_table(pa.Table.from_pylist(rows(pictures)[::-1]), path, row_group_size=5)
    assert source.read(uris[0]) == wanted[-1]


def test_tables_behind_a_url_are_a_folder_too(pictures: Path) -> None:
    files = fsspec.filesystem("memory")
    with files.open("/columnar/data/train-0.parquet", "wb") as file:
        pq.write_table(pa.Table.from_pylist(rows(pictures)), file)
    digests = {name: entry[2] for name, entry in found(f"table:{pictures / 'pairs.csv'}").items()}
    there = found("table:memory://columnar")
    assert {name: entry[2] for name, entry in there.items()} == digests
    assert {entry[0] for entry in there.values()} == {"train"}


def test_a_cache_and_a_student_of_cells_are_those_of_the_files(
    pictures: Path, tmp_path: Path, tiny_teacher: Path
) -> None:
    pq.write_table(pa.Table.from_pylist(rows(pictures)), tmp_path / "x.parquet", row_group_size=5)
    write_arrow(tmp_path / "x.arrow", pa.Table.from_pylist(rows(pictures)))
    student, losses = make_student(tmp_path / "student.json"), []
    for name in ("files/pairs.csv?split=", "x.parquet", "x.arrow"):
        cache = tmp_path / f"{name[:6]}.cache".replace("/", "-")
        teacher = f"local-dir:{tiny_teacher}"
        dataset = f"table:{tmp_path / name}"
        precompute(PrecomputeConfig(dataset=dataset, teacher=teacher, cache=str(cache), device="cpu"))
        settings = {"split": "", "epochs": 1, "batch_size": 4, "workers": 1}
        train(train_config(cache, student, tmp_path / cache.stem, **settings))
        losses.append([step["loss"] for step in trace(tmp_path / cache.stem)])
    caches = [Cache(str(path)) for path in sorted(tmp_path.glob("*.cache"))]
    for tower in ("image", "text"):
        every = [cache.take(tower, np.arange(COUNT)) for cache in caches]
        assert all(np.array_equal(one, every[0]) for one in every)
    assert losses[1:] == losses[:1] * 2


def test_a_row_without_a_picture_is_a_problem(pictures: Path, tmp_path: Path) -> None:
    values = rows(pictures)
    values[4]["image"]["bytes"] = None
    table = pa.Table.from_pylist(values)
    pq.write_table(table, tmp_path / "x.parquet")
    write_arrow(tmp_path / "y.arrow", table)
    for name, said in (("x.parquet", "row 4 has no picture in its column image.bytes"), ("y.arrow", "no picture in")):
        samples, _ = load_samples(DatasetSpec.parse(f"table:{tmp_path / name}"))
        assert len(samples.samples) == COUNT - 1
        assert [problem.lost_image for problem in samples.problems] == [True]
        assert said in str(samples.problems[0])


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_damaged_file_is_no_crash(ending: str, pictures: Path, tmp_path: Path) -> None:
    path, table = tmp_path / f"x.{ending}", pa.Table.from_pylist(rows(pictures))
    pq.write_table(table, path) if ending == "parquet" else write_arrow(path, table)
    whole = path.read_bytes()
    for end in (0, 3, len(whole) // 2, len(whole) - 9):
        path.write_bytes(whole[:end])
        try:
            samples, _ = load_samples(DatasetSpec.parse(f"table:{path}"))
        except UsageError as error:
            assert str(path) in str(error)  # noqa: PT017 - a stream cut at the end of a batch is a whole one
        else:
            assert samples.problems or end == len(whole) - 9


def test_what_cannot_be_read_in_place_is_refused(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.Table.from_pylist(rows(pictures))
    packed = write_arrow(tmp_path / "x.arrow", table, options=pa.ipc.IpcWriteOptions(compression="zstd"))
    with pytest.raises(UsageError, match="is compressed, so that its pictures lie nowhere in it; write it plain"):
        read("table", packed)
    pq.write_table(table, tmp_path / "x.parquet")
    monkeypatch.setattr("teacher_cache.pipeline.data.datasets.columnar.MOST_GROUP_BYTES", 100)
    with pytest.raises(UsageError, match=r"has a row group of .* GB, .*row_group_size=100"):
        read("table", tmp_path / "x.parquet")
    pq.write_table(pa.table({"image": [["a"]], "caption": ["b"]}), tmp_path / "y.parquet")
    with pytest.raises(UsageError, match=r"'image' holds list<.*paths, bytes of pictures, or structs of bytes and"):
        read("table", tmp_path / "y.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=re.escape("is a folder without Parquet or Arrow files; name the table")):
        read("table", tmp_path / "empty")


def test_a_cell_that_is_not_there_is_an_error_of_that_picture(pictures: Path, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows(pictures)), tmp_path / "x.parquet")
    source = ImageSource(str(tmp_path))
    for uri, said in (
        ("x.parquet#image.bytes/99", "row 99 of column image.bytes cannot be read"),
        ("x.parquet#image.path/0", "row 0 has no picture in its column image.path"),
        ("x.parquet#none/0", "row 0 of column none cannot be read"),
    ):
        with pytest.raises(OSError, match=re.escape(said)):
            source.read(uri)
    with pytest.raises(FileNotFoundError):
        source.read("gone.parquet#image.bytes/0")


def test_the_digest_is_of_the_bytes_in_the_cell(pictures: Path, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows(pictures)), tmp_path / "x.parquet")
    _, digests = load_samples(DatasetSpec.parse(f"table:{tmp_path / 'x.parquet'}"))
    assert digests[0] == hashlib.sha256((pictures / "00.png").read_bytes()).hexdigest()
    assert parquet_cells.in_cell("a/b.parquet#image/3")
    assert not parquet_cells.in_cell("a/b.parquet")
    sample = Sample("a", "x.parquet#image.bytes/0", "", ())
    assert ImageSource(str(tmp_path)).resolve(sample.uri) == f"{tmp_path}/x.parquet#image.bytes/0"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on loopback, in place of Hugging Face's."""
    with start_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "".join((hub.address, *template[1:])))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        HfFileSystem.clear_instance_cache()
        yield hub
    HfFileSystem.clear_instance_cache()


def test_a_dataset_on_the_hub_is_named_by_folder_file_or_pattern(pictures: Path, tmp_path: Path, hub: Hub) -> None:
    for split, part in (("train", rows(pictures)[3:]), ("test", rows(pictures)[:3])):
        pq.write_table(pa.Table.from_pylist(part), tmp_path / f"{split}-00000-of-00001.parquet")
    files = {f"data/{path.name}": path.read_bytes() for path in tmp_path.glob("*.parquet")}
    hub.files["datasets/org/pictures"] = {"README.md": b"-", **files}
    hub.private["datasets/org/pictures"] = False
    wanted = [path.read_bytes() for path in sorted(pictures.glob("*.png"))]
    root = "hf://datasets/org/pictures"
    for name in (root, f"{root}/data/*.parquet"):
        found = load(f"table:{name}")
        source = ImageSource(found.root)
        assert [source.read(sample.uri) for sample in found.samples] == wanted
        assert [sample.split for sample in found.samples] == ["test"] * 3 + ["train"] * 9
    assert len(load(f"table:{root}/data/test-00000-of-00001.parquet").samples) == 3
    # a pattern names files on a disk, too
    assert len(load(f"table:{tmp_path}/*.parquet").samples) == COUNT
    for name, reason in ((f"{root}/*.parquet", "no file has such a name"), ("hf://datasets/org/no", "not found")):
        with pytest.raises(UsageError, match=rf"no table there that can be read \(FileNotFoundError: .*{reason}"):
            read("table", name)


@pytest.mark.parametrize(("offline", "error"), [(True, UsageError), (False, ConnectionError)])
def test_a_hub_that_is_not_reached_is_an_error_of_one_line(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tiny_teacher: Path, tmp_path: Path, offline: bool, error: type[Exception]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    config = {"dataset": "table:hf://datasets/org/pictures", "teacher": f"local-dir:{tiny_teacher}", "device": "cpu"}
    with pytest.raises(error, match=r"hf://datasets/org/pictures: .*(offline mode|Connection refused)") as raised:
        precompute(PrecomputeConfig(cache=str(tmp_path / "cache"), **config))
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_read_any_more_is_closed(tmp_path: Path) -> None:
    """Sixteen stay open. pytest turns a file that is left open into an error, at the latest here."""
    for number in range(20):
        pq.write_table(pa.table({"image": [b"x"]}), tmp_path / f"{number}.parquet")
        uri = parquet_cells.cell_uri(str(tmp_path / f"{number}.parquet"), "image", 0)
        assert parquet_cells.read_cell(uri) == b"x"
    still_open = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert sum(name.startswith(str(tmp_path)) for name in still_open) <= 16
    gc.collect()
