"""The report of a flow run: its page beside the result, its main chart as a Prefect artifact.

A failure here does not fail the run, which has done its work: the log gives the reason.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from prefect import get_run_logger
from prefect.artifacts import create_image_artifact

from teacher_cache.flows.markdown import code
from teacher_cache.flows.progress import LoggedProgress
from teacher_cache.flows.serve import REPORTS_URL
from teacher_cache.storage.errors import UsageError, install_line
from teacher_cache.storage.files.local import LocalFiles

if TYPE_CHECKING:
    from teacher_cache.pipeline.evaluate.sampled import SampledRecall
    from teacher_cache.pipeline.report.data import ReportData

# sizes of an encoded image: the server keeps all images in its database
_MOST_BYTES = 200_000
_REDUCED_FROM = 50_000
_COLOURS = 64
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class ReportLeft:
    """The parts of a report that were made.

    Attributes:
        collected: whether the data could be read.
        page: path of the page; None if none was written.
        recall: recall of the teacher; None for a cache of prompts, or if nothing was collected.
    """

    collected: bool = False
    page: str | None = None
    recall: SampledRecall | None = None

    def line(self) -> str:
        """Return a Markdown line that opens the page, by a link if serve started this worker; empty without a page.

        Browsers do not follow a ``file:`` link from a page of a server.
        """
        if self.page is None:
            return ""
        place = quote(self.page)
        by_hand = f"on the worker's machine: {code(f'python3 -m webbrowser file://{place}')}"
        if server := os.environ.get(REPORTS_URL):
            return f"\n\n[Open the report]({server}{place}), or {by_hand}"
        return f"\n\nOpen the report {by_hand}"


def page_beside(cache: str) -> Path | None:
    """Return the path of a cache's report, ``f8k.report.html`` beside ``f8k.cache``; None for a cache at a URL."""
    return None if "://" in cache else Path(cache.rstrip("/").removesuffix(".cache") + ".report.html")


def leave_report(
    key: str, location: str, page: Path | None, runs: Sequence[str] = (), image_root: str | None = None
) -> ReportLeft:
    """Write the report page of a cache, and create the image artifact ``key-chart`` of its main chart.

    Args:
        page: path of the page; None makes the chart only, without pictures and map.
        runs: training runs to show.
    """
    logger = get_run_logger()
    data = _attempt("report", lambda: _collected(location, page is not None, runs, image_root))
    if data is None:
        return ReportLeft()
    written = None
    if page is None:
        logger.info(f"{location} is no folder here, so no page is written: teacher-cache report makes one")
    else:
        written = _attempt("report page", lambda: _write_page(data, page))
    leave_image(key, lambda: _chart(data), runs[0] if runs else location)
    return ReportLeft(collected=True, page=written, recall=data.recall)


def teacher_recall(location: str) -> SampledRecall | None:
    """Return the teacher's own recall, sampled for a large cache; None if it is undefined or fails."""
    from teacher_cache.pipeline.evaluate.sampled import sampled_recall

    return _attempt("recall of the teacher", lambda: sampled_recall(location))


def leave_image(key: str, make: Callable[[], bytes], of: str) -> None:
    """Store a PNG as the image artifact ``key-chart`` in the server's database. The log says why if it fails."""

    def leave() -> None:
        create_image_artifact(image_url=image_uri(make()), key=f"{key}-chart", description=code(of))

    _attempt("chart", leave)


def image_uri(png: bytes) -> str:
    """Return a picture as a ``data:`` URI for Prefect's UI, in fewer colours if it is large.

    Raises:
        ValueError: the picture is still larger than 200 kB.
    """
    uri = _as_uri(png)
    if len(uri) > _REDUCED_FROM:
        from PIL import Image

        reduced = io.BytesIO()
        with Image.open(io.BytesIO(png)) as image:
            image.convert("RGB").quantize(_COLOURS).save(reduced, "PNG", optimize=True)
        uri = _as_uri(reduced.getvalue())
    if len(uri) > _MOST_BYTES:
        raise ValueError(f"a picture of {len(uri):,} bytes; Prefect's database takes at most {_MOST_BYTES:,}")
    return uri


def _as_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _collected(location: str, whole: bool, runs: Sequence[str], image_root: str | None) -> ReportData:
    # imported here: the extra may be missing, and prefect deploy imports this file
    from teacher_cache.pipeline.report.collect import collect_report

    # the chart needs no map or pictures, which are thousands of requests for a cache at a URL
    progress = LoggedProgress(get_run_logger())
    return collect_report(location, runs=runs, image_root=image_root, progress=progress, whole=whole)


def _write_page(data: ReportData, page: Path) -> str:
    from teacher_cache.pipeline.report.page import render_report

    LocalFiles(str(page.parent)).write(page.name, render_report(data).encode())
    return str(page.resolve())


def _chart(data: ReportData) -> bytes:
    from teacher_cache.pipeline.report.charts import main_chart_png

    return main_chart_png(data)


def _attempt(what: str, make: Callable[[], _Made]) -> _Made | None:
    try:
        return make()
    except ImportError as error:
        get_run_logger().warning(f"no {what}: {error}. It needs: {install_line('altair')}")
    except UsageError as error:
        get_run_logger().warning(f"no {what}: {error}")
    except Exception as error:  # the run has done its work
        get_run_logger().warning(f"no {what}: {type(error).__name__}: {error}", exc_info=True)
    return None
