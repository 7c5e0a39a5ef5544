"""The report page as a file: one copy of everything, nothing that runs or loads, sizes said."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.pipeline.evaluate.recall import mean_recall
from teacher_cache.pipeline.evaluate.sampled import SampledRecall
from teacher_cache.pipeline.evaluate.several_teachers import OtherTeacher
from teacher_cache.pipeline.report.chart import PALETTES
from teacher_cache.pipeline.report.charts import all_charts, main_chart, main_chart_png
from teacher_cache.pipeline.report.collect import collect_report
from teacher_cache.pipeline.report.data import ReportData
from teacher_cache.pipeline.report.page import _evaluations, render_report
from teacher_cache.pipeline.report.summary import verdict
from teacher_cache.storage.errors import UsageError
from tests.conftest import plan_known_cache
from tests.pipeline.report.report_data import HOSTILE, RTL, odd_report, report_data, unfinished_report
from tests.storage.look.test_look import fill

pytest.importorskip("jinja2", reason="needs jinja2: pip install 'teacher-cache[report]'")
pytest.importorskip("vl_convert", reason="needs vl-convert-python: pip install 'teacher-cache[report]'")


class _Parts(HTMLParser):
    """Scripts and attributes of a page, as an HTML parser sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data


@pytest.fixture(scope="module")
def page() -> str:
    return render_report(report_data())


@pytest.fixture(scope="module")
def block(page: str) -> dict[str, Any]:
    """The JSON block."""
    found = [text for attributes, text in _Parts(page).scripts if attributes.get("type") == "application/json"]
    assert len(found) == 1
    parsed: dict[str, Any] = json.loads(found[0])
    return parsed


def test_each_picture_is_in_the_page_once(page: str, block: dict[str, Any]) -> None:
    pictures = report_data().pictures
    assert block["pictures"] == {str(row): uri for row, uri in pictures.items()}
    assert len(pictures) == 39
    for uri in pictures.values():
        assert page.count(uri) == 1


def test_the_rows_of_each_chart_are_in_the_block_once_and_the_specs_only_name_them(block: dict[str, Any]) -> None:
    charts = all_charts(report_data())
    names = ["retention", "teacher", "pairs", "cosines", "image_norms", "text_norms"]
    names += ["map", "losses", "selection", "shipped"]
    assert list(charts) == list(block["charts"]) == names
    for name, chart in charts.items():
        assert block["charts"][name]["spec"]["data"] == {"name": name}
        assert block["charts"][name]["rows"] == [list(row) for row in chart.rows]
        assert len(chart.rows) > 0
    assert next(row[5] for row in block["charts"]["map"]["rows"] if row[3] == "caption") == HOSTILE
    # a loss that is no number is null, never NaN, which is no JSON
    assert [row[4] for row in block["charts"]["losses"]["rows"] if row[2] == 17 and row[1] == "total"] == [None, None]


def test_no_caption_becomes_markup(page: str) -> None:
    parts = _Parts(page)
    assert HOSTILE not in page
    assert "onerror" not in {name for _, attributes in parts.attributes for name in attributes}
    assert [attributes for tag, attributes in parts.attributes if tag == "b"] == []  # of a uri
    raw = page[page.index('id="report-data">') :].partition("</script>")[0]
    assert not set("&\u2028\u2029") & set(raw)
    assert "<" not in raw.partition(">")[2]
    # and what was escaped is there for people
    shown = html.unescape(page)
    assert page.count(html.escape(HOSTILE, quote=False).replace('"', "&#34;").replace("'", "&#39;")) >= 3
    assert RTL in shown


def test_the_policy_allows_the_pages_own_scripts_by_hash_and_loads_nothing(page: str) -> None:
    parts = _Parts(page)
    policies = [a["content"] for tag, a in parts.attributes if tag == "meta" and "http-equiv" in a]
    assert len(policies) == 1
    rules = dict(rule.strip().split(" ", 1) for rule in str(policies[0]).split(";"))
    hashes = {
        "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
        for attributes, text in parts.scripts
        if "type" not in attributes
    }
    assert len(hashes) == 2
    assert rules == {
        "default-src": "'none'",
        "script-src": rules["script-src"],
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert set(rules["script-src"].split()) == hashes
    # nothing that names another place: no source, no link but to a part of the page
    for _, attributes in parts.attributes:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")


def test_the_licences_of_the_libraries_are_in_the_page(page: str) -> None:
    libraries = [text for attributes, text in _Parts(page).scripts if "vegaEmbed=" in text]
    assert len(libraries) == 1
    for words in ("University of Washington Interactive Data Lab", "Redistributions in binary form", "Mike Bostock"):
        assert words in libraries[0][:4000]


def test_what_is_sampled_says_of_how_many(page: str) -> None:
    assert "39 of 40 images and 39 captions, coloured by split; " in page
    assert "80 of 800 steps" in page


def _problems(page: str) -> tuple[str, str]:
    """The badge of the tab, and the words of its part."""
    badge = re.search(r'class="badge">([^<]*)', page)
    part = page[page.index('<section id="problems">') :].partition("</section>")[0]
    return badge[1] if badge else "", " ".join(html.unescape(re.sub(r"<[^>]*>", " ", part)).split())


def test_reasons_of_quarantine_are_counted_over_all_images_or_say_that_they_are_not() -> None:
    data = report_data()
    lost = tuple(data.lost[0].model_copy(update={"row": row}) for row in range(3))

    def said(shown: Any = lost, **info: Any) -> tuple[str, str]:
        return _problems(render_report(report_data(lost=shown, info=data.info.model_copy(update=info))))

    counted = {"truncated": 1_000, "undecodable": 4_000}
    badge, words = said(quarantine=counted, images_quarantined=5_000)
    assert badge == "5,002"  # two images of the dataset got no row
    assert "no reader returns them. 3 of 5,000 are shown. By reason: undecodable, 4,000; truncated, 1,000." in words
    # more have a place in what is committed than in what is sealed
    assert said(quarantine=counted, images_quarantined=7, sealed=False) == (badge, words)
    badge, words = said(quarantine=None, images_quarantined=5_000)
    assert badge == "5,002"
    assert "3 of 5,000 are shown. By reason (of those shown): truncated, 3." in words
    badge, words = said(quarantine=None, images_quarantined=3)
    assert "no reader returns them. By reason: truncated, 3." in words
    badge, words = said((), quarantine=counted, images_quarantined=None, sealed=False)
    assert "5,000 images without an embedding; none is shown here. By reason: undecodable, 4,000; " in words
    assert said((), quarantine={}, images_quarantined=0, problems={}) == (
        "",
        "Problems No image is quarantined, and the dataset was read without a problem.",
    )


def test_commit_records_that_were_not_read_are_no_proof_that_nothing_is_quarantined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "part.cache"
    plan_known_cache(path)
    fill(path, chunks=2)
    whole = _problems(render_report(collect_report(str(path))))
    assert whole == ("", "Problems No image is quarantined so far, and the dataset was read without a problem.")
    monkeypatch.setattr("teacher_cache.storage.look.info.COMMITS_READ", 1)
    page = render_report(collect_report(str(path)))
    badge, words = _problems(page)
    assert badge == "?"
    assert words.startswith("Problems Whether images are quarantined is not known: ")
    assert f"teacher-cache verify {path} This counts them" in words
    assert "No image" not in words
    assert '<strong>–</strong><span class="small">not counted in this unfinished cache' in page


def test_a_path_that_is_no_utf8_does_not_break_the_page(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.cache")
    plan_known_cache(path)
    data = collect_report(str(path))
    page = render_report(data)
    assert b"caf?.cache</bdi>" in page.encode()
    assert ReportData.model_validate_json(data.model_dump_json()) == data
    # and what was put together by hand
    info = data.info.model_copy(update={"dataset": "flickr:/caf\udce9"})
    assert b"flickr:/caf?" in render_report(data.model_copy(update={"info": info})).encode()


def test_a_checkpoint_chosen_on_the_split_it_is_measured_on_says_so(page: str) -> None:
    assert page.count("best-epoch-0003, chosen on dev: no test result") == 2
    # and is not the number that the summary shows, though it is higher
    tiles = re.findall(r"mean recall</span><strong>([\d.]+) %</strong><span class=\"small\">([^<]*)", page)
    assert tiles == [("84.0", "on 8 test images"), ("79.0", "small on the same images")]


_ON_TEST = " of the teacher's mean recall on 8 test images"
_KEEPS = f"small, the best of 2 students, keeps 94 % (90 to 98){_ON_TEST}"
_FASTER = ", with 41 % of its parameters; ONNX int8 encodes images 3.9 times as fast"
_ALONE = "tiny has embedded 39 images and 120 captions."


def _no_test(data: ReportData) -> dict[str, Any]:
    """Measured only on the split that its checkpoint was chosen on."""
    run = data.runs[0]
    return {"runs": (run.model_copy(update={"evaluations": run.evaluations[1:]}),), "deployments": ()}


def _learned(data: ReportData) -> dict[str, Any]:
    """The best run learned from three of the test images, the other from none."""
    first, *others = data.runs
    evaluations = tuple(item.model_copy(update={"learned_images": 3}) for item in first.evaluations)
    return {"runs": (first.model_copy(update={"evaluations": evaluations}), *others), "deployments": ()}


def _only_learned(data: ReportData) -> dict[str, Any]:
    return {"runs": _learned(data)["runs"][:1], "deployments": ()}


def _of_another_cache(data: ReportData) -> dict[str, Any]:
    """Measured on a cache of the same data, and trained on yet another."""
    run = data.runs[1]
    evaluations = tuple(item.model_copy(update={"cache_manifest_digest": "2" * 64}) for item in run.evaluations)
    return {"runs": (run.model_copy(update={"evaluations": evaluations}),), "deployments": ()}


def test_a_student_that_learned_from_the_images_says_so() -> None:
    data = report_data()
    assert render_report(report_data(**_learned(data))).count("; the student learned from 3 of them") == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (lambda data: {}, f"{_KEEPS}{_FASTER}."),
        (
            _learned,
            f"smaller (1,952,477 parameters), the best of 2 students, keeps 75 % (71 to 79){_ON_TEST}. It learned "
            "from made-up.cache, not this cache.",
        ),
        (
            _of_another_cache,
            f"smaller (1,952,477 parameters) keeps 75 % (71 to 79){_ON_TEST}. It learned from made-up.cache and was "
            "measured on made-up.cache, not this cache.",
        ),
        (
            _only_learned,
            f"small (1,952,477 parameters) keeps 94 % (90 to 98){_ON_TEST}. It learned from 3 of these images, which "
            "flatters it.",
        ),
        (lambda data: {"deployments": ()}, f"{_KEEPS.replace('small', 'small (1,952,477 parameters)')}."),
        (lambda data: {"runs": ()}, f"small keeps 92 % (90 to 94){_ON_TEST}{_FASTER}."),
        (
            _no_test,
            "small (1,952,477 parameters) keeps 99 % (95 to 103) of the teacher's mean recall on 8 dev images. "
            "Its checkpoint was chosen on these images, so this is no test result.",
        ),
        (lambda data: {"runs": (), "deployments": (), "recall": None}, _ALONE),
        (
            lambda data: {
                "runs": (),
                "deployments": (),
                "recall": SampledRecall(images=39, captions=117, i2t={"R@1": 30.4}, t2i={"R@1": 20}),
            },
            f"{_ALONE} Among 39 images its first answer is right for 30 % of the images and 20 % of the captions; "
            "chance is 2.6 % and 2.6 %.",
        ),
    ],
)
def test_the_first_sentence_is_the_result(changes: Callable[[ReportData], dict[str, Any]], said: str) -> None:
    assert verdict(report_data(**changes(report_data()))) == said


def test_an_unfinished_cache_says_how_much_is_there() -> None:
    assert verdict(unfinished_report()) == (
        "15 % of this cache is encoded. Run the same precompute command again to finish it."
    )


def test_a_student_of_the_same_name_gets_no_cost_of_another() -> None:
    data = report_data()
    run = data.runs[0]
    other = run.evaluations[0].model_copy(update={"student_parameters": 1})
    changed = run.model_copy(update={"evaluations": (other,)})
    assert verdict(report_data(runs=(changed,))) == f"small (1 parameters) keeps 94 % (90 to 98){_ON_TEST}."


def test_epochs_count_from_one(page: str) -> None:
    charts = all_charts(report_data())
    assert [row["epoch"] for row in charts["selection"].records()] == [1, 2, 3, 4] * 2
    assert {row["epoch"] for row in charts["losses"].records()} == {1, 2, 3, 4}
    assert page.count("<dd>4, chosen on dev: mean recall 80.0 %</dd>") == 2
    # a whole number of epochs, steps or images/s at each tick, and few of them
    for name in ("selection", "losses", "shipped"):
        text = json.dumps(charts[name].spec)
        assert '"format": ",d", "tickCount": 8, "tickMinStep": 1' in text


def test_digests_are_folded(page: str) -> None:
    before, _, after = page.partition(f"<summary>Identity {report_data().info.identity_digest[:12]}: ")
    assert not re.search(r"\b[0-9a-f]{64}\b", before.partition("<main")[2])
    assert "1" * 64 in after.partition("</details>")[0]


def test_bins_of_one_chart_are_equal() -> None:
    for name in ("pairs", "cosines"):
        bins: dict[str, list[tuple[float, float]]] = {}
        for row in all_charts(report_data())[name].records():
            bins.setdefault(row["series"], []).append((row["from"], row["to"]))
        one, other = bins.values()
        assert one == other


def test_recall_is_shown_beside_chance() -> None:
    chart = all_charts(report_data())["teacher"]
    by_chance = {(row["series"], row["metric"]): row["chance"] for row in chart.records()}
    # 8 images with 3 captions each
    assert by_chance["split test, 8 images", "text → image R@1"] == pytest.approx(12.5)
    assert by_chance["split test, 8 images", "image → text R@1"] == pytest.approx(12.5)
    assert by_chance["split test, 8 images", "text → image R@10"] == 100
    assert chart.rows[0][0] == "mean recall"
    assert [layer["mark"]["type"] for layer in chart.spec["layer"]] == ["tick", "rule", "point"]


@pytest.mark.parametrize(
    ("change", "by", "groups"),
    [
        (lambda number: {"class_name": "cat" if number % 3 else "dog"}, "class", {"cat", "dog"}),
        (lambda number: {"class_name": f"class {number % 9}"}, "class", {*(f"class {n}" for n in range(5)), "other"}),
        (lambda number: {}, "split", {"train", "test"}),
        (lambda number: {"split": "all"}, "tower", {"image", "caption"}),
    ],
)
def test_the_map_is_coloured_by_class_or_split(
    change: Callable[[int], dict[str, Any]], by: str, groups: set[str]
) -> None:
    data = report_data()
    assert data.row_map is not None
    points = tuple(point.model_copy(update=change(number)) for number, point in enumerate(data.row_map.points))
    chart = all_charts(report_data(row_map=data.row_map.model_copy(update={"points": points})))["map"]
    assert f"coloured by {by}; " in chart.caption
    assert chart.columns[-1] == ("group", by)
    assert {row[-1] for row in chart.rows} == groups


def test_each_tower_that_was_measured_by_itself_has_a_row() -> None:
    data = report_data()
    tables = dict(_evaluations(data))
    assert list(tables) == ["test: 8 images, 24 captions", "dev: 8 images, 24 captions"]
    rows = tables["test: 8 images, 24 captions"]
    assert rows[0] == ["teacher", "–", "84.0 (81.0 to 87.0)", "78.0 (75.0 to 81.0)", *rows[0][4:]]
    for run in data.runs:
        for which, tower in (run.evaluations[0].towers or {}).items():
            (row,) = [row for row in rows if row[0] == f"{run.name}, {which} tower by itself"]
            assert row[1:3] == [f"{tower.retention['mean']:.1f} %", f"{mean_recall(tower.recall):.1f}"]
            assert row[3] == f"{tower.recall['i2t']['R@1']:.1f}"
    assert len([row for row in rows if "by itself" in row[0]]) == 2 * len(data.runs) > 0


def test_further_teachers_and_all_together_have_a_row_once() -> None:
    """Of two runs that were measured on the same caches, too."""
    data = report_data()
    first = data.runs[0].evaluations[0]
    other = OtherTeacher(
        teacher_name="b", cache="b.cache", cache_manifest_digest="2" * 64, recall=first.student or first.teacher
    )
    more = {"other_teachers": (other,), "together": first.teacher}
    run = data.runs[0].model_copy(update={"evaluations": (first.model_copy(update=more),)})
    rows = dict(_evaluations(data.model_copy(update={"runs": (run, run)})))["test: 8 images, 24 captions"]
    assert [row[0] for row in rows[:3]] == ["teacher", "teacher of b.cache", "all teachers together"]
    assert rows[1][2] == f"{mean_recall(other.recall):.1f}"
    assert rows[2][2] == f"{mean_recall(first.teacher):.1f}"
    assert len([row for row in rows if row[0] in ("teacher of b.cache", "all teachers together")]) == 2


def test_an_unfinished_cache_has_a_page_that_says_what_to_run() -> None:
    page = render_report(unfinished_report())
    assert "not complete" in page
    assert re.findall(r'<progress max="(\d+)" value="(\d+)" aria-label="(\w+)"></progress> ([^<]+)<', page) == [
        ("40", "24", "images", "24 of 40 encoded"),
        ("120", "0", "captions", "0 of 120 encoded"),
    ]
    assert "6 of 40 chunks" in page
    for command in ("precompute", "train", "evaluate", "deploy"):
        assert f"teacher-cache {command} " in page
    assert "--cache &#39;/data/caches/made up &amp; &lt;odd&gt;.cache&#39;" in page  # quoted for a shell
    assert "vegaEmbed=" not in page  # no chart, no library


def test_equal_numbers_are_one_bar_where_they_are() -> None:
    rows = all_charts(odd_report())["text_norms"].records()
    filled = [(row["series"], row["from"], row["to"], row["count"], row["share"]) for row in rows if row["count"]]
    assert filled == [("captions", 1.0, pytest.approx(1.05), 3, 1.0)]


def test_specs_are_valid_vega_lite() -> None:
    altair = pytest.importorskip("altair", reason="its schema of Vega-Lite; pip install 'teacher-cache[report]'")
    for chart in (*all_charts(report_data()).values(), *all_charts(odd_report()).values()):
        kind = altair.LayerChart if "layer" in chart.spec else altair.Chart
        kind.from_dict({**chart.spec, "data": {"values": chart.records()}})


@pytest.mark.parametrize(("changes", "more"), [({}, set()), ({"runs": ()}, {"chance"})], ids=["students", "teacher"])
def test_the_main_chart_holds_its_data_and_becomes_a_picture(changes: dict[str, Any], more: set[str]) -> None:
    data = report_data(**changes)
    spec = main_chart(data)
    first = spec.get("vconcat", [spec])[0]
    assert set(first["data"]["values"][0]) == {"metric", "series", "value", "low", "high"} | more
    assert spec["config"]["range"]["category"][0] == PALETTES["light"]["series1"]
    assert main_chart_png(data)[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(UsageError, match="no embedding to draw"):
        main_chart(unfinished_report())


def test_pages_are_made_without_torch() -> None:
    code = (
        "import sys; from tests.pipeline.report.report_data import unfinished_report\n"
        "from teacher_cache.pipeline.report.page import render_report; render_report(unfinished_report())\n"
        "bad = {'torch', 'open_clip', 'faiss', 'prefect'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def _contrast(one: str, other: str) -> float:
    """WCAG 2.1's contrast of two colours, 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", PALETTES)
def test_colours_can_be_told_from_their_ground(theme: Any) -> None:
    palette = PALETTES[theme]
    for name in ("ink", "muted", "accent", "good", "warn", "bad"):
        for ground in ("ground", "surface", "sunken"):
            assert _contrast(palette[name], palette[ground]) >= 4.5, (name, ground)
    for number in range(1, 7):
        assert _contrast(palette[f"series{number}"], palette["surface"]) >= 3, number
