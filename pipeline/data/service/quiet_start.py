"""Imported by the fork server alone: a worker whose parent was stopped while it started it shows no traceback."""

from __future__ import annotations

import sys
from types import TracebackType


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # the parent ended between the two parts of the worker's start; it has said itself why. By name: no pickle here
    if kind.__name__ not in ("EOFError", "UnpicklingError"):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _show
