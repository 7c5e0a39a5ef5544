"""``export --sidecar``: tars that the real webdataset package joins to the tars of the dataset, key by key."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import webdataset as wds
from click.testing import CliRunner

from teacher_cache import Cache, PrecomputeConfig, UsageError, precompute
from teacher_cache.pipeline.cli.app import app
from teacher_cache.storage.look.sidecar import export_sidecar
from tests.conftest import write_photos
from tests.pipeline.data.dataset_files import write_tar

ROOT = Path(__file__).parents[3]
run = CliRunner()
# webdataset leaves tars to the garbage collector
leaves_tars_open = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:unclosed file:ResourceWarning"
)


@pytest.fixture(scope="module")
def folder(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``shards`` of eight tars of three pictures, and their cache. In 001, one more has no caption, one is broken."""
    folder = tmp_path_factory.mktemp("sidecar")
    photos = [path.read_bytes() for path in sorted((write_photos(folder / "p", 24) / "images").iterdir())]
    for tar in range(8):
        members: list[tuple[str, Any]] = []
        for number in range(3 * tar, 3 * tar + 3):
            key = f"./deep/{number:04d}" if tar == 2 else f"{number:04d}"
            members += [(f"{key}.jpg", photos[number]), (f"{key}.txt", f"picture {number}")]
        if tar == 1:
            members[2:2] = [("bare.jpg", photos[0]), ("broken.jpg", b"\xff\xd8 no picture"), ("broken.txt", "Broken.")]
        write_tar(folder / f"shards/train/{tar:03d}.tar", members)
    config = {
        "batch_size": 8,
        "chunk_rows": 8,
        "device": "cpu",
        "cache": str(folder / "shards.cache"),
        "max_problems": 5,
    }
    precompute(PrecomputeConfig(dataset=f"webdataset:{folder}/shards", teacher=f"local-dir:{tiny_teacher}", **config))
    return folder


def members(tar: Path) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    with tarfile.open(tar) as archive:
        return {each.name: dict(np.load(io.BytesIO(archive.extractfile(each).read()))) for each in archive}  # type: ignore[union-attr]


def test_each_key_has_the_rows_of_its_image_and_captions(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "targets"
    done = run.invoke(app, ["export", str(folder / "shards.cache"), "--sidecar", "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result == json.loads((out / "export.json").read_text())
    assert (result["tars"], result["images"], result["captions"], result["quarantined"]) == (8, 24, 24, 1)
    tars = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.tar"))
    assert tars == sorted(path.relative_to(folder / "shards").as_posix() for path in (folder / "shards").rglob("*.tar"))
    assert list(members(out / "train/002.tar")) == ["deep/0006.npz", "deep/0007.npz", "deep/0008.npz"]
    cache = Cache(str(folder / "shards.cache"))
    ids = cache.samples["sample_id"].to_pylist()
    for tar in tars:
        for name, arrays in members(out / tar).items():
            row = int(arrays["row"])
            assert f"{ids[row]}.npz" == name
            texts = np.arange(*cache.caption_offsets[row : row + 2])
            assert np.array_equal(arrays["image"], cache.take("image", [row])[0])
            assert np.array_equal(arrays["text"], cache.take("text", texts))
            assert np.array_equal(arrays["box"], cache.take("image", [row], array="view")[0])
            assert (arrays["image"].dtype, arrays["text"].shape) == (np.float16, (1, 16))
    export_sidecar(str(folder / "shards.cache"), str(tmp_path / "again"))
    for tar in tars:
        assert (tmp_path / "again" / tar).read_bytes() == (out / tar).read_bytes()


@leaves_tars_open
@pytest.mark.parametrize("workers", [0, 2])
def test_the_page_on_webdataset_joins_them_unchanged(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Run as it is shown, shuffled and split over workers: each sample comes once, with its own row."""
    (tmp_path / "shards").symlink_to(folder / "shards")
    (tmp_path / "shards.cache").symlink_to(folder / "shards.cache")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/howto/webdataset.md").read_text()
    command = re.search(r"^teacher-cache (export .*)$", page, re.MULTILINE)[1]  # type: ignore[index]
    assert run.invoke(app, command.split()).exit_code == 0
    shown: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], shown)  # type: ignore[index]
    cache = Cache(str(folder / "shards.cache"))
    loader = wds.WebLoader(shown["dataset"], batch_size=None, num_workers=workers, multiprocessing_context=None)
    rows = []
    for image, npz in loader:
        row = int(npz["row"])
        assert min(image.size) == npz["box"][2:4].min()  # the evaluation crop of this very picture
        assert np.array_equal(npz["image"], cache.take("image", [row])[0])
        rows.append(row)
    assert sorted(rows) == cache.image_rows().tolist()
    assert rows != sorted(rows)


@leaves_tars_open
def test_the_recipe_of_webdatasets_own_documentation_joins_whole_tars(folder: Path, tmp_path: Path) -> None:
    """Its column store reads both tars in step and asserts equal keys: 000 has no sample without a target."""
    export_sidecar(str(folder / "shards.cache"), str(tmp_path / "targets"))

    def add_column(samples: Any) -> Any:
        url, column = None, iter(())
        for sample in samples:
            if sample["__url__"] != url:
                url = sample["__url__"]
                beside = url.replace(str(folder / "shards"), str(tmp_path / "targets"))
                options: dict[str, Any] = {"shardshuffle": False, "nodesplitter": None, "workersplitter": None}
                column = iter(wds.WebDataset(beside, **options))
            extra = next(column)
            assert extra["__key__"] == sample["__key__"]
            yield {**sample, "npz": extra["npz"]}

    shards = [str(folder / f"shards/train/{tar:03d}.tar") for tar in (0, 3, 4, 5)]
    joined = wds.WebDataset(shards, shardshuffle=100).compose(add_column).shuffle(8).decode()
    ids = Cache(str(folder / "shards.cache")).samples["sample_id"].to_pylist()
    keys = [sample["__key__"] for sample in joined if ids[int(sample["npz"]["row"])] == sample["__key__"]]
    assert sorted(keys) == [f"{number:04d}" for number in (0, 1, 2, *range(9, 18))]


def test_a_dataset_without_tars_an_output_that_exists_and_idle_options_are_refused(
    photo_cache: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(
        UsageError, match=r"0000\.jpg does not lie in a tar of this dataset \(flickr:.*Leave --sidecar out"
    ):
        export_sidecar(str(photo_cache), str(out))
    cache = str(folder / "shards.cache")
    done = run.invoke(app, ["export", cache, "--sidecar", "--out", str(out), "--captions", "all"])
    assert "--captions has no effect with --sidecar; leave it out" in str(done.exception)
    with pytest.raises(UsageError, match="is written to a local folder"):
        export_sidecar(cache, "s3://bucket/targets")
    column = Cache.column
    for name in ("../000.tar", "/000.tar", "s3://b/000.tar"):

        def outside(self: Cache, table: str, field: str, name: str = name) -> Iterator[pa.ChunkedArray]:
            for part in column(self, table, field):
                yield pa.chunked_array([[name] * len(part)]) if field == "uri" else part

        monkeypatch.setattr(Cache, "column", outside)
        with pytest.raises(UsageError, match=re.escape(f"the image {name} does not lie")):
            export_sidecar(cache, str(out))
    assert not out.exists()
    out.mkdir()
    with pytest.raises(UsageError, match="is there already"):
        export_sidecar(cache, str(out))


def test_a_killed_export_leaves_nothing_under_the_final_name_and_can_be_run_again(folder: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, tarfile\n"
        "from teacher_cache.storage.look.sidecar import export_sidecar\n"
        "add, added = tarfile.TarFile.addfile, []\n"
        "def killed(*member):\n"
        "    added.append(member)\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if len(added) == 10 else add(*member)\n"
        "tarfile.TarFile.addfile = killed\n"
        "export_sidecar(*sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, str(folder / "shards.cache"), str(tmp_path / "targets")]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".partial-")
    assert export_sidecar(str(folder / "shards.cache"), str(tmp_path / "targets")).images == 24
