"""The report (``teacher_cache.pipeline.report``) of a flow run: its page beside what the run made, its main chart in
Prefect.

The run has made what it was for before this begins, so nothing here fails it: what cannot be made is named in the log,
with the reason.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prefect import get_run_logger
from prefect.artifacts import create_image_artifact

from teacher_cache.flows.markdown import code
from teacher_cache.flows.progress import LoggedProgress
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.location import LocalFiles

if TYPE_CHECKING:
    from teacher_cache.pipeline.report.data import ReportData
    from teacher_cache.storage.look.stats import RecallStats

__all__ = ["ReportLeft", "image_uri", "leave_image", "leave_report", "page_beside", "teacher_recall"]

# of an image as it is sent to the server, which keeps all of them in its database
_MOST_BYTES = 200_000
_REDUCED_FROM = 50_000
_COLOURS = 64
_RECALL_IMAGES = 5000
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class ReportLeft:
    """What there is of a report.

    Attributes:
        collected: its data could be read.
        page: the file; None where none was written.
        recall: the teacher's own; None for a cache of prompts, or where nothing was collected.
    """

    collected: bool = False
    page: str | None = None
    recall: RecallStats | None = None

    def line(self) -> str:
        """Where the page lies, as Markdown; empty where there is none."""
        return "" if self.page is None else f"\n\nReport: {code(self.page)}"


def page_beside(cache: str) -> Path | None:
    """Where the report of a cache goes: ``f8k.report.html`` beside ``f8k.cache``; None for one that lies at a URL."""
    return None if "://" in cache else Path(cache.rstrip("/").removesuffix(".cache") + ".report.html")


def leave_report(
    key: str, location: str, page: Path | None, runs: Sequence[str] = (), image_root: str | None = None
) -> ReportLeft:
    """Write the page of a cache and leave its main chart as an image artifact ``key-chart``.

    Args:
        page: where to write it; None: only the chart, and no picture is read and no map made.
        runs: training runs that are shown.
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
    return ReportLeft(collected=True, page=written, recall=data.stats.recall if data.stats else None)


def teacher_recall(location: str) -> RecallStats | None:
    """The teacher's own recall, of a part of a large cache, without a report; None where it cannot be said."""
    from teacher_cache.storage.look.stats import cache_stats

    return _attempt("recall of the teacher", lambda: cache_stats(location, most=_RECALL_IMAGES).recall)


def leave_image(key: str, make: Callable[[], bytes], of: str) -> None:
    """Leave a picture, a PNG, as the image artifact ``key-chart``; if it cannot be made, the log says why.

    The server keeps it in its database: it is there when the file is gone, and for who cannot see the file.
    """

    def leave() -> None:
        create_image_artifact(image_url=image_uri(make()), key=f"{key}-chart", description=code(of))

    _attempt("chart", leave)


def image_uri(png: bytes) -> str:
    """A picture as the ``data:`` URI that Prefect's UI shows, in fewer colours where it is large.

    Raises:
        ValueError: it is larger than 200 kB even so.
    """
    found = _as_uri(png)
    if len(found) > _REDUCED_FROM:
        from PIL import Image

        reduced = io.BytesIO()
        with Image.open(io.BytesIO(png)) as image:
            image.convert("RGB").quantize(_COLOURS).save(reduced, "PNG", optimize=True)
        found = _as_uri(reduced.getvalue())
    if len(found) > _MOST_BYTES:
        raise ValueError(f"a picture of {len(found):,} bytes, {_MOST_BYTES:,} at most are left in Prefect's database")
    return found


def _as_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _collected(location: str, whole: bool, runs: Sequence[str], image_root: str | None) -> ReportData:
    # here, not above: the extra may be missing, and prefect deploy imports this file too
    from teacher_cache.pipeline.report.collect import collect_report

    # a chart shows neither map nor pictures, and those of a cache at a URL are thousands of requests
    less: dict[str, Any] = {} if whole else {"map_images": 0, "pictures": False}
    progress = LoggedProgress(get_run_logger())
    return collect_report(location, runs=runs, image_root=image_root, progress=progress, **less)


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
        get_run_logger().warning(f"no {what}: {error}. It needs: pip install 'teacher-cache[report]'")
    except UsageError as error:
        get_run_logger().warning(f"no {what}: {error}")
    except Exception as error:  # whatever it is, the run did what it was for
        get_run_logger().warning(f"no {what}: {type(error).__name__}: {error}", exc_info=True)
    return None
