"""The page of an index: what it shows, what it refuses, and how it ends. HTTP and a real Chromium."""

from __future__ import annotations

import csv
import http.client
import io
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from teacher_cache.pipeline.cli.app import app
from teacher_cache.pipeline.deploy.runtime import StudentRuntime
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.search import serve
from teacher_cache.pipeline.search.build import build_index
from teacher_cache.pipeline.search.page import SearchPage
from teacher_cache.pipeline.search.query import QueryEncoder, SearchIndex, student_queries, teacher_queries
from teacher_cache.pipeline.search.serve import SearchServer
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.errors import CacheCorruptError, CacheMismatchError, UsageError
from tests.conftest import write_photos
from tests.pipeline.data.odd_images import ODD_IMAGES

HOSTILE = (
    "<script>document.title='broken'</script>",
    "<img src=x onerror=alert(1)>",
    "\" onload='alert(1)' x=\"",
    "safe \u202egnp.exe\u2066 end",
    "&lt;b&gt; ${about} $typed",
)


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return unescape(self.body.decode())

    @property
    def cosines(self) -> list[str]:
        return re.findall(r"<small>(-?\d\.\d{3}) ", self.text)


class Served:
    """A server that answers in this process."""

    def __init__(self, server: SearchServer, index: SearchIndex) -> None:
        self.server, self.index = server, index
        self.host = f"127.0.0.1:{server.server_port}"
        self.url = f"http://{self.host}/"

    def ask(self, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Answer:
        with closing(http.client.HTTPConnection(self.host, timeout=20)) as connection:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def send(self, picture: bytes, **headers: str) -> Answer:
        """Send a picture as a browser does."""
        part = b'Content-Disposition: form-data; name="picture"; filename="a.jpg"\r\nContent-Type: image/jpeg'
        body = b"--line\r\n" + part + b"\r\n\r\n" + picture + b"\r\n--line--\r\n"
        return self.ask("/", "POST", body, Content_Type="multipart/form-data; boundary=line", **headers)


@contextmanager
def served(index: SearchIndex, encoder: Any, image_root: Path | None = None) -> Iterator[Served]:
    page = SearchPage(index, encoder, None if image_root is None else str(image_root), 5)
    with SearchServer(page, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield Served(server, index)
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def photos(photo_index: Path, photo_student: Path) -> Iterator[Served]:
    """40 photographs, answered by a student."""
    index = SearchIndex(photo_index)
    with served(index, student_queries(StudentRuntime(photo_student), index)) as page:
        yield page


@pytest.fixture(scope="module")
def hostile(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Photographs whose captions and file names are hostile, answered by their teacher."""
    folder = tmp_path_factory.mktemp("hostile")
    images = write_photos(folder / "photos", len(HOSTILE)) / "images"
    with (folder / "pairs.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "caption"))
        for path, text in zip(sorted(images.iterdir()), HOSTILE, strict=True):
            rows.writerow((f"photos/images/{path.rename(images / (text.replace('/', '') + '.jpg')).name}", text))
    cache, teacher = str(folder / "hostile.cache"), f"local-dir:{tiny_teacher}"
    precompute(PrecomputeConfig(dataset=f"table:{folder}/pairs.csv", teacher=teacher, cache=cache, device="cpu"))
    build_index(cache, str(folder / "<b>.index"), 99.0, "Flat")
    index = SearchIndex(folder / "<b>.index")
    with served(index, teacher_queries(index, teacher, device="cpu")) as page:
        yield page


def require_strict(answer: Answer) -> None:
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "script" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert b"Traceback" not in answer.body


def test_text_row_and_picture_are_answered_as_in_the_terminal(photos: Served, photo_student: Path) -> None:
    student, index = StudentRuntime(photo_student), photos.index
    answer = photos.ask("/?q=a+cat")
    wanted = index.nearest("image", student.embed_texts(["a cat"])[0], 5)
    assert (answer.status, answer.cosines) == (200, [f"{match.cosine:.3f}" for match in wanted])
    assert [int(row) for row in re.findall(r"/picture\?image=(\d+)", answer.text)] == [m.row for m in wanted]
    assert all(f'<p dir="auto">{match.caption}</p>' in answer.text for match in wanted)
    near = index.nearest("text", index.image_vector(4), 5)
    assert photos.ask("/?image=4").cosines == [f"{match.cosine:.3f}" for match in near]
    marked, sent = PngInfo(), io.BytesIO()
    marked.add_text("ends", "as a form does\r\n\r\n--line--\r\n")
    Image.effect_noise((90, 60), 99).save(sent, "PNG", pnginfo=marked)
    picture = sent.getvalue()
    assert b"\r\n--line--\r\n" in picture[:200]
    near = index.nearest("text", student.embed_images([picture])[0], 5)
    answer = photos.send(picture)
    assert answer.cosines == [f"{match.cosine:.3f}" for match in near]
    assert 'src="data:image/jpeg;base64,' in answer.text
    for path in ("/", "/page.css", "/?q=a+cat", "/picture?image=4"):
        require_strict(photos.ask(path))


def _bomb(name: str) -> bytes:
    return next(image.data for image in ODD_IMAGES if image.name == name)


@pytest.mark.parametrize(
    ("ask", "status", "message"),
    [
        (lambda page: page.ask("/", Host="evil.example"), 421, "No answer by that name. Open http://127.0.0.1:"),
        (lambda page: page.ask("/", Host=f"evil.example:{page.server.server_port}"), 421, "No answer by that name"),
        (lambda page: page.ask("/picture?image=4", Host=f"{page.host}.evil.example"), 421, "No answer by that name"),
        (lambda page: page.send(b"x", Origin="http://evil.example"), 403, "No answer to a form of another page"),
        (lambda page: page.send(b"x", Origin="null"), 403, "No answer to a form of another page"),
        (lambda page: page.ask("/captions.txt"), 404, "There is no such page."),
        (lambda page: page.ask("/../../../../etc/passwd"), 404, "There is no such page."),
        (lambda page: page.ask("http://evil.example/", Host=page.host), 404, "There is no such page."),
        (lambda page: page.ask("/picture?image=40"), 404, "The index has no image 40."),
        (lambda page: page.ask("/picture?image=-1"), 404, "The index has no image -1."),
        (lambda page: page.ask("/picture?image=/etc/passwd"), 404, "The index has no image /etc/passwd."),
        (lambda page: page.ask("/picture?image=%D9%A3"), 404, "The index has no image ٣."),
        (lambda page: page.ask("/?image=" + "9" * 5_000), 404, "The index has no image 99999999999999999999."),
        (lambda page: page.ask("/picture"), 404, "The index has no image ."),
        (lambda page: page.ask("/?q=" + "a" * 1_001), 400, "The text has 1,001 characters; at most 1,000 are taken."),
        (lambda page: page.send(b""), 400, "No picture was sent."),
        (lambda page: page.ask("/", "POST", b"no form"), 400, "No picture was sent."),
        (lambda page: page.send(b"GIF89a, or not"), 400, "The picture cannot be used: not an image"),
        (lambda page: page.send(_bomb("60000.png")), 400, "3600000000 pixels) exceeds limit of 178956970"),
        (lambda page: page.send(_bomb("strip.png")), 400, "would be resized to"),
        (lambda page: page.ask("/", "PUT"), 501, "Unsupported method"),
    ],
)
def test_what_is_not_answered_is_told_in_words(
    photos: Served, ask: Callable[[Served], Answer], status: int, message: str
) -> None:
    answer = ask(photos)
    assert (answer.status, message in answer.text) == (status, True), answer.text
    require_strict(answer)
    assert str(photos.index.folder.parent) not in answer.text


def test_a_teacher_refuses_a_strip_too(hostile: Served) -> None:
    answer = hostile.send(_bomb("strip.png"))
    assert (answer.status, "The picture cannot be used: 1 x 6,000,000 pixels would be" in answer.text) == (400, True)


def test_an_upload_beyond_the_bound_is_read_to_its_end_but_not_kept(
    photos: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_MOST_BYTES", 1_000)
    answer = photos.send(bytes(3_000_000))
    assert (answer.status, "The picture has 3.0 MB; at most 1.0 kB are taken." in answer.text) == (413, True)
    with socket.create_connection(("127.0.0.1", photos.server.server_port), timeout=20) as claims:
        claims.sendall(f"POST / HTTP/1.1\r\nHost: {photos.host}\r\nContent-Length: {10**17}\r\n\r\n".encode())
        assert claims.recv(12) == b"HTTP/1.0 413"  # at once, and without the memory


def test_a_picture_is_the_one_that_the_cache_was_made_of_or_none(
    photo_index: Path, photo_student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = SearchIndex(photo_index)
    root = shutil.copytree(index.reader.manifest.source.image_root, tmp_path / "moved")
    names = [root / uri for uri in index.reader.samples["uri"].to_pylist()[:4]]
    names[1].unlink()
    names[1].symlink_to(names[0])
    names[2].unlink()
    names[3].write_bytes(names[3].read_bytes() + b"\0")
    with served(index, student_queries(StudentRuntime(photo_student), index), root) as page:
        answers = [page.ask(f"/picture?image={row}") for row in range(4)]
    with Image.open(io.BytesIO(answers[0].body)) as picture, Image.open(names[0]) as whole:
        assert (answers[0].status, picture.format, picture.size) == (200, "JPEG", whole.size)
    for answer in answers[1:]:
        assert (answer.status, answer.headers["content-type"]) == (404, "image/svg+xml")
        assert "The picture cannot be read." in answer.text
        require_strict(answer)
    assert [re.search("not the image|cannot be read", record.getMessage())[0] for record in caplog.records] == [  # type: ignore[index]
        "not the image",
        "cannot be read",
        "not the image",
    ]


@pytest.mark.parametrize("error", [CacheCorruptError, RuntimeError, ConnectionError])
def test_what_fails_is_told_in_the_terminal_and_names_no_folder_on_the_page(
    photo_index: Path, error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    def fails(query: Any) -> Any:
        raise error("/srv/secret: is full")

    index = SearchIndex(photo_index)
    with served(index, QueryEncoder("broken", fails, fails)) as page:
        answer = page.ask("/?q=a")
        assert page.ask("/?image=0").status == 200
    assert (answer.status, "The terminal of teacher-cache says why." in answer.text) == (500, True)
    assert "/srv/secret" not in answer.text
    assert [record.getMessage() for record in caplog.records] == ["/srv/secret: is full"]


def test_closing_waits_for_the_answer_in_the_making(photo_index: Path) -> None:
    index, begun, go = SearchIndex(photo_index), threading.Event(), threading.Event()

    def slow(text: str) -> Any:
        begun.set()
        assert go.wait(20)
        return index.image_vector(0)

    page = SearchPage(index, QueryEncoder("slow", slow, slow), None, 5)  # type: ignore[arg-type]
    server = SearchServer(page, "127.0.0.1", 0)
    with ThreadPoolExecutor() as pool:
        pool.submit(server.serve_forever, 0.01)
        answer = pool.submit(Served(server, index).ask, "/?q=a")
        assert begun.wait(20)
        server.shutdown()
        closing_it = pool.submit(server.server_close)
        ended_early = bool(wait([closing_it], 0.2).done)
        go.set()
        assert (ended_early, closing_it.result(20), answer.result(20).status) == (False, None, 200)


def test_it_ends_by_ctrl_c_with_an_open_connection(photo_index: Path, photo_student: Path) -> None:
    main = "from teacher_cache.pipeline.cli.app import main; main()"
    words = ["search", str(photo_index), "--serve", "--port", "0", "--student", str(photo_student)]
    process = subprocess.Popen(
        [sys.executable, "-c", main, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(rf"http://127\.0\.0\.1:(\d+)/ answers from {photo_index}; Ctrl-C ends it\n", line)
    assert found, (line, process.communicate())
    port = int(found[1])
    with socket.create_connection(("127.0.0.1", port)), closing(http.client.HTTPConnection(f"localhost:{port}")) as ask:
        ask.request("GET", "/?q=a+cat")
        assert ask.getresponse().status == 200
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_it_does_not_start_for_another_cache_or_a_taken_port_and_warns_of_a_network(
    photos: Served, photo_index: Path, photo_student: Path, paired_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["search", str(photo_index), "--serve", "--student", str(photo_student)]

    def start(*more: str) -> Any:
        return CliRunner().invoke(app, [*words, *more], catch_exceptions=False)

    with pytest.raises(CacheMismatchError, match="has manifest"):
        start("--cache", str(paired_cache))
    with pytest.raises(UsageError, match=rf"--port {photos.server.server_port}: cannot listen \(.* in use\)"):
        start("--port", str(photos.server.server_port))
    monkeypatch.setattr(SearchServer, "serve_forever", lambda server: signal.raise_signal(signal.SIGINT))
    done = start("--port", "0", "--host", "0.0.0.0")
    assert (done.exit_code, "warning: whoever reaches 0.0.0.0 sees captions" in done.stderr) == (0, True)
    assert "warning" not in start("--port", "0").stderr


@pytest.fixture
def shown(browser: Any, hostile: Served) -> Iterator[Any]:
    """The page of hostile names in a browser; what it complains of and asks for is checked at the end."""
    page = browser.new_context(viewport={"width": 390, "height": 740}).new_page()
    heard: list[str] = []
    for kind in ("console", "pageerror", "dialog"):
        page.on(kind, lambda item: heard.append(str(getattr(item, "text", item))))
    page.on("request", lambda request: request.url.startswith((hostile.url, "data:")) or heard.append(request.url))
    page.goto(hostile.url)
    yield page
    assert heard == []
    page.context.close()


@pytest.mark.browser
def test_hostile_captions_and_names_are_words_on_the_page(shown: Any, hostile: Served, tmp_path: Path) -> None:
    clean = [re.sub("[\u202e\u2066]", "\ufffd", text) for text in HOSTILE]
    names = {f"photos/images/{text.replace('/', '')}.jpg" for text in clean}

    def require_cards() -> None:
        shown.wait_for_load_state("networkidle")
        assert set(shown.locator("li p").all_inner_texts()) == set(clean)
        assert set(shown.locator("li bdi").all_inner_texts()) == names
        assert shown.locator("script, [onerror], [onload]").count() == 0
        assert all(shown.locator("img").evaluate_all("images => images.map(image => image.naturalWidth > 30)"))
        assert shown.title() == "teacher-cache search"
        assert shown.evaluate("document.documentElement.scrollWidth") == 390

    for typed, text in zip(HOSTILE, clean, strict=True):
        shown.fill("input[name=q]", typed)
        shown.keyboard.press("Enter")
        shown.wait_for_function(
            "text => document.querySelector('h1').innerText === text", arg=f"Pictures nearest to “{text}”"
        )
        require_cards()
        assert shown.input_value("input[name=q]") == text
    assert shown.inner_text("footer").startswith("5 images in <b>.index, searched by teacher local-dir:")
    shown.click("li a >> nth=1")
    shown.wait_for_selector("img.query")
    require_cards()
    picture = tmp_path / "<img src=x onerror=alert(1)>.png"
    Image.effect_noise((90, 60), 99).save(picture)
    shown.set_input_files("input[type=file]", picture)
    shown.click("text=Search by picture")
    shown.wait_for_selector("h1 >> text=Captions nearest to your picture")
    require_cards()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_to_mend(browser: Any, photos: Served, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    page = browser.new_context(bypass_csp=True, color_scheme=scheme).new_page()
    for path in ("", "?q=a+cat", "?image=9", "?image=99"):
        page.goto(photos.url + path)
        found = axe.Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
    page.context.close()
