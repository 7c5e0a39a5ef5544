"""The report page in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacher_cache.pipeline.report.chart import PALETTES
from teacher_cache.pipeline.report.data import ReportData
from teacher_cache.pipeline.report.page import render_report
from tests.pipeline.report.report_data import HOSTILE, odd_report, report_data, unfinished_report

pytest.importorskip("jinja2", reason="needs jinja2: pip install 'teacher-cache[report]'")
pytest.importorskip("vl_convert", reason="needs vl-convert-python: pip install 'teacher-cache[report]'")

TABS = ["overview", "students", "deployment", "retrieval", "map", "distributions", "problems"]
TITLE = "made up & <odd>.cache – teacher cache report"
pytestmark = pytest.mark.browser


class Opened:
    """A page in a browser, and everything that it complained of or asked for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def tab(self, name: str) -> None:
        """Open a tab and wait for its charts."""
        self.page.click(f"#tab-{name}")
        self.drawn(name)

    def drawn(self, name: str) -> None:
        self.page.wait_for_function(
            "name => [...document.querySelectorAll(`#${name} .plot`)].every(p => p.querySelector('svg, canvas'))",
            arg=name,
        )

    def require_quiet(self, path: Path) -> None:
        assert self.complaints == []
        assert [url for url in self.requests if not url.startswith("data:image/")] == [path.as_uri()]


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render_report(report_data()), encoding="utf-8")
    return path


@pytest.fixture
def open_report(browser: Any, report_file: Path) -> Iterator[Callable[..., Opened]]:
    """Opens the report in a context of its own; settings are playwright's, ``fragment`` is the tab in the address."""
    contexts = []

    def opened(fragment: str = "", file: Path = report_file, **settings: Any) -> Opened:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **settings})
        contexts.append(context)
        found = Opened(context.new_page())
        found.page.goto(file.as_uri() + fragment)
        return found

    yield opened
    for context in contexts:
        context.close()


def test_every_tab_draws_without_a_complaint_or_a_request(
    open_report: Callable[..., Opened], report_file: Path
) -> None:
    report = open_report()
    for name in TABS:
        report.tab(name)
        assert report.page.is_visible(f"#{name} h2")
        assert report.page.locator("main > section:visible").count() == 1
        assert report.page.evaluate("location.hash") == f"#{name}"
    assert report.page.locator(".plot svg, .plot canvas").count() == 10
    # no caption ran as a script, and their pictures are really there
    assert report.page.title() == TITLE
    pictures = report.page.evaluate("[...document.querySelectorAll('img[data-picture]')].map(i => i.naturalWidth)")
    assert len(pictures) == report_file.read_text().count("<img data-picture=") > 18
    assert set(pictures) == {96}
    # whole ones: what was cut off might be what its caption is about
    fits = report.page.evaluate(
        "[...document.querySelectorAll('.pictures img')].map(i => getComputedStyle(i).objectFit)"
    )
    assert set(fits) == {"contain"}
    report.require_quiet(report_file)


@pytest.mark.parametrize("make", [odd_report, unfinished_report])
def test_what_is_missing_or_equal_is_no_complaint(
    open_report: Callable[..., Opened], tmp_path: Path, make: Callable[[], ReportData]
) -> None:
    path = tmp_path / "other.html"
    path.write_text(render_report(make()), encoding="utf-8")
    report = open_report(file=path)
    for name in TABS:
        report.tab(name)
        assert report.page.is_visible(f"#{name} h2")
    report.require_quiet(path)


def test_tabs_follow_the_keyboard_and_the_address(open_report: Callable[..., Opened]) -> None:
    report = open_report("#students")
    page = report.page
    selected = "document.querySelector('[role=tab][aria-selected=true]').id"
    assert page.evaluate(selected) == "tab-students"
    page.focus("#tab-students")
    for key, wanted in [
        ("ArrowRight", "deployment"),
        ("ArrowLeft", "students"),
        ("Home", "overview"),
        ("ArrowLeft", "problems"),
        ("ArrowRight", "overview"),
        ("End", "problems"),
    ]:
        page.keyboard.press(key)
        assert page.evaluate(selected) == f"tab-{wanted}"
        assert page.evaluate("document.activeElement.id") == f"tab-{wanted}"
        assert page.is_visible(f"#{wanted}")
    # one stop of the Tab key: the next one is in the panel, or behind it
    assert page.locator("[role=tab][tabindex='0']").count() == 1
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('[role=tablist]')") is None


def _at_point(page: Any, row: int, tower: str = "image") -> tuple[float, float]:
    """Where the image of that row, or its caption, is on the screen, by the view's own scales."""
    found: list[float] = page.evaluate(
        """([row, tower]) => {
            const data = JSON.parse(document.getElementById('report-data').textContent);
            const spec = data.charts.map, at = spec.rows.find(r => r[3] === tower && r[7] === row);
            const box = document.querySelector('#map canvas').getBoundingClientRect();
            const [x, y] = ['x', 'y'].map((axis, i) => {
                const [low, high] = spec.spec.layer[0].encoding[axis].scale.domain;
                return (at[1 + i] - low) / (high - low);
            });
            return [box.left, box.bottom, box.width, box.height, x, y];
        }""",
        [row, tower],
    )
    left, bottom, width, _, x, y = found
    return left + 5 + x * (width - 10), bottom - 5 - y * 460


def test_pointing_at_the_map_shows_the_picture_and_caption(open_report: Callable[..., Opened]) -> None:
    report = open_report("#map")
    page = report.page
    report.drawn("map")
    page.locator("#map canvas").scroll_into_view_if_needed()
    page.mouse.move(*_at_point(page, 17))
    page.wait_for_selector("#thumb:visible")
    assert page.inner_text("#thumb p") == "img-17 (image 17, train)"
    page.wait_for_function("document.querySelector('#thumb img').naturalWidth === 96")
    assert page.get_attribute("#thumb img", "src") == report_data().pictures[17]
    assert page.get_attribute("#thumb img", "alt") == "img-17"
    page.mouse.move(5, 5)
    page.wait_for_selector("#thumb", state="hidden")
    assert report.complaints == []


def test_a_line_leads_from_a_caption_to_its_image(open_report: Callable[..., Opened]) -> None:
    report = open_report("#map")
    page = report.page
    report.drawn("map")
    page.locator("#map canvas").scroll_into_view_if_needed()
    caption, image = (np.array(_at_point(page, 17, tower)) for tower in ("caption", "image"))
    between = [(caption + part * (image - caption)).tolist() for part in (0.3, 0.5, 0.7)]
    inked = """places => {
        const canvas = document.querySelector('#map canvas'), box = canvas.getBoundingClientRect();
        const scale = canvas.width / box.width;
        return places.every(([x, y]) => canvas.getContext('2d')
            .getImageData((x - box.left) * scale - 2, (y - box.top) * scale - 2, 5, 5).data.some(value => value));
    }"""
    assert not page.evaluate(inked, between)
    page.mouse.move(*caption.tolist())
    page.wait_for_function(inked, arg=between)
    assert page.inner_text("#thumb p").endswith("(caption 51, train)")
    page.mouse.move(5, 5)
    page.wait_for_function(f"places => !({inked})(places)", arg=between)


def test_the_map_is_reached_by_keys_and_searched(open_report: Callable[..., Opened]) -> None:
    report = open_report("#map")
    page = report.page
    report.drawn("map")
    page.focus("#map .plot")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#thumb")
    first = page.inner_text("#map-said")
    assert first == "img-0 (image 0, train)"
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#map-said") != first
    page.keyboard.press("Escape")
    assert not page.is_visible("#thumb")

    page.fill("#map-query", "IMG-3")  # img-3 is quarantined: 30 to 39 are left
    assert page.inner_text("#map-said") == "10 of 78 points contain it:"
    page.select_option("#map-split", "test")
    assert page.inner_text("#map-said") == "8 of 16 points contain it:"
    page.focus("#map-hits button >> nth=1")
    assert page.inner_text("#thumb p") == "img-33 (image 33, test)"
    page.select_option("#map-tower", "caption")
    assert page.inner_text("#map-said") == "0 of 8 points contain it."
    page.fill("#map-query", "<script>")
    page.select_option("#map-split", "")
    assert page.locator("#map-hits button").count() == 1
    assert page.title() == TITLE
    assert report.complaints == []


def test_charts_are_tables_for_who_asks(open_report: Callable[..., Opened]) -> None:
    report = open_report("#students")
    report.page.click("[data-table=losses] summary")
    cells = report.page.locator("#students [data-table=losses] tbody tr").all_inner_texts()
    assert len(cells) == 2 * 3 * 40
    assert cells[17 * 3].split("\t") == ["small", "total", "17", "2", "–"]


def test_losses_are_chosen_and_shown_on_a_logarithmic_axis(open_report: Callable[..., Opened]) -> None:
    report = open_report("#students")
    page = report.page
    report.drawn("students")
    plot = "document.querySelector('[data-chart=losses] svg').textContent"
    before = page.evaluate(plot)
    page.select_option("#loss-part", "relational")
    page.wait_for_function(f"{plot} !== {json.dumps(before)}")
    linear = page.evaluate(plot)
    page.check("#loss-log")
    page.wait_for_function(f"{plot} !== {json.dumps(linear)}")
    assert report.complaints == []


def test_the_theme_is_the_systems_until_the_button_is_pressed(open_report: Callable[..., Opened]) -> None:
    report = open_report(color_scheme="dark")
    page = report.page
    ground = "getComputedStyle(document.body).backgroundColor"
    ink = "document.querySelector('#overview svg .role-axis-label text').getAttribute('fill')"
    report.drawn("overview")

    def colours() -> tuple[str, str]:
        red, green, blue = (int(part) for part in re.findall(r"\d+", page.evaluate(ground)))
        return f"#{red:02x}{green:02x}{blue:02x}", page.evaluate(ink)

    assert colours() == (PALETTES["dark"]["ground"], PALETTES["dark"]["muted"])
    page.click("#theme")
    page.wait_for_function(f"{ink} === '{PALETTES['light']['muted']}'")
    assert colours() == (PALETTES["light"]["ground"], PALETTES["light"]["muted"])
    page.reload()
    report.drawn("overview")
    assert colours()[0] == PALETTES["light"]["ground"]  # remembered
    page.click("#theme")
    page.wait_for_function(f"{ink} === '{PALETTES['dark']['muted']}'")
    assert report.complaints == []


@pytest.mark.parametrize("width", [390, 1280])
def test_tables_show_their_numbers(open_report: Callable[..., Opened], width: int) -> None:
    """No scrolling inside a table but sideways, and then the names stay."""
    report = open_report("#students", viewport={"width": width, "height": 740})
    page = report.page
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    for name in TABS:
        report.tab(name)
        higher = "boxes => boxes.filter(box => box.scrollHeight > box.clientHeight + 2).length"
        assert page.locator(".scroll:visible").evaluate_all(higher) == 0, name
    ends = "(rows, cells) => Math.max(...rows.map(row => [...row.cells].at(cells).getBoundingClientRect().right))"
    report.tab("students")
    rows = page.locator("#students > .scroll tbody tr")
    assert [text.split("\t")[0] for text in rows.all_inner_texts()] == [
        *("teacher", "small\nepoch-0004", "small, image tower by itself", "small, text tower by itself"),
        *("smaller\nepoch-0004", "smaller, image tower by itself", "smaller, text tower by itself"),
        *("teacher", *(f"{name}\nbest-epoch-0003, chosen on dev: no test result" for name in ("small", "smaller"))),
    ]
    assert rows.evaluate_all(ends, 2) < width  # what is kept, and the mean recall
    report.tab("deployment")
    rows = page.locator("#deployment > .scroll tbody tr")
    names = ["retention (95 %)", "mean recall (chance 53.6)"]
    assert [text.split("\t")[0] for text in rows.all_inner_texts()[:2]] == names
    assert rows.evaluate_all(ends, -1) < width  # all four models
    page.set_viewport_size({"width": 250, "height": 740})
    box = page.locator("#deployment > .scroll")
    box.evaluate("box => { box.scrollLeft = 60; }")
    places = "box => [box, box.querySelector('tbody th')].map(each => each.getBoundingClientRect().x)"
    left, name = box.evaluate(places)
    assert (box.evaluate("box => box.scrollLeft"), abs(name - left) <= 1) == (60, True)


def test_a_phone_never_scrolls_sideways(open_report: Callable[..., Opened]) -> None:
    report = open_report(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    for name in TABS:
        report.tab(name)
        assert report.page.evaluate("document.documentElement.scrollWidth") == 360, name
    report.tab("map")
    report.page.locator("#map canvas").scroll_into_view_if_needed()
    report.page.touchscreen.tap(*_at_point(report.page, 17))
    report.page.wait_for_selector("#thumb:visible")
    assert report.complaints == []


def test_without_javascript_the_text_is_there(open_report: Callable[..., Opened], report_file: Path) -> None:
    report = open_report(java_script_enabled=False)
    assert report.page.locator("main > section:visible").count() == len(TABS)
    text = report.page.inner_text("body")
    assert "Without JavaScript" in text
    assert "best-epoch-0003, chosen on dev: no test result" in text
    assert HOSTILE.replace("\u2028", " ")[:40] in text
    report.require_quiet(report_file)


def test_printing_shows_every_part(open_report: Callable[..., Opened]) -> None:
    report = open_report(color_scheme="dark")
    page = report.page
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    for name in TABS:
        report.drawn(name)
    assert page.locator("main > section:visible").count() == len(TABS)
    # on paper, which is white
    inks = "[...document.querySelectorAll('svg .role-axis-label text')].map(text => text.getAttribute('fill'))"
    assert set(page.evaluate(inks)) == {PALETTES["light"]["muted"]}
    page.emulate_media(media="screen")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("main > section:visible").count() == 1
    assert report.complaints == []


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)])
def test_axe_finds_nothing_to_mend(open_report: Callable[..., Opened], scheme: str, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    # axe is a script of the test's: it may run where the page's policy forbids it
    report = open_report(bypass_csp=True, color_scheme=scheme, viewport={"width": width, "height": 900})
    report.drawn("overview")
    report.page.click("#overview [data-table=retention] summary")
    report.page.click("#overview summary >> text=Identity")
    found = axe.Axe().run(report.page)
    assert found.violations_count == 0, found.generate_report()
    report.page.evaluate("dispatchEvent(new Event('beforeprint'))")  # all parts at once: one run, not eight
    for name in TABS:
        report.drawn(name)
    found = axe.Axe().run(report.page)
    assert found.violations_count == 0, found.generate_report()
