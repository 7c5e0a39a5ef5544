"""The report of a cache and of the students trained from it, as one page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_cache.lazy_names import lazy_names

if TYPE_CHECKING:
    from teacher_cache.pipeline.report.collect import collect_report as collect_report
    from teacher_cache.pipeline.report.data import ReportData as ReportData
    from teacher_cache.pipeline.report.page import render_report as render_report

__all__ = ["ReportData", "collect_report", "render_report"]

_HOMES = {"ReportData": "data", "collect_report": "collect", "render_report": "page"}

__getattr__ = lazy_names(__name__, _HOMES)
