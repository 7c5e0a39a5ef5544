"""A folder that appears whole or not at all, whatever an earlier process left beside it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from teacher_cache.storage.errors import CacheUnreachableError, UsageError
from teacher_cache.storage.files import new_files as module
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.files.new_files import new_folder
from teacher_cache.storage.files.processes import this_process
from teacher_cache.storage.format.tables import named_errors


def test_it_appears_with_what_was_written(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("x")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UsageError, match="is there already"), new_folder(tmp_path / "out"):
        pass


def test_a_killed_process_of_the_same_number_does_not_stand_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in containers, where the same command has the same process id each time."""
    before = this_process().model_copy(update={"started": 1})
    with monkeypatch.context() as patch:
        patch.setattr(module, "this_process", lambda: before)
        patch.setattr(module.shutil, "rmtree", lambda *found, **more: None)
        with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out"):
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == [f".partial-{before.tag}-out"]
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("x")
    assert (tmp_path / "out" / "a").read_text() == "x"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_an_error_that_names_the_folder_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as full, new_folder(tmp_path / "out"):
        (tmp_path / "full").write_bytes(b"x")
    assert full.value.filename == str(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize(
    "naming",
    [lambda folder: new_folder(folder / "out"), lambda folder: named_errors(LocalFiles(str(folder)), "samples")],
    ids=["a folder of output", "a table"],
)
def test_an_error_that_says_all_itself_is_left_as_it_is(
    naming: Callable[[Path], AbstractContextManager[object]], tmp_path: Path
) -> None:
    message = "s3://caches/a.cache: cannot read samples/000000.parquet; 6 tries failed"
    with pytest.raises(CacheUnreachableError) as error, naming(tmp_path):
        raise CacheUnreachableError(message)
    assert str(error.value) == message
