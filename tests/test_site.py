"""The documentation site as it is built: nothing is missing in it, every link leads somewhere, nothing is fetched."""

from __future__ import annotations

import functools
import html
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest

from teacher_cache.pipeline.cli.app import app
from teacher_cache.storage.cli.app import PANELS, every_command
from teacher_cache.storage.read.reader import EmbeddingReader

for package in ("sphinx", "myst_parser", "furo", "sphinx_copybutton"):
    pytest.importorskip(package, reason="the site needs the extra docs")

ROOT = Path(__file__).parents[1]
# the whole site is built, which takes long where other work is done
pytestmark = pytest.mark.timeout(1800)


class Page(HTMLParser):
    """Of one page: ids, links, what the browser loads by itself, and the flags that stand under each heading's id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.flags: dict[str, list[str]] = {}
        self._section, self._in_flag = "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        followed = tag == "a" or (tag == "link" and found.get("rel") in ("next", "prev", "index", "search", "author"))
        if followed:
            self.links += [found["href"]] if "href" in found else []
        else:
            self.loaded += [found[name] for name in ("src", "href", "srcset", "poster", "data") if name in found]
        if tag == "section":
            self._section = found.get("id", "")
        self._in_flag = tag == "dt" or (self._in_flag and tag in ("code", "span"))
        if tag == "dt":
            self.flags.setdefault(self._section, []).append("")

    def handle_data(self, data: str) -> None:
        if self._in_flag:
            self.flags[self._section][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._in_flag = self._in_flag and tag != "dt"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site, made as ``make docs`` makes it: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    target = re.search(r"python (-m sphinx .*) docs site$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert target is not None
    flags = target[1].replace("build/doctrees", str(folder / "doctrees")).split()
    command = [sys.executable, *flags, "docs", str(folder / "html")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    told = [line for line in done.stderr.splitlines() if "WARNING" in line or "ERROR" in line]
    assert (done.returncode, told) == (0, []), done.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    """Every page by its path."""
    return {path: Page(path.read_text()) for path in site.rglob("*.html")}


def test_every_command_and_flag_is_in_the_reference(site: Path, pages: dict[Path, Page]) -> None:
    assert app.entries
    found = pages[site / "reference" / "cli.html"].flags
    words = " ".join(html.unescape(re.sub(r"<[^>]+>", "", (site / "reference" / "cli.html").read_text())).split())
    for name, command in every_command():
        wanted = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
        shown = {
            typed
            for line in found[name.replace(" ", "-")]
            for typed in re.findall(r"(?<!\S)--[a-z0-9-]+", line.replace("/", " "))
        }
        assert shown == {option for option in wanted if option.startswith("--")} | {"--help"}, name
        assert " ".join(str(command.help).partition("\n\n")[0].split()) in words, name
    text = re.sub(r"<[^>]+>", "", (site / "reference" / "cli.html").read_text())
    assert re.search(r"Number of passes over the split, with captions at random. Default: 10\.", text)


def test_commands_are_in_groups_with_an_example_and_without_the_parsers_notation(site: Path) -> None:
    article = (site / "reference" / "cli.html").read_text().partition("<article")[2].partition("</article>")[0]
    groups = re.findall(r"<h2>([^<]*)<", article)
    assert groups == list(PANELS)
    sections = {
        html.unescape(name): html.unescape(re.sub(r"<[^>]+>", "", content))
        for name, content in re.findall(r"<h3>([^<]*)<.*?</h3>(.*?)</section>", article, re.DOTALL)
    }
    assert list(sections) == [name for name, _ in every_command()]
    for name, text in sections.items():
        assert re.search(rf"^teacher-cache {name}( |$)", text, re.MULTILINE), name
        assert not re.search(r"TEXT|INTEGER|\[OPTIONS\]|x>=|<=x| range|\[\w+[|\]]", text), name
    assert "ROW or SAMPLE_ID (optional)" in " ".join(sections["look"].split())
    assert "--precision fp32, bf16, pure_bf16 or fp16" in " ".join(sections["precompute"].split())


def test_no_docstring_is_taken_apart(pages: dict[Path, Page]) -> None:
    """The words before the first colon of a property's docstring are no type, and a cached property is a property."""
    for path in pages:
        assert 'Type<span class="colon">' not in path.read_text(), path.name
    reader = next(path for path in pages if path.name == "teacher_cache.storage.read.reader.html").read_text()
    for name in ("samples", "captions", "identity"):
        signature = reader.partition(f'id="teacher_cache.storage.read.reader.EmbeddingReader.{name}"')[2].partition(
            "</dt>"
        )[0]
        assert "property" in signature, name
    text = " ".join(re.sub(r"<[^>]+>", "", reader).split())
    assert " ".join(str(EmbeddingReader.identity.__doc__).split()).replace("``", "") in text


def test_every_module_and_setting_has_its_place(pages: dict[Path, Page]) -> None:
    ids = set().union(*(page.ids for page in pages.values()))
    assert {
        "module-teacher_cache.storage.read.reader",
        "teacher_cache.pipeline.train.loop.train",
        "teacher_cache.storage.read.reader.EmbeddingReader.take",
    } <= ids
    config = next(path for path in pages if path.name == "teacher_cache.pipeline.settings.train.html").read_text()
    assert "Maximum norm of the gradient." in config  # a setting without a flag


def test_every_link_and_anchor_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        for link in [*page.links, *page.loaded]:
            if re.match(r"[a-z]+:|//", link):
                continue
            target, anchor = urldefrag(link)
            place = (path.parent / unquote(target.partition("?")[0])).resolve() if target else path
            if not place.is_file():
                broken.append(f"{path.relative_to(site)}: {link}")
            elif anchor and place.suffix == ".html" and unquote(anchor) not in pages[place].ids:
                broken.append(f"{path.relative_to(site)}: {link}: no such anchor")
    assert broken == []


def test_no_page_loads_anything_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    outside = {link for page in pages.values() for link in page.loaded if re.match(r"(?!data:)[a-z]+:|//", link)}
    for sheet in site.rglob("*.css"):
        outside |= set(re.findall(r"""(?:url\(|@import )["']?(?:https?:)?//[^)"';]*""", sheet.read_text()))
    assert outside == set()


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    """The site on loopback."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.browser
def test_a_browser_shows_it_and_finds_a_word(served: str, browser: Any) -> None:
    """Light and dark, wide and narrow: no error on the console, no request that leaves, no page wider than a phone."""
    complaints: list[str] = []
    for scheme, width in (("light", 1280), ("dark", 390)):
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
        page = context.new_page()
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        # an icon is not waited for: the next page may be asked for before it has come
        page.on(
            "requestfailed",
            lambda failed: (
                None if "ERR_ABORTED" in (failed.failure or "") else complaints.append(f"failed: {failed.url}")
            ),
        )
        page.on("response", lambda got: complaints.append(f"{got.status}: {got.url}") if got.status >= 400 else None)
        page.on("request", lambda made: None if made.url.startswith((served, "data:")) else complaints.append(made.url))
        for name, heading in (
            ("index", "teacher-cache"),
            ("tutorial", "1,000 pictures"),
            ("reference/cli", "Commands"),
            ("project/api/teacher_cache.pipeline.settings.train", "teacher_cache.pipeline.settings.train"),
        ):
            page.goto(f"{served}/{name}.html")
            assert heading in page.inner_text("h1")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} at {width}"
        page.goto(f"{served}/reference/datasets.html")
        broken = "codes => codes.filter(code => code.getClientRects().length > 1).map(code => code.textContent)"
        assert page.locator("article td:first-child code").evaluate_all(broken) == []
        page.goto(f"{served}/search.html?q=quarantined")
        # results come one by one
        found = page.locator("#search-results li a", has_text="teacher_cache.storage.format.commits.quarantined_rows")
        found.wait_for()
        page.goto(f"{served}/search.html?q=csv")
        page.wait_for_selector("#search-results li a")
        assert page.locator("#search-results li a").first.inner_text().startswith("Your own pictures")
        context.close()
    assert complaints == []
