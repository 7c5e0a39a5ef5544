"""What flow runs leave to read, to the letter, without a server."""

from __future__ import annotations

import base64
import io
import re
from types import SimpleNamespace
from uuid import UUID

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image

from teacher_cache.flows.markdown import cache_text, code, problem_lines, recall_text, retraining_text, run_text
from teacher_cache.flows.precompute_teacher import summary_table
from teacher_cache.flows.report_artifacts import ReportLeft, image_uri, page_beside
from teacher_cache.flows.serve import REPORTS_URL
from teacher_cache.pipeline.evaluate.intervals import Interval, RecallIntervals
from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult, TowerResult
from teacher_cache.pipeline.evaluate.sampled import SampledRecall
from teacher_cache.pipeline.models.run_record import BestRecord, EpochRecord, RunRecord, Selection
from teacher_cache.pipeline.precompute.run import PrecomputeResult
from teacher_cache.storage.look.info import describe_cache
from teacher_cache.storage.observe.safe_text import unmarked
from tests.conftest import make_identity
from tests.pipeline.train.train_work import train_config

CUTS = ("R@1", "R@5", "R@10")


def measured(**changes):
    """Teacher and student of round numbers; two of the shares have no interval, one has no share either."""
    spans = {cut: Interval(low=40.04, high=61.26) for cut in CUTS}
    fields = {
        "split": "te|st",
        "images": 1000,
        "captions": 5000,
        "quarantined": 2,
        "cache": "f8k.cache",
        "cache_manifest_digest": "a" * 64,
        "accepted_mismatches": (),
        "run": "runs/a",
        "learned_images": 0,
        "checkpoint": "checkpoints/best-epoch-0002",
        "chosen_on": "dev",
        "teacher": {"i2t": dict(zip(CUTS, (0.0, 80.0, 90.0), strict=True)), "t2i": dict.fromkeys(CUTS, 40.0)},
        "student": {"i2t": dict(zip(CUTS, (0.5, 40.0, 45.0), strict=True)), "t2i": dict.fromkeys(CUTS, 20.0)},
        "retention": {
            "i2t": {"R@1": None, "R@5": 50.0, "R@10": 50.0},
            "t2i": dict.fromkeys(CUTS, 50.0),
            "mean": 50.17,
        },
        "student_parameters": 1234567,
        "teacher_intervals": RecallIntervals(i2t=spans, t2i=spans, mean=None),
        "student_intervals": None,
        "retention_intervals": RecallIntervals(
            i2t={**spans, "R@1": None}, t2i={**spans, "R@10": None}, mean=Interval(low=45, high=55)
        ),
        "seconds": 1.0,
    }
    return EvaluateResult(**{**fields, **changes})


def test_images_that_the_student_learned_from_are_counted():
    assert "was chosen on `dev`; the student learned from 12 of them." in recall_text(measured(learned_images=12))


def test_recall_is_a_table_with_what_was_kept_and_its_interval():
    assert recall_text(measured()).splitlines() == [
        "Recall on `te\\|st`: 1,000 images, 5,000 captions, 2 quarantined ones left out. Student: "
        "`checkpoints/best-epoch-0002`, which was chosen on `dev`.",
        "",
        "| metric | teacher | student | retention [95 %] |",
        "|---|---:|---:|---:|",
        "| i2t R@1 | 0.0 | 0.5 | - |",
        "| i2t R@5 | 80.0 | 40.0 | 50.0 % [40.0, 61.3] |",
        "| i2t R@10 | 90.0 | 45.0 | 50.0 % [40.0, 61.3] |",
        "| t2i R@1 | 40.0 | 20.0 | 50.0 % [40.0, 61.3] |",
        "| t2i R@5 | 40.0 | 20.0 | 50.0 % [40.0, 61.3] |",
        "| t2i R@10 | 40.0 | 20.0 | 50.0 % |",
        "| mean | 48.3 | 24.2 | 50.2 % [45.0, 55.0] |",
    ]


def test_a_notice_is_no_markup():
    look = SimpleNamespace(cache="c", images=1, captions=1, notices=("<b> [a](b)\n# c",), changes=None)
    assert retraining_text("nothing-new", look, None, None).splitlines()[-1] == r"&lt;b&gt; \[a](b) # c"


def test_each_tower_that_was_measured_has_a_line():
    recall, kept = measured().student, measured().retention
    towers = {"image": TowerResult(recall=recall, retention=kept), "text": TowerResult(recall=recall, retention=kept)}
    assert recall_text(measured(towers=towers)).splitlines()[-3:] == [
        "| mean | 48.3 | 24.2 | 50.2 % [45.0, 55.0] |",
        "| mean, image tower with the teacher's other | - | 24.2 | 50.2 % |",
        "| mean, text tower with the teacher's other | - | 24.2 | 50.2 % |",
    ]


def test_without_a_student_only_the_teacher_is_shown():
    alone = dict.fromkeys(("run", "checkpoint", "chosen_on", "student", "retention", "retention_intervals"))
    lines = recall_text(measured(**alone, quarantined=0)).splitlines()
    assert lines[0] == "Recall on `te\\|st`: 1,000 images, 5,000 captions."
    assert lines[5] == "| i2t R@5 | 80.0 | - | - |"
    assert lines[-1] == "| mean | 48.3 | - | - |"


def test_a_run_shows_its_epochs_and_which_one_was_the_best():
    epochs = tuple(
        EpochRecord(
            epoch=number,
            loss=loss,
            parts={"feature": loss / 2},
            seconds=1,
            samples_per_second=1,
            data_wait_share=0,
            selection=selection and Selection(split="dev", mean_recall=selection, recalls={}),
        )
        for number, (loss, selection) in enumerate([(2.0, None), (1.0, 33.33)])
    )
    record = RunRecord(
        config=train_config("c.cache", "vit-s-32", "runs/a", select_split="dev"),
        student_config={},
        student_parameters=1234567,
        teacher="tiny",
        identity=make_identity(),
        cache_manifest_digest="0123456789abcdef" * 4,
        view="evaluation",
        image_root="/images",
        train_images=8,
        steps=8,
        epochs=epochs,
        checkpoint="checkpoints/epoch-0002",
        best=BestRecord(epoch=1, split="dev", mean_recall=33.33, checkpoint="checkpoints/best-epoch-0002"),
    )
    assert run_text(record, None).splitlines() == [
        "# `runs/a`",
        "",
        "`vit-s-32`, 1,234,567 parameters, from `c.cache` (teacher `tiny`, manifest `0123456789abcdef`): 8 steps on 8 "
        "images. Checkpoint `runs/a/checkpoints/epoch-0002`.",
        "",
        "| epoch | loss | feature | mean recall on `dev` |",
        "|---|---:|---:|---:|",
        "| 1 | 2.0000 | 1 | - |",
        "| 2 (best) | 1.0000 | 0.5 | 33.3 |",
    ]
    assert "| i2t R@5 | 80.0 | 40.0 | 50.0 % [40.0, 61.3] |" in run_text(record, measured())


def test_a_cache_says_what_made_it(known_cache):
    info = describe_cache(str(known_cache))
    recall = SampledRecall(images=10, captions=25, i2t=dict.fromkeys(CUTS, 12.34), t2i=dict.fromkeys(CUTS, 56.0))
    text = cache_text(info, recall)
    for line in (
        f"# `{known_cache}`",
        f"| teacher | `tiny`, weights `{'a' * 16}` |",
        "| architecture | width 8, GELU, fp32, logit scale 20 |",
        "| pixels | 32 x 32, bicubic, shortest |",
        f"| dataset | `{info.dataset}`, 10 images, 25 captions |",
        "| splits | `train` 8, `test` 2 |",
        "The teacher's own recall, 10 images, 25 captions, in percent:",
        "| image to text | 12.3 | 12.3 | 12.3 |",
        "| text to image | 56.0 | 56.0 | 56.0 |",
        f"Identity `{info.identity_digest}`, manifest `{info.manifest_digest}`.",
    ):
        assert line in text.splitlines(), line
    assert "recall" not in cache_text(info, None)
    assert "Problems" not in cache_text(info, None)
    # a table without words in its first row has an empty line above it in the UI
    assert "| |" not in text


def in_splits(info, **splits):
    dataset = info.identity.dataset.model_copy(update={"splits": splits})
    return info.model_copy(update={"identity": info.identity.model_copy(update={"dataset": dataset})})


def test_a_cache_without_splits_says_so(known_cache):
    info = describe_cache(str(known_cache))
    assert "| splits | no splits |" in cache_text(in_splits(info, **{"": 10}), None)
    assert "| splits | `test` 2, no split 8 |" in cache_text(in_splits(info, **{"test": 2, "": 8}), None)
    fields = dict.fromkeys(PrecomputeResult.model_fields, 0)
    result = PrecomputeResult.model_construct(
        **fields | {"splits": {"": 8, "test": 2}, "rows_reused": {}, "problems": {}},
    )
    assert [row["what"] for row in summary_table(result) if "split" in row["what"]] == ["split test"]


def test_the_first_problems_are_listed_and_the_others_counted(known_cache):
    result = PrecomputeResult.model_construct(
        cache="c.cache",
        problem_details=("undecodable-image: a|b.jpg: cut short", "damaged-tar: 0.tar: ends early"),
        problems={"undecodable-image": 1_200, "damaged-tar": 1},
    )
    more = "1,199 more: teacher-cache info c.cache --problems lists them"
    assert problem_lines(result) == [*result.problem_details, more]
    text = cache_text(describe_cache(str(known_cache)), None, problem_lines(result), ["?txt=lines splits them"])
    assert "\nHints:\n\n- `?txt=lines splits them`\n" in text
    listed = text.partition("Problems:\n\n")[2].partition("\n\n")[0]
    assert listed.splitlines() == [
        "- `undecodable-image: a\\|b.jpg: cut short`",
        "- `damaged-tar: 0.tar: ends early`",
        f"- `{more}`",
    ]
    few = result.model_copy(update={"problems": {"undecodable-image": 1, "damaged-tar": 1}})
    assert problem_lines(few) == list(few.problem_details)


@pytest.mark.parametrize("escaped", [code, unmarked])
@pytest.mark.parametrize(
    "name",
    [
        "a`b|c\nd",
        "<img src=x>",
        r"\[a](//b)",
        r"\![a](//b)",
        r"a\|<b>",
        r"a\\|b|c",
        "a\r# b",
        "\u202eb",
        "\x1b[2J",
        "[a]: b",
    ],
)
def test_no_name_is_markup_in_a_table(escaped, name):
    page = MarkdownIt().enable("table").render(f"| x | y |\n|---|---|\n| 1 | {escaped(name)} |")
    cells = [
        cell.removeprefix("<code>").removesuffix("</code>") for cell in re.findall(r"<td>(.*?)</td>", page, re.DOTALL)
    ]
    assert len(cells) == 2
    assert "<" not in cells[1]
    assert not re.search("[\x00-\x1f\u202e]", cells[1])
    assert page.count("<table>") == 1
    assert page.endswith("</table>\n")


def test_no_name_breaks_out_of_its_code():
    assert code("a`b|c\nd") == "`a'b\\|c d`"


def as_png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_a_picture_is_sent_as_it_is_or_in_fewer_colours_or_not_at_all():
    small = as_png(np.full((20, 30, 3), 7, np.uint8))
    head, _, data = image_uri(small).partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == small
    rng = np.random.default_rng(0)
    # 256 x 256 x 3 random bytes do not shrink as they are; as one of 64 colours a pixel takes 6 bits
    reduced = base64.b64decode(image_uri(as_png(rng.integers(0, 256, (256, 256, 3), np.uint8))).partition(",")[2])
    with Image.open(io.BytesIO(reduced)) as image:
        assert (image.size, image.mode) == ((256, 256), "P")
    with pytest.raises(ValueError, match="at most 200,000"):
        image_uri(as_png(rng.integers(0, 256, (600, 600, 3), np.uint8)))


def test_the_page_of_a_cache_lies_beside_it_and_never_in_it():
    assert str(page_beside("caches/f8k.cache")) == "caches/f8k.report.html"
    assert str(page_beside("caches/other/")) == "caches/other.report.html"
    assert page_beside("s3://bucket/f8k.cache") is None


def test_a_report_is_opened_by_a_link_where_serve_runs_and_by_a_command_elsewhere(monkeypatch):
    """A browser follows no file: link from a page of a server."""
    monkeypatch.delenv(REPORTS_URL, raising=False)
    command = "`python3 -m webbrowser file:///work/my%20runs/report.html`"
    left = ReportLeft(page="/work/my runs/report.html")
    assert left.line() == f"\n\nOpen the report on the worker's machine: {command}"
    monkeypatch.setenv(REPORTS_URL, "http://127.0.0.1:4201")
    link = "[Open the report](http://127.0.0.1:4201/work/my%20runs/report.html)"
    assert left.line() == f"\n\n{link}, or on the worker's machine: {command}"
    assert ReportLeft().line() == ""


def test_gpus_are_named_by_their_uuid_else_by_host_and_by_what_cuda_may_see(monkeypatch):
    from teacher_cache.flows.devices import gpu_limits

    def found(name):
        kind, _, index = name.partition(":")
        return SimpleNamespace(type="cuda" if kind == "auto" else kind, index=int(index) if index else None)

    uuids = {}
    monkeypatch.setattr("teacher_cache.pipeline.models.device.resolve_device", found)
    monkeypatch.setattr("teacher_cache.pipeline.models.device.device_uuid", uuids.get)
    monkeypatch.setattr("socket.gethostname", lambda: "box")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_limits("cpu") == []
    assert gpu_limits("auto") == ["gpu:0@box"]
    assert gpu_limits("cuda:1") == ["gpu:1@box"]
    assert gpu_limits("cuda", 2) == ["gpu:0@box", "gpu:1@box"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-8f")
    assert gpu_limits("cuda", 2) == ["gpu:3@box", "gpu:GPU-8f@box"]
    uuids[1] = "8f0d5c1e-0000-4000-8000-000000000001"
    assert gpu_limits("cuda:1") == ["gpu:8f0d5c1e-0000-4000-8000-000000000001"]
    assert gpu_limits("cuda", 2) == ["gpu:3@box", "gpu:8f0d5c1e-0000-4000-8000-000000000001"]


def test_the_uuid_of_a_gpu_is_torchs_own_and_none_where_it_tells_none(monkeypatch):
    import torch

    from teacher_cache.pipeline.models.device import device_uuid

    properties = SimpleNamespace(name="a card")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert device_uuid(0) is None
    properties.uuid = UUID(int=5)  # torch's own type has no constructor; it too is text by str
    assert device_uuid(0) == "00000000-0000-0000-0000-000000000005"
    assert device_uuid(1) is None  # not there: whoever wants it says so better
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_uuid(0) is None
