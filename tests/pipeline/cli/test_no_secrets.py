"""Credentials of a dataset's addresses are refused, and are nowhere to be found afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from teacher_cache.pipeline.data.datasets.samples import ImageSource, load_samples
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec
from teacher_cache.storage.errors import UsageError
from tests.commands import run_command
from tests.pipeline.data.dataset_files import save_image

SECRET = "hunter2-S3CRET"
URLS = [
    f"https://user:{SECRET}@host.invalid/x.jpg",
    f"https://{SECRET}@host.invalid/x.jpg",
    f"s3://KEY:{SECRET}@bucket/x.jpg",
    f"https://bucket.s3.amazonaws.invalid/x.jpg?X-Amz-Expires=60&X-Amz-Signature={SECRET}",
    f"https://account.blob.core.invalid/c/x.jpg?sp=r&sig={SECRET}",
    f"https://storage.googleapis.invalid/b/x.jpg?X-Goog-Credential={SECRET}&X-Goog-Date=1",
    f"x.jpg?token={SECRET}",
]


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_secret_in_a_table_is_in_no_byte_of_the_run(
    flags: tuple[str, ...], tiny_teacher: Path, tmp_path: Path
) -> None:
    save_image(tmp_path / "a.png")
    rows = "".join(f"{number},{url},A caption.\n" for number, url in enumerate(URLS))
    # as an id, without an id, and in a row that is no row
    (tmp_path / "t.csv").write_text(
        f"id,path,caption\n,a.png,Good.\n{rows},{URLS[0]},B.\n{URLS[0]},a2.png,C.\n,{URLS[1]},too,many\n9,{URLS[0]},D.\n"
    )
    done = run_command(
        "precompute", "--dataset", f"table:{tmp_path}/t.csv", "--teacher", f"local-dir:{tiny_teacher}",
        "--cache", str(tmp_path / "c"), "--device", "cpu", *flags,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    looked = [file.read_bytes() for file in (tmp_path / "c").rglob("*") if file.is_file()]
    for place in (done.stdout.encode(), done.stderr.encode(), *looked):
        assert SECRET.encode() not in place
    shown = done.stdout + done.stderr
    assert "credentials belong into the environment" in shown
    assert "https://***@host.invalid/x.jpg" in shown
    info = run_command("info", str(tmp_path / "c"), "--json")
    assert info.returncode == 0
    assert SECRET not in info.stdout + info.stderr
    # parquet compresses, so the tables are looked at as tables too
    import pyarrow.parquet as pq

    for file in (tmp_path / "c").rglob("*.parquet"):
        assert SECRET not in str(pq.ParquetFile(file).read().to_pylist())


@pytest.mark.parametrize("url", URLS[:-1])
@pytest.mark.parametrize("kind", ["table", "webdataset", "flickr"])
def test_a_secret_in_the_name_of_a_dataset_is_refused(kind: str, url: str) -> None:
    with pytest.raises(UsageError, match=r"holds a password, a signature or a key") as caught:
        DatasetSpec.parse(f"{kind}:{url}")
    assert SECRET not in str(caught.value)
    with pytest.raises(UsageError):
        load_samples(DatasetSpec.parse(f"{kind}:/x?images={url.replace('&', '%26')}"))


@pytest.mark.parametrize(
    "text", [f"nosuch:{URLS[0]}", URLS[0], f"table:{URLS[0]}?a=1&a=2", f"{URLS[1]}", ":", f"x{URLS[3]}"]
)
def test_a_mistake_beside_a_secret_does_not_show_it(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        DatasetSpec.parse(text)
    assert SECRET not in str(caught.value)


def test_a_secret_on_the_command_line_is_refused_and_hidden(tiny_teacher: Path, tmp_path: Path) -> None:
    done = run_command(
        "precompute",
        "--dataset",
        f"table:{URLS[0]}",
        "--teacher",
        f"local-dir:{tiny_teacher}",
        "--cache",
        str(tmp_path / "c"),
    )
    assert done.returncode == 2
    assert SECRET not in done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
    assert "Give credentials through the environment" in done.stderr
    assert not (tmp_path / "c").exists()


def test_an_image_root_with_a_secret_is_refused() -> None:
    with pytest.raises(UsageError, match=r"https://\*\*\*@host\.invalid/x holds a password") as caught:
        ImageSource(f"https://user:{SECRET}@host.invalid/x")
    assert SECRET not in str(caught.value)
