"""The report of a cache and of the students trained from it, as one page."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teacher_cache.pipeline.report.collect import collect_report as collect_report
    from teacher_cache.pipeline.report.data import ReportData as ReportData
    from teacher_cache.pipeline.report.page import render_report as render_report

__all__ = ["ReportData", "collect_report", "render_report"]

_HOMES = {"ReportData": "data", "collect_report": "collect", "render_report": "page"}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
