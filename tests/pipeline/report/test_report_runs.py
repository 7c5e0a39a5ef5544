"""Runs, their evaluations and deployed students in a report; the command that writes it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from teacher_cache.pipeline.cli.app import app, main
from teacher_cache.pipeline.cli.demo import RUN_NAMES
from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult, evaluate
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import OtherTeacher
from teacher_cache.pipeline.report.charts import newest_evaluations
from teacher_cache.pipeline.report.collect import collect_report
from teacher_cache.pipeline.report.data import ReportData
from teacher_cache.pipeline.report.students import read_deployments, read_runs, thinned
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.pipeline.report.report_data import student_table
from tests.pipeline.train.train_work import make_cache, make_student, trace, train_config, train_on_images

run_cli = CliRunner()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A cache of 40 photographs and a run of two epochs on it, not evaluated."""
    home = tmp_path_factory.mktemp("runs")
    cache = make_cache(home, tiny_teacher)
    train(train_config(cache, make_student(home / "student.json"), home / "run", select_split="test"))
    return home


def measure(home: Path, **more: Any) -> EvaluateResult:
    return evaluate(EvaluateConfig(run=str(home / "run"), split="test", workers=0, device="cpu", **more))


def digest(home: Path) -> str:
    return EmbeddingReader(str(home / "photos.cache")).manifest.digest


# --- evaluations in the run


def test_an_evaluation_is_left_in_the_run_and_replaced_by_a_newer_one(home: Path) -> None:
    folder = home / "run" / "evaluations"
    assert not folder.exists()
    first, best = measure(home), measure(home, checkpoint="best")
    assert first.not_kept is None
    assert first.date is not None
    assert first.date.endswith("+00:00")
    best_name = Path(str(best.checkpoint)).name
    assert sorted(path.name for path in folder.iterdir()) == [f"test-{best_name}.json", "test-epoch-0002.json"]
    assert EvaluateResult.model_validate_json((folder / "test-epoch-0002.json").read_bytes()) == first
    again = measure(home)
    assert len(list(folder.iterdir())) == 2
    assert EvaluateResult.model_validate_json((folder / "test-epoch-0002.json").read_bytes()) == again != first
    # what it is may not depend on where it is: a run goes on, and the demo replaces it, with evaluations in it
    assert RunFolder(home / "run").read().finished
    assert {path.name for path in (home / "run").iterdir()} <= RUN_NAMES
    with pytest.raises(UsageError, match="holds a run already"):
        RunFolder(home / "run").require_free()


def test_other_caches_and_odd_splits_have_files_of_their_own(home: Path) -> None:
    folder = RunFolder(home / "run")
    there = set(folder.evaluation_files())
    kept = [
        folder.keep_evaluation(split, "checkpoints/epoch-0002", cache, b"{}")
        for split, cache in (("test", "f" * 64), ("../../out of here", digest(home)), ("", digest(home)))
    ]
    assert [path.name for path in kept] == [
        "test-epoch-0002-ffffffffffff.json",
        "..%2F..%2Fout%20of%20here-epoch-0002.json",
        "-epoch-0002.json",
    ]
    assert {path.parent for path in kept} == {home / "run" / "evaluations"}
    (home / "run" / "evaluations" / ".partial-x-1-1-00000000").touch()
    assert set(folder.evaluation_files()) == there | set(kept)
    for path in kept:
        path.unlink()


def test_a_run_that_cannot_be_written_is_evaluated_all_the_same(home: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for part in (home / "run").iterdir():
        if part.name != "evaluations":
            (tmp_path / "run" / part.name).symlink_to(part)
    (tmp_path / "run" / "evaluations").touch()  # a file is in the way, for root too
    found = evaluate(EvaluateConfig(run=str(tmp_path / "run"), split="test", workers=0, device="cpu"))
    assert found.student is not None
    assert found.not_kept is not None
    assert "evaluations" in found.not_kept
    done = run_cli.invoke(app, ["evaluate", "--run", str(tmp_path / "run"), "--split", "test", "--json"])
    assert done.exit_code == 0
    assert f"warning: not left in the run, so that no report of it will show it: {tmp_path}" in done.stderr
    assert json.loads(done.stdout)["not_kept"] == found.not_kept


def test_the_teacher_alone_leaves_nothing_anywhere(home: Path) -> None:
    before = sorted(home.rglob("*"))
    found = evaluate(EvaluateConfig(cache=str(home / "photos.cache"), split="test"))
    assert (found.not_kept, sorted(home.rglob("*"))) == (None, before)


# --- runs


def test_a_run_is_shown_with_its_steps_and_evaluations(home: Path) -> None:
    last, best = measure(home), measure(home, checkpoint="best")
    (found,), notes = read_runs([str(home / "run")], digest(home))
    lines = trace(home / "run")
    assert (found.name, found.steps_of, found.same_cache, notes) == ("run", 8, True, [])
    assert found.record == RunFolder(home / "run").read()
    assert [(step.step, step.epoch, step.loss) for step in found.steps] == [
        (line["step"], line["epoch"], line["loss"]) for line in lines
    ]
    assert found.steps[0].learning_rate == lines[0]["learning_rate"]
    assert set(found.steps[0].parts) == set(found.record.epochs[0].parts)
    # those of one second keep the order of their names
    assert {result.date for result in found.evaluations} == {last.date, best.date}
    dates = [str(result.date) for result in found.evaluations]
    assert dates == sorted(dates, reverse=True)
    ((other,), _) = read_runs([str(home / "run")], "0" * 64)
    assert not other.same_cache
    another = OtherTeacher(teacher="t", cache_manifest_digest="0" * 64, identity=found.record.identity)
    with pytest.MonkeyPatch.context() as patched:  # a run of several teachers, of which the report shows the second
        record = found.record.model_copy(update={"others": (another,)})
        patched.setattr(RunFolder, "read", lambda self: record)
        ((second,), _) = read_runs([str(home / "run")], "0" * 64)
    assert second.same_cache


def test_what_is_wrong_with_a_run_is_said(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "other" / "run"
    run.mkdir(parents=True)
    for name in ("run.json", "log.jsonl"):
        (run / name).write_bytes((home / "run" / name).read_bytes())
    (run / "log.jsonl").write_bytes((run / "log.jsonl").read_bytes()[:-30])  # written at this moment
    both, notes = read_runs([str(home / "run"), str(run)], digest(home))
    assert [report.name for report in both] == [str(home / "run"), str(run)]
    assert both[1].steps_of == 7
    assert notes == [
        f"{run}: not measured yet, or by an older version: teacher-cache evaluate --run {run} --split SPLIT leaves "
        "recall and retention in the run."
    ]
    (run / "evaluations").mkdir()
    (run / "evaluations" / "test-epoch-0002.json").write_text('{"split": "test"')
    notes = read_runs([str(run)], digest(home))[1]
    assert notes[0].startswith(f"{run}/evaluations/test-epoch-0002.json: not an evaluation that can be shown (")
    with pytest.raises(UsageError, match=r"other: no run here \(run.json not found\)"):
        collect_report(str(home / "photos.cache"), [str(tmp_path / "other")])


def test_an_evaluation_of_an_older_version_has_no_date_and_comes_last(home: Path) -> None:
    newest = measure(home)
    folder = home / "run" / "evaluations"
    old = newest.model_dump(mode="json", exclude={"date", "not_kept"})
    (folder / "train-epoch-0002.json").write_text(json.dumps({**old, "split": "train"}))
    evaluations = read_runs([str(home / "run")], digest(home))[0][0].evaluations
    assert (evaluations[-1].split, evaluations[-1].date) == ("train", None)
    assert evaluations[0].date == newest.date
    (folder / "train-epoch-0002.json").unlink()


def test_long_runs_are_thinned_evenly_and_keep_the_ends_of_epochs() -> None:
    assert thinned([0] * 10, 10) == list(range(10))
    assert thinned([0] * 11, 5) == [0, 5, 10]
    epochs = [number // 700 for number in range(7_000)]
    kept = thinned(epochs, 1_000)
    assert 900 <= len(kept) <= 1_000
    assert {0, *(700 * epoch - 1 for epoch in range(1, 11))} <= set(kept)
    assert max(after - before for before, after in pairwise(kept)) <= 8
    many = thinned(list(range(3_000)), 1_000)  # an epoch a step
    assert (len(many), many[0], many[-1]) == (1_000, 0, 2_999)
    assert thinned([], 1_000) == []


# --- deployed students


def test_a_deployed_student_is_its_table(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    table = student_table()
    (tmp_path / "a" / "table.json").write_text(table.model_dump_json())
    assert read_deployments([str(tmp_path / "a")], table.cache_manifest_digest) == ((table,), [])
    assert read_deployments([str(tmp_path / "a")], "0" * 64)[1] == [
        f"{tmp_path / 'a'}: measured on another state of the cache, or another cache, than this report is of."
    ]
    (tmp_path / "a" / "table.json").write_text("{}")
    with pytest.raises(UsageError, match=r"not a table of a deployed student \(\d+ fields do not fit\)\. Deploy"):
        read_deployments([str(tmp_path / "a")], "e" * 64)
    with pytest.raises(UsageError, match=r"no deployed student here .*No such file.* teacher-cache deploy has made"):
        read_deployments([str(tmp_path)], "e" * 64)


# --- the command


@pytest.fixture
def plain_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of one line: how it really looks is tested where it is drawn."""
    page = SimpleNamespace(render_report=lambda data: f"<p>{data.location} \N{SNOWMAN}")
    monkeypatch.setitem(sys.modules, "teacher_cache.pipeline.report.page", page)


def test_the_command_writes_a_page_and_says_what_is_in_it(
    home: Path, tmp_path: Path, plain_page: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    measure(home)
    cache, run = str(home / "photos.cache"), str(home / "run")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "table.json").write_text(student_table(cache_manifest_digest=digest(home)).model_dump_json())
    arguments = ["report", cache, "--run", run, "--deployed", "d", "--data", "all.json"]
    done = run_cli.invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    page = f"<p>{cache} \N{SNOWMAN}"
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
    said = json.loads(done.stdout)
    assert {**said, "seconds": 0} == {
        "location": cache,
        "out": "report.html",
        "bytes": len(page.encode()),
        "pictures": 40,
        "seconds": 0,
        "notes": [],
    }
    assert "pictures: 40 of 40" in done.stderr
    data = ReportData.model_validate_json((tmp_path / "all.json").read_bytes())
    assert ([report.name for report in data.runs], [one.student for one in data.deployments]) == (["run"], ["small"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.json", "d", "report.html"]

    more = ["--out", "new/folder/r.html", "--split", "test", "--image-root", "/nowhere", "--most", "5", "--seed", "2"]
    done = run_cli.invoke(app, ["report", cache, *more])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "new" / "folder" / "r.html").is_file()
    assert done.stdout.startswith("new/folder/r.html: ")
    assert (
        "note: Statistics are of 5 of 8 images and their captions, drawn with seed 2; --most reads more." in done.stdout
    )
    assert "note: 5 of 5 pictures are missing." in done.stdout


def test_a_cache_whose_path_is_no_utf8_is_reported(
    known_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jinja2", reason="needs jinja2: pip install 'teacher-cache[report]'")
    pytest.importorskip("vl_convert", reason="needs vl-convert-python: pip install 'teacher-cache[report]'")
    monkeypatch.chdir(tmp_path)
    folder = Path(os.fsdecode(b"caf\xe9"))
    shutil.copytree(known_cache, folder / "a.cache")
    given = [str(folder / "a.cache"), "--out", str(folder / "r.html"), "--data", str(folder / "r.json"), "--json"]
    done = run_cli.invoke(app, ["report", *given])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["location"] == "caf?/a.cache"
    assert b"<dd>caf?/a.cache</dd>" in (folder / "r.html").read_bytes()
    data = ReportData.model_validate_json((folder / "r.json").read_bytes())
    assert data.stats is not None
    assert data.location == data.info.location == data.stats.location == "caf?/a.cache"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nothing.cache"], 2, "nothing.cache: no cache"),
        (["CACHE", "--run", "."], 2, "no run here (run.json not found)"),
        (["CACHE", "--deployed", "."], 2, "no deployed student here"),
        (["CACHE", "--split", "dev"], 2, "no split 'dev'"),
        (["CACHE", "--out", "."], 2, "--out .: this is a folder; name a file in it, for example report.html"),
        (["CACHE", "--out", "s3://bucket/r.html"], 2, "a local file is wanted, not a URL"),
        (["CACHE", "--data", "."], 2, "--data .: this is a folder"),
        (["CACHE", "--data", "a", "--out", "./a"], 2, "--out and --data both name a: the page and its data are two"),
    ],
)
def test_what_cannot_be_reported_is_one_line(
    arguments: list[str],
    code: int,
    message: str,
    home: Path,
    tmp_path: Path,
    plain_page: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(home / "photos.cache") if argument == "CACHE" else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["teacher-cache", "report", *given])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_what_was_measured_on_other_data_is_no_result_of_this_cache(home: Path, tmp_path: Path) -> None:
    """A row that names its cache, and a note; neither the headline nor the chart."""
    run = shutil.copytree(home / "run", tmp_path / "run")
    here = evaluate(EvaluateConfig(run=str(run), split="train", device="cpu", workers=0))
    there = here.model_copy(
        update={
            "cache": "other.cache",
            "cache_manifest_digest": "f" * 64,
            "accepted_mismatches": ("dataset.images",),
            "date": "2999-01-01 00:00:00",
        }
    )
    folder = RunFolder(run)
    folder.keep_evaluation("train", str(here.checkpoint), "f" * 64, there.model_dump_json().encode())
    digest = here.cache_manifest_digest
    (report,), notes = read_runs([str(run)], digest)
    assert report.evaluations[0].cache == "other.cache"
    assert {each.cache for each in newest_evaluations(report, digest)} == {here.cache}
    assert [note for note in notes if "other.cache" in note] == [
        f"{run}: also measured on other.cache: rows of the table that say so, no more."
    ]
    # nor is one on captions of one kind
    kind = here.model_copy(update={"caption_kind": "synthetic", "date": "2999-01-02 00:00:00"})
    folder.keep_evaluation("train-synthetic", str(here.checkpoint), digest, kind.model_dump_json().encode())
    (with_kind,), _ = read_runs([str(run)], digest)
    assert with_kind.evaluations[0].caption_kind == "synthetic"
    assert {each.caption_kind for each in newest_evaluations(with_kind, digest)} == {None}
    # of that cache's own report it is the result
    assert "other.cache" in {each.cache for each in newest_evaluations(report, "f" * 64)}


def test_a_run_of_images_alone_is_reported_with_its_cache_which_cannot_measure_it(
    home: Path, tiny_teacher: Path
) -> None:
    run, photos = str(train_on_images(home, tiny_teacher)), str(home / "photos.cache")
    digest = RunFolder(run).read().cache_manifest_digest
    (note,) = read_runs([run], digest)[1]
    assert note == (
        f"{run}: learned from images without captions: teacher-cache evaluate --run {run} --cache CACHE-WITH-CAPTIONS "
        "measures its recall, zero-shot its classes."
    )
    evaluate(EvaluateConfig(run=run, cache=photos, split="test", workers=0, device="cpu"))
    (note,) = read_runs([run], digest)[1]
    shown = f"teacher-cache report {photos} --run {run} shows it."
    assert note == f"{run} was measured on {photos}, not here (no captions): {shown}"
    with pytest.raises(UsageError, match="and not measured on this cache"):
        read_runs([run], "0" * 64)
