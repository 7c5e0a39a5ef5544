"""The web page of an index: what it answers to a text, a picture or a row. No script, no torch."""

from __future__ import annotations

import base64
import logging
import re
import threading
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple
from urllib.parse import parse_qs

from teacher_cache.pipeline.data.batches.stored_images import CachedImages
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images.decode import UndecodableImageError
from teacher_cache.pipeline.report.thumbnails import thumbnail
from teacher_cache.pipeline.search.query import Match, QueryEncoder, SearchIndex
from teacher_cache.storage.errors import CacheError, UsageError
from teacher_cache.storage.observe.quantities import counted
from teacher_cache.storage.observe.safe_text import shown

_LOG = logging.getLogger(__name__)
_HERE = Path(__file__).parent
_SIDE = 400  # pixels; a card is some 200 wide, and screens have two pixels in one
_MOST_CHARACTERS = 1_000
_UNREADABLE = (
    b'<svg xmlns="http://www.w3.org/2000/svg" width="400" height="300"><text x="200" y="140" font-family="sans-serif" '
    b'font-size="20" fill="#888" text-anchor="middle">The picture cannot be read.<tspan x="200" dy="32">The terminal '
    b"says why.</tspan></text></svg>"
)


class Reply(NamedTuple):
    """Status, content type and body of an answer."""

    status: int
    kind: str
    body: bytes


class _RefusedError(Exception):
    """A request that is answered by a status and a message."""


class SearchPage:
    """The page of an index. Threads may use it at once; the model embeds one query at a time.

    Args:
        image_root: folder or URL of the images. Default: the recorded place.
        count: number of matches on the page.
    """

    def __init__(self, index: SearchIndex, encoder: QueryEncoder, image_root: str | None, count: int) -> None:
        self._index, self._encoder, self._count = index, encoder, count
        self._source = ImageSource(image_root or index.reader.manifest.source.image_root)
        self._template = Template((_HERE / "page.html").read_text(encoding="utf-8"))
        self._model = threading.Lock()

    def reply(self, target: str, upload: bytes | None = None) -> Reply:
        """Return the answer to ``/``, ``/?q=TEXT``, ``/?image=ROW``, ``/picture?image=ROW`` or ``/page.css``.

        Args:
            upload: bytes of a picture that was sent to ``/``.
        """
        path, _, query = target.partition("?")
        fields = {name: values[0].strip() for name, values in parse_qs(query).items()}
        try:
            return self._answer(path, fields, upload)
        except _RefusedError as refused:
            return self.problem(*refused.args)
        except UndecodableImageError as error:
            return self.problem(400, f"The picture cannot be used: {error}.")
        except (CacheError, OSError, UsageError, RuntimeError, MemoryError) as error:  # the last two: a full device
            _LOG.warning("%s", error)  # not on the page: it names folders
            return self.problem(500, "This could not be answered. The terminal of teacher-cache says why.")

    def problem(self, status: int, message: str) -> Reply:
        """Return the page with a message."""
        return self._page(status, f'<h1 class="problem">{_plain(message)}</h1>')

    def _answer(self, path: str, fields: Mapping[str, str], upload: bytes | None) -> Reply:
        if path == "/page.css":
            return Reply(200, "text/css", (_HERE / "page.css").read_bytes())
        if path == "/picture":
            return self._picture(self._row(fields.get("image", "")))
        if path != "/":
            raise _RefusedError(404, "There is no such page.")
        if upload is not None:
            small = base64.b64encode(thumbnail(upload, _SIDE)).decode()
            with self._model:
                vector = self._encoder.image(upload)
            matches = self._index.nearest("text", vector, self._count)
            return self._matches("Captions nearest to your picture", matches, f"data:image/jpeg;base64,{small}")
        if "image" in fields:
            row = self._row(fields["image"])
            matches = self._index.nearest("text", self._index.image_vector(row), self._count)
            return self._matches(f"Captions nearest to image {row}", matches, f"/picture?image={row}")
        if not fields.get("q"):
            return self._page(200, "<h1>Write what a picture shows, or choose a picture</h1>")
        return self._text(fields["q"])

    def _text(self, typed: str) -> Reply:
        if len(typed) > _MOST_CHARACTERS:
            raise _RefusedError(400, f"The text has {len(typed):,} characters; at most {_MOST_CHARACTERS:,} are taken.")
        with self._model:
            vector = self._encoder.text(typed)
        matches = self._index.nearest("image", vector, self._count)
        return self._matches(f"Pictures nearest to “{typed}”", matches, typed=typed)

    def _row(self, typed: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", typed) or int(typed) not in self._index.images:
            raise _RefusedError(404, f"The index has no image {typed[:20]}.")
        return int(typed)

    def _picture(self, row: int) -> Reply:
        try:
            data = CachedImages(self._index.reader, self._source, [row]).read(row)
            return Reply(200, "image/jpeg", thumbnail(data, _SIDE))
        except (CacheError, OSError, UndecodableImageError) as error:
            _LOG.warning("%s", error)
            return Reply(404, "image/svg+xml", _UNREADABLE)

    def _matches(self, title: str, matches: tuple[Match, ...], picture: str = "", typed: str = "") -> Reply:
        image = f'<img class="query" src="{picture}" alt="Your picture">' if picture else ""
        cards = "".join(
            f'<li><a href="/?image={match.image_row}"><img src="/picture?image={match.image_row}" '
            f'alt="{_plain(match.sample_id)}"></a><p dir="auto">{_plain(match.caption)}</p>'
            f"<small>{match.cosine:.3f} <bdi>{_plain(match.sample_id)}</bdi></small></li>\n"
            for match in matches
        )
        return self._page(200, f"{image}<h1><bdi>{_plain(title)}</bdi></h1>\n<ol>\n{cards}</ol>", typed)

    def _page(self, status: int, answer: str, typed: str = "") -> Reply:
        images = counted(self._index.record.image.rows, "image")
        about = f"{images} in {self._index.folder.name}, searched by {self._encoder.name}"
        body = self._template.substitute(typed=_plain(typed), answer=answer, about=_plain(about))
        return Reply(status, "text/html; charset=utf-8", body.encode())


def _plain(text: str) -> str:
    """Return a text without markup and without characters that reorder or hide what is around it."""
    return escape(shown(text))
