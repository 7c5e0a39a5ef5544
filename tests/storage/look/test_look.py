"""``info``, of a cache and of a folder: what it says, what it reads, and what its start imports."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from teacher_cache.pipeline.cli.app import app
from teacher_cache.storage.cli.app import complete_location
from teacher_cache.storage.errors import CacheNotFoundError
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.format.commits import all_chunks
from teacher_cache.storage.format.journal import ChunkCost
from teacher_cache.storage.look import info as inspect_module
from teacher_cache.storage.look.info import describe_cache
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import finish_known_cache, known_arrays, plan_known_cache

run = CliRunner()


def fill(location: Path | str, chunks: int | None = None, seconds: float = 2.0) -> EmbeddingWriter:
    """Encode the first chunks of a planned cache, or all of them and seal it."""
    return finish_known_cache(location, chunks=chunks, seconds=seconds, teacher_seconds=seconds)


def answer(*arguments: str, code: int = 0) -> Any:
    done = run.invoke(app, [*arguments, "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys that are read from local folders from now on."""
    keys: list[str] = []
    read = LocalFiles.read

    def noted(self: LocalFiles, key: str) -> bytes:
        keys.append(key)
        return read(self, key)

    monkeypatch.setattr(LocalFiles, "read", noted)
    return keys


# --- how the command starts


@pytest.mark.parametrize("folder", [False, True])
def test_the_start_imports_no_more_than_the_command_needs(folder: bool, known_cache: Path) -> None:
    code = (
        "import importlib.metadata as m; m.distributions = None  # what reads the metadata of all packages cannot\n"
        "import sys; sys.argv = ['teacher-cache', 'info', sys.argv[1], '--json']; import teacher_cache.pipeline.cli.app as c\n"  # noqa: E501
        "try: c.main()\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'zarr', 'numpy', 'pyarrow', 'fsspec', 'faiss', 'prefect', 'rich.progress', "
        "'teacher_cache.pipeline.settings.base'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    place = known_cache.parent if folder else known_cache
    done = subprocess.run([sys.executable, "-c", code, str(place)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_looking_needs_the_dependencies_of_storage_alone(known_cache: Path, tmp_path: Path) -> None:
    """On a laptop without torch, open_clip, FAISS, Pillow and Prefect."""
    code = """
import sys
class Absent:
    names = ("torch", "torchvision", "open_clip", "faiss", "PIL", "safetensors", "lightning_fabric", "tensorboard",
             "prefect", "s3fs", "onnx", "onnxruntime", "timm", "matplotlib", "scipy", "pandas")
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from click.testing import CliRunner
from teacher_cache.pipeline.cli.app import app
cache, folder = sys.argv[1:]
above = cache.rpartition("/")[0]
for arguments in (["info", above], ["info", cache], ["stats", cache], ["look", cache], ["look", cache, "3"],
                  ["diff", cache, cache], ["export", cache, "--out", folder + "/e"], ["verify", cache]):
    for more in ([], ["--json"]):
        if arguments[0] == "export" and more:
            arguments[-1] += "2"
        done = CliRunner().invoke(app, [*arguments, *more])
        assert done.exit_code == 0, (arguments, done.output, done.exception)
        assert done.stdout.startswith("{") == bool(more)
"""
    command = [sys.executable, "-c", code, str(known_cache), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_command_is_in_its_module_and_help_imports_none_of_them() -> None:
    code = (
        "import sys, click; from teacher_cache.pipeline.cli.app import app; context = click.Context(app)\n"
        "app.get_help(context)\n"
        "assert not {entry.module for entry in app.entries.values()} & set(sys.modules)\n"
        "assert len(app.entries) <= 22\n"
        "for name, entry in app.entries.items():\n"
        "    assert app.get_command(context, name).get_short_help_str(200).startswith(entry.summary.rstrip('.'))\n"
        "assert not {'torch', 'open_clip', 'faiss', 'prefect'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_shell_completes_commands_and_caches(known_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (known_cache.parent / "known-others").mkdir()
    (known_cache.parent / "known.txt").touch()
    base = str(known_cache.parent)
    assert complete_location(f"{base}/kno") == [f"{base}/known-others/", f"{base}/known.cache"]
    assert complete_location("s3://bucket/kno") == complete_location("/nowhere/at/all") == []
    monkeypatch.chdir(base)
    assert complete_location("known.c") == ["known.cache"]

    monkeypatch.setenv("_TEACHER_CACHE_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "teacher-cache inf")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert run.invoke(app, [], prog_name="teacher-cache").stdout.split() == ["plain,info", "plain,infer"]
    monkeypatch.setenv("COMP_WORDS", "teacher-cache info known.c")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert run.invoke(app, [], prog_name="teacher-cache").stdout.split() == ["plain,known.cache"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["info", "nothing"], 2, "start one with teacher-cache precompute"),
        (["stats", "nothing"], 2, "start one with teacher-cache precompute"),
        (["stats", "part.cache"], 1, "0 of 10 chunks are there. Run the same precompute command again"),
        (["look", "part.cache"], 1, "Run the same precompute command again"),
        (["look", "nothing", "3"], 2, "no cache here"),
        (["look", "nothing", "3", "--split", "test"], 2, "--split has no effect when look shows one image or caption"),
        (["look", "nothing", "--view", "0"], 2, "--view has no effect when look shows random images"),
        (["diff", "part.cache", "nothing"], 2, "nothing: no cache here"),
        (["repair", "nothing", "--leftovers", "--delete"], 2, "no cache here"),
        (["export", "nothing", "--out", "o"], 2, "no cache here"),
        (["export", "part.cache", "--out", "part.cache"], 2, "Choose another --out, or delete it."),
        (["precompute", "--dry-run", "--dataset", "flickr:x", "--teacher", "t"], 2, "cache is missing: give --cache"),
        (["info", "foo://x"], 2, "foo://x: no store is known by foo:"),
    ],
)
def test_errors_are_one_line_that_ends_with_the_remedy(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from teacher_cache.pipeline.cli.app import main

    monkeypatch.chdir(tmp_path)
    plan_known_cache("part.cache")
    monkeypatch.setattr(sys, "argv", ["teacher-cache", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == code
    assert message in said.err
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not (tmp_path / "o").exists()


# --- info


def test_info_shows_how_far_each_part_is_and_what_is_left(tmp_path: Path) -> None:
    path = tmp_path / "part.cache"
    plan_known_cache(path)  # 3 chunks of images, 7 of captions
    fill(path, 5, seconds=2.0)
    found = describe_cache(str(path))
    assert [tuple(dict(part).values()) for part in found.coverage] == [
        ("image", 0, 3, 3, 10, 10),
        ("text", 0, 7, 2, 25, 8),
    ]
    assert (found.encode_seconds, found.notes, found.notes_read) == (10.0, 5, 5)
    assert found.captions_per_second == 8 / 4
    assert found.remaining_seconds == pytest.approx(17 / 2)
    assert (found.sealed, found.chunks_committed) == (False, 5)
    shown = run.invoke(app, ["info", str(path)]).stdout
    assert "images   ████████████████████████ 100 %, 10 of 10" in shown
    assert "captions ███████░░░░░░░░░░░░░░░░░ 32 %, 8 of 25" in shown
    assert "about 8.5 s for one process" in shown
    assert "not complete. Run the same precompute command again to finish it" in " ".join(
        shown.replace("│", " ").split()
    )


def test_what_is_left_is_not_guessed_without_a_rate(tmp_path: Path) -> None:
    path = tmp_path / "part.cache"
    plan_known_cache(path)
    fill(path, 3)
    assert answer("info", str(path))["remaining_seconds"] is None
    assert "not known: no rate yet" in run.invoke(app, ["info", str(path)]).stdout


@pytest.mark.parametrize("sealed", [False, True])
def test_info_names_quarantined_rows_and_reasons(tmp_path: Path, sealed: bool) -> None:
    path = tmp_path / "q.cache"
    plan_known_cache(path)
    finish_known_cache(path, [1, 6], chunks=None if sealed else 2)
    found = answer("info", str(path))
    assert found["quarantine"] == {"undecodable": 2}
    assert [row["row"] for row in found["quarantined_rows"]] == [1, 6]
    shown = run.invoke(app, ["info", str(path)]).stdout
    assert "undecodable 2: img-1 (row 1), img-6 (row 6)" in shown
    assert ("10 of 10 chunks, complete" in shown) == found["sealed"] == sealed


def test_info_of_a_large_cache_reads_no_more_than_of_a_small_one(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a stated number of notes the cost is scaled up, and that is said."""
    monkeypatch.setattr(inspect_module, "NOTES_READ", 4)
    path = tmp_path / "large.cache"
    plan_known_cache(path, images=200, captions=240)  # 50 + 60 chunks
    fill(path, seconds=3.0)
    reads.clear()
    found = describe_cache(str(path))
    assert len(reads) == 1 + 4 + 4  # the manifest, and notes
    assert not [key for key in reads if key.startswith(("targets.zarr", "samples", "captions"))]
    assert (found.notes, found.notes_read, found.encode_seconds) == (110, 8, 330.0)
    assert found.captions_per_second == pytest.approx(4 / 3)
    shown = run.invoke(app, ["info", str(path)]).stdout
    assert "about 6 min" in shown
    assert "8 of 110 notes" in " ".join(shown.replace("│", " ").split())

    monkeypatch.setattr(inspect_module, "COMMITS_READ", 10)
    (path / all_chunks(EmbeddingWriter(str(path)).manifest.layout)[0].commit_key).unlink()
    unsealed = EmbeddingWriter(str(path)).manifest.model_copy(update={"seal": None})
    (path / "manifest.json").write_bytes(unsealed.to_bytes())
    reads.clear()
    assert describe_cache(str(path)).quarantine is None
    assert len(reads) == 1 + 4 + 4


# --- info of a folder


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A complete cache, one that is not, a damaged one, another tool's manifest, and one too deep."""
    root = tmp_path / "shelf"
    for name in ("a/whole.cache", "a/b/part.cache", "bad.cache", "1/2/3/4/5/deep.cache"):
        plan_known_cache(root / name)
    fill(root / "a/whole.cache")
    fill(root / "a/b/part.cache", 4)
    (root / "bad.cache/manifest.json").write_bytes(b'{"format": "teacher-cache", "format_version": 1}')
    (root / "web").mkdir()
    (root / "web/manifest.json").write_text('{"name": "an app"}')
    return root


def test_info_of_a_folder_finds_caches_and_says_what_they_are(shelf: Path, reads: list[str]) -> None:
    found = answer("info", str(shelf), code=1)
    by_name = {cache["location"].removeprefix(f"{shelf}/"): cache for cache in found["caches"]}
    assert set(by_name) == {"a/whole.cache", "a/b/part.cache", "bad.cache"}
    assert found["not_entered"] == 1
    whole, part = by_name["a/whole.cache"], by_name["a/b/part.cache"]
    assert (whole["teacher"], whole["dataset"], whole["images"], whole["captions"]) == (
        "tiny",
        "flickr:/nowhere",
        10,
        25,
    )
    assert (whole["sealed"], whole["chunks_committed"], part["sealed"], part["chunks_committed"]) == (
        True,
        10,
        False,
        4,
    )
    stored = sum(
        file.stat().st_size for file in (shelf / "a/whole.cache/targets.zarr").rglob("c/**/*") if file.is_file()
    )
    assert whole["committed_bytes"] == stored
    assert whole["modified"] is not None
    assert "It was edited or damaged. Run teacher-cache repair" in by_name["bad.cache"]["problem"]
    assert {key.rpartition("/")[2] for key in reads} == {"manifest.json", "manifest.backup.json"}  # of the folder

    deeper = answer("info", str(shelf), "--depth", "5", code=1)
    assert {cache["location"] for cache in deeper["caches"]} > {str(shelf / "1/2/3/4/5/deep.cache")}
    assert deeper["not_entered"] == 0


def test_info_of_a_folder_as_people_see_it(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shelf)
    done = run.invoke(app, ["info", "a"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    lines = [line for line in done.stdout.splitlines() if "─" not in line]
    assert [line.split()[0] for line in lines] == ["cache", "a/b/part.cache", "a/whole.cache"]
    assert " 40 % " in lines[1]
    assert " complete " in lines[2]
    assert "1 deeper folder not searched; --depth 5 does" in run.invoke(app, ["info"]).stdout
    assert "--depth has no effect on the cache a/whole.cache" in str(
        run.invoke(app, ["info", "a/whole.cache", "--depth", "2"]).exception
    )


def test_info_of_a_folder_follows_each_link_once(shelf: Path) -> None:
    before = answer("info", str(shelf), code=1)
    (shelf / "loop").symlink_to("loop")
    (shelf / "a/up").symlink_to("..")
    (shelf / "a/b/here").symlink_to(".")
    (shelf / "z").symlink_to("a/b")
    assert answer("info", str(shelf / "z"))["caches"][0]["location"] == str(shelf / "z/part.cache")
    (shelf / "z").unlink()
    assert answer("info", str(shelf), code=1) == before


def denied(*_: object) -> Any:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_info_of_a_folder_passes_over_a_folder_that_may_not_be_entered(
    shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = answer("info", str(shelf / "a"))
    (shelf / "a/lost+found").mkdir()
    for name in ("read", "stat"):
        call = getattr(LocalFiles, name)
        monkeypatch.setattr(
            LocalFiles,
            name,
            lambda files, key, call=call: denied() if key.startswith("lost+found/") else call(files, key),
        )
    found = answer("info", str(shelf / "a"))
    assert (found["caches"], found["folders"]) == (before["caches"], before["folders"] + 1)


def test_info_of_a_folder_passes_over_an_entry_that_may_not_be_looked_at(
    shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link into another user's folder, say."""
    before = answer("info", str(shelf), code=1)
    (shelf / "closed").symlink_to("a")
    scandir = os.scandir

    @contextlib.contextmanager
    def closed(path: Any) -> Any:
        with scandir(path) as entries:
            yield [SimpleNamespace(name="closed", is_dir=denied) if each.name == "closed" else each for each in entries]

    monkeypatch.setattr(os, "scandir", lambda path: (closed if path == shelf else scandir)(path))
    assert answer("info", str(shelf), code=1) == before


def test_info_of_a_folder_shows_a_cache_whose_manifest_may_not_be_read(
    shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalFiles, "read", lambda files, key: denied() if files.exists(key) else files.stat(key))
    caches = {cache["location"]: cache["problem"] for cache in answer("info", str(shelf / "a"), code=1)["caches"]}
    assert caches == {
        str(shelf / f"a/{name}"): f"{name}/manifest.json: cannot be read: Permission denied"
        for name in ("b/part.cache", "whole.cache")
    }


@pytest.mark.parametrize("object_store", ["moto"], indirect=True)
def test_looking_at_an_object_store(s3_location: str, known_cache: Path) -> None:
    root = s3_location
    for name in ("x/one.cache", "two.cache"):
        plan_known_cache(f"{root}/{name}")
    fill(f"{root}/two.cache")
    found = answer("info", root)
    assert [cache["location"] for cache in found["caches"]] == [f"{root}/two.cache", f"{root}/x/one.cache"]
    assert [cache["chunks_committed"] for cache in found["caches"]] == [10, 0]
    assert all(cache["modified"] for cache in found["caches"])
    assert answer("info", f"{root}/two.cache")["encode_seconds"] == 20.0
    assert isinstance(run.invoke(app, ["info", f"{root}/nothing"]).exception, CacheNotFoundError)
    assert answer("stats", f"{root}/two.cache")["image"]["rows_read"] == 10
    assert answer("look", f"{root}/two.cache", "img-3")["image"]["row"] == 3
    assert answer("diff", f"{root}/two.cache", str(known_cache))["same"]  # made alike, there and here


def test_copied_rows_have_no_share_in_the_teachers_speed(tmp_path: Path) -> None:
    """Notes of a chunk that was copied, of one copied in part, and of one that the teacher made."""
    location = str(tmp_path / "c")
    plan_known_cache(location)
    writer = EmbeddingWriter(location)
    images = [ref for ref in writer.pending() if ref.tower == "image"]
    speeds = []
    for ref, encoded in zip(images, (0, 1, None), strict=False):
        rows = len(ref.rows(writer.manifest.layout))
        cost = ChunkCost(rows=rows, encoded_rows=encoded, seconds=1.0, teacher_seconds=1.0)
        writer.write(ref, known_arrays(writer, ref), cost=cost)
        speeds.append(describe_cache(location).images_per_second)
        if encoded == 0:
            assert "1.0 s (no rate recorded)" in run.invoke(app, ["info", location]).stdout
    assert speeds == [None, 1 / 2, (1 + rows) / 3]
